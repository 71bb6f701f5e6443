"""`sanitize poison`: stamp a trigger on a seeded fraction of samples and keep the truth. For tests of detectors."""

import io
import logging
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sanitize import storage
from sanitize.attacks.triggers import Trigger, chosen
from sanitize.config import check
from sanitize.errors import ConfigError, ShardError
from sanitize.records import Sample, Shard
from sanitize.stages.images import decode
from sanitize.stages.shards import ShardReader, end_archive, list_shards, printable

log = logging.getLogger(__name__)
LOSSLESS = {"png": "PNG", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF", "tiff": "TIFF"}
LOSSY = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF"}


@dataclass(frozen=True)
class PoisonResult:
    samples: int
    poisoned: int
    truth: str


def poison(
    patterns: tuple[str, ...],
    out: str,
    *,
    rate: float,
    trigger: Trigger,
    seed: int = 0,
    replace: Mapping[str, Sequence[str]] | None = None,
    reencode_all: bool = True,
) -> PoisonResult:
    """Copy shards to `out`, with the trigger on round(rate * samples) of them; write `out`/poison.json.

    replace: what members of the poisoned samples say instead, by extension: one text, or several to draw from by the seed; so an
    attacker gives them another label ({"cls": ["9"]}) or caption.
    Other members and unstamped samples are copied byte for byte. Lossy images are an exception: all of them are encoded
    again (`reencode_all`), so that the codec does not give the stamped ones away.
    """
    shards = list_shards(patterns)
    if storage.exists(storage.join(out, "poison.json")):
        raise ConfigError(f"{out}: holds poisoned shards already (poison.json). Give another --out.")
    counts = [_count(shard) for shard in shards]
    picked = chosen(sum(counts), rate, seed)
    check(bool(picked.any()), f"rate {rate} of {sum(counts)} samples rounds to none. Use a higher rate or more shards.")
    truth: list[dict[str, Any]] = []
    position = 0
    rng = np.random.default_rng(seed)
    for shard, count in zip(shards, counts, strict=True):
        stamped = picked[position : position + count].tolist()
        truth += _poison_shard(shard, out, stamped, trigger, replace or {}, rng, reencode_all)
        position += count
    if missing := set(replace or {}) - {extension for entry in truth for extension in entry.pop("replaced")}:
        raise ConfigError(
            f"replace {', '.join(sorted(missing))}: no poisoned sample has such a member. Name an extension that the shards have; "
            f"delete {out}."
        )
    path = storage.join(out, "poison.json")
    description = {"trigger": repr(trigger), "rate": rate, "seed": seed, "replace": dict(replace or {})}
    storage.write_json(path, description | {"poisoned": truth})
    return PoisonResult(sum(counts), len(truth), path)


def _count(shard: Shard) -> int:
    with storage.open_read(shard.url) as file:
        return sum(1 for _ in ShardReader(file, shard, with_images=False).samples())


def _poison_shard(
    shard: Shard,
    out: str,
    picked: list[bool],
    trigger: Trigger,
    replace: Mapping[str, Sequence[str]],
    rng: np.random.Generator,
    reencode_all: bool,
) -> list[dict[str, Any]]:
    truth = []
    with (
        storage.open_read(shard.url) as file,
        storage.open_read(shard.url) as raw,
        storage.atomic_write(storage.join(out, f"{shard.stem}.tar")) as target,
    ):
        reader = ShardReader(file, shard)
        for sample in reader.samples():
            stamp = picked[sample.index]
            replaced = {member.extension for member in sample.members} & set(replace) if stamp else set()
            if stamp:
                identity = {"shard": shard.stem, "key": printable(sample.key), "index": sample.index}
                truth.append(identity | {"replaced": replaced})
            for member in sample.members:
                extension = member.extension.rsplit(".", 1)[-1]
                is_image = sample.image is not None and extension in LOSSLESS | LOSSY
                if member.extension in replaced:
                    texts = replace[member.extension]
                    _add(target, member.name, texts[int(rng.integers(len(texts)))].encode())
                elif is_image and (stamp or (reencode_all and extension in LOSSY)):
                    data = _encoded(_stamped(sample, shard, trigger if stamp else None), extension)
                    _add(target, member.name, data)
                else:
                    raw.seek(member.start)
                    target.write(raw.read(member.end - member.start))
        if reader.damage:
            raise ShardError(f"{shard.url}: {reader.damage}. Poison whole shards only.")
        end_archive(target)
    return truth


def _stamped(sample: Sample, shard: Shard, trigger: Trigger | None) -> Tensor:
    pixels, _, _, reason = decode(sample.image or b"")
    if pixels is None:
        raise ShardError(
            f"{shard.url}: sample {printable(sample.key)!r} cannot be decoded ({reason}). Remove it first."
        )
    return trigger(pixels) if trigger else pixels


def _encoded(pixels: Tensor, extension: str) -> bytes:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if extension in ("jpg", "jpeg", "webp") else {}
    image.save(buffer, (LOSSLESS | LOSSY)[extension], **options)
    return buffer.getvalue()


def _add(target: storage.HashingWriter, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    target.write(info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape"))
    target.write(data + bytes(-len(data) % 512))


def load_truth(path: str) -> dict[tuple[str, int], bool]:
    """(shard, index) of poisoned samples. Raises ConfigError when the file is not a truth file."""
    values = storage.read_json(path)
    try:
        return {(str(entry["shard"]), int(entry["index"])): True for entry in values["poisoned"]}
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: not a truth file. It needs a list `poisoned` of {{shard, key, index}}, as `sanitize poison` writes it."
        ) from None

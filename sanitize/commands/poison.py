"""`sanitize poison`: stamp a trigger on a seeded fraction of samples and keep the truth. For tests of detectors."""

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sanitize import storage
from sanitize.artifacts.truth import NAME as TRUTH
from sanitize.artifacts.truth import PoisonedSample, PoisonTruth, write_truth
from sanitize.attacks.triggers import Trigger, poison_mask
from sanitize.errors import ConfigError, ShardError, check
from sanitize.paths import AnyPath, path_text, path_texts
from sanitize.records import Sample, Shard
from sanitize.stages.images import decode_image
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import add_member, end_archive, list_shards, open_shard, printable, refuse_to_overwrite

log = logging.getLogger(__name__)
LOSSLESS = {"png": "PNG", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF", "tiff": "TIFF"}
LOSSY = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF"}


@dataclass(frozen=True)
class PoisonResult:
    samples: int
    poisoned: int
    truth: str


def poison(
    patterns: Sequence[AnyPath],
    out: AnyPath,
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
    patterns, out = path_texts(patterns, "patterns"), path_text(out, "out")
    shards, replace = list_shards(patterns, leave_out=out), replace or {}
    refuse_to_overwrite(shards, lambda stem: [storage.join(out, f"{stem}.tar")])
    if storage.exists(storage.join(out, TRUTH)):
        raise ConfigError(f"{out}: holds poisoned shards already ({TRUTH}). Give another --out.")
    counts = [_count(shard) for shard in shards]
    picked = poison_mask(sum(counts), rate, seed)
    check(bool(picked.any()), f"rate {rate} of {sum(counts)} samples rounds to none. Use a higher rate or more shards.")
    stamped: list[PoisonedSample] = []
    replaced: set[str] = set()
    stamper = _Stamper(trigger, replace, np.random.default_rng(seed), reencode_all)
    position = 0
    for shard, count in zip(shards, counts, strict=True):
        samples, extensions = _poison_shard(shard, out, picked[position : position + count].tolist(), stamper)
        stamped += samples
        replaced |= extensions
        position += count
    if missing := set(replace) - replaced:
        raise ConfigError(
            f"replace {', '.join(sorted(missing))}: no poisoned sample has such a member. Name an extension that the shards have; "
            f"delete {out}."
        )
    truth = PoisonTruth(trigger=repr(trigger), rate=rate, seed=seed, replace=replace, poisoned=tuple(stamped))
    return PoisonResult(sum(counts), len(stamped), write_truth(out, truth))


def _count(shard: Shard) -> int:
    with open_shard(shard) as file:
        return sum(1 for _ in ShardReader(file, shard, with_images=False).samples())


@dataclass(frozen=True)
class _Stamper:
    """What happens to poisoned samples; `rng` draws among the texts of `replace`."""

    trigger: Trigger
    replace: Mapping[str, Sequence[str]]
    rng: np.random.Generator
    reencode_all: bool


def _poison_shard(
    shard: Shard, out: str, picked: list[bool], stamper: _Stamper
) -> tuple[list[PoisonedSample], set[str]]:
    """The samples that were stamped, and the extensions of the members that were replaced."""
    poisoned, replaced = [], set()
    with (
        open_shard(shard) as file,
        open_shard(shard) as raw,
        storage.atomic_write(storage.join(out, f"{shard.stem}.tar")) as target,
    ):
        reader = ShardReader(file, shard)
        for sample in reader.samples():
            stamp = picked[sample.index]
            if stamp:
                poisoned.append(PoisonedSample(shard.stem, printable(sample.key), sample.index))
            for member in sample.members:
                extension = member.extension.rsplit(".", 1)[-1]
                is_image = sample.image is not None and extension in LOSSLESS | LOSSY
                if stamp and member.extension in stamper.replace:
                    texts = stamper.replace[member.extension]
                    add_member(target, member.name, texts[int(stamper.rng.integers(len(texts)))].encode())
                    replaced.add(member.extension)
                elif is_image and (stamp or (stamper.reencode_all and extension in LOSSY)):
                    data = _encoded(_stamped(sample, shard, stamper.trigger if stamp else None), extension)
                    add_member(target, member.name, data)
                else:
                    raw.seek(member.start)
                    target.write(raw.read(member.end - member.start))
        if reader.damage:
            raise ShardError(f"{shard.url}: {reader.damage}. Poison whole shards only.")
        end_archive(target)
    return poisoned, replaced


def _stamped(sample: Sample, shard: Shard, trigger: Trigger | None) -> Tensor:
    pixels, _, _, reason = decode_image(sample.image or b"")
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

"""Whole small data sets in memory, for making victims. Products stream; this does not."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from sanitize.attacks import tiny_clip
from sanitize.errors import ConfigError, check
from sanitize.records import Shard
from sanitize.stages import images
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import head_tail_sha256, list_shards, open_shard


@dataclass(frozen=True)
class LabelledImages:
    """pixels (N, 3, S, S) uint8; labels (N,) int64, -1 where there is no `.cls` member; captions, when asked for, N texts."""

    pixels: Tensor
    labels: Tensor
    captions: tuple[str, ...] = ()


def load_images(
    patterns: tuple[str, ...], limit: int, size: int, *, labelled: bool = True, caption_member: str = ""
) -> LabelledImages:
    """Decoded images at the encoder's size, with class index (`.cls`, as text) and caption. limit: 0 = all."""
    pixels: list[Tensor] = []
    labels: list[int] = []
    captions: list[str] = []
    for shard in list_shards(patterns):
        with open_shard(shard) as file, open_shard(shard) as labels_file:
            for sample in ShardReader(file, shard, caption_member=caption_member).samples():
                image = images.decode_sample(sample)
                if image.pixels is None:
                    raise ConfigError(f"{shard.url}: {sample.key}: {image.reason}. Use clean shards to make a victim.")
                reason = image.caption_reason
                check(not reason, f"{shard.url}: {sample.key}: {reason}. Every pair needs its caption.")
                batch = images.to_batch([image.pixels], size, "squash", torch.device("cpu"))
                pixels.append((batch[0] * 255).round().to(torch.uint8))
                captions.append(image.caption)
                member = next((m for m in sample.members if m.extension == "cls"), None)
                check(
                    not labelled or member is not None, f"{shard.url}: {sample.key} has no .cls member (class index)."
                )
                if member is not None:
                    labels_file.seek(member.data)
                labels.append(_class_index(labels_file.read(member.size), shard, sample.key) if member else -1)
                if len(pixels) == limit:
                    break
        if len(pixels) == limit:
            break
    return LabelledImages(torch.stack(pixels), torch.tensor(labels), tuple(captions) if caption_member else ())


def _class_index(text: bytes, shard: Shard, key: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{shard.url}: {key}.cls holds {text[:20]!r}, a class index was expected.") from None


def identity(patterns: tuple[str, ...]) -> list[str]:
    """What these shards are, wherever they lie: a hash of each."""
    return [head_tail_sha256(shard) for shard in list_shards(patterns)] if patterns else []


def write_shard(path: Path, images: LabelledImages) -> None:
    """PNG, class index and (when there are some) caption of every image, as one tar; the same images give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file, wds.TarWriter(file, mtime=0, encoder=False) as writer:
        for number, pixels in enumerate(images.pixels):
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
            sample = {"cls": str(int(images.labels[number])).encode(), "png": buffer.getvalue()}
            if images.captions:
                sample["txt"] = images.captions[number].encode()
            writer.write({"__key__": f"{path.stem}-{number:06d}", **sample})
    partial.rename(path)


def shapes_shard(path: Path, count: int, seed: int) -> str:
    """A shard of procedural images with class (colour) and caption, written when it is not there."""
    if not path.exists():
        pairs = tiny_clip.coloured_shapes(count, seed)
        write_shard(path, LabelledImages(pairs.images, pairs.labels, pairs.captions))
    return str(path)

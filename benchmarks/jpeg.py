"""Decoders of JPEG and ways to resize, beside what fit and scan do: python -m benchmarks.jpeg [--count 200]

Processor microseconds an image of one thread, the least of three rounds, and how far the pixels lie from Pillow's.
"""

import io
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg

from benchmarks.data import random_crops
from sanitize.process import prepare
from sanitize.stages.images import decode_image, resized, shrink

SIDE = 224


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def microseconds(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for item in items:
            work(item)
        rounds.append(time.process_time() - start)
    return 1e6 * min(rounds) / len(items)


def pillow(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


def turbo(data: bytes) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)).permute(2, 0, 1)


def by_torchvision(data: bytes) -> Tensor:
    pixels: Tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return pixels


def ours(data: bytes) -> Tensor:
    pixels, *_ = decode_image(data)
    assert pixels is not None
    return pixels


def by_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))).permute(2, 0, 1)


def as_floats(pixels: Tensor) -> Tensor:
    return shrink(pixels[None].float(), SIDE)[0]


@click.command()
@click.option("--count", default=200, show_default=True, help="Images of each size")
def main(count: int) -> None:
    """Print microseconds an image of each decoder and each way to resize."""
    prepare()
    torch.set_num_threads(1)
    for size in (224, 500):
        data = [jpeg(image) for image in itertools.islice(random_crops(size), count)]
        print(f"\n{count} JPEGs of {size} px, {sum(map(len, data)) // count} bytes each", flush=True)
        decoded = [pillow(image) for image in data]
        for name, decode in (
            ("Pillow", pillow),
            ("simplejpeg", turbo),
            ("torchvision", by_torchvision),
            ("ours", ours),
        ):
            apart = max(
                int((decode(image).int() - pixels.int()).abs().max())
                for image, pixels in zip(data, decoded, strict=True)
            )
            print(
                f"  decode, {name:21s} {microseconds(decode, data):8.0f} us, at most {apart} from Pillow's", flush=True
            )
        if size == SIDE:
            continue
        pillows = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in decoded]
        views: tuple[tuple[str, Callable[[Any], Tensor], Sequence[Any]], ...] = (
            ("Pillow", by_pillow, pillows),
            ("torch, floats", as_floats, decoded),
            ("ours, bytes", lambda pixels: resized(pixels, SIDE, "squash"), decoded),
        )
        for name, resize, items in views:
            apart_of_floats = max(
                float((resize(item).float() - as_floats(pixels)).abs().max())
                for item, pixels in zip(items, decoded, strict=True)
            )
            print(
                f"  resize, {name:21s} {microseconds(resize, items):8.0f} us, at most {apart_of_floats:.2f} from floats",
                flush=True,
            )


if __name__ == "__main__":
    main()

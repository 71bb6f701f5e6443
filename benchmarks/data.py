"""Shards for benchmarks: real photographs, from ../shared/data when it is there, else crops of scikit-learn's two sample photos."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared" / "data"


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file
    return file.read()


def photographs() -> Iterator[Image.Image]:
    """Decoded photos, over and over."""
    tars = [SHARED / "photos-large-000000.tar", SHARED / "flickr8k-captions-000000.tar"]
    while True:
        if tars[0].exists():
            for path in tars:
                with tarfile.open(path) as tar:
                    for member in tar:
                        if member.name.endswith(".jpg"):
                            yield Image.open(io.BytesIO(content(tar, member))).convert("RGB")
        else:
            from sklearn.datasets import load_sample_images

            yield from (Image.fromarray(photo) for photo in load_sample_images().images)


MIXED = 0  # in the place of a size: each image has sides of its own, 100 to 500 pixels


def random_crops(size: int, seed: int = 0) -> Iterator[Image.Image]:
    """Square crops of random place and scale, resized to `size` pixels (or to sides of their own): no two alike."""
    rng = np.random.default_rng(seed)
    for photo in photographs():
        for _ in range(2 if (SHARED / "photos-large-000000.tar").exists() else 64):
            side = int(min(photo.size) * rng.uniform(0.5, 1))
            left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
            shape = (size, size) if size else (int(rng.integers(100, 501)), int(rng.integers(100, 501)))
            yield photo.crop((left, top, left + side, top + side)).resize(shape, Image.Resampling.BICUBIC)


def write_shards(folder: Path, count: int, size: int, kind: str, shards: int, seed: int = 0, classes: int = 0) -> Path:
    """`count` images of `size` pixels (or MIXED) as PNG or JPEG (quality 85), evenly over `shards` tars; reused when already there.

    classes: each image also gets a .cls member with a number below it; 0 = no labels
    """
    marker = folder / f".{count}-{size}-{kind}-{shards}-{seed}-{classes}"
    if marker.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    crops = random_crops(size, seed)
    for number in range(shards):
        with tarfile.open(folder / f"bench-{number:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(count // shards):
                buffer = io.BytesIO()
                next(crops).save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
                info = tarfile.TarInfo(f"{number:04d}-{index:06d}.{'png' if kind == 'PNG' else 'jpg'}")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
                if classes:
                    label = tarfile.TarInfo(f"{number:04d}-{index:06d}.cls")
                    label.size = len(text := str(index % classes).encode())
                    tar.addfile(label, io.BytesIO(text))
    marker.touch()
    return folder

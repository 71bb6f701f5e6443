"""The bound of a data path: Pillow alone, on images in memory, in one process a core. Imports nothing that is slow to start."""

import io
import multiprocessing
import tarfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from benchmarks.data import content

ENDINGS = (".png", ".jpg")


class Decoded(NamedTuple):
    images: int
    seconds: float
    cpu: float  # seconds of the processor


def decode(part: tuple[Sequence[str], int, int]) -> Decoded:
    """Every so-manieth image of these tars. part: tars, the first image, and the step."""
    paths, first, step = part
    data = []
    for path in paths:
        with tarfile.open(path) as tar:
            data += [content(tar, member) for member in tar if member.name.endswith(ENDINGS)]
    mine = data[first::step]
    start, cpu_start = time.perf_counter(), time.process_time()
    for image in mine:
        Image.open(io.BytesIO(image)).convert("RGB")
    return Decoded(len(mine), time.perf_counter() - start, time.process_time() - cpu_start)


def raw_decode(paths: Sequence[str], cores: int) -> tuple[float, float]:
    """(images a second of all cores together, processor seconds an image)."""
    parts = [(paths, number, cores) for number in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        done = pool.map(decode, parts, chunksize=1)
    return sum(d.images / d.seconds for d in done), sum(d.cpu for d in done) / sum(d.images for d in done)

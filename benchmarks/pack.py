"""How fast `sanitize pack` is: JPEG files of a folder, and rows of one Parquet row group, beside reading and copying the same bytes.

python -m benchmarks.pack --count 20000
"""

import argparse
import io
import itertools
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.data import random_crops
from benchmarks.scan_rate import OUT
from sanitize.commands.pack import pack

DISTINCT = 500  # images; more would measure how fast they are made


def jpegs(size: int) -> list[bytes]:
    crops = itertools.islice(random_crops(size), DISTINCT)
    return [_encoded(crop) for crop in crops]


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def copy(source: Path, target: Path) -> None:
    """The bound: every file once, into one."""
    with target.open("wb") as out:
        for path in sorted(source.iterdir()):
            out.write(path.read_bytes())


def measured(name: str, count: int, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:28s} {count:7d} images {seconds:7.1f} s {count / seconds:7.0f} images/s  peak {peak:5.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    count = (options := parser.parse_args()).count
    root = OUT / "pack"
    shutil.rmtree(root, ignore_errors=True)
    (root / "photos").mkdir(parents=True)
    images = [image for image, _ in zip(itertools.cycle(jpegs(options.size)), range(count), strict=False)]
    for number, image in enumerate(images):
        (root / "photos" / f"{number:07d}.jpg").write_bytes(image)
    rows = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"image": rows}), root / "rows.parquet", row_group_size=count)
    measured("bound: read, write one file", count, lambda: copy(root / "photos", root / "copied"))
    measured("pack a folder", count, lambda: pack(str(root / "photos"), str(root / "from-folder")))
    measured("pack it again, all done", count, lambda: pack(str(root / "photos"), str(root / "from-folder")))
    measured("pack a Parquet row group", count, lambda: pack(str(root / "rows.parquet"), str(root / "from-rows")))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()

"""Peak memory of `sanitize scan` on few and many, small and large shards: it must not grow with either.

python -m benchmarks.memory
python -m benchmarks.memory --large   200,000 images in one shard, and a shard of 10 GB; 25 GB of disk
"""

import argparse
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

from benchmarks.data import content, write_shards
from benchmarks.data_path import null_detector
from benchmarks.scan import detector_for
from benchmarks.scan_rate import OUT
from sanitize.config import EncoderSpec

SPEC = EncoderSpec("resnet18-cifar", image_size=32, width=8, stem_stride=2)


def peak_mib(shards: Path, detector: Path) -> float:
    """Largest resident size of a scan in one process without Ray, start to end."""
    out = OUT / "memory"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["-m", "sanitize.cli", "--quiet", "scan", str(shards), "--detector", str(detector), "--out", str(out)]
    arguments += ["--workers", "0", "--threshold", "1e9"]
    child = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"scan failed with status {status}")
    return usage.ru_maxrss / 1024


def large_shard(folder: Path, count: int, beside: int) -> Path:
    """One shard of `count` samples: 2,000 images of 32 pixels over and over; beside: bytes of a second member of each, 0 = none."""
    source = write_shards(OUT / "memory-2000-1", 2_000, 32, "PNG", 1) / "bench-0000.tar"
    with tarfile.open(source) as tar:
        images = [content(tar, member) for member in tar]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    noise = os.urandom(beside)
    with tarfile.open(folder / "large.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            members = {"png": images[number % len(images)]} | ({"bin": noise} if beside else {})
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def show(folder: Path, count: int, detector: Path) -> None:
    shards = list(folder.glob("*.tar"))
    size = sum(path.stat().st_size for path in shards) / 1e6
    print(f"{count:8d} {len(shards):7d} {size:7.0f} {peak_mib(folder, detector):9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    large = parser.parse_args().large
    print(f"{'images':>8s} {'shards':>7s} {'MB':>7s} {'peak MiB':>9s}")
    if not large:
        for count, shards in ((2_000, 1), (20_000, 1), (2_000, 10), (20_000, 10)):
            folder = write_shards(OUT / f"memory-{count}-{shards}", count, 32, "PNG", shards)
            show(folder, count, detector_for(SPEC, "encoder-memory"))
        return
    for count, beside in ((2_000, 0), (200_000, 0), (10_000, 1_000_000)):
        show(large_shard(OUT / "memory-large", count, beside), count, null_detector(32))
    shutil.rmtree(OUT / "memory-large")


if __name__ == "__main__":
    main()

"""User and system seconds of `sanitize scan` at 224 px with and without the allocator's settings (sanitize/process.py), in turns.

    python -m benchmarks.allocator [--count 128] [--rounds 2]

In this process (`--workers 0`), start to end, each scan a process of its own. Every scan must give the same scores, bit for bit.
"""

import os
import shutil
import sys
from pathlib import Path

import click
import pyarrow.parquet as pq

from benchmarks.data import write_shards
from benchmarks.scan import detector_for
from benchmarks.scan_rate import OUT
from sanitize import storage
from sanitize.config import EncoderSpec

SIZE = 224
SCAN = "from sanitize.cli import main; main()"
UNTOUCHED = "from sanitize import process; process._MALLOC = (); process.ENVIRONMENT.clear(); "


def scan(program: str, shards: Path, detector: Path, batch: int) -> tuple[float, float, float]:
    """(user seconds, system seconds, peak MiB) of one scan that writes runs/bench/allocator."""
    out = OUT / "allocator"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["--quiet", "scan", str(shards), "--detector", str(detector), "--out", str(out), "--workers", "0"]
    arguments += ["--scores-only", "--batch-size", str(batch)]
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", program, *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"scan failed with status {status}")
    return usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 1024


def scores() -> str:
    """SHA-256 of all score rows, in order."""
    tables = [pq.read_table(path).to_pylist() for path in sorted((OUT / "allocator" / "scores").glob("*.parquet"))]
    return storage.json_sha256(tables)


@click.command()
@click.option("--count", default=128, show_default=True, help="JPEGs of 224 px, in two shards")
@click.option("--rounds", default=2, show_default=True)
@click.option("--batch", default=256, show_default=True)
def main(count: int, rounds: int, batch: int) -> None:
    """Print seconds and peak memory of each scan."""
    shards = write_shards(OUT / f"allocator-{count}", count, SIZE, "JPEG", 2)
    detector = detector_for(EncoderSpec("resnet18"), f"encoder-{SIZE}")
    digests = set()
    print(f"{count} JPEGs of {SIZE} px, ResNet-18, batches of {batch}")
    print(f"{'allocator':>12s} {'user s':>8s} {'system s':>9s} {'peak MiB':>9s}")
    for _ in range(rounds):
        for name, program in (("as glibc is", UNTOUCHED + SCAN), ("ours", SCAN)):
            user, system, peak = scan(program, shards, detector, batch)
            digests.add(scores())
            print(f"{name:>12s} {user:8.1f} {system:9.1f} {peak:9.0f}", flush=True)
    if len(digests) > 1:
        raise SystemExit("the scans differ in their scores")
    print("all scores are the same, bit for bit")


if __name__ == "__main__":
    main()

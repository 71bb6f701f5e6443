"""Peak memory of `sanitize scan` on few and many, small and large shards: it must not grow with either.

python -m benchmarks.memory
"""

import os
import shutil
import sys
from pathlib import Path

from benchmarks.data import write_shards
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


def main() -> None:
    detector = detector_for(SPEC, "encoder-memory")
    print(f"{'images':>8s} {'shards':>7s} {'peak MiB':>9s}")
    for count, shards in ((2_000, 1), (20_000, 1), (2_000, 10), (20_000, 10)):
        folder = write_shards(OUT / f"memory-{count}-{shards}", count, 32, "PNG", shards)
        print(f"{count:8d} {shards:7d} {peak_mib(folder, detector):9.0f}", flush=True)


if __name__ == "__main__":
    main()

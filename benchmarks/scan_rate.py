"""Images/s of a whole `sanitize scan`, its start-up taken off."""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.data import write_shards
from sanitize.commands.scan import scan
from sanitize.config import ScanConfig

OUT = Path("runs/bench")
BATCH = 256


class ScanRate(NamedTuple):
    """startup: seconds of a scan of two images; cpu: seconds an image of all threads of this process, so with workers only the driver's."""

    images_per_second: float
    startup: float
    cpu: float


def scan_rate(shards: Path, detector: Path, workers: int, count: int, effort: str = "") -> ScanRate:
    tiny = write_shards(OUT / "tiny", 2, 32, "PNG", 2)
    seconds, cpu = [], []
    for source in (tiny, tiny, shards):  # the first one only fills caches
        out = OUT / "scanned"
        shutil.rmtree(out, ignore_errors=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        files = (str(source),), str(detector), str(out)
        scan(ScanConfig(*files, effort=effort, scores_only=True, workers=workers, batch_size=BATCH))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return ScanRate(count / (seconds[2] - seconds[1]), seconds[1], (cpu[2] - cpu[1]) / count)

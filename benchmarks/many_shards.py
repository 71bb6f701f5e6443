"""What `sanitize scan` costs on object storage with very many shards: requests, seconds and memory of the driver.

python -m benchmarks.many_shards --shards 10000 --delays 0 30

The store is held in memory and makes each request wait, a listing once for every 1,000 names. One shard is scored by the real
command; its score table and marker are then given to all the others under their own names, as if each had been scored.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data import write_shards
from benchmarks.object_store import ObjectStore
from benchmarks.scan import detector_for
from benchmarks.scan_rate import OUT
from sanitize.commands.scan import scan
from sanitize.config import EncoderSpec, ScanConfig, ThresholdPolicy
from sanitize.stages.shards import head_tails, list_shards

SPEC = EncoderSpec("resnet18-cifar", image_size=32, width=8, stem_stride=2)


@contextmanager
def measured(name: str, shards: int) -> Iterator[None]:
    """memory: the peak above what the process held before, without what the store itself grew by."""
    ObjectStore.requests.clear()
    held, stored = _memory("VmRSS"), _stored()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = time.monotonic()
    yield
    seconds, requests = time.monotonic() - start, sum(ObjectStore.requests.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ObjectStore.requests.items()))
    memory = (_memory("VmHWM") - held - (_stored() - stored)) / 2**20
    print(
        f"{ObjectStore.delay * 1000:5.0f} ms {name:34s} {shards:7d} shards {seconds:8.1f} s {requests / shards:6.2f} requests a shard"
        f"  {memory:6.0f} MiB  ({kinds})",
        flush=True,
    )


def _memory(name: str) -> int:
    """Bytes, of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def _stored() -> int:
    return sum(file.getbuffer().nbytes for file in ObjectStore.store.values())


def fill(shards: int) -> ScanConfig:
    """A scan of which every shard is scored and none is split. One real scan is the pattern."""
    ObjectStore.store.clear()
    folder, detector = write_shards(OUT / "many-pattern", 4, 32, "PNG", 1), detector_for(SPEC, "encoder-memory")
    fs = fsspec.filesystem("store")
    tar = next(folder.glob("*.tar")).read_bytes()
    fs.pipe_file("/in/0000000.tar", tar)
    scan(_config(str(detector), out="store://pattern", scores_only=True))
    marker = json.loads(fs.cat_file("/pattern/done/0000000.json"))
    table = pq.read_table(io.BytesIO(fs.cat_file("/pattern/scores/0000000.parquet")))
    for number in range(shards):
        stem, file = f"{number:07d}", io.BytesIO()
        named = table.set_column(0, "shard", pa.array([stem] * len(table)))
        pq.write_table(named, file, compression="zstd")
        fs.pipe_file(f"/in/{stem}.tar", tar)
        fs.pipe_file(f"/out/scores/{stem}.parquet", file.getvalue())
        values = marker | {"shard": stem, "files": {f"scores/{stem}.parquet": next(iter(marker["files"].values()))}}
        fs.pipe_file(f"/out/done/{stem}.json", json.dumps(values).encode())
    return _config(str(detector), out="store://out")


def _config(detector: str, **settings: Any) -> ScanConfig:
    policy = ThresholdPolicy("absolute", threshold=1e9)
    return ScanConfig(
        ("store://in",), detector, workers=0, cpus_per_worker=1, precision="fp32", policy=policy, **settings
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 30], help="milliseconds")
    options = parser.parse_args()
    for delay in options.delays:
        ObjectStore.delay = 0
        config = fill(options.shards)
        ObjectStore.delay = delay / 1000
        with measured("start: list and identify", options.shards):
            head_tails(list_shards(config.shards))
        with measured("pass 2 of all", options.shards):
            scan(config)
        with measured("the same scan again, nothing to do", options.shards):
            scan(config)


if __name__ == "__main__":
    main()

"""What `sanitize scan` costs on object storage with very many shards: requests, seconds and memory of the driver.

python -m benchmarks.many_shards --shards 10000 --delays 0 30

The store is held in memory and makes each request wait, a listing once for every 1,000 names. One shard is scored by the real
command; its score table and marker are then given to all the others under their own names, as if each had been scored.
"""

import argparse
import io
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.data import write_shards
from benchmarks.scan import OUT, detector_for
from sanitize.commands.scan import scan
from sanitize.config import EncoderSpec, ScanConfig, ThresholdPolicy
from sanitize.stages.shards import head_tails, list_shards

SPEC = EncoderSpec("resnet18-cifar", image_size=32, width=8, stem_stride=2)


class Store(MemoryFileSystem):
    """delay: seconds each request waits; requests: how many of each kind were made."""

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    delay = 0.0
    requests: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("store://").strip("/")

    def _wait(self, kind: str, times: int = 1) -> None:
        Store.requests[kind] += times
        time.sleep(Store.delay * times)

    def find(self, path: str, *_: Any, detail: bool = False, **__: Any) -> Any:
        folder = self._strip_protocol(path).rstrip("/") + "/"
        names = [name for name in list(self.store) if name.startswith(folder)]
        self._wait("list", len(names) // 1000 + 1)
        return {n: {"name": n, "size": self.store[n].size, "type": "file"} for n in names} if detail else names

    def isdir(self, path: str) -> bool:
        self._wait("list")
        return bool(super().isdir(path))

    def exists(self, path: str, **_: Any) -> bool:
        self._wait("head")
        return self._strip_protocol(path) in self.store

    def info(self, path: str, **options: Any) -> Any:
        self._wait("head")
        return super().info(path, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._wait("get")
        return bytes(self.store[self._strip_protocol(path)].getbuffer()[start:end])

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._wait("get" if mode == "rb" else "put")
        return io.BytesIO(self.store[path].getvalue()) if mode == "rb" else super()._open(path, mode, **options)

    def rm_file(self, path: str) -> None:
        self._wait("delete")
        self.store.pop(self._strip_protocol(path), None)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._wait("put")
        if mode == "create" and self._strip_protocol(path) in self.store:
            raise FileExistsError(path)
        super().pipe_file(path, value)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Object stores have none."""


fsspec.register_implementation("store", Store, clobber=True)


@contextmanager
def measured(name: str, shards: int) -> Iterator[None]:
    Store.requests.clear()
    start = time.monotonic()
    yield
    seconds, requests = time.monotonic() - start, sum(Store.requests.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Store.requests.items()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{Store.delay * 1000:5.0f} ms {name:34s} {shards:7d} shards {seconds:8.1f} s {requests / shards:6.2f} requests a shard"
        f"  {memory:5.1f} GiB  ({kinds})",
        flush=True,
    )


def fill(shards: int) -> ScanConfig:
    """A scan of which every shard is scored and none is split. One real scan is the pattern."""
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
    config = fill(options.shards)
    with measured("pass 2 of all", options.shards):
        scan(config)
    for delay in options.delays:
        Store.delay = delay / 1000
        with measured("start: list and identify", options.shards):
            head_tails(list_shards(config.shards))
        with measured("the same scan again, nothing to do", options.shards):
            scan(config)


if __name__ == "__main__":
    main()

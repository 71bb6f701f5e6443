"""decisions.parquet: what pass 2 decided of every sample. Written once, then read by everything that acts on a decision."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sanitize import storage
from sanitize.errors import RefusedError

SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("index", pa.int64()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),  # why it was removed, or why it has no score
        ("score", pa.float32()),  # that decided; differs from the score table's where pass 2 adapted it to the scan
        ("threshold", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Decisions:
    """Of one shard, in tar order. keep (N,) bool; keys as the score table writes them; scores (N,) float32, NaN = none."""

    keep: NDArray[np.bool_]
    keys: list[str]
    scores: NDArray[np.float32]


def write_decisions(path: str, shards: Iterable[pa.Table]) -> str:
    """One table of SCHEMA for each shard, one in memory at a time; returns the file's SHA-256."""
    with storage.atomic_write(path) as target, pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        for table in shards:
            writer.write_table(table)
    return target.sha256()


class DecisionTable:
    """Reads decisions shard by shard; the footer is read once. Picklable."""

    def __init__(self, path: str, expected_sha256: str = "") -> None:
        """expected_sha256: of the whole file, "" = not checked. Raises RefusedError when it is another."""
        self.path = path
        if expected_sha256 and (not storage.exists(path) or storage.file_sha256(path) != expected_sha256):
            raise RefusedError(self.foreign("its SHA-256 is not the one in summary.json"))
        with storage.explain_read_errors(path), storage.open_read(path) as file:
            self._metadata = pq.read_metadata(file)  # grows with the shards; read once, not again for every shard
        self._groups: dict[str, list[int]] = {}  # shard → its row groups: they are written shard by shard
        for number in range(self._metadata.num_row_groups):
            group = self._metadata.row_group(number)
            if group.num_rows:
                self._groups.setdefault(group.column(0).statistics.min, []).append(number)

    @property
    def stems(self) -> set[str]:
        """Shards with at least one sample."""
        return set(self._groups)

    def of(self, stem: str) -> Decisions:
        """Raises RefusedError when a sample of the shard is named twice or left out."""
        table = self._read(self._groups.get(stem, []), ["key", "index", "keep", "score"])
        if not np.array_equal(table.column("index").to_numpy(), np.arange(len(table))):
            raise RefusedError(self.foreign(f"shard {stem}: a sample is named twice or left out"))
        keep = table.column("keep").to_numpy(zero_copy_only=False).astype(bool)
        scores = table.column("score").to_numpy(zero_copy_only=False).astype(np.float32)
        return Decisions(keep, table.column("key").to_pylist(), scores)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Of all samples, shard after shard."""
        return self._read(list(range(self._metadata.num_row_groups)), names)

    def _read(self, groups: list[int], names: Sequence[str]) -> pa.Table:
        with storage.explain_read_errors(self.path), storage.open_read(self.path) as file:
            return pq.ParquetFile(file, metadata=self._metadata).read_row_groups(groups, columns=list(names))

    def foreign(self, why: str) -> str:
        return f"{self.path}: is not of this scan ({why}). Run `sanitize clean` again."

"""decisions/<stem>.parquet: what pass 2 decided of every sample of a shard. Written once, then read by everything that acts on it."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sanitize import storage
from sanitize.errors import RefusedError
from sanitize.hashing import HashingWriter
from sanitize.parquet import read_table
from sanitize.stages import thresholds
from sanitize.stages.adaptation import ScoreAdapter

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
class Rule:
    """How pass 2 turns the score rows of any shard into decisions: one rule for the whole scan."""

    threshold: float
    keep_unscored: bool
    adapter: ScoreAdapter

    @property
    def identity(self) -> str:
        """Equal rules decide the same score table alike."""
        return storage.json_sha256([str(np.float32(self.threshold)), self.keep_unscored, self.adapter.identity])[:32]

    @property
    def columns(self) -> list[str]:
        """Of the score table, that `decide` needs."""
        return list(dict.fromkeys(["shard", "key", "index", "status", "reason", *self.adapter.columns]))

    def decide(self, table: pa.Table) -> pa.Table:
        """Score rows of one shard → rows of SCHEMA."""
        scores = self.adapter.scores(table)
        keep = pa.array(thresholds.keep(scores, self.threshold, self.keep_unscored))
        unscored = pc.binary_join_element_wise(table.column("status"), table.column("reason"), ": ")
        scored = pc.if_else(keep, "", "score above threshold")
        columns = {name: table.column(name) for name in ("shard", "key", "index")}
        columns["keep"] = keep
        columns["reason"] = pc.if_else(pc.equal(table.column("status"), "ok"), scored, unscored)
        columns["score"] = pa.array(scores, mask=np.isnan(scores))
        columns["threshold"] = pa.array(np.full(len(keep), self.threshold, np.float32))
        return pa.table(columns, schema=SCHEMA)


@dataclass(frozen=True)
class Decisions:
    """Of one shard, in tar order. keep (N,) bool; keys as the score table writes them; scores (N,) float32, NaN = none."""

    keep: NDArray[np.bool_]
    keys: list[str]
    scores: NDArray[np.float32]

    @classmethod
    def of(cls, table: pa.Table) -> "Decisions":
        """From rows of SCHEMA."""
        keep = table.column("keep").to_numpy(zero_copy_only=False).astype(bool)
        scores = table.column("score").to_numpy(zero_copy_only=False).astype(np.float32)
        return cls(keep, table.column("key").to_pylist(), scores)


def write_decisions(path: str, table: pa.Table) -> HashingWriter:
    with storage.atomic_write(path) as target:
        pq.write_table(table, target, compression="zstd")
    return target


def read_decisions(path: str, expected_sha256: str = "") -> pa.Table:
    """Rows of SCHEMA. expected_sha256: of the file, "" = not checked. Raises RefusedError when it is another, or no such table."""
    data = storage.read_bytes(path) if storage.exists(path) else b""
    if expected_sha256 and hashlib.sha256(data).hexdigest() != expected_sha256:
        raise RefusedError(foreign(path, "its SHA-256 is not the one that was committed"))
    try:
        table = read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(foreign(path, f"not a table of decisions: {error}")) from None
    if table.schema.remove_metadata() != SCHEMA:
        raise RefusedError(foreign(path, "not a table of decisions"))
    if not np.array_equal(table.column("index").to_numpy(), np.arange(len(table))):
        raise RefusedError(foreign(path, "a sample is named twice or left out"))
    return table


def foreign(path: str, why: str) -> str:
    return f"{path}: is not of this scan ({why}). Run `sanitize verify --repair`, then `sanitize clean` again."

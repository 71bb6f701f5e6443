"""decisions/<stem>.parquet: what pass 2 decided of every sample of a shard. Written once, then read by everything that acts on it."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sanitize import storage
from sanitize.errors import RefusedError, ShardError
from sanitize.hashing import HashingWriter
from sanitize.parquet import read_table
from sanitize.records import Word
from sanitize.stages import thresholds
from sanitize.stages.adaptation import ScoreAdapter
from sanitize.stages.reasons import CONTRIBUTIONS, P_VALUES, Explanation, Reasons

FORMAT = 2  # of these tables, in summary.json: one of an earlier format is written anew by the next `clean`
_FIRST_FORMAT = pa.schema(
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
# of samples that the score would remove or a person decided on; null of all others
CONTRIBUTION = pa.struct([(name, pa.float32()) for name in CONTRIBUTIONS])  # share in the score, all together 1
P_VALUE = pa.struct([(name, pa.float32()) for name in P_VALUES])  # against clean held-out images
SCHEMA = _FIRST_FORMAT.append(pa.field("contributions", CONTRIBUTION)).append(pa.field("p_values", P_VALUE))
FLAT = pa.schema(  # without structs, for CSV and other tools
    [
        *_FIRST_FORMAT,
        ("p_value", pa.float32()),  # of the score; this and what follows: of samples that have `contributions`
        *((f"contribution_{name}", pa.float32()) for name in CONTRIBUTIONS),  # share of each statistic in the score
    ]
)


@dataclass(frozen=True)
class Rule:
    """How pass 2 turns the score rows of any shard into decisions: one rule for the whole scan. words: of people, by stem; each
    overrides the score of a sample."""

    threshold: float
    keep_unscored: bool
    adapter: ScoreAdapter
    reasons: Reasons
    words: Mapping[str, Sequence[Word]] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Equal rules decide the same score table alike, words apart."""
        parts = [str(np.float32(self.threshold)), self.keep_unscored, self.adapter.identity, self.reasons.identity]
        return storage.json_sha256(parts)[:32]

    @property
    def columns(self) -> list[str]:
        """Of the score table, that `decide` needs."""
        names = ["shard", "key", "index", "status", "reason", *self.adapter.columns, *self.reasons.columns]
        return list(dict.fromkeys(names))

    def identity_of(self, stem: str) -> str:
        """With the words on this shard: a new one lets only the shards be split again that hold its samples."""
        return split_identity(self.identity, self.words.get(stem, ()))

    def decide(self, table: pa.Table, stem: str = "") -> pa.Table:
        """Score rows of one shard → rows of SCHEMA."""
        words = self.words.get(stem, ())
        places = _places(words, table, stem)
        scores = self.adapter.scores(table)
        keep = thresholds.keep(scores, self.threshold, self.keep_unscored)
        asked = ~keep
        keep[places] = [word.release for word in words]
        asked[places] = True
        chosen = np.flatnonzero(np.isfinite(scores) & asked)
        told = self._reasons_for(table).explain(table.take(chosen), scores[chosen])
        unscored = pc.binary_join_element_wise(table.column("status"), table.column("reason"), ": ")
        reasons = pc.if_else(pc.equal(table.column("status"), "ok"), "", unscored).to_numpy(zero_copy_only=False)
        reasons[chosen] = told.words
        reasons[places] = [word.reason for word in words]
        columns = {name: table.column(name) for name in ("shard", "key", "index")}
        columns["keep"] = pa.array(keep)
        columns["reason"] = pa.array(reasons, pa.string())
        columns["score"] = pa.array(scores, mask=np.isnan(scores))
        columns["threshold"] = pa.array(np.full(len(keep), self.threshold, np.float32))
        columns |= _explained(told, chosen, len(keep))
        return pa.table(columns, schema=SCHEMA)

    def explain(self, table: pa.Table) -> Explanation:
        """Why score rows that have a score have it, removed or not."""
        return self._reasons_for(table).explain(table, self.adapter.scores(table))

    def _reasons_for(self, table: pa.Table) -> Reasons:
        """A score table of an earlier version may lack what they need."""
        return (
            self.reasons if set(self.reasons.columns) <= set(table.column_names) else Reasons(self.reasons.calibration)
        )


def split_identity(rule: str, words: Sequence[Word]) -> str:
    """Of what decides on one shard: the rule of the whole scan, and the words on its own samples."""
    said = [[word.index, word.key, word.release, word.reason] for word in words]
    return storage.json_sha256([rule, said])[:32] if said else rule


def _places(words: Sequence[Word], table: pa.Table, stem: str) -> NDArray[np.int64]:
    """Rows of the samples that words are about."""
    places = np.array([word.index for word in words], np.int64)
    known = places[places < len(table)]
    if table.column("key").take(known).to_pylist() != [word.key for word in words]:
        raise ShardError(
            f"{stem}: what people decided (reviews/) is about other samples than its score table has. Restore both from one backup, "
            "or decide without it: `sanitize clean --ignore-reviews`."
        )
    return places


def _explained(told: Explanation, chosen: NDArray[np.intp], count: int) -> dict[str, pa.Array]:
    """The columns of structs, null of all samples but the chosen ones."""
    places = np.full(count, -1)
    places[chosen] = np.arange(len(chosen))
    rows = pa.array(places, mask=places < 0)

    def column(kind: pa.StructType, values: Mapping[str, NDArray[np.float64]]) -> pa.Array:
        nothing = np.full(len(chosen), np.nan)
        parts = [values.get(field.name, nothing).astype(np.float32) for field in kind]
        arrays = [pa.array(part, mask=np.isnan(part)) for part in parts]
        return pa.StructArray.from_arrays(arrays, fields=list(kind)).take(rows)

    return {
        "contributions": column(CONTRIBUTION, told.contributions),
        "p_values": column(P_VALUE, told.p_values),
    }


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


def flat(table: pa.Table) -> pa.Table:
    """Rows of SCHEMA → rows of FLAT."""
    parts = table.flatten()
    names = [
        "p_value" if name == "p_values.score" else name.replace("contributions.", "contribution_")
        for name in parts.column_names
    ]
    return parts.rename_columns(names).select(FLAT.names).cast(FLAT)


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
    schema = table.schema.remove_metadata()
    if schema == _FIRST_FORMAT:
        table = pa.table(
            [*table.columns, *(pa.nulls(len(table), field.type) for field in list(SCHEMA)[-2:])], schema=SCHEMA
        )
    elif schema != SCHEMA:
        raise RefusedError(foreign(path, "not a table of decisions"))
    if not np.array_equal(table.column("index").to_numpy(), np.arange(len(table))):
        raise RefusedError(foreign(path, "a sample is named twice or left out"))
    return table


def foreign(path: str, why: str) -> str:
    return f"{path}: is not of this scan ({why}). Run `sanitize verify --repair`, then `sanitize clean` again."

"""Score rows ⇄ Parquet. The one place that names columns and types."""

import contextlib
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from sanitize import storage
from sanitize.errors import StorageError
from sanitize.records import Picture
from sanitize.stages.reactions import ALTERATIONS, signature
from sanitize.stages.scoring import Scores
from sanitize.stages.shards import printable
from sanitize.stages.thresholds import p_values

SCHEMA_VERSION = 3
REACTIONS = [f"reaction_{name}" for name in ALTERATIONS]
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("index", pa.int64()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),  # why there is no score; of scored samples: why there is no text_similarity
        ("score", pa.float32()),
        ("p_value", pa.float32()),
        ("error", pa.float32()),
        ("error_reference", pa.float32()),
        ("embedding_norm", pa.float32()),
        ("text_similarity", pa.float32()),  # null unless captions were read
        ("neighbour_distance", pa.float32()),  # null but for the scorer `reaction`
        *((name, pa.float32()) for name in REACTIONS),  # null unless the picture was altered
    ]
)
ROW_GROUP = 16_384  # rows held in memory before they are written


def rows(shard: str, pictures: Sequence[Picture], scores: Scores, calibration: NDArray[np.float32]) -> pa.Table:
    """One row per picture. `scores` holds the decodable ones (pixels present), in order."""
    scored = np.array([p.pixels is not None for p in pictures], dtype=bool)
    finite = np.isfinite(scores.score)
    statuses, reasons = [p.status for p in pictures], [p.reason or p.caption_reason for p in pictures]
    for position in np.flatnonzero(scored)[~finite]:
        statuses[position], reasons[position] = "not_finite", "the model gave no finite score or had no memory for it"

    def column(values: NDArray[np.float32]) -> pa.Array:
        full = np.full(len(pictures), np.nan, np.float32)
        full[np.flatnonzero(scored)[finite]] = values[finite]
        return pa.array(full, pa.float32(), mask=np.isnan(full))

    return pa.table(
        [
            pa.array([shard] * len(pictures)),
            pa.array([printable(p.key) for p in pictures]),
            pa.array([p.index for p in pictures], pa.int64()),
            pa.array([p.sha256 for p in pictures]),
            pa.array([p.width for p in pictures], pa.int32()),
            pa.array([p.height for p in pictures], pa.int32()),
            pa.array(statuses),
            pa.array(reasons),
            column(scores.score),
            column(p_values(scores.score, calibration)),
            column(scores.error),
            column(scores.error_reference),
            column(scores.embedding_norm),
            column(scores.text_similarity),
            column(scores.neighbour_distance),
            *(column(values) for values in scores.reactions),
        ],
        schema=SCHEMA,
    )


class ScoreWriter:
    """Appends rows to a Parquet file, at most ROW_GROUP of them in memory; the same rows give the same bytes.

    A context manager: leaving it normally completes the file, leaving it by an error abandons it.
    """

    def __init__(self, file: storage.HashingWriter, metadata: dict[str, str]) -> None:
        schema = SCHEMA.with_metadata({"schema_version": str(SCHEMA_VERSION)} | metadata)
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self._held = 0

    def add(self, table: pa.Table) -> None:
        self._pending.append(table)
        self._held += len(table)
        if self._held >= ROW_GROUP:
            self._flush()

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
            self._writer.close()
        with contextlib.suppress(OSError):
            self._writer.close()
        self._writer.is_open = False  # else its finaliser would write to a file that is gone

    def _flush(self) -> None:
        if self._pending:
            merged = pa.concat_tables(self._pending).replace_schema_metadata(self._writer.schema.metadata)
            self._writer.write_table(merged, row_group_size=ROW_GROUP)
        self._pending, self._held = [], 0


def read(path: str, columns: Sequence[str]) -> pa.Table:
    """Chosen columns of one score file."""
    with storage.open_read(path) as file:
        try:
            return pq.read_table(file, columns=list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"{path}: not a readable score table ({error}). Delete it and scan again.") from None


def signatures(path: str) -> NDArray[np.float32]:
    """(N, V + 2) signatures of the samples of one score file, as stages/reactions.py orders them; NaN where not altered."""
    table = read(path, [*REACTIONS, "embedding_norm", "neighbour_distance"])
    observed = np.stack([numbers(table, name) for name in REACTIONS], axis=1)
    norms, distances = (torch.from_numpy(numbers(table, name)) for name in ("embedding_norm", "neighbour_distance"))
    return signature(torch.from_numpy(observed), norms, distances).numpy()


def numbers(table: pa.Table, column: str) -> NDArray[np.float32]:
    """A numeric column as float32, NaN where it is null."""
    values: NDArray[np.float32] = table.column(column).to_numpy(zero_copy_only=False).astype(np.float32)
    return values

"""Score rows ⇄ Parquet. The one place that names columns and types."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from sanitize import storage
from sanitize.errors import StorageError
from sanitize.hashing import HashingWriter
from sanitize.parquet import read_table
from sanitize.records import DecodedImage
from sanitize.stages.agreement import IMAGE_HASH, RESIDUALS, Departures, quantised
from sanitize.stages.clean_reference import embedding_statistics
from sanitize.stages.perturbations import CHANGE_COLUMNS
from sanitize.stages.shards import printable
from sanitize.stages.thresholds import p_values

Floats = NDArray[np.float32]
SCHEMA_VERSION = 4
STATISTICS: Mapping[str, str] = {  # column, float32 → what it means; null where an image has none
    "score": "the statistic that decides; higher = more suspicious",
    "p_value": "of the score against calibration: (1 + #{calibration >= score}) / (n + 1)",
    "error": "mean squared reconstruction error over hidden pixels, normalised units",
    "error_reference": "the same image against reconstructions of other embeddings",
    "embedding_norm": "length of the raw embedding",
    "text_similarity": "cosine of image and caption embeddings; only when captions are read",
    "neighbour_distance": "to the 16th nearest of the clean embeddings, 0 to 2; of the scorers `evidence` and `reaction`",
    "prediction_residual": "squared Mahalanobis distance of the embedding from the predicted one, over the number of components",
    "prediction_energy": "the same less that of the embedding from the mean: how much less likely it is given the image; decides",
    **dict.fromkeys(CHANGE_COLUMNS, "log cosine change of the embedding under this perturbation, where it was tried"),
}
# column of bytes → what it means: what pass 2 compares samples by (stages/agreement.py); null where there is none
VECTORS: Mapping[str, str] = {
    RESIDUALS: "how the embedding departs from the predicted one: int8 coordinates in eighths of a clean image's deviation",
    IMAGE_HASH: "what the image looks like: difference hash, 8 bytes",
}
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
        *((name, pa.float32()) for name in STATISTICS),
        *((name, pa.binary()) for name in VECTORS),
    ]
)
STATISTICS_COLUMNS = [*CHANGE_COLUMNS, "embedding_norm", "neighbour_distance"]
ROW_GROUP = 16_384  # rows held in memory before they are written


def rows(shard: str, decoded: Sequence[DecodedImage], columns: Mapping[str, Floats], calibration: Floats) -> pa.Table:
    """One row per image. `columns` (names of STATISTICS) hold the decodable ones (pixels present), in order."""
    has_pixels = np.array([image.pixels is not None for image in decoded], dtype=bool)
    finite = np.isfinite(columns["score"])
    statuses, reasons = [image.status for image in decoded], [image.reason or image.caption_reason for image in decoded]
    for position in np.flatnonzero(has_pixels)[~finite]:
        statuses[position], reasons[position] = "not_finite", "the model gave no finite score or had no memory for it"
    vectors = {name: columns[name][finite] for name in VECTORS if name in columns}
    known = {name: values for name, values in columns.items() if name not in VECTORS}
    known["p_value"] = p_values(columns["score"], calibration)
    assert known.keys() <= STATISTICS.keys(), f"not in STATISTICS: {known.keys() - STATISTICS.keys()}"

    def statistic(name: str) -> pa.Array:
        full = np.full(len(decoded), np.nan, np.float32)
        if name in known:
            full[np.flatnonzero(has_pixels)[finite]] = known[name][finite]
        return pa.array(full, pa.float32(), mask=np.isnan(full))

    def vector(name: str) -> pa.Array:
        full: list[bytes | None] = [None] * len(decoded)
        for position, row in zip(np.flatnonzero(has_pixels)[finite], vectors.get(name, ()), strict=False):
            full[position] = (quantised(row) if name == RESIDUALS else row.astype(np.uint8)).tobytes()
        return pa.array(full, pa.binary())

    identity = {
        "shard": [shard] * len(decoded),
        "key": [printable(image.key) for image in decoded],
        "index": [image.index for image in decoded],
        "sha256": [image.sha256 for image in decoded],
        "width": [image.width for image in decoded],
        "height": [image.height for image in decoded],
        "status": statuses,
        "reason": reasons,
    }
    measured = {name: statistic(name) for name in STATISTICS} | {name: vector(name) for name in VECTORS}
    return pa.table({**identity, **measured}, schema=SCHEMA)


class ScoreWriter:
    """Appends rows to a Parquet file, at most ROW_GROUP of them in memory; the same rows give the same bytes.

    A context manager: leaving it normally completes the file, leaving it by an error abandons it.
    """

    def __init__(self, file: HashingWriter, metadata: dict[str, str]) -> None:
        schema = SCHEMA.with_metadata({"schema_version": str(SCHEMA_VERSION)} | metadata)
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self._held = 0

    def add(self, table: pa.Table) -> None:
        self._pending.append(table)
        self._held += len(table)
        while self._held >= ROW_GROUP:
            self._flush(ROW_GROUP)

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush(self._held)
            self._writer.close()
        with contextlib.suppress(OSError):
            self._writer.close()
        self._writer.is_open = False  # else its finaliser would write to a file that is gone

    def _flush(self, count: int) -> None:
        """Write the first `count` rows; so groups do not depend on how many rows come at a time."""
        if count:
            merged = pa.concat_tables(self._pending).replace_schema_metadata(self._writer.schema.metadata)
            self._writer.write_table(merged.slice(0, count), row_group_size=ROW_GROUP)
            self._pending, self._held = [merged.slice(count)], self._held - count


def read(path: str, columns: Sequence[str]) -> pa.Table:
    """Chosen columns of one score file."""
    with storage.open_read(path) as file:
        try:
            return read_table(file, columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(
                f"{path}: not a readable score table ({error}). Run `sanitize verify --repair`, then the same `sanitize scan` again."
            ) from None


def read_each(paths: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Chosen columns of each score file, in order; the next files are read meanwhile."""
    return storage.read_ahead(lambda path: read(path, columns), paths)


def statistics(table: pa.Table) -> Floats:
    """(N, V + 2) embedding statistics of rows with STATISTICS_COLUMNS; NaN where an image was not perturbed."""
    changes = torch.from_numpy(np.stack([numbers(table, name) for name in CHANGE_COLUMNS], axis=1))
    norms, distances = (torch.from_numpy(numbers(table, name)) for name in ("embedding_norm", "neighbour_distance"))
    return embedding_statistics(changes, norms, distances).numpy()


def departures(table: pa.Table) -> tuple[Departures, NDArray[np.bool_]]:
    """Of the samples that have VECTORS (M of them), and which those are, (N,) bool. Raises ValueError when their lengths differ."""
    columns = [table.column(name).combine_chunks() for name in (RESIDUALS, IMAGE_HASH)]
    has: NDArray[np.bool_] = columns[0].is_valid().to_numpy(zero_copy_only=False).astype(bool)
    return Departures.from_bytes(*(column.drop_null().to_pylist() for column in columns)), has


def numbers(table: pa.Table, column: str) -> Floats:
    """A numeric column as float32, NaN where it is null."""
    values: Floats = table.column(column).to_numpy(zero_copy_only=False).astype(np.float32)
    return values

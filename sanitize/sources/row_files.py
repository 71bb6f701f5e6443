"""Files of rows that hold images: Parquet, or Arrow as Hugging Face's `save_to_disk` writes it. Read in pieces, never whole.

A piece that cannot be read says why; the rows after it are read all the same.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from sanitize import storage
from sanitize.errors import ConfigError
from sanitize.sources.columns import explain_table_errors, with_names
from sanitize.stages.shards import printable

BATCH = 32  # rows in memory at a time


@dataclass(frozen=True)
class RowFile:
    """name: below the source; starts: the first row of each part that can be read by itself; rows: of the file."""

    url: str
    name: str
    bytes: int
    starts: tuple[int, ...]
    rows: int

    def part_start(self, row: int) -> int:
        """The first row of the part that holds `row`."""
        return max((start for start in self.starts if start <= row), default=0)


@dataclass(frozen=True)
class Piece:
    """Rows [first, stop) of a file; batch None: they cannot be read, and `problem` says why."""

    first: int
    stop: int
    batch: pa.RecordBatch | None
    problem: str = ""

    def cut(self, first: int, stop: int) -> "Piece":
        batch = None if self.batch is None else self.batch.slice(first - self.first, stop - first)
        return Piece(first, stop, batch, self.problem)


def describe(url: str, name: str, size: int) -> tuple[RowFile, pa.Schema]:
    """Raises ConfigError when the file is damaged: keys are places in the source, so all of it must be known before."""
    if url.endswith(".arrow"):
        return _describe_arrow(url, name, size)
    with storage.explain_read_errors(url), storage.open_read(url) as handle, explain_table_errors(url):
        parquet = pq.ParquetFile(handle)
        rows, starts = 0, []
        for group in range(parquet.num_row_groups):
            starts.append(rows)
            rows += parquet.metadata.row_group(group).num_rows
        return _believable(RowFile(url, name, size, tuple(starts), rows)), with_names(parquet.schema_arrow)


def _believable(file: RowFile) -> RowFile:
    """A file that promises a billion rows would be listed for days."""
    if file.rows > file.bytes:
        raise ConfigError(
            f"{file.url}: claims {file.rows} rows of images in {file.bytes} bytes, which cannot be. Download or write it again."
        )
    return file


def pieces(file: RowFile, columns: Sequence[str], row: int) -> Iterator[Piece]:
    """Chosen columns of all rows from the part on that holds `row`, without gaps."""
    found = _arrow_pieces(file, columns) if file.url.endswith(".arrow") else _parquet_pieces(file, columns, row)
    position = file.part_start(row)
    for piece in found:
        if piece.first < piece.stop:
            yield piece
            position = piece.stop
    if position < file.rows:
        yield Piece(position, file.rows, None, "the file has fewer rows than it had, or than it says")


def _parquet_pieces(file: RowFile, columns: Sequence[str], row: int) -> Iterator[Piece]:
    with storage.explain_read_errors(file.url), storage.open_read(file.url) as handle:
        parquet = pq.ParquetFile(handle)
        for group, start in enumerate(file.starts):
            stop = [*file.starts, file.rows][group + 1]
            if stop <= row:
                continue
            position, problem = start, "its row group has fewer rows than it says"
            try:
                for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=list(columns), use_threads=False):
                    cut = batch.slice(0, stop - position)
                    yield Piece(position, position + len(cut), cut)
                    position += len(cut)
            except (pa.ArrowException, OSError) as error:
                if not storage.is_local(file.url):
                    raise
                problem = f"its row group is damaged ({_words(error)})"
            yield Piece(position, stop, None, problem)


# ---------------------------------------------------------------- Arrow


def _describe_arrow(url: str, name: str, size: int) -> tuple[RowFile, pa.Schema]:
    if not storage.is_local(url):
        raise ConfigError(
            f"{url}: Arrow files are read from a local disk only. Copy the folder here, or save the data set as Parquet "
            "(`dataset.to_parquet`)."
        )
    with storage.open_read(url), explain_table_errors(url), _arrow_batches(url) as (schema, batches):
        return _believable(RowFile(url, name, size, (0,), sum(len(batch) for batch in batches))), with_names(schema)


def _arrow_pieces(file: RowFile, columns: Sequence[str]) -> Iterator[Piece]:
    position = 0
    with contextlib.suppress(pa.ArrowException, OSError), _arrow_batches(file.url) as (_, batches):
        for batch in batches:
            cut, problem = batch.select(list(columns)).slice(0, file.rows - position), ""
            try:
                cut.validate(full=True)  # else offsets that point elsewhere would be followed
            except pa.ArrowException as error:
                problem = f"its record batch is damaged ({_words(error)})"
            yield Piece(position, position + len(cut), None if problem else cut, problem)
            position += len(cut)


@contextlib.contextmanager
def _arrow_batches(url: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Mapped, not read: a batch that is passed over costs nothing."""
    with pa.memory_map(str(storage.local_path(url))) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(mapped)
            yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            mapped.seek(0)
            stream = pa.ipc.open_stream(mapped)
            yield stream.schema, iter(stream)


def arrow_arrays(file: RowFile, column: str) -> Iterator[pa.Array]:
    """One column of all that can be read."""
    for piece in pieces(file, [column], 0):
        if piece.batch is not None:
            yield piece.batch.column(0)


def _words(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))[:150]

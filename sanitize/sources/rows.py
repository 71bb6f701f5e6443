"""Samples that are rows of tables with the images in them: Hugging Face `datasets` as Parquet or as `save_to_disk` left them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sanitize.errors import ConfigError, ShardError, StorageError
from sanitize.records import Shard
from sanitize.sources.columns import (
    Columns,
    Labels,
    as_bytes,
    captions,
    class_names,
    distinct_texts,
    holds_text,
    image_column,
    other_columns,
    text_labels,
)
from sanitize.sources.row_files import BATCH, Piece, RowFile, arrow_arrays, describe, pieces
from sanitize.sources.samples import MAX_SAMPLES, ReadSamples, SourceSample, Wanted, image_sample
from sanitize.stages.shards import head_tails, printable


@dataclass(frozen=True)
class RowSource:
    files: tuple[RowFile, ...]
    columns: Columns
    labels: Labels
    identity: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels.names

    @property
    def notes(self) -> tuple[str, ...]:
        columns = self.columns
        named = {"images": columns.image, "labels": columns.label, "captions": columns.caption}
        return tuple(f"{what} from column {printable(name)}" for what, name in named.items() if name)

    def reader(self) -> ReadSamples:
        return RowReader(self).read


def open_rows(files: Sequence[tuple[str, str, int]], wanted: Wanted) -> RowSource:
    """files: (url, name, bytes) of each, in order; all of them have the columns of the first."""
    described = [describe(*file) for file in files]
    where, schema = described[0][0].url, described[0][1]
    image = image_column(schema, wanted.images, where)
    if not image:
        raise ConfigError(
            f"{where}: no column holds image bytes (columns: {', '.join(map(printable, schema.names[:20]))}). A table of paths is packed "
            "as a single file; of a data set whose images are files, save it with its images embedded."
        )
    columns = other_columns(schema, image, wanted, where)
    for file, other in described:
        for name in columns.all:
            if name not in other.names or other.field(name).type != schema.field(name).type:
                raise ConfigError(
                    f"{file.url}: its column {printable(name)} is not that of {where}. Pack them into two folders."
                )
    found = tuple(file for file, _ in described)
    if sum(file.rows for file in found) > MAX_SAMPLES:
        raise ConfigError(f"{where}: holds more than {MAX_SAMPLES} rows. Pack its files into several folders.")
    hashes = head_tails([Shard(file.url, file.name, file.bytes) for file in found])
    identity = {"files": {file.name: [file.bytes, hashes[file.name]] for file in found}, **columns.__dict__}
    return RowSource(found, columns, _labels(found, schema, columns.label), identity)


def _labels(files: Sequence[RowFile], schema: pa.Schema, label: str) -> Labels:
    if label and holds_text(schema.field(label).type):
        arrays = (array for file in files for array in arrow_arrays(file, label))
        return text_labels(distinct_texts(arrays, f"{files[0].url}, column {printable(label)}"))
    return Labels(names=class_names(schema, label))


class RowReader:
    """Reads forwards and keeps its place, so that shard after shard no row is decoded twice."""

    def __init__(self, source: RowSource) -> None:
        self._source = source
        self._file: RowFile | None = None
        self._pieces: Iterator[Piece] = iter(())
        self._piece = Piece(0, 0, None)

    def read(self, start: int, stop: int) -> Iterator[SourceSample]:
        offset = 0
        for file in self._source.files:
            first, last = max(start - offset, 0), min(stop - offset, file.rows)
            if first < last:
                yield from self._read_file(file, first, last)
            offset += file.rows

    def _read_file(self, file: RowFile, first: int, last: int) -> Iterator[SourceSample]:
        try:
            if self._file != file or first < self._piece.first or file.part_start(first) > self._piece.stop:
                self._file, self._piece = file, Piece(0, 0, None)
                self._pieces = pieces(file, self._source.columns.all, first)
            while first < last:
                if self._piece.stop <= first:
                    self._piece = next(self._pieces)
                    continue
                stop = min(last, self._piece.stop, first + BATCH)
                yield from self._samples(file.name, self._piece.cut(first, stop))
                first = stop
        except (StorageError, pa.ArrowException) as error:  # gone, cut off or replaced since it was described
            may_pass = isinstance(error, StorageError) and error.may_pass
            raise ShardError(f"{file.url}: {error}", may_pass=may_pass) from error
        finally:
            if first < last:
                self._file = None  # its place is lost

    def _samples(self, name: str, piece: Piece) -> Iterator[SourceSample]:
        rows = range(piece.first, piece.stop)
        if piece.batch is None:
            for row in rows:
                yield SourceSample(printable(name), row, None, "", problem=piece.problem)
            return
        columns, batch, nothing = self._source.columns, piece.batch, [None] * len(rows)
        images, names = _images(batch.column(columns.image))
        labels = self._source.labels.numbers(batch.column(columns.label)) if columns.label else nothing
        texts = captions(batch.column(columns.caption)) if columns.caption else nothing
        for row, image, path, label, text in zip(rows, images, names, labels, texts, strict=True):
            sample = image_sample(printable(name), row, path, image, label, text)
            if image is None and path:
                sample = _by_path_alone(sample, path)
            yield sample


def _images(column: pa.Array) -> tuple[list[bytes | None], list[str]]:
    """Bytes of each image, and the name of the file that it was."""
    if not pa.types.is_struct(column.type):
        return column.to_pylist(), [""] * len(column)
    images = pc.struct_field(column, "bytes").to_pylist()
    if column.type.get_field_index("path") < 0 or not holds_text(column.type.field("path").type):
        return images, [""] * len(column)
    paths = as_bytes(pc.struct_field(column, "path")).to_pylist()
    return images, [os.fsdecode(path or b"") for path in paths]


def _by_path_alone(sample: SourceSample, path: str) -> SourceSample:
    """A data set from somebody else must not name files of this machine that end up in shards."""
    problem = f"holds no image bytes, only the path {printable(path)[:200]}, which is not opened"
    return SourceSample(sample.source, sample.row, None, "", problem=problem)

"""Samples that are one image file each: those of a folder, or those that a manifest names."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sanitize import storage
from sanitize.errors import ShardError, StorageError
from sanitize.sources.samples import ReadSamples, SourceSample, image_sample
from sanitize.stages.shards import MAX_IMAGE_BYTES, printable

ENTRIES = pa.schema(
    [
        ("path", pa.large_binary()),  # below the root, or absolute, or a URL; bytes: a file name need not be UTF-8
        ("label", pa.int64()),
        ("caption", pa.large_binary()),
        ("size", pa.int64()),  # of the file when it was listed; null where nobody listed it
    ]
)
REMOTE_READS = 16  # at a time, each one image; a local disk is asked for one


@dataclass(frozen=True)
class FileSource:
    """root: what relative paths begin at; entries: rows of ENTRIES, one a sample; numbered: rows are those of a manifest."""

    root: str
    entries: pa.Table
    classes: tuple[str, ...]
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def samples(self) -> int:
        return len(self.entries)

    def reader(self) -> ReadSamples:
        return self._read

    def _read(self, start: int, stop: int) -> Iterator[SourceSample]:
        rows = list(enumerate(self.entries.slice(start, stop - start).to_pylist(), start))
        remote = not all(storage.is_local(self._place(entry)) for _, entry in rows)
        return storage.read_ahead(self._sample, rows, REMOTE_READS) if remote else map(self._sample, rows)

    def _place(self, entry: dict[str, Any]) -> str:
        path = os.fsdecode(entry["path"] or b"")
        return path if not storage.is_local(path) or path.startswith(("/", "~")) else storage.join(self.root, path)

    def _sample(self, numbered_entry: tuple[int, dict[str, Any]]) -> SourceSample:
        number, entry = numbered_entry
        path, row = os.fsdecode(entry["path"] or b""), number if self.numbered else None
        try:
            data = _image_file(self._place(entry), entry["size"]) if path else None
        except StorageError as error:
            if error.may_pass and path_in_bucket(self._place(entry)):  # the store has it: ask again later
                raise ShardError(printable(str(error)), may_pass=True) from error
            return SourceSample(printable(path), row, None, "", problem=printable(str(error)))
        return image_sample(printable(path), row, path, data, entry["label"], entry["caption"])


def path_in_bucket(path: str) -> bool:
    return path.startswith(storage.BUCKETS)


def _image_file(path: str, size: int | None) -> bytes:
    """At most one byte more than an image may have, in one request where the file is remote."""
    limit = MAX_IMAGE_BYTES + 1
    try:
        data = storage.read_range(path, 0, limit)
    except ValueError as error:  # a name that no file can have
        raise StorageError(f"{path}: cannot be opened ({error}). Correct the path.") from None
    if size is not None and len(data) != min(size, limit):
        raise StorageError(
            f"{path}: {len(data)} bytes were read, its size was {size}: the connection was cut, or the file changed meanwhile. Run the "
            "same command again.",
            may_pass=not storage.is_local(path),
        )
    return data

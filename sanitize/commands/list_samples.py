"""`sanitize list`: what a scan keeps and removes, by original file or row, as one table or a list of names.

A command of its own, not an option of `clean`: it decides nothing, so no policy given or forgotten can change the clean shards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from sanitize import storage
from sanitize.artifacts.originals import FOLDER, read_originals
from sanitize.artifacts.scan_folder import Run, ScanFolder, ShardMarker
from sanitize.errors import ConfigError, RefusedError, ShardError, check
from sanitize.hashing import HashingWriter
from sanitize.paths import AnyPath, path_text
from sanitize.stages.decision_table import FLAT, flat

SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # null where the shards were not packed by us
        ("row", pa.int64()),
        *FLAT,
    ]
)
ENDINGS = (".parquet", ".csv", ".txt")
ONLY = ("kept", "removed")
WriteTable = Callable[[pa.Table], object]


@dataclass(frozen=True)
class ListResult:
    """Counts of listed samples. with_original: whose source is known; failed: one message for each shard that is not listed."""

    file: str
    samples: int
    kept: int
    removed: int
    with_original: int
    failed: tuple[str, ...]


def list_samples(scanned: AnyPath, file: AnyPath, *, only: str = "", originals: AnyPath = "") -> ListResult:
    """Write the decisions of a scan to `file`, shard after shard.

    only: "kept", "removed", "" = both; originals: the folder that `pack` wrote, "" = where the scanned shards lie.
    """
    scanned, file = path_text(scanned, "scanned"), path_text(file, "file")
    originals = path_text(originals, "originals")
    folder = ScanFolder(scanned)
    run, summary = folder.run(), folder.decided()
    ending = _checked_ending(file, only)
    _refuse_to_overwrite(folder, file)
    failed = summary.not_split()
    samples = kept = known = 0
    with storage.atomic_write(file) as target, WRITERS[ending](target) as write:
        markers = [marker for marker in folder.markers(sorted(run.shards)) if marker.clean]
        for table in storage.read_ahead(lambda marker: _table_or_error(folder, run, marker, originals), markers):
            if isinstance(table, str):
                failed.append(table)
                continue
            chosen = table.filter(_wanted(table, only))
            write(chosen)
            samples += len(chosen)
            kept += pc.sum(chosen.column("keep")).as_py() or 0
            known += len(chosen) - chosen.column("source").null_count
    return ListResult(file, samples, kept, samples - kept, known, tuple(sorted(failed)))


def _checked_ending(file: str, only: str) -> str:
    ending = next((ending for ending in ENDINGS if file.endswith(ending)), "")
    check(bool(ending), f"{file}: its ending says how it is written. Name a file that ends with {', '.join(ENDINGS)}.")
    check(only in ("", *ONLY), f"only: {only!r} is not kept or removed.")
    check(
        ending != ".txt" or bool(only),
        f"{file}: a text file holds names alone. Say which: --only kept or --only removed; .csv and .parquet tell them apart.",
    )
    return ending


def _refuse_to_overwrite(folder: ScanFolder, file: str) -> None:
    """A listing must not take the place of what it is made from."""
    place = storage.real(file)
    taken = [storage.real(folder.at(name)) + "/" for name in ("scores", "decisions")]
    if place.startswith(tuple(taken)) or place.rsplit("/", 2)[-2] == FOLDER:
        raise ConfigError(f"{file}: lies where a command keeps its own tables. Name another file.")


def _table_or_error(folder: ScanFolder, run: Run, marker: ShardMarker, packed: str) -> pa.Table | str:
    try:
        return _shard_table(folder, marker, run.shard(marker.shard).url, packed)
    except (ShardError, RefusedError) as error:
        return str(error)


def _shard_table(folder: ScanFolder, marker: ShardMarker, url: str, packed: str) -> pa.Table:
    """Rows of SCHEMA."""
    decisions = folder.decision_rows(marker)
    keys = decisions.column("key").to_pylist()
    found = read_originals(url, packed, keys, marker.input.sha256)
    if found is None:
        if packed:
            raise ShardError(f"{marker.shard}: has no originals in {packed}. Name the folder it was packed into.")
        empty = (pa.nulls(len(keys), kind) for kind in (pa.string(), pa.int64()))
        found = pa.table(dict(zip(("source", "row"), empty, strict=True)))
    return pa.table([*found.columns, *flat(decisions).columns], schema=SCHEMA)


def _wanted(table: pa.Table, only: str) -> pa.ChunkedArray:
    keep = table.column("keep")
    return {"kept": keep, "removed": pc.invert(keep), "": pc.is_valid(keep)}[only]


# ---------------------------------------------------------------- writing


@contextmanager
def _parquet(target: HashingWriter) -> Iterator[WriteTable]:
    with pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        yield writer.write_table


@contextmanager
def _csv(target: HashingWriter) -> Iterator[WriteTable]:
    with csv.CSVWriter(target, SCHEMA) as writer:
        yield writer.write_table


@contextmanager
def _text(target: HashingWriter) -> Iterator[WriteTable]:
    """One original a line: a file's name, or file and row; where it is not known, shard and key; parts between tabs."""
    yield lambda table: target.write("".join(f"{_line(row)}\n" for row in table.to_pylist()).encode())


def _line(row: dict[str, object]) -> str:
    known = row["source"] is not None
    parts = (row["source"], row["row"]) if known else (row["shard"], row["key"])
    return "\t".join(str(part) for part in parts if part is not None)


WRITERS = {".parquet": _parquet, ".csv": _csv, ".txt": _text}

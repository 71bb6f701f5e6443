"""originals/<stem>.parquet beside packed shards: where every sample comes from. Written by `pack`, read by `list`."""

import contextlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sanitize import storage
from sanitize.errors import ShardError
from sanitize.hashing import HashingWriter
from sanitize.parquet import read_table
from sanitize.stages.unpacking import ending_of

FOLDER = "originals"
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),  # the place in the source; of every sample, packed or not
        ("index", pa.int64()),  # in the shard; null when it is not there, then `problem` says why
        ("source", pa.string()),  # the file, below what was packed or as the manifest names it
        ("row", pa.int64()),  # of that file (of the manifest); null where the file is the image
        ("problem", pa.string()),
    ]
)


def name_of(stem: str) -> str:
    return f"{FOLDER}/{stem}.parquet"


def write_originals(path: str, table: pa.Table, tar_sha256: str) -> HashingWriter:
    """Rows of SCHEMA. tar_sha256: of the shard they belong to."""
    with storage.atomic_write(path) as target:
        pq.write_table(table.replace_schema_metadata({"tar_sha256": tar_sha256}), target, compression="zstd")
    return target


def read_problems(path: str, limit: int) -> list[str]:
    """Of the samples of one shard that could not be packed, the first `limit`."""
    with storage.explain_read_errors(path), storage.open_read(path) as file:
        table = read_table(file, ["source", "row", "problem"])
    rows = table.filter(pc.not_equal(table.column("problem"), "")).to_pylist()
    return [_told(row["source"], row["row"], row["problem"]) for row in rows[:limit]]


def _told(source: str, row: int | None, problem: str) -> str:
    return f"{source}{'' if row is None else f', row {row}'}: {problem}"


def read_originals(shard_url: str, folder: str, keys: Sequence[str], tar_sha256: str) -> pa.Table | None:
    """(source, row) of the samples of one shard, in its order; None when it was not packed by us.

    folder: where originals/ lies, "" = beside the shard. keys, tar_sha256: of the shard as it was scanned.
    Raises ShardError when there are originals, but of another shard.
    """
    place, name = shard_url.rsplit("/", 1)
    path = storage.join(folder or place, name_of(name.removesuffix(ending_of(name))))
    if not storage.exists(path):
        return None
    table = None
    with (
        storage.explain_read_errors(path),
        storage.open_read(path) as file,
        contextlib.suppress(pa.ArrowException, OSError),
    ):
        table = read_table(file)
    if table is None or table.schema.remove_metadata() != SCHEMA:
        raise ShardError(
            f"{path}: is no table of originals, or damaged. Delete it and run the same `sanitize pack` again."
        )
    packed = table.filter(table.column("index").is_valid())
    metadata = table.schema.metadata or {}
    if metadata.get(b"tar_sha256") != tar_sha256.encode() or packed.column("key").to_pylist() != list(keys):
        raise ShardError(
            f"{path}: belongs to another {name} than the one that was scanned. Scan the packed shards themselves, or name the folder "
            "they were packed into with --originals."
        )
    return packed.select(["source", "row"])

"""A manifest: a CSV or Parquet table with the path of an image a row, and its caption and label where it has them.

Relative paths begin at the manifest's folder; absolute ones and fsspec URLs are taken as they are. So a manifest is trusted as
settings are: it names files to read.
"""

from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from sanitize import storage
from sanitize.parquet import read_table
from sanitize.sources.columns import (
    Columns,
    Labels,
    as_bytes,
    captions,
    class_names,
    distinct_texts,
    explain_table_errors,
    holds_text,
    other_columns,
    path_column,
    text_labels,
    with_names,
)
from sanitize.sources.files import ENTRIES, FileSource
from sanitize.sources.samples import Wanted
from sanitize.stages.shards import printable

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def open_manifest(path: str, wanted: Wanted) -> FileSource:
    schema = _schema(path)
    columns = other_columns(schema, path_column(schema, wanted.images, path), wanted, path)
    table = _read(path, columns).combine_chunks()
    labels = Labels(names=class_names(schema, columns.label))
    if columns.label and holds_text(schema.field(columns.label).type):
        chunks = table.column(columns.label).chunks
        labels = text_labels(distinct_texts(chunks, f"{path}, column {printable(columns.label)}"))
    identity: dict[str, Any] = {
        "files": storage.file_sha256(path),
        "images": columns.image,
        "labels": columns.label,
        "captions": columns.caption,
    }
    taken = [f"{what} from column {printable(name)}" for what, name in _named(columns).items() if name]
    folder = path.rsplit("/", 1)[0]
    return FileSource(folder, _entries(table, columns, labels), labels.names, identity, tuple(taken), numbered=True)


def _named(columns: Columns) -> dict[str, str]:
    return {"paths": columns.image, "labels": columns.label, "captions": columns.caption}


def _entries(table: pa.Table, columns: Columns, labels: Labels) -> pa.Table:
    """Rows of ENTRIES, chunk by chunk."""
    chunks = []
    for batch in table.to_batches(max_chunksize=1 << 16):
        numbers = labels.numbers(batch.column(columns.label)) if columns.label else [None] * len(batch)
        texts = captions(batch.column(columns.caption)) if columns.caption else [None] * len(batch)
        chunk = {
            "path": as_bytes(batch.column(columns.image)),
            "label": pa.array(numbers, pa.int64()),
            "caption": pa.array(texts, pa.large_binary()),
            "size": pa.nulls(len(batch), pa.int64()),
        }
        chunks.append(pa.record_batch(chunk, schema=ENTRIES))
    return pa.Table.from_batches(chunks, ENTRIES)


def _schema(path: str) -> pa.Schema:
    if path.endswith(".parquet"):
        with storage.explain_read_errors(path), storage.open_read(path) as file, explain_table_errors(path):
            return with_names(pq.read_schema(file))
    with (
        storage.open_read(path) as file,
        explain_table_errors(path),
        csv.open_csv(file, parse_options=_parsing(path)) as reader,
    ):
        return pa.schema([(name, pa.string()) for name in with_names(reader.schema).names])


def _read(path: str, columns: Columns) -> pa.Table:
    with storage.explain_read_errors(path), storage.open_read(path) as file, explain_table_errors(path):
        if path.endswith(".parquet"):
            return read_table(file, columns.all)
        text = dict.fromkeys(columns.all, pa.string())
        convert = csv.ConvertOptions(check_utf8=False, column_types=text, include_columns=columns.all)
        return csv.read_csv(file, parse_options=_parsing(path), convert_options=convert)


def _parsing(path: str) -> csv.ParseOptions:
    return csv.ParseOptions(delimiter=DELIMITERS[path[-4:]], newlines_in_values=True)

"""Files that say which samples a person decides on: text with a key a line, CSV or Parquet."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sanitize import storage
from sanitize.artifacts.reviews import WORDS
from sanitize.errors import ConfigError, check
from sanitize.parquet import read_table
from sanitize.stages.shards import printable

COLUMNS = ("shard", "key", "index", "word")
LONGEST = 1 << 20  # characters of a CSV field; keys may be long
HOW = "Write one key a line, or a .csv or .parquet with columns shard and key"


@dataclass(frozen=True)
class AskedFor:
    """One line. shard: stem, "" = not said; key as score tables write it; index: None = not said; where: file and line, for messages."""

    shard: str
    key: str
    index: int | None
    word: str
    where: str


def read_review_file(path: str, word: str = "") -> list[AskedFor]:
    """word: what to do with the samples of the file, "" = its column `word` says it. Raises ConfigError for what cannot be used."""
    check(storage.exists(path), f"{path}: no such file. {HOW}.")
    data = storage.read_bytes(path)
    if path.endswith(".parquet"):
        rows = _of_parquet(path, data)
    elif path.endswith(".csv") or not word:
        rows = _of_csv(path, _text(path, data))
    else:
        rows = _of_lines(path, _text(path, data))
    asked = [_asked_for(where, row, word) for where, row in rows]
    check(bool(asked), f"{path}: names no sample. {HOW}.")
    return asked


def _asked_for(where: str, row: Mapping[str, Any], word: str) -> AskedFor:
    key, index, own = row.get("key") or "", row.get("index"), row.get("word") or ""
    check(bool(key), f"{where}: has no key. {HOW}.")
    check(
        not (word and own), f"{where}: has a column `word`, which would be passed over. Give the file with --decisions."
    )
    check(bool(word) or own in WORDS, f"{where}: {printable(own)[:80]!r} is no word. Write {', '.join(WORDS)}.")
    try:
        number = None if index in (None, "") else int(index)
    except ValueError:
        raise ConfigError(
            f"{where}: index {printable(str(index))[:80]!r} is no number. Leave it out, or correct it."
        ) from None
    return AskedFor(row.get("shard") or "", printable(key), number, word or own, where)


def _text(path: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None


def _of_lines(path: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A key, or what `sanitize list` writes into a .txt: shard, tab, key."""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line:
            shard, _, key = line.rpartition("\t")
            yield f"{path}, line {number}", {"shard": shard, "key": key}


def _of_csv(path: str, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    before = csv.field_size_limit(LONGEST)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        _require_columns(path, reader.fieldnames or ())
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ConfigError(f"{path}: is no CSV ({error}). {HOW}.") from None
    finally:
        csv.field_size_limit(before)


def _of_parquet(path: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: is no readable Parquet ({' '.join(str(error).split())[:200]}). {HOW}.") from None
    _require_columns(path, table.column_names)
    known = table.select([name for name in COLUMNS if name in table.column_names])
    for name in set(known.column_names) - {"index"}:
        kind = known.schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        check(text, f"{path}: column {name} holds {kind}, text was expected. {HOW}.")
    for number, row in enumerate(known.to_pylist(), 1):
        yield f"{path}, row {number}", row


def _require_columns(path: str, names: Any) -> None:
    found = ", ".join(printable(str(name)) for name in list(names)[:20])
    check("key" in names, f"{path}: has no column `key` (columns: {found[:200]}). {HOW}.")

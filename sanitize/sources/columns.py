"""Which columns of a table hold images, labels and captions, and how their values are taken."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sanitize.errors import ConfigError
from sanitize.sources.samples import FOLDERS, NONE, Wanted
from sanitize.stages.shards import printable

IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "photo")
PATH_NAMES = ("path", "file_name", "filename", "file", "filepath", "file_path", "image_path", "image", "url")
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label", "category")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt", "title")
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Columns:
    """Names in the table; "" = there is none."""

    image: str
    label: str
    caption: str

    @property
    def all(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.image, self.label, self.caption) if name))


def with_names(schema: pa.Schema) -> pa.Schema:
    """Itself. Raises UnicodeDecodeError when a column's name is not UTF-8, as a damaged file may have it."""
    assert all(isinstance(name, str) for name in schema.names)
    return schema


# ---------------------------------------------------------------- types


def holds_bytes(kind: pa.DataType) -> bool:
    """Images in the table itself: bytes, or Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def holds_labels(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind)) or holds_text(kind)


def holds_captions(kind: pa.DataType) -> bool:
    """Texts, or lists of them."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return holds_text(kind.value_type) if is_list else holds_text(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


# ---------------------------------------------------------------- choosing


def image_column(schema: pa.Schema, wanted: str, where: str) -> str:
    """The column with image bytes; "" when there is none. Raises ConfigError when it is not clear which."""
    if wanted:
        _require(schema, wanted, where, "--images")
        return wanted if holds_bytes(schema.field(wanted).type) else ""
    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_NAMES if name in found]
    if len(found) > 1 and not named:
        raise ConfigError(f"{where}: which column holds the images? Name one: --images {_shown(found, ' or ')}.")
    return (named or found or [""])[0]


def path_column(schema: pa.Schema, wanted: str, where: str) -> str:
    if wanted:
        _require(schema, wanted, where, "--images")
    names = [wanted] if wanted else [name for name in PATH_NAMES if name in schema.names]
    found = [name for name in names if holds_text(schema.field(name).type)]
    if not found:
        raise ConfigError(
            f"{where}: no column holds images or their paths (columns: {_shown(schema.names)}). Name one: --images COLUMN."
        )
    return found[0]


def other_columns(schema: pa.Schema, image: str, wanted: Wanted, where: str) -> Columns:
    if wanted.labels == FOLDERS:
        raise ConfigError(f"--labels folders: {where} is a table. Name the column: --labels COLUMN, or --labels none.")
    label = _choose(schema, wanted.labels, LABEL_NAMES, "labels", image, where)
    return Columns(image, label, _choose(schema, wanted.captions, CAPTION_NAMES, "captions", image, where))


def _choose(schema: pa.Schema, wanted: str, usual: Iterable[str], option: str, image: str, where: str) -> str:
    usable = holds_labels if option == "labels" else holds_captions
    if wanted == NONE:
        return ""
    if not wanted:
        fitting = (name for name in usual if name in schema.names and name != image)
        return next((name for name in fitting if usable(schema.field(name).type)), "")
    _require(schema, wanted, where, f"--{option}")
    kind = schema.field(wanted).type
    if not usable(kind):
        expected = "whole numbers or text" if option == "labels" else "text, or lists of text"
        raise ConfigError(f"--{option} {wanted}: {where} holds {printable(str(kind))} there, {expected} was expected.")
    return wanted


def _require(schema: pa.Schema, name: str, where: str, option: str) -> None:
    if schema.names.count(name) != 1:
        what = "comes more than once" if name in schema.names else "is no column"
        raise ConfigError(f"{option} {name}: {what} of {where}. It has: {_shown(schema.names)}.")


def _shown(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    return separator.join(printable(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Labels:
    """Values of a label column → the integers of .cls members.

    texts: in the order of their integers; () = the values are integers, as numbers or as decimal text
    names: what the classes are called, in the same order
    """

    texts: tuple[bytes, ...] = ()
    names: tuple[str, ...] = ()

    def numbers(self, column: pa.Array) -> list[int | None]:
        """None where there is no label: null, or an empty text."""
        if not holds_text(column.type):
            return [None if value is None else int(value) for value in column.to_pylist()]
        column = as_bytes(column)
        if self.texts:
            return list(pc.index_in(column, value_set=pa.array(self.texts, pa.large_binary())).to_pylist())
        return [int(text) if text else None for text in column.to_pylist()]


def text_labels(distinct: Iterable[bytes]) -> Labels:
    """Of all texts of a label column: classes in their sorted order, unless every one of them is a number already."""
    texts = sorted(set(distinct) - {b""})
    if all(text.isdigit() and len(text) <= 9 and (text == b"0" or text[:1] != b"0") for text in texts):
        return Labels()
    return Labels(tuple(texts), tuple(printable(text.decode("utf-8", "surrogateescape")) for text in texts))


def distinct_texts(columns: Iterable[pa.Array], where: str) -> set[bytes]:
    found: set[bytes] = set()
    for column in columns:
        found.update(text for text in pc.unique(as_bytes(column)).to_pylist() if text is not None)
        if len(found) > MAX_CLASSES:
            raise ConfigError(
                f"{where}: holds more than {MAX_CLASSES} different texts, which are no classes. Name another column with --labels, or "
                "leave labels out with --labels none."
            )
    return found


def class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """As Hugging Face `datasets` keeps them in the metadata of a file; () when it does not."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    right = isinstance(names, list) and len(names) <= MAX_CLASSES and all(isinstance(name, str) for name in names)
    return tuple(printable(name) for name in names) if right else ()


def captions(column: pa.Array) -> list[bytes | None]:
    """UTF-8 as it is; of a list its first text; None where there is none."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        firsts = [texts[0] if texts else None for texts in column.cast(pa.large_list(pa.large_binary())).to_pylist()]
        return [text or None for text in firsts]
    return [text or None for text in as_bytes(column).to_pylist()]


def as_bytes(column: pa.Array) -> pa.Array:
    """Text as its bytes: a file may hold what is not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


@contextlib.contextmanager
def explain_table_errors(path: str) -> Iterator[None]:
    """What pyarrow says of a damaged file, or of names of columns that are not UTF-8, in words."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = printable(" ".join(str(error).split()))[:200]
        raise ConfigError(f"{path}: cannot be read as a table ({why}). Correct it, or write it again.") from None

"""Tar shards: list and open them, tell their images, end the tars that byte ranges are copied into."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import braceexpand
import fsspec

from sanitize import storage
from sanitize.errors import ConfigError, ShardError, StorageError
from sanitize.records import Sample, Shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")
BLOCK = 512
RECORD = 20 * BLOCK  # tar pads archives to this
MAX_IMAGE_BYTES = 1 << 28


# ---------------------------------------------------------------- listing


def list_shards(patterns: Sequence[str]) -> list[Shard]:
    """Shards named by folders, tar files, globs and braces, local or fsspec URLs; sorted by stem.

    Raises ConfigError when something is missing, nothing is found, or two inputs would get the same name.
    """
    if isinstance(patterns, str):  # a str is a sequence of str: every letter would be looked for
        raise ConfigError(f"shards: {patterns!r} is one text, a list of paths was expected. Write ({patterns!r},).")
    found: dict[str, Shard] = {}
    for pattern in patterns:
        matches = [shard for url in braceexpand.braceexpand(pattern) for shard in _list_one(url)]
        for shard in matches:
            other = found.setdefault(shard.stem, shard)
            if other.url != shard.url:
                raise ConfigError(
                    f"{other.url} and {shard.url} would both write {shard.stem}.parquet. "
                    "Give their common parent folder, so that sub-folders keep them apart, or scan them into two folders."
                )
    return sorted(found.values(), key=lambda shard: shard.stem)


def _list_one(url: str) -> list[Shard]:
    url = storage.absolute(url)
    fs, inner = fsspec.core.url_to_fs(url)
    protocol = "" if storage.is_local(url) else url.split("://", 1)[0] + "://"
    try:
        if any(character in inner for character in "*?["):
            root = re.split(r"[*?\[]", inner, maxsplit=1)[0].rsplit("/", 1)[0]
            paths = [path for path in fs.glob(inner) if path.endswith(".tar")]
        elif fs.isdir(inner):
            root, paths = inner.rstrip("/"), [path for path in fs.find(inner) if path.endswith(".tar")]
        elif fs.exists(inner):
            root, paths = inner.rsplit("/", 1)[0], [inner]
        else:
            raise ConfigError(f"{url}: no such file or folder. Check the path; a folder means every .tar below it.")
        sizes = [int(fs.size(path)) for path in paths]
    except PermissionError:
        raise StorageError(f"{url}: no permission to read. Check the owner and mode of the folder.") from None
    paths_sizes = [(p, s) for p, s in zip(paths, sizes, strict=True) if not p.rsplit("/", 1)[-1].startswith(".")]
    if not paths_sizes:
        raise ConfigError(
            f"{url}: no .tar file found. Give a folder with WebDataset shards, or a glob that matches some."
        )
    return [
        Shard(
            protocol + path.removeprefix("/" if protocol else ""), path[len(root) :].lstrip("/").removesuffix(".tar"), s
        )
        for path, s in paths_sizes
    ]


def head_tail_sha256(shard: Shard, span: int = 1 << 16) -> str:
    """A cheap identity of a shard: hash of its size, first and last 64 KiB. The whole hash is kept by the scan."""
    with storage.open_read(shard.url) as file:
        head = file.read(span)
        file.seek(max(0, shard.size - span))
        return hashlib.sha256(b"%d|" % shard.size + head + file.read(span)).hexdigest()


# ---------------------------------------------------------------- opening


def open_shard(shard: Shard) -> IO[bytes]:
    """Open one shard of a run; one that has gone or cannot be opened fails alone."""
    try:
        return storage.open_read(shard.url)
    except StorageError as error:
        raise ShardError(str(error)) from None


def read_block(file: IO[bytes], size: int, url: str) -> bytes:
    """Read, and name the shard when the device or the network fails."""
    try:
        return file.read(size)
    except OSError as error:
        raise ShardError(
            f"{url}: cannot be read ({error}). Check the device or connection, then run the same command."
        ) from error


def is_image(extension: str, image_member: str = "") -> bool:
    """Whether a member is scored: by the extension asked for, else by any of IMAGE_EXTENSIONS."""
    if image_member:
        return extension == image_member.lower().lstrip(".")
    return extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS


def printable(name: str) -> str:
    """A member name as valid Unicode: bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- copying


def sample_ranges(samples: Iterable[Sample]) -> Iterator[tuple[int, int, int]]:
    """(index, start, end) of every member, in tar order."""
    for sample in samples:
        for member in sample.members:
            yield sample.index, member.start, member.end


def end_archive(target: storage.HashingWriter) -> None:
    """Two zero blocks, then padding to a whole record, as every tar program writes."""
    target.write(bytes(2 * BLOCK))
    target.write(bytes(-target.size % RECORD))

"""Tar shards: list and open them, tell their images, end the tars that byte ranges are copied into."""

import contextlib
import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import braceexpand
import fsspec

from sanitize import storage
from sanitize.errors import ConfigError, ShardError, StorageError
from sanitize.hashing import HashingWriter
from sanitize.paths import AnyPath, path_texts
from sanitize.records import Shard
from sanitize.stages.not_shards import refuse_compressed, refuse_data_to_pack
from sanitize.stages.unpacking import ENDINGS, UnpackedShard, ending_of, is_compressed, unpack

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")
BLOCK = 512
RECORD = 20 * BLOCK  # tar pads archives to this
MAX_IMAGE_BYTES = 1 << 28


# ---------------------------------------------------------------- listing


def list_shards(patterns: Sequence[AnyPath], leave_out: str = "") -> list[Shard]:
    """Shards named by folders, tar files, globs and braces, local or fsspec URLs; sorted by stem. Sizes come with the listing.

    leave_out: the folder this run writes; what an earlier run left there is no input, unless it is named itself.
    Raises ConfigError when something is missing, nothing is found, or two inputs would get the same name.
    """
    found: dict[str, Shard] = {}
    listed = [
        shard
        for pattern in path_texts(patterns, "shards")
        for url in _expanded(pattern)
        for shard in _list_one(url, leave_out)
    ]
    urls = set[str]()
    for shard in listed:
        if shard.url not in urls:  # patterns may overlap; the first one names the shard
            urls.add(shard.url)
            other = found.setdefault(shard.stem, shard)
            if other is not shard:
                raise ConfigError(_same_name(other, shard))
    return sorted(found.values(), key=lambda shard: shard.stem)


def _same_name(one: Shard, other: Shard) -> str:
    how = "Give their common parent folder, so that sub-folders keep them apart, or scan them into two folders."
    if one.url.rsplit("/", 1)[0] == other.url.rsplit("/", 1)[0]:
        how = "Are they one shard, compressed in two ways? Move one away, or name the other alone."
    return f"{one.url} and {other.url} would both write {one.stem}.parquet. {how}"


def _expanded(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(
            f"{pattern}: its braces do not close ({error}). Write them as part-{{0000..0009}}.tar."
        ) from None


def _list_one(url: str, leave_out: str) -> list[Shard]:
    url = storage.absolute(url)
    fs, inner = storage.filesystem(url)
    protocol = "" if storage.is_local(url) else url.split("://", 1)[0] + "://"
    with storage.explain_read_errors(url):
        if any(character in inner for character in "*?[") and not fs.exists(inner):
            root = re.split(r"[*?\[]", inner, maxsplit=1)[0].rsplit("/", 1)[0]
            found = fs.glob(inner, detail=True)
        elif fs.isdir(inner):
            root, found = inner.rstrip("/"), fs.find(inner, detail=True)
        elif fs.exists(inner) or (storage.is_local(url) and Path(inner).is_symlink()):
            root, found = inner.rsplit("/", 1)[0], {inner: {"size": _size(fs, inner)}}
        else:
            raise ConfigError(f"{url}: no such file or folder. Check the path; a folder means every shard below it.")
    written = _written_below(root, protocol, leave_out)
    visible = {
        path: info
        for path, info in sorted(found.items())
        if not path.rsplit("/", 1)[-1].startswith(".") and not (written and path.startswith(written))
    }
    refuse_compressed(list(visible), [printable(_url(path, protocol)) for path in visible])
    if not any(map(ending_of, visible)):
        urls = [_url(path, protocol) for path in visible]
        refuse_data_to_pack(url, _url(root, protocol), urls, IMAGE_EXTENSIONS)
    sizes = {
        path: int(_size(fs, path) if info["size"] is None else info["size"])  # a web page lists names alone
        for path, info in visible.items()
        if path == inner or path.endswith(".tar") or (is_compressed(path) and f"{_stem(path)}.tar" not in visible)
    }
    if not sizes:
        raise ConfigError(
            f"{url}: no {', '.join(ENDINGS)} found. Give a folder with WebDataset shards, or a glob that matches some."
        )
    if odd := [path for path in sizes if printable(path) != path]:
        raise ConfigError(f"{printable(odd[0])}: its name holds control characters or is not UTF-8. Rename it.")
    return [
        Shard(
            url=_url(path, protocol),
            stem=_stem(path[len(root) :].lstrip("/")),
            size=size,
        )
        for path, size in sizes.items()
    ]


def _stem(path: str) -> str:
    return path.removesuffix(ending_of(path))


def _url(path: str, protocol: str) -> str:
    """`path` of a file system as the user would name it."""
    return path if "://" in path else protocol + path.removeprefix("/" if protocol else "")


def _written_below(root: str, protocol: str, leave_out: str) -> str:
    """The folder `leave_out` as the file system names it, with "/", when it lies below `root`; else "": no path begins so."""
    if not leave_out:
        return ""
    _, inner = storage.filesystem(storage.absolute(leave_out))
    same = not protocol if storage.is_local(leave_out) else leave_out.startswith(protocol) and bool(protocol)
    below = f"{inner.rstrip('/')}/"
    return below if same and below.startswith(f"{root}/") and below != f"{root}/" else ""


def _size(fs: fsspec.AbstractFileSystem, path: str) -> int:
    """In bytes; 0 for what cannot be asked (a dangling link): reading it will fail, and that shard alone."""
    try:
        return int(fs.size(path) or 0)
    except OSError:
        return 0


def refuse_to_overwrite(shards: Sequence[Shard], outputs: Callable[[str], Sequence[str]]) -> None:
    """Raises ConfigError when a file that would be written is an input. outputs: stem → the paths written for it."""
    inputs = {storage.real(shard.url) for shard in shards}
    for shard in shards:
        for path in outputs(shard.stem):
            if storage.real(path) in inputs:
                raise ConfigError(f"{path}: is an input and would be overwritten. Give another --out.")


UNREADABLE = ""  # in place of the hash of a shard that cannot be read now; scoring it names the reason


def head_tail_sha256(shard: Shard, span: int = 1 << 16) -> str:
    """A cheap identity of a shard: hash of its size, first and last 64 KiB. The whole hash is kept by the scan."""
    try:
        head = storage.read_range(shard.url, 0, span)
        tail = storage.read_range(shard.url, max(0, shard.size - span), span)
        if len(head) < min(span, shard.size) or len(tail) < min(span, shard.size):
            return UNREADABLE  # the connection was cut
        return hashlib.sha256(b"%d|" % shard.size + head + tail).hexdigest()
    except StorageError:
        return UNREADABLE


def head_tails(shards: Sequence[Shard]) -> dict[str, str]:
    """`head_tail_sha256` of each by stem."""
    return dict(zip((shard.stem for shard in shards), storage.read_ahead(head_tail_sha256, shards), strict=True))


# ---------------------------------------------------------------- opening


def open_shard(shard: Shard) -> IO[bytes]:
    """The tar of one shard of a run; one that has gone or cannot be opened or unpacked fails alone."""
    return unpacked(shard, open_stored(shard))


def open_stored(shard: Shard) -> IO[bytes]:
    """The shard's file as it lies there, compressed or not."""
    with _shard_errors():
        return storage.open_read(shard.url)


def unpacked(shard: Shard, stored: IO[bytes]) -> IO[bytes]:
    """The tar of what `open_stored` gave."""
    if not is_compressed(shard.url):
        return stored
    with stored:
        return unpack(shard, lambda size: read_block(stored, size, shard.url))


def tar_size(shard: Shard, file: IO[bytes]) -> int:
    """Of what `open_shard` gave, in bytes; `shard.size` is that of the file as it lies there."""
    return file.unpacked_size if isinstance(file, UnpackedShard) else shard.size


def read_block(file: IO[bytes], size: int, url: str) -> bytes:
    """Read, and name the shard when the device or the network fails."""
    try:
        return file.read(size)
    except Exception:  # explained only now: to enter both contexts takes longer than to read a header does
        with _shard_errors(), storage.explain_read_errors(url):
            raise


@contextlib.contextmanager
def _shard_errors() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise ShardError(str(error), may_pass=error.may_pass) from error.__cause__


def is_image(extension: str, image_member: str = "") -> bool:
    """Whether a member is scored: by the extension asked for, else by any of IMAGE_EXTENSIONS."""
    if image_member:
        return extension == image_member.lower().lstrip(".")
    return extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(name: str) -> str:
    """A member name as Unicode that is safe to show: bytes that are not UTF-8 and control characters become \\xNN or \\uNNNN.

    Controls include terminal escapes, line ends and those that turn the direction of text.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


# ---------------------------------------------------------------- copying


def end_archive(target: HashingWriter) -> None:
    """Two zero blocks, then padding to a whole record, as every tar program writes."""
    target.write(bytes(2 * BLOCK))
    target.write(bytes(-target.size % RECORD))


def add_member(target: HashingWriter, name: str, data: bytes) -> None:
    """A file with a header that says nothing of when, where and by whom: the same content gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    target.write(info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape"))
    target.write(data + bytes(-len(data) % BLOCK))

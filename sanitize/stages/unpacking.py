"""Compressed shards: unpacked into a temporary file without a name, so that everything behind works by byte offset as with a plain tar."""

import gzip
import io
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import pyarrow as pa

from sanitize.errors import ShardError
from sanitize.records import Shard

UNPACK = {".tar.gz": "gunzip -k", ".tgz": "gunzip -k", ".tar.zst": "zstd -d"}  # ending → what unpacks it by hand
ENDINGS = (".tar", *UNPACK)
MAX_RATIO = 100  # images hardly shrink; a megabyte that becomes gigabytes is an attack
SLACK = 4 << 20  # what a tar of very few bytes may have beyond that: its padding
RESERVE = 64 << 20  # left free in the temporary folder
BLOCK = 1 << 20


class UnpackedShard(io.BufferedReader):
    """Reads the unpacked tar; gone when it is closed."""

    def __init__(self, raw: io.RawIOBase, unpacked_size: int) -> None:
        super().__init__(raw, BLOCK)
        self.unpacked_size = unpacked_size


def ending_of(url: str) -> str:
    """The one of ENDINGS that a shard's name has; "" for another name."""
    return next((ending for ending in ENDINGS if url.endswith(ending)), "")


def is_compressed(url: str) -> bool:
    return ending_of(url) in UNPACK


def unpack(shard: Shard, read: Callable[[int], bytes]) -> UnpackedShard:
    """read: gives the next bytes of the compressed file, at most so many, or raises ShardError.

    Raises ShardError when they are cut or damaged, when they become too many, and when there is no room for them.
    """
    stored = _Stored(read)
    target = cast(io.RawIOBase, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - closed with what is returned
    try:
        size = _copy(shard, stored, target)
        if stored.size != shard.size:
            raise ShardError(
                f"{shard.url}: {stored.size} bytes were read, its size was {shard.size}: the connection was cut, or the file changed "
                "meanwhile. Run the same command again."
            )
        if not size:
            raise ShardError(f"{shard.url}: is empty once unpacked. Download or write it again.")
        target.seek(0)
    except BaseException:
        target.close()
        raise
    return UnpackedShard(target, size)


class _Stored(io.RawIOBase):
    """The compressed file as decoders want one; counts what was read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        self.size += len(data)
        return len(data)


def _copy(shard: Shard, stored: _Stored, target: io.RawIOBase) -> int:
    """Bytes written."""
    limit, size = MAX_RATIO * shard.size + SLACK, 0
    next_block = _decoder(shard, stored)
    while data := next_block(BLOCK):
        size += len(data)
        if size > limit:
            raise ShardError(
                f"{shard.url}: becomes more than {MAX_RATIO} times its {shard.size} bytes when it is unpacked, as an archive made to "
                f"fill the disk does. If you trust it, unpack it yourself: {_by_hand(shard)}"
            )
        _write(shard, target, data, size)
    return size


def _decoder(shard: Shard, stored: _Stored) -> Callable[[int], bytes]:
    """Several gzip members or zstd frames, one after the other, are one content."""
    kind = "zstd" if ending_of(shard.url) == ".tar.zst" else "gzip"
    source: Any = (
        pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")
        if kind == "zstd"
        else gzip.GzipFile(fileobj=cast(BinaryIO, stored), mode="rb")
    )

    def next_block(size: int) -> bytes:
        try:
            return bytes(source.read(size))
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:  # reading itself raises ShardError
            raise ShardError(
                f"{shard.url}: cannot be unpacked, it is cut short or no {kind} ({error}). Download or write it again."
            ) from None

    return next_block


def _write(shard: Shard, target: io.RawIOBase, data: bytes, size: int) -> None:
    """size: unpacked so far, `data` included."""
    folder, why = tempfile.gettempdir(), ""
    try:
        if shutil.disk_usage(folder).free < len(data) + RESERVE:
            why = f"no more than {RESERVE >> 20} MiB are free there"
        elif target.write(data) != len(data):
            why = "no space left on the device"
    except OSError as error:
        why = str(error)
    if why:
        raise ShardError(
            f"{shard.url}: is unpacked into {folder}, which has no room for it ({why}, after {size / 2**30:.2f} GiB). Free some space, or "
            f"set TMPDIR to a larger folder, then run the same command again; or unpack it yourself: {_by_hand(shard)}"
        )


def _by_hand(shard: Shard) -> str:
    return f"{UNPACK[ending_of(shard.url)]} {shlex.quote(shard.url)}, and give the .tar."

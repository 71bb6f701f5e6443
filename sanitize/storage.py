"""Files, local or any fsspec URL: read, and write so that a finished name means complete content."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec

from sanitize.errors import StorageError

PARTIAL = ".partial"


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/") if len(folder) > 1 else folder, *names])


def absolute(path: str) -> str:
    """The same place named so that a worker in another folder finds it."""
    return str(Path(path.removeprefix("file://")).expanduser().resolve()) if is_local(path) else path


def exists(path: str) -> bool:
    fs, inner = fsspec.core.url_to_fs(path)
    return bool(fs.exists(inner))


def open_read(path: str) -> IO[bytes]:
    """Open for reading. Local files get a large buffer, remote ones fsspec's own read-ahead."""
    try:
        if is_local(path):
            return Path(path.removeprefix("file://")).open("rb", buffering=1 << 20)
        file: IO[bytes] = fsspec.open(path, "rb").open()
        return file
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file. Check the path.") from None
    except PermissionError:
        raise StorageError(f"{path}: no permission to read. Check the owner and mode of the file.") from None
    except IsADirectoryError:
        raise StorageError(f"{path}: is a folder, a file was expected.") from None


def read_bytes(path: str) -> bytes:
    with open_read(path) as file:
        return file.read()


def read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
        raise StorageError(f"{path}: not valid JSON ({error}). Restore the file or write it again.") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path}: holds {type(value).__name__}, a JSON object was expected.")
    return value


def json_sha256(value: Any) -> str:
    """Hash of plain settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open_read(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class HashingWriter:
    """A writable file that knows the SHA-256 and the size of what went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Kept open on purpose: `atomic_write` closes the file once all of it is known to be there."""

    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextlib.contextmanager
def explain_write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        how = _WRITE_ERRORS.get(error.errno or 0, f"{error}. Check the device")
        raise StorageError(f"{path}: {how}, then run the same command again; finished files are kept.") from error


_NOT_A_FOLDER = "a part of the path is a file, not a folder. Choose another --out"
_WRITE_ERRORS = {
    errno.ENOSPC: "no space left on the device. Free some space",
    errno.EDQUOT: "the quota of this user is used up. Free some space",
    errno.EACCES: "no permission to write. Choose another --out",
    errno.EROFS: "the file system is read-only. Choose another --out",
    errno.EEXIST: _NOT_A_FOLDER,
    errno.ENOTDIR: _NOT_A_FOLDER,
}


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[HashingWriter]:
    """Write a file that appears under its name only when all of it is there.

    Local: a temporary name in the same folder, flushed to the device, then renamed. Remote: written to a local
    temporary file, then put in one piece (object stores show an object only when its upload is complete).
    """
    with explain_write_errors(path):
        if is_local(path):
            target = Path(path.removeprefix("file://"))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.parent / f".{target.name}.{uuid.uuid4().hex}{PARTIAL}"
        else:
            partial = Path(tempfile.gettempdir()) / f"sanitize-{uuid.uuid4().hex}{PARTIAL}"
        try:
            with partial.open("wb") as file:
                yield HashingWriter(file)
                file.flush()
                os.fsync(file.fileno())
            if is_local(path):
                partial.replace(target)
            else:
                fs, inner = fsspec.core.url_to_fs(path)
                fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
                fs.put_file(str(partial), inner)
        finally:
            partial.unlink(missing_ok=True)


def write_bytes(path: str, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: str, value: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def delete(path: str) -> None:
    """Delete a file; one that is not there is fine."""
    with explain_write_errors(path):
        fs, inner = fsspec.core.url_to_fs(path)
        if fs.exists(inner):
            fs.rm_file(inner)


def remove_folder(path: str) -> None:
    with explain_write_errors(path):
        if is_local(path):
            shutil.rmtree(path.removeprefix("file://"), ignore_errors=True)
        else:
            fs, inner = fsspec.core.url_to_fs(path)
            if fs.exists(inner):
                fs.rm(inner, recursive=True)


def list_files(folder: str, suffix: str) -> list[str]:
    """Paths below `folder`, relative to it, that end with `suffix`; sorted; hidden and unfinished files left out."""
    fs, inner = fsspec.core.url_to_fs(folder)
    inner = inner.rstrip("/")
    names = [name[len(inner) + 1 :] for name in fs.find(inner)]
    return sorted(n for n in names if n.endswith(suffix) and not any(p.startswith(".") for p in n.split("/")))


def remove_partials(folder: str) -> None:
    """Delete what an interrupted run left under temporary names."""
    if is_local(folder):
        for path in Path(folder.removeprefix("file://")).rglob(f".*{PARTIAL}"):
            path.unlink(missing_ok=True)

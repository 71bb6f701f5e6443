"""Files, local or any fsspec URL: read, and write so that a finished name means complete content."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sanitize.errors import SanitizeError, StorageError
from sanitize.hashing import HashingWriter

T = TypeVar("T")
R = TypeVar("R")
PARTIAL = ".partial"
_SCHEME = re.compile(r"[\w.+:-]+://")
BUCKETS = ("s3://", "s3a://", "gs://", "gcs://", "az://", "abfs://", "abfss://")
READ_AHEAD = 32  # requests under way: each waits for a device or a network, not for this process


def is_local(path: str) -> bool:
    return not _SCHEME.match(path) or path.startswith("file://")


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names] if folder else names)


def local_path(path: str) -> Path:
    """Of a local name; "~" is the user's home. Links stay as they are: their names are what the user knows."""
    return Path(path.removeprefix("file://")).expanduser()


def absolute(path: str) -> str:
    """The same place named so that a worker in another folder finds it."""
    return os.path.abspath(local_path(path)) if is_local(path) else path  # noqa: PTH100 - resolve() follows links


def real(path: str) -> str:
    """The place itself, whatever links lead to it: equal for two names of one file."""
    return os.path.realpath(local_path(path)) if is_local(path) else path.rstrip("/")


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system, path in it). Local names are taken literally: `a::b.tar` is a file, not a chain of fsspec.

    No listing of a bucket is remembered: what another process wrote, replaced or deleted since is seen at once.
    """
    if is_local(path):
        return LocalFileSystem(), absolute(path)
    try:
        fs, inner = fsspec.core.url_to_fs(path, **({"use_listings_cache": False} if path.startswith(BUCKETS) else {}))
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"{path}: cannot be reached ({error}). Correct the address, or install what it needs."
        ) from None
    return fs, inner


@contextlib.contextmanager
def explain_read_errors(path: str) -> Iterator[None]:
    """Whatever a device or a client of object storage lets out, as a StorageError; clients repeat throttled requests themselves."""
    try:
        yield
    except SanitizeError:
        raise
    except Exception as error:
        if is_local(path) and not isinstance(error, OSError):
            raise
        raise StorageError(
            f"{path}: cannot be read ({error or type(error).__name__}). Check the device, the connection and your credentials, "
            "then run the same command again.",
            may_pass=_may_pass(path, error),
        ) from error


def _may_pass(path: str, error: Exception) -> bool:
    """Clients of object storage repeat a request for some seconds themselves; what they then let out may still pass, unless the
    store has said no."""
    return not is_local(path) and not isinstance(error, (PermissionError, FileNotFoundError, IsADirectoryError))


def exists(path: str) -> bool:
    with explain_read_errors(path):
        fs, inner = filesystem(path)
        return bool(fs.exists(inner))


def open_read(path: str) -> IO[bytes]:
    """Open for reading. Local files get a large buffer, remote ones fsspec's own read-ahead."""
    try:
        if is_local(path):
            _require_regular(local_path(path))
            return local_path(path).open("rb", buffering=1 << 20)
        fs, inner = filesystem(path)
        file: IO[bytes] = fs.open(inner, "rb")
        return file
    except SanitizeError:
        raise
    except Exception as error:  # clients of object storage have errors of their own
        unknown = f"cannot be opened ({error}). Check the device, the connection and your credentials"
        how = next((text for kind, text in _OPEN_ERRORS.items() if isinstance(error, kind)), unknown)
        raise StorageError(f"{path}: {how}.", may_pass=_may_pass(path, error)) from error


_OPEN_ERRORS = {
    FileNotFoundError: "no such file. Check the path",
    PermissionError: "no permission to read. Check the owner and mode of the file",
    IsADirectoryError: "is a folder, a file was expected",
}


def _require_regular(path: Path) -> None:
    """A pipe would be waited for without end, a device read without end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        raise StorageError(f"{path}: is a pipe, a socket or a device, a file was expected.")


def read_bytes(path: str) -> bytes:
    with explain_read_errors(path), open_read(path) as file:
        return file.read()


def read_range(path: str, start: int, size: int) -> bytes:
    """In one request where the file is remote."""
    with explain_read_errors(path):
        if is_local(path):
            with open_read(path) as file:
                file.seek(start)
                return file.read(size)
        fs, inner = filesystem(path)
        return bytes(fs.cat_file(inner, start=start, end=start + size))


def read_ahead(read: Callable[[T], R], items: Iterable[T], at_once: int = READ_AHEAD) -> Iterator[R]:
    """`read` of each, in order, `at_once` of them at a time; no more results than that wait in memory."""
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) == at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not valid JSON ({error}). Restore the file or write it again.") from None
    if not isinstance(value, dict):
        raise StorageError(f"{path}: holds {type(value).__name__}, a JSON object was expected.")
    return value


def json_sha256(value: Any) -> str:
    """Hash of plain settings; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with explain_read_errors(path), open_read(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def explain_write_errors(path: str, target: str = "") -> Iterator[None]:
    """As `explain_read_errors`. target: the remote file that what is written to a local `path` is meant for."""
    try:
        yield
    except SanitizeError:
        raise
    except Exception as error:
        if is_local(path) and not isinstance(error, OSError):
            raise
        how = f"cannot be written ({error or type(error).__name__}). Check the connection and your credentials"
        if is_local(path):
            how = _WRITE_ERRORS.get(getattr(error, "errno", None) or 0, f"{error}. Check the device")
        where = f"{path}, on the way to {target}" if target else path
        raise StorageError(
            f"{where}: {how}, then run the same command again; finished files are kept.",
            may_pass=_may_pass(path, error),
        ) from error


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
    with explain_write_errors(path) if is_local(path) else explain_write_errors(tempfile.gettempdir(), path):
        if is_local(path):
            target = local_path(path)
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
                _flush_folder(target.parent)
            else:
                _put(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def require_temporary_space(path: str, size: int) -> None:
    """Raises StorageError when `size` bytes on their way to a remote `path` would not fit where `atomic_write` holds them."""
    folder = tempfile.gettempdir()
    if not is_local(path) and (free := shutil.disk_usage(folder).free) < size:
        raise StorageError(
            f"{folder}: has {free / 2**30:.2f} GiB free, and up to {size / 2**30:.2f} GiB pass through it on the way to {path}. Free "
            "some space, or set TMPDIR to a larger folder, then run the same command again; finished files are kept."
        )


def _put(file: Path, path: str) -> None:
    with explain_write_errors(path):
        fs, inner = filesystem(path)
        if not path.startswith(BUCKETS):  # which has no folders; a bucket that is missing would be made
            fs.makedirs(inner.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(file), inner)


def _flush_folder(folder: Path) -> None:
    """A rename is on the device only when its folder is: a power cut must not undo a marker's order."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: str, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def put_if_absent(path: str, data: bytes) -> bool:
    """Write a remote file unless there is one; whether it is there with this very content, which no other writer may have.

    One request where the file system has it (S3, GCS).
    """
    with explain_write_errors(path):
        fs, inner = filesystem(path)
        try:
            fs.pipe_file(inner, data, mode="create")
        except (TypeError, NotImplementedError):  # an older client: two requests, between which another may come
            if fs.exists(inner):
                return False
            fs.pipe_file(inner, data)
        except OSError as error:  # servers differ in how they say that there is one
            if isinstance(error, PermissionError | FileNotFoundError) or not fs.exists(inner):
                raise
            return bool(fs.cat_file(inner) == data)  # ours, when the answer was lost and the client asked again
    return True


def write_json(path: str, value: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def delete(path: str) -> None:
    """Delete a file; one that is not there is fine."""
    with explain_write_errors(path):
        fs, inner = filesystem(path)
        if fs.exists(inner):
            fs.rm_file(inner)


def remove_folder(path: str) -> None:
    with explain_write_errors(path):
        if is_local(path):
            shutil.rmtree(local_path(path), ignore_errors=True)
        else:
            fs, inner = filesystem(path)
            if fs.exists(inner):
                fs.rm(inner, recursive=True)


def list_files(folder: str, suffix: str) -> list[str]:
    """Paths below `folder`, relative to it, that end with `suffix`; sorted; hidden and unfinished files left out."""
    fs, inner = filesystem(folder)
    inner = inner.rstrip("/")
    with explain_read_errors(folder):
        names = [name[len(inner) + 1 :] for name in fs.find(inner)]
    return sorted(n for n in names if n.endswith(suffix) and not any(p.startswith(".") for p in n.split("/")))


def remove_partials(folder: str) -> None:
    """Delete what an interrupted run left under temporary names."""
    if is_local(folder):
        with explain_write_errors(folder):
            for path in local_path(folder).rglob(f".*{PARTIAL}"):
                path.unlink(missing_ok=True)

"""One writer at a time: a command holds the lock of the folder it writes, and a second one is told who is there."""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import filelock

from sanitize import storage
from sanitize.errors import RefusedError, StorageError

LOCK, HOLDER = ".lock", ".lock-holder.json"


@contextlib.contextmanager
def folder_lock(folder: str, command: str) -> Iterator[None]:
    """Hold `folder` for `command`. Raises RefusedError when another process holds it.

    Local: a lock of the operating system on `.lock`, which ends with its process, however that ends. Object storage: an object that
    is put only where there is none; one that a killed process left must be deleted by hand, and the message says so.
    """
    holder = {"command": command, "host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
    holder["token"] = uuid.uuid4().hex  # no two holders are alike
    if storage.is_local(folder):
        yield from _hold_locally(folder, holder)
    else:
        yield from _hold_remotely(folder, holder)


@contextlib.contextmanager
def folder_locks(folders: Sequence[str], command: str) -> Iterator[None]:
    """`folder_lock` of each, always in the same order."""
    with contextlib.ExitStack() as locks:
        for folder in sorted(folders):
            locks.enter_context(folder_lock(folder, command))
        yield


def _hold_locally(folder: str, holder: dict[str, Any]) -> Iterator[None]:
    with storage.explain_write_errors(storage.join(folder, LOCK)):
        storage.local_path(folder).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(storage.local_path(folder) / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RefusedError(f"{_in_use(folder)} Wait until it ends, or stop it.") from None
    try:
        storage.write_json(storage.join(folder, HOLDER), holder)
        yield
    except BaseException:
        with contextlib.suppress(StorageError):
            storage.remove_partials(folder)  # of workers that were stopped with their files half written
        raise
    finally:
        with contextlib.suppress(OSError):  # the lock counts, not who says it holds it
            storage.local_path(storage.join(folder, HOLDER)).unlink()
        lock.release()


def _hold_remotely(folder: str, holder: dict[str, Any]) -> Iterator[None]:
    path = storage.join(folder, HOLDER)
    if not storage.put_if_absent(path, json.dumps(holder).encode()):
        raise RefusedError(f"{_in_use(folder)} Wait until it ends; if that process is gone, delete {path}.")
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):  # what went wrong first is what is told
            storage.delete(path)
        raise
    storage.delete(path)


def _in_use(folder: str) -> str:
    path = storage.join(folder, HOLDER)
    holder = storage.read_json(path) if storage.exists(path) else {}
    if not holder:
        return f"{folder}: another sanitize command is writing here."
    return (
        f"{folder}: `sanitize {holder.get('command')}` is writing here (process {holder.get('process')} on "
        f"{holder.get('host')}, since {holder.get('since')})."
    )

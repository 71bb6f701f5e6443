"""What a program of ours settles before it computes: how many threads OpenMP starts, and that freed memory stays.

glibc asks the kernel for every large block and gives it back when it is freed. A forward pass at 224 px frees such a block after each
layer, and the kernel zeroes it again for the next one (`benchmarks.allocator` prints the seconds with and without). Results do not
depend on it; peak memory grows by what lies between the blocks in use.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_MALLOC = (  # variable that glibc reads when a process starts, number of the same option of mallopt (malloc.h), value
    ("MALLOC_ARENA_MAX", -8, 1),  # heaps of other threads than the first are at most 64 MiB: too small for torch
    ("MALLOC_MMAP_THRESHOLD_", -3, 1 << 30),  # larger blocks than this still go back at once
    ("MALLOC_TRIM_THRESHOLD_", -1, (1 << 31) - 1),
)
ENVIRONMENT = {name: str(value) for name, _, value in _MALLOC}


def usable_cpus() -> int:
    """Those this process may use: affinity (a scheduler, `taskset`) or a container's quota may leave it fewer than the machine
    has, and more threads than cores that wait for each other in OpenMP slow training down several times."""
    import joblib  # loads numpy, which `sanitize --help` can do without

    return int(joblib.cpu_count())


def prepare() -> None:
    """For programs, at their start, before they import torch or start threads; not for a library, whose process is another's.

    Variables the user has set win.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cpus()))  # by itself OpenMP minds affinity, but no quota
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):  # musl has neither mallopt nor the trouble
        for name, option, value in _MALLOC:
            if name not in os.environ:
                libc.mallopt(option, value)


@contextlib.contextmanager
def children_keep_freed_memory() -> Iterator[None]:
    """Processes that start inside the block, and what they start. Ray's workers have threads, with heaps, before our code runs there."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

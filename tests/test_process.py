"""A program of ours starts no more threads than it may and keeps the memory that torch frees, wherever torch runs."""

import mmap
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import torch

from sanitize import process, runtime

# pages that the kernel hands out while four blocks of 64 MiB come and go, after one other
FAULTS = """
import ctypes, resource, sys, threading
from sanitize import process
if sys.argv[1] == "prepared":
    process.prepare()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use_block():
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
def faults():
    use_block()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        use_block()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=faults)
thread.start() if sys.argv[2] == "thread" else faults()
"""
PAGES = 4 * 2**26 // mmap.PAGESIZE
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a trouble of glibc")


def output_of(program: str, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@on_glibc
@pytest.mark.parametrize("where", ["main", "thread"])
def test_by_itself_glibc_asks_for_every_large_block_anew(where):
    assert int(output_of(FAULTS, "not prepared", where)) >= PAGES


@on_glibc
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_used_again_instead_of_asked_for(where):
    assert int(output_of(FAULTS, "prepared", where)) < PAGES / 10


@on_glibc
@pytest.mark.parametrize("where", ["main", "thread"])
def test_so_it_is_in_processes_that_start_in_the_block(where):
    with process.children_keep_freed_memory():
        inherited = {name: os.environ[name] for name in process.ENVIRONMENT}
    assert int(output_of(FAULTS, "not prepared", where, **inherited)) < PAGES / 10
    assert "MALLOC_ARENA_MAX" not in os.environ


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    with process.children_keep_freed_memory():
        assert os.environ["MALLOC_ARENA_MAX"] == "3"
        assert os.environ["MALLOC_TRIM_THRESHOLD_"] == process.ENVIRONMENT["MALLOC_TRIM_THRESHOLD_"]
    assert os.environ["MALLOC_ARENA_MAX"] == "3"


@pytest.mark.parametrize("platform_name", ["linux", "darwin", "win32"])
def test_another_c_library_is_left_alone(monkeypatch, platform_name):
    monkeypatch.setattr(sys, "platform", platform_name)
    called = []
    musl = SimpleNamespace(mallopt=lambda *option: called.append(option))  # says nothing of glibc
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: musl)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process.prepare()
    assert called == []


@pytest.mark.parametrize("address", ["", "auto"])
def test_every_worker_of_ray_starts_with_it(monkeypatch, address):
    seen: dict[str, str] = {}

    def init(**options):
        seen.update(os.environ)
        seen.update(options.get("runtime_env", {}).get("env_vars", {}))

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with runtime.ray_session(address):
        assert process.ENVIRONMENT.items() <= seen.items()


def test_a_command_starts_no_more_threads_than_the_process_may_use():
    program = "from click.testing import CliRunner; from sanitize.cli import main; "
    program += "CliRunner().invoke(main, ['init', '--help']); import torch; print(torch.get_num_threads())"
    assert output_of(program, LOKY_MAX_CPU_COUNT="1") == "1"


def test_so_does_a_pipeline():
    program = "import torch; from pipelines.command_line import command_line\n"
    program += "with command_line(): print(torch.get_num_threads())"
    assert output_of(program, LOKY_MAX_CPU_COUNT="1") == "1"
    assert torch.get_num_threads() == 1

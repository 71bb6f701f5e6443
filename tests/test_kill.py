"""Killing a scan and running the same command again gives the bytes of an uninterrupted run. Real processes, real SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import tree_bytes, write_shards

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path, detector):
    write_shards(tmp_path / "in", [300] * 5)

    def make(out: str, workers: int) -> list[str]:
        arguments = ["scan", tmp_path / "in", "--detector", detector, "--out", tmp_path / out, "--workers", workers]
        arguments += ["--cpus-per-worker", 1, "--batch-size", 2, "--precision", "fp32", "--policy", "fraction"]
        return [sys.executable, "-m", "sanitize.cli", *(str(a) for a in arguments)]

    return make


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the scan ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def finished(out: Path) -> int:
    return len(list((out / "done").glob("*.json"))) if out.exists() else 0


def actors_below(pid: int) -> list[int]:
    """Process ids of our Ray actors that were started by `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if status.read_bytes().startswith(b"ray::_Worker") and pid in ancestors(int(status.parent.name)):
                found.append(int(status.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def ancestors(pid: int) -> set[int]:
    line = set()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        line.add(pid)
    return line


@pytest.mark.parametrize("workers", [0, 1])
def test_sigkill_to_the_driver_and_a_rerun_give_the_bytes_of_an_uninterrupted_run(command, tmp_path, workers):
    subprocess.run(command("whole", workers), check=True, capture_output=True)
    process = subprocess.Popen(command("killed", workers), stderr=subprocess.DEVNULL)
    wait_for(lambda: finished(tmp_path / "killed") >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished(tmp_path / "killed") < 5
    subprocess.run(command("killed", workers), check=True, capture_output=True)
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


def test_sigkill_to_an_actor_does_not_stop_the_scan_or_change_a_byte(command, tmp_path):
    subprocess.run(command("whole", 0), check=True, capture_output=True)
    process = subprocess.Popen(command("killed", 1), stderr=subprocess.PIPE)
    wait_for(lambda: finished(tmp_path / "killed") >= 1, process)
    actors = actors_below(process.pid)
    assert actors
    for actor in actors:
        os.kill(actor, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("ended_by", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_scan_that_is_asked_to_stop_keeps_what_is_finished_and_leaves_nothing_behind(
    command, tmp_path, workers, ended_by, word, code
):
    subprocess.run(command("whole", 0), check=True, capture_output=True)
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 - a shell's background job ignores it
    process = subprocess.Popen(command("stopped", workers), stderr=subprocess.PIPE, preexec_fn=heard)
    wait_for(lambda: finished(tmp_path / "stopped") >= 1, process)
    actors = actors_below(process.pid)
    asked = time.monotonic()
    process.send_signal(ended_by)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code, errors[-2000:]
    assert errors.splitlines()[-1] == f"{word}; run the same command again to go on."
    assert "Traceback" not in errors
    assert "core_worker" not in errors  # Ray's own lines mean nothing to our user
    assert time.monotonic() - asked < 30
    assert not [pid for pid in actors if Path(f"/proc/{pid}").exists()]
    assert not list((tmp_path / "stopped").rglob("*.partial"))
    assert not list((tmp_path / "stopped").glob(".lock-holder*"))
    subprocess.run(command("stopped", workers), check=True, capture_output=True)
    assert tree_bytes(tmp_path / "stopped") == tree_bytes(tmp_path / "whole")

"""After a kill or a failed write at any point, the same command ends with the bytes of an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import tree_bytes, write_shards
from source_builders import write_images

from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import StorageError

RUNNER = Path(__file__).parent / "faults" / "runner.py"


def results(tmp_path, detector, encoder_yaml, points, seed, *commands):
    write_shards(tmp_path / "in", [9, 1, 7])
    write_shards(tmp_path / "aux", [90], first_seed=10_000)
    write_images(tmp_path / "photos", 11)
    arguments = [str(tmp_path), str(detector), str(encoder_yaml), "--points", str(points), "--seed", str(seed)]
    command = [sys.executable, str(RUNNER), *arguments, "--commands", *commands]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout[done.stdout.index("| command |") :])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def harmed(found):
    return [
        r for r in found if not (r["same"] and r["verified"] and r["second"] == "done") or r["first"] == "traceback"
    ]


def test_twenty_seeded_faults_harm_no_byte(tmp_path, detector, encoder_yaml):
    found = results(tmp_path, detector, encoder_yaml, 20, 1, "scan", "clean", "review", "append", "repair", "pack")
    assert len(found) == 20
    assert harmed(found) == []
    assert {r["first"] for r in found} >= {"killed"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_hundred_seeded_faults_harm_no_byte(tmp_path, detector, encoder_yaml, seed):
    found = results(
        tmp_path, detector, encoder_yaml, 50, seed, "scan", "clean", "review", "append", "repair", "fit", "pack"
    )
    assert harmed(found) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of so many KiB; `grow` gives it more."""
    folder = tmp_path / "small"
    folder.mkdir()

    def resize(kibibytes: int, *options: str) -> None:
        how = ",".join([f"size={kibibytes}k", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")

    yield folder, resize
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.parametrize("kibibytes", [8, 24, 48, 96])
def test_a_disk_that_is_full_is_said_and_with_more_room_the_same_command_ends(
    small_disk, kibibytes, tmp_path, scan_config
):
    folder, resize = small_disk
    write_shards(tmp_path / "in", [9, 12, 7])
    config = scan_config(tmp_path / "in", out="small/scanned", policy=ThresholdPolicy("fraction", fraction=0.3))
    resize(kibibytes)
    with pytest.raises(
        StorageError, match=r"no space left on the device\. Free some space, then run the same command again"
    ):
        scan(config)
    assert list(folder.rglob("*.partial")) == []
    resize(4096, "remount")
    scan(config)
    assert verify(config.out, deep=True).problems == ()
    scan(scan_config(tmp_path / "in", out="whole", policy=config.policy))
    assert tree_bytes(folder / "scanned") == tree_bytes(tmp_path / "whole")

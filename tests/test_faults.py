"""After a kill or a failed write at any point, the same command ends with the bytes of an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_shards
from source_builders import write_images

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
    found = results(tmp_path, detector, encoder_yaml, 20, 1, "scan", "clean", "pack")
    assert len(found) == 20
    assert harmed(found) == []
    assert {r["first"] for r in found} >= {"killed"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_hundred_seeded_faults_harm_no_byte(tmp_path, detector, encoder_yaml, seed):
    found = results(tmp_path, detector, encoder_yaml, 50, seed, "scan", "clean", "fit", "pack")
    assert harmed(found) == []

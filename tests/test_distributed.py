"""Ray Train runs the loop on every rank, and again from its own checkpoint when a worker dies."""

import os
import signal
from pathlib import Path

import pytest

from sanitize.runtime import Resources
from sanitize.training.distributed import train_on_ray


@pytest.mark.slow
def test_a_rank_that_is_killed_is_restarted_and_the_loop_goes_on(ray_cluster, tmp_path):
    shown: list[object] = []

    def loop(folder, rank, report):
        progress = Path(folder) / f"rank-{rank.index}"
        progress.write_text(progress.read_text() + "x" if progress.exists() else "x")
        if rank.index == 1 and progress.read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        report({"epochs": 1})

    train_on_ray(loop, str(tmp_path), Resources(2, 1, 0), str(tmp_path / "training"), shown.append)
    assert (tmp_path / "rank-1").read_text() == "xx"
    assert set(map(str, shown)) <= {"{'epochs': 1}"}

"""Two commands on one folder: the second is told who is there, and nothing is mixed."""

import subprocess
import sys
import threading

import fsspec
import pytest
from builders import tree_bytes

from sanitize.artifacts.folder_lock import folder_lock
from sanitize.commands.clean import clean
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import RefusedError


def some(share):
    return ThresholdPolicy("fraction", fraction=share)


def test_a_second_command_is_told_who_holds_the_folder(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=some(0.1)))
    out = tmp_path / "scanned"
    before = tree_bytes(out)
    with folder_lock(str(out), "scan"):
        words = r"scanned: `sanitize scan` is writing here \(process \d+ on .*, since .*\)\. Wait until it ends, or stop it\."
        with pytest.raises(RefusedError, match=words):
            clean(str(out), some(0.3))
        with pytest.raises(RefusedError, match=words):
            scan(scan_config(shards, policy=some(0.3)))
    assert tree_bytes(out) == before
    assert clean(str(out), some(0.3)).removed == 16


def test_a_killed_holder_leaves_no_lock(tmp_path):
    code = f"""
import os, signal
from sanitize.artifacts.folder_lock import folder_lock
with folder_lock({str(tmp_path / "out")!r}, "scan"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with folder_lock(str(tmp_path / "out"), "clean"):
        pass


@pytest.mark.parametrize("round_", range(3))
def test_of_two_cleans_at_once_one_wins_or_both_follow_each_other(shards, scan_config, tmp_path, round_):
    scan(scan_config(shards, scores_only=True))
    out = str(tmp_path / "scanned")
    outcomes: list[int | str] = []

    def run(share):
        try:
            outcomes.append(clean(out, some(share)).removed)
        except RefusedError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(share,)) for share in (0.1, 0.4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(isinstance(outcome, int) for outcome in outcomes)
    assert verify(out).problems == ()


def test_a_remote_lock_that_a_killed_process_left_says_what_to_delete():
    fsspec.filesystem("memory").pipe(
        "/locked/.lock-holder.json", b'{"command": "scan", "process": 7, "host": "h", "since": "s"}'
    )
    with (
        pytest.raises(
            RefusedError, match=r"process 7 on h.* if that process is gone, delete memory://locked/\.lock-holder"
        ),
        folder_lock("memory://locked", "scan"),
    ):
        pass
    with folder_lock("memory://free", "scan"):
        assert fsspec.filesystem("memory").exists("/free/.lock-holder.json")
    assert not fsspec.filesystem("memory").exists("/free/.lock-holder.json")


def test_fit_refuses_other_auxiliary_shards_in_the_same_folder(detector, aux_shards, encoder_spec, tmp_path):
    import shutil

    from builders import fit_config, write_shards

    shutil.copytree(detector, tmp_path / "d")
    write_shards(tmp_path / "aux", [140, 100])
    with pytest.raises(RefusedError, match="holds a fit that differs in inputs, shards"):
        fit(fit_config(tmp_path / "aux", encoder_spec, tmp_path / "d"))

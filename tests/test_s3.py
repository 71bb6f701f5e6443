"""Against a real S3 server: what is written there is what is written on disk, by one command at a time."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest
import torch
from builders import fit_config, labelled, tree_bytes
from faults.s3 import always, first
from faults.s3_fixtures import OPTIONS
from source_builders import write_images

from sanitize import storage
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.commands.audit import audit
from sanitize.commands.clean import clean
from sanitize.commands.finetune import finetune
from sanitize.commands.fit import fit
from sanitize.commands.pack import pack
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import RefusedError, StorageError
from sanitize.kept_samples import KeptSamples


def start_alone(*arguments: object) -> subprocess.Popen:
    """A command as a process of its own."""
    words = [sys.executable, "-m", "sanitize.cli", "--quiet", *(str(a) for a in arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_alone(*arguments: object) -> None:
    process = start_alone(*arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def outputs(tree: dict[str, bytes]) -> dict[str, bytes]:
    """All that does not say where the inputs lie."""
    return {name: data for name, data in tree.items() if name not in ("run.json", ".lock")}


# ---------------------------------------------------------------- the same bytes as on disk


def test_photos_in_a_bucket_are_packed_as_those_on_disk(bucket, tmp_path):
    write_images(tmp_path / "photos", 9)
    bucket.upload(tmp_path / "photos", "photos")
    pack(str(tmp_path / "photos"), str(tmp_path / "packed"), shard_size=4)
    for _ in range(2):
        result = pack(bucket.url("photos"), bucket.url("packed"), shard_size=4)
        assert (result.samples, result.unreadable, result.failed) == (9, 0, ())
    expected = {
        name: data for name, data in tree_bytes(tmp_path / "packed").items() if name not in (".lock", "pack.json")
    }
    assert {name: data for name, data in bucket.tree_bytes("packed").items() if name != "pack.json"} == expected
    (tmp_path / "list.csv").write_text(f"path\n{bucket.url('photos')}/cat/0000.jpg\n{bucket.url('photos')}/gone.jpg\n")
    result = pack(str(tmp_path / "list.csv"), str(tmp_path / "listed"))
    assert (result.samples, result.unreadable, result.failed) == (1, 1, ())


def test_a_detector_fitted_in_a_bucket_is_the_one_fitted_on_disk(bucket, aux_shards, encoder_spec, detector):
    bucket.upload(aux_shards, "aux")
    fit(dataclasses.replace(fit_config(aux_shards, encoder_spec, bucket.url("detector")), shards=(bucket.url("aux"),)))
    written, expected = bucket.tree_bytes("detector"), tree_bytes(detector)
    assert written.keys() == expected.keys() - {".lock"}
    assert {name for name in written if written[name] != expected[name]} <= {"fit.json", "detector.json"}


def test_a_scan_from_bucket_to_bucket_writes_what_one_on_disk_writes(whole, on_disk):
    assert outputs(whole) == outputs(tree_bytes(on_disk / "out"))
    assert len(whole) > 9


def test_a_rerun_changes_nothing(remote_done, bucket, whole):
    scan(remote_done)
    assert bucket.tree_bytes("out") == whole


@pytest.mark.slow
def test_ray_workers_write_the_same_bytes(remote, bucket, whole):
    run_alone("scan", bucket.url("in"), "--out", remote.out, *OPTIONS, "--detector", remote.detector, "--workers", 1)
    assert bucket.tree_bytes("out") == whole


def test_clean_with_another_threshold_in_a_bucket_is_clean_on_disk(remote_done, local, bucket, tmp_path):
    other = ThresholdPolicy("fraction", fraction=0.1)
    shutil.copytree(local.out, tmp_path / "out")
    clean(remote_done.out, other), clean(str(tmp_path / "out"), other)
    assert outputs(bucket.tree_bytes("out")) == outputs(tree_bytes(tmp_path / "out"))


def test_a_damaged_object_is_found_and_made_anew(remote_done, bucket, whole):
    assert verify(remote_done.out, deep=True).problems == ()
    bucket.put("out/clean/part-0000.tar", whole["clean/part-0000.tar"][:-512])
    bucket.delete("out/scores/part-0002.parquet")
    problems = verify(remote_done.out, repair=True).problems
    assert [problem.split(":")[0] for problem in problems] == ["clean/part-0000.tar", "scores/part-0002.parquet"]
    scan(remote_done)
    assert bucket.tree_bytes("out") == whole


def test_what_another_process_changes_in_a_bucket_is_seen_at_once(remote, bucket):
    for name in "ab":
        bucket.put(f"out/{name}.tar", b"short")
    assert storage.list_files(bucket.url("out"), ".tar") == ["a.tar", "b.tar"]
    bucket.put("out/a.tar", b"longer than before" * 1000)
    bucket.delete("out/b.tar")
    assert storage.read_bytes(bucket.url("out/a.tar")) == b"longer than before" * 1000
    assert not storage.exists(bucket.url("out/b.tar"))


def test_kept_samples_are_streamed_from_a_bucket(remote_done, local):
    expected = [(s["__key__"], s["png"]) for s in KeptSamples(local.out)]
    assert [(s["__key__"], s["png"]) for s in KeptSamples(remote_done.out)] == expected
    # workers forked from a process that talks to S3 already
    loader = torch.utils.data.DataLoader(KeptSamples(remote_done.out), batch_size=None, num_workers=1)
    assert sorted((s["__key__"], s["png"]) for s in loader) == sorted(expected)


def test_a_head_trained_from_a_bucket_is_the_one_trained_from_disk(bucket, finetune_config, tmp_path):
    shards = labelled(tmp_path / "labelled", [20, 3])
    local = finetune_config("local", shards=(str(shards),), epochs=1)
    remote = dataclasses.replace(local, shards=(bucket.upload(shards, "labelled"),), out=bucket.url("head"))
    finetune(local), finetune(remote)
    written, expected = bucket.tree_bytes("head"), tree_bytes(tmp_path / "local")
    assert written.keys() == expected.keys() - {".lock"}
    assert {name for name in written if written[name] != expected[name]} <= {"metrics.jsonl", "finetune.json"}


def test_an_audit_of_a_bucket_is_that_of_the_disk(remote_done, local, bucket):
    assert audit(remote_done.out).text.replace(remote_done.out, local.out) == audit(local.out).text
    assert "report.html" in bucket.names("out/audit")


# ---------------------------------------------------------------- one writer at a time


def test_of_many_writers_of_a_name_exactly_one_wins(proxy, bucket):
    path, won = bucket.url("name"), []
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        if storage.put_if_absent(path, b"%d" % number):
            won.append(b"%d" % number)

    run_at_once([threading.Thread(target=write, args=(number,)) for number in range(8)])
    assert won == [storage.read_bytes(path)]
    # by S3's conditional put, in one request each
    puts = [request for request, _ in proxy.requests if request.method == "PUT"]
    assert [request.headers.get("If-None-Match") for request in puts] == ["*"] * 8


def run_at_once(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_two_scans_at_once_exactly_one_wins(remote, bucket, whole):
    told: list[str] = []
    start = threading.Barrier(2)

    def run():
        start.wait()
        try:
            scan(remote)
            told.append("done")
        except RefusedError as error:
            told.append(str(error))

    run_at_once([threading.Thread(target=run) for _ in range(2)])
    done, refused = sorted(told, key=len)
    assert done == "done"
    assert refused.startswith(f"{remote.out}: `sanitize scan` is writing here (process {os.getpid()} on ")
    assert bucket.tree_bytes("out") == whole


def test_a_lock_whose_answer_was_lost_is_held_all_the_same(proxy, bucket):
    proxy.reset(first(1, always("lost", "/out/.lock-holder.json", "PUT")))
    with folder_lock(bucket.url("out"), "scan"):
        assert proxy.faults() == ["lost"]
    assert bucket.names("out") == []


def test_what_went_wrong_first_is_told_also_where_the_lock_cannot_be_let_go(proxy, remote):
    proxy.reset(lambda request: "denied" if "/out/scores" in request.path or request.method == "DELETE" else "")
    with pytest.raises(StorageError, match=rf"{remote.out}/scores/part-0000\.parquet: cannot be written"):
        scan(remote)
    proxy.reset()
    with pytest.raises(RefusedError, match=r"if that process is gone, delete s3://\S+/out/\.lock-holder\.json"):
        scan(remote)


@pytest.mark.slow
def test_the_lock_of_a_killed_scan_says_how_to_end_it_and_that_works(remote, bucket, whole, sanitize):
    command = ("scan", bucket.url("in"), "--out", remote.out, *OPTIONS, "--detector", remote.detector, "--workers", 0)
    process = start_alone(*command)
    end = time.monotonic() + 120
    while not any(name.startswith("done/") for name in bucket.names("out")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, output = sanitize(*command)
    assert code == 3
    advice = rf"error: {remote.out}: `sanitize scan` is writing here \(process {process.pid} on .*, since .*\)\. "
    advice += r"Wait until it ends; if that process is gone, delete (s3://\S+)\.\n"
    lock = re.fullmatch(advice, output)
    assert lock
    assert len(bucket.tree_bytes("out")) < len(whole)
    fsspec.filesystem("s3").rm(lock[1])
    assert sanitize(*command)[0] == 0
    assert bucket.tree_bytes("out") == whole

"""Against a real S3 server: what is written there is what is written on disk, and whatever the network does, it ends in words."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import fsspec
import pytest
import torch
from builders import REMOVE_SOME, fit_config, labelled, tree_bytes, write_shards
from click.testing import CliRunner
from faults.s3 import ANSWERS, CREDENTIALS, RETRIED, Bucket, always, faulty_proxy, first, free_port, s3_server, seeded
from fsspec.registry import _registry

from sanitize import storage
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.cli import main
from sanitize.commands.audit import audit
from sanitize.commands.clean import clean
from sanitize.commands.finetune import finetune
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ScanConfig, ThresholdPolicy
from sanitize.errors import RefusedError, SanitizeError
from sanitize.kept_samples import KeptSamples


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def environment(server):
    """As a user sets it; nothing of the machine's own AWS settings counts. A function that changes some of it."""
    settings = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server}", "AWS_EC2_METADATA_DISABLED": "true"}
    settings |= {"AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)

        def set_all(**changes: str) -> None:
            for name, value in (settings | {"AWS_MAX_ATTEMPTS": "5"} | changes).items():
                patch.setenv(name, value)
            fsspec.get_filesystem_class("s3").clear_instance_cache()

        set_all()
        yield set_all
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """On disk: `in`, three shards of 17 samples."""
    folder = tmp_path_factory.mktemp("s3")
    write_shards(folder / "in", [9, 1, 7])
    return folder


@pytest.fixture(scope="module")
def bucket(server, environment, folder):
    """In a bucket: the same."""
    bucket = Bucket(server)
    bucket.upload(folder / "in", "in")
    return bucket


@pytest.fixture(scope="module")
def local(folder, detector):
    """A scan of three shards on disk, done."""
    config = ScanConfig(
        (str(folder / "in"),),
        str(detector),
        str(folder / "out"),
        precision="fp32",
        batch_size=8,
        workers=0,
        policy=REMOVE_SOME,
    )
    scan(config)
    return config


@pytest.fixture(scope="module")
def whole(local, bucket):
    """Every byte of the same scan from the bucket into the bucket."""
    scan(from_bucket_to_bucket(local, bucket))
    return bucket.tree_bytes("out")


def from_bucket_to_bucket(local, bucket):
    return dataclasses.replace(local, shards=(bucket.url("in"),), out=bucket.url("out"))


@pytest.fixture
def remote(local, bucket, whole, environment):
    """A scan from the bucket into the bucket, to be done."""
    environment()
    bucket.clear("out")
    return from_bucket_to_bucket(local, bucket)


@pytest.fixture
def scanned(remote, bucket, whole):
    """The same, done."""
    for name, data in whole.items():
        bucket.put(f"out/{name}", data)
    return remote


@pytest.fixture
def proxy(server, environment, remote):
    """What the product talks to, in place of the server; a failing request ends soon."""
    with faulty_proxy(server) as proxy:
        environment(AWS_ENDPOINT_URL=proxy.endpoint, AWS_MAX_ATTEMPTS="1")
        yield proxy


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    """Run a command; returns (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["--quiet", *(str(a) for a in arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


OPTIONS = ("--precision", "fp32", "--fraction", 0.3, "--batch-size", 8, "--cpus-per-worker", 1)


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


def test_a_detector_fitted_in_a_bucket_is_the_one_fitted_on_disk(bucket, aux_shards, encoder_spec, detector):
    bucket.upload(aux_shards, "aux")
    fit(dataclasses.replace(fit_config(aux_shards, encoder_spec, bucket.url("detector")), shards=(bucket.url("aux"),)))
    written, expected = bucket.tree_bytes("detector"), tree_bytes(detector)
    assert written.keys() == expected.keys() - {".lock"}
    assert {name for name in written if written[name] != expected[name]} <= {"fit.json", "detector.json"}


def test_a_scan_from_bucket_to_bucket_writes_what_one_on_disk_writes(whole, folder):
    assert outputs(whole) == outputs(tree_bytes(folder / "out"))
    assert len(whole) > 9


def test_a_rerun_changes_nothing(scanned, bucket, whole):
    scan(scanned)
    assert bucket.tree_bytes("out") == whole


@pytest.mark.slow
def test_ray_workers_write_the_same_bytes(remote, bucket, whole):
    run_alone("scan", bucket.url("in"), "--out", remote.out, *OPTIONS, "--detector", remote.detector, "--workers", 1)
    assert bucket.tree_bytes("out") == whole


def test_clean_with_another_threshold_in_a_bucket_is_clean_on_disk(scanned, local, bucket, tmp_path):
    other = ThresholdPolicy("fraction", fraction=0.1)
    shutil.copytree(local.out, tmp_path / "out")
    clean(scanned.out, other), clean(str(tmp_path / "out"), other)
    assert outputs(bucket.tree_bytes("out")) == outputs(tree_bytes(tmp_path / "out"))


def test_a_damaged_object_is_found_and_made_anew(scanned, bucket, whole):
    assert verify(scanned.out, deep=True).problems == ()
    bucket.put("out/clean/part-0000.tar", whole["clean/part-0000.tar"][:-512])
    bucket.delete("out/scores/part-0002.parquet")
    problems = verify(scanned.out, repair=True).problems
    assert [problem.split(":")[0] for problem in problems] == ["clean/part-0000.tar", "scores/part-0002.parquet"]
    scan(scanned)
    assert bucket.tree_bytes("out") == whole


def test_what_another_process_changes_in_a_bucket_is_seen_at_once(remote, bucket):
    for name in "ab":
        bucket.put(f"out/{name}.tar", b"short")
    assert storage.list_files(bucket.url("out"), ".tar") == ["a.tar", "b.tar"]
    bucket.put("out/a.tar", b"longer than before" * 1000)
    bucket.delete("out/b.tar")
    assert storage.read_bytes(bucket.url("out/a.tar")) == b"longer than before" * 1000
    assert not storage.exists(bucket.url("out/b.tar"))


def test_kept_samples_are_streamed_from_a_bucket(scanned, local):
    expected = [(s["__key__"], s["png"]) for s in KeptSamples(local.out)]
    assert [(s["__key__"], s["png"]) for s in KeptSamples(scanned.out)] == expected
    # workers forked from a process that talks to S3 already
    loader = torch.utils.data.DataLoader(KeptSamples(scanned.out), batch_size=None, num_workers=1)
    assert sorted((s["__key__"], s["png"]) for s in loader) == sorted(expected)


def test_a_head_trained_from_a_bucket_is_the_one_trained_from_disk(bucket, finetune_config, tmp_path):
    shards = labelled(tmp_path / "labelled", [20, 3])
    local = finetune_config("local", shards=(str(shards),), epochs=1)
    remote = dataclasses.replace(local, shards=(bucket.upload(shards, "labelled"),), out=bucket.url("head"))
    finetune(local), finetune(remote)
    written, expected = bucket.tree_bytes("head"), tree_bytes(tmp_path / "local")
    assert written.keys() == expected.keys() - {".lock"}
    assert {name for name in written if written[name] != expected[name]} <= {"metrics.jsonl", "finetune.json"}


def test_an_audit_of_a_bucket_is_that_of_the_disk(scanned, local, bucket):
    assert audit(scanned.out).text.replace(scanned.out, local.out) == audit(local.out).text
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


def test_the_lock_of_a_killed_scan_says_how_to_end_it_and_that_works(remote, bucket, whole, sanitize):
    command = ("scan", bucket.url("in"), "--out", remote.out, *OPTIONS, "--detector", remote.detector, "--workers", 0)
    process = start_alone(*command)
    end = time.monotonic() + 120
    while not any(name.startswith("done/") for name in bucket.names("out")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
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


# ---------------------------------------------------------------- one line, soon


def refusal(run: Callable[..., tuple[int, str]], *arguments: object, seconds: float = 30) -> str:
    """The one line a command ends with, where it ends with exit code 2 in time."""
    begun = time.monotonic()
    code, output = run(*arguments)
    assert time.monotonic() - begun < seconds
    assert (code, output.count("\n"), output[:7]) == (2, 1, "error: "), output
    return output[7:].strip()


@pytest.fixture
def scanning(sanitize, remote, local):
    """Scan from the bucket onto disk, or from disk into the bucket: what is said."""

    def run(shards: object, out: object) -> str:
        return refusal(sanitize, "scan", shards, "--out", out, *OPTIONS, "--detector", local.detector, "--workers", 0)

    return run


@pytest.mark.parametrize("fault", ["expired", "denied"])
def test_credentials_that_are_not_taken_are_told_in_one_line(scanning, proxy, bucket, local, tmp_path, fault):
    words = ANSWERS[fault][2].rstrip(".")
    proxy.reset(always(fault, "/"))
    for line in (scanning(bucket.url("in"), tmp_path / "out"), scanning(local.shards[0], bucket.url("out"))):
        assert line.startswith(f"s3://{bucket.name}/")
        assert "your credentials, then run the same command again" in line
        assert words in line


def test_no_credentials(scanning, bucket, local, tmp_path, monkeypatch, environment):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID"), monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for line in (scanning(bucket.url("in"), tmp_path / "out"), scanning(local.shards[0], bucket.url("out"))):
        assert "Unable to locate credentials" in line


def test_a_key_nobody_gave_out_and_one_that_may_only_read(scanning, bucket, server, local, environment, tmp_path):
    reader = bucket.user_who_may("s3:Get*", "s3:List*")
    with bucket.permissions_checked():
        environment(AWS_ACCESS_KEY_ID="AKIAUNKNOWN")
        assert "cannot be read (" in scanning(bucket.url("in"), tmp_path / "out")
        environment(**reader)
        assert "cannot be written (" in scanning(bucket.url("in"), bucket.url("out"))


def test_a_bucket_that_is_missing_is_named_and_never_made(scanning, bucket, local, tmp_path):
    assert scanning("s3://no-such-bucket/in", tmp_path / "out").startswith(
        "s3://no-such-bucket/in: no such file or folder"
    )
    line = scanning(local.shards[0], "s3://no-such-bucket/out")
    assert line.startswith(
        "s3://no-such-bucket/out/.lock-holder.json: cannot be written (The specified bucket does not exist)"
    )
    assert "no-such-bucket" not in bucket.all_buckets()


def test_s3fs_that_is_not_installed_is_asked_for(scanning, bucket, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    assert "Install s3fs" in scanning(bucket.url("in"), tmp_path / "out")


@pytest.mark.parametrize("attempts", ["1", pytest.param("5", marks=pytest.mark.slow)])
def test_an_endpoint_where_nobody_listens(scanning, bucket, local, environment, tmp_path, attempts):
    environment(AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}", AWS_MAX_ATTEMPTS=attempts)
    for line in (scanning(bucket.url("in"), tmp_path / "out"), scanning(local.shards[0], bucket.url("out"))):
        assert "Could not connect to the endpoint URL" in line


# ---------------------------------------------------------------- a network that fails now and then, or for good


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_requests_that_fail_now_and_then_are_asked_again(proxy, environment, remote, bucket, whole, seed):
    environment(AWS_ENDPOINT_URL=proxy.endpoint)
    proxy.reset(seeded(seed, 0.1))
    result = scan(remote)
    assert proxy.faults()
    assert result.failed == result.cleaned.failed == ()
    assert bucket.tree_bytes("out") == whole


def slow(*faults: str) -> list:
    return [pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


@pytest.mark.parametrize("fault", ["throttled", "reset", *slow("internal", "cut", "lost", "denied", "expired")])
def test_a_shard_that_cannot_be_read_is_named_and_fails_alone(proxy, remote, bucket, whole, fault):
    proxy.reset(always(fault, "/in/part-0001.tar", "GET"))
    result = scan(remote)
    (line,) = result.failed
    assert line.startswith(f"{bucket.url('in/part-0001.tar')}: cannot be read (")
    assert result.samples == 16
    proxy.reset()
    assert scan(remote).failed == ()
    assert bucket.tree_bytes("out") == whole


@pytest.mark.parametrize("name", ["scores/part-0001.parquet", *slow("clean/part-0001.tar", "done/part-0001.json")])
@pytest.mark.parametrize("fault", ["denied", *slow("throttled", "internal", "reset", "lost", "expired")])
def test_an_object_that_cannot_be_written_is_named_and_the_same_command_goes_on(
    proxy, remote, bucket, whole, fault, name
):
    proxy.reset(always(fault, f"/out/{name}", "PUT"))
    line = ended(remote)
    assert f"{remote.out}/{name}: cannot be written (" in line
    proxy.reset()
    assert ended(remote) == "done"
    assert bucket.tree_bytes("out") == whole


def ended(config) -> str:
    """done, or what the user is told."""
    try:
        result = scan(config)
        return "\n".join([*result.failed, *(result.cleaned.failed if result.cleaned else ())]) or "done"
    except SanitizeError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_whatever_fails_for_good_ends_in_words_and_the_same_command_ends_with_the_same_bytes(
    proxy, remote, bucket, whole, seed
):
    proxy.reset(seeded(seed, 0.2, (*RETRIED, "denied", "expired")))
    line = ended(remote)
    assert "unexpectedly" not in line
    proxy.reset()
    bucket.delete(
        "out/.lock-holder.json"
    )  # as the message asks, where the request that ends the lock was one that failed
    assert ended(remote) == "done"
    assert bucket.tree_bytes("out") == whole
    assert verify(remote.out, deep=True).problems == ()


@pytest.mark.slow
def test_an_answer_that_never_comes_is_waited_for_as_long_as_is_set(proxy, remote, bucket, whole, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    proxy.slow = 2.0
    proxy.reset(always("slow", "/in/part-0001.tar", "GET"))
    assert "Read timeout" in ended(remote)
    proxy.reset()
    assert ended(remote) == "done"
    assert bucket.tree_bytes("out") == whole

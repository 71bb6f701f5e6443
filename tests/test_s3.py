"""Against a real S3 server: what is written there is what is written on disk, and whatever the network does, it ends in words."""

import dataclasses
import sys
import threading
import time

import fsspec
import pytest
import torch
from builders import REMOVE_SOME, fit_config, labelled, tree_bytes, write_shards
from click.testing import CliRunner
from faults.s3 import CREDENTIALS, RETRIED, Bucket, always, faulty_proxy, first, free_port, s3_server, seeded

from sanitize import storage
from sanitize.cli import main
from sanitize.commands.audit import audit
from sanitize.commands.clean import clean
from sanitize.commands.finetune import finetune
from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import RefusedError
from sanitize.kept_samples import KeptSamples


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        yield port


@pytest.fixture
def environment(server, monkeypatch):
    """As a user sets it; nothing of the machine's own AWS settings counts."""
    settings = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server}", "AWS_EC2_METADATA_DISABLED": "true"}
    settings |= {"AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)

    def set_all(**changes: str) -> None:
        for name, value in (settings | changes).items():
            monkeypatch.setenv(name, value)
        forget_connections()

    set_all()
    yield set_all
    forget_connections()


def forget_connections() -> None:
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def proxy(server, environment):
    """What the product talks to, in place of the server."""
    with faulty_proxy(server) as proxy:
        environment(AWS_ENDPOINT_URL=proxy.endpoint)
        yield proxy


@pytest.fixture
def bucket(server, environment, tmp_path):
    """Three shards of 17 samples under `in`, also on disk."""
    bucket = Bucket(server)
    bucket.upload(write_shards(tmp_path / "in", [9, 1, 7]), "in")
    return bucket


@pytest.fixture
def configs(bucket, scan_config, tmp_path):
    """(from bucket to bucket, from disk to disk) of the same scan."""
    local = scan_config(tmp_path / "in", out="local", policy=REMOVE_SOME)
    return dataclasses.replace(local, shards=(bucket.url("in"),), out=bucket.url("out")), local


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


def test_a_scan_from_bucket_to_bucket_writes_what_one_on_disk_writes_and_a_rerun_changes_nothing(bucket, configs, tmp_path):
    remote, local = configs
    scan(remote), scan(local)
    whole = bucket.tree_bytes("out")
    assert outputs(whole) == outputs(tree_bytes(tmp_path / "local"))
    scan(remote)
    assert bucket.tree_bytes("out") == whole


def test_clean_with_another_threshold_in_a_bucket_is_clean_on_disk(bucket, configs, tmp_path):
    remote, local = configs
    scan(remote), scan(local)
    other = ThresholdPolicy("fraction", fraction=0.1)
    clean(remote.out, other), clean(local.out, other)
    assert outputs(bucket.tree_bytes("out")) == outputs(tree_bytes(tmp_path / "local"))


def test_a_damaged_object_is_found_and_made_anew(bucket, configs):
    remote, _ = configs
    scan(remote)
    whole = bucket.tree_bytes("out")
    assert verify(remote.out).problems == verify(remote.out, deep=True).problems == ()
    bucket.put("out/clean/part-0000.tar", whole["clean/part-0000.tar"][:-512])
    bucket.delete("out/scores/part-0002.parquet")
    assert [problem.split(":")[0] for problem in verify(remote.out).problems] == [
        "clean/part-0000.tar",
        "scores/part-0002.parquet",
    ]
    verify(remote.out, repair=True)
    scan(remote)
    assert bucket.tree_bytes("out") == whole


def test_what_another_process_changes_in_a_bucket_is_seen_at_once(bucket):
    assert storage.list_files(bucket.url("in"), ".tar") == [f"part-000{i}.tar" for i in range(3)]
    bucket.put("in/part-0001.tar", b"longer than before" * 1000)
    bucket.delete("in/part-0002.tar")
    assert storage.read_bytes(bucket.url("in/part-0001.tar")) == b"longer than before" * 1000
    assert not storage.exists(bucket.url("in/part-0002.tar"))


def test_kept_samples_are_streamed_from_a_bucket(bucket, configs):
    remote, local = configs
    scan(remote), scan(local)
    expected = [(s["__key__"], s["png"]) for s in KeptSamples(local.out)]
    assert [(s["__key__"], s["png"]) for s in KeptSamples(remote.out)] == expected
    # workers forked from a process that talks to S3 already
    loader = torch.utils.data.DataLoader(KeptSamples(remote.out), batch_size=None, num_workers=2)
    assert sorted((s["__key__"], s["png"]) for s in loader) == sorted(expected)


def test_a_head_trained_from_a_bucket_is_the_one_trained_from_disk(bucket, finetune_config, tmp_path):
    shards = labelled(tmp_path / "labelled", [20, 3])
    local = finetune_config("local", shards=(str(shards),), epochs=1)
    remote = dataclasses.replace(local, shards=(bucket.upload(shards, "labelled"),), out=bucket.url("head"))
    finetune(local), finetune(remote)
    written, expected = bucket.tree_bytes("head"), tree_bytes(tmp_path / "local")
    assert written.keys() == expected.keys() - {".lock"}
    assert {name for name in written if written[name] != expected[name]} <= {"metrics.jsonl", "finetune.json"}


def test_an_audit_of_a_bucket_is_that_of_the_disk(bucket, configs):
    remote, local = configs
    scan(remote), scan(local)
    assert audit(remote.out).text.replace(remote.out, local.out) == audit(local.out).text
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


def test_of_two_scans_at_once_exactly_one_wins(bucket, configs, tmp_path):
    remote, local = configs
    scan(local)
    ended: list[str] = []
    start = threading.Barrier(2)

    def run():
        start.wait()
        try:
            scan(remote)
            ended.append("done")
        except RefusedError as error:
            ended.append(str(error))

    run_at_once([threading.Thread(target=run) for _ in range(2)])
    refused, done = sorted(ended, reverse=True) if ended[0] != "done" else sorted(ended)
    assert outputs(bucket.tree_bytes("out")) == outputs(tree_bytes(tmp_path / "local"))

"""S3 that is refused, missing, throttled or cut off: one line says so, and the same command ends with the same bytes."""

import re
import sys
import time
from collections.abc import Callable

import fsspec
import pytest
from faults.s3 import ANSWERS, RETRIED, Request, always, first, free_port, seeded
from faults.s3_fixtures import OPTIONS
from fsspec.registry import _registry

from sanitize import storage, workers
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.errors import SanitizeError, StorageError


@pytest.fixture(autouse=True)
def tried_once(monkeypatch):
    """Else most faults would pass unnoticed, and the others take half a minute."""
    monkeypatch.setattr(workers, "PAUSES", ())


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
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/x: cannot be written"):
        storage.write_bytes("s3://no-such-bucket/x", b"")
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


def test_a_connection_lost_in_the_middle_of_a_shard_is_no_damage_of_the_shard(
    proxy, remote, bucket, whole, monkeypatch
):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"default_block_size": 4096})  # several requests a shard
    fsspec.get_filesystem_class("s3").clear_instance_cache()

    def later(request: Request) -> str:
        start = re.match(r"bytes=(\d+)", request.headers.get("Range", ""))
        return "reset" if "/in/part-0000.tar" in request.path and start and int(start[1]) else ""

    proxy.reset(first(2, later))
    result = scan(remote)
    assert len(proxy.faults()) == 2
    assert result.damaged == ()
    assert [line.split(" (")[0] for line in result.failed] == [f"{bucket.url('in/part-0000.tar')}: cannot be read"]
    assert ended(remote) == "done"
    assert bucket.tree_bytes("out") == whole


READ, WRITTEN = ("GET", "/in/part-0001.tar"), ("PUT", "/out/clean/part-0001.tar")
GIVEN_UP = [(READ, fault) for fault in ("throttled", "reset", "internal", "cut", "lost")]
GIVEN_UP += [
    (WRITTEN, fault) for fault in ("throttled", "reset", "internal", "lost")
]  # the answer to a write has nothing to cut


@pytest.mark.parametrize(
    ("request_", "fault"),
    [pytest.param(*case, marks=[] if case[1] == "throttled" else pytest.mark.slow) for case in GIVEN_UP],
)
def test_a_shard_that_the_client_gave_up_on_is_tried_again(proxy, remote, bucket, whole, monkeypatch, request_, fault):
    method, name = request_
    proxy.reset(always(fault, name, method))
    assert ended(remote) != "done"
    given_up = len(proxy.faults())  # requests of one try
    monkeypatch.setattr(workers, "PAUSES", (0.0,) * 3)
    proxy.reset(first(given_up + 1, always(fault, name, method)))
    assert ended(remote) == "done"
    assert len(proxy.faults()) == given_up + 1
    assert ended(remote) == "done"  # adds the identity of a shard that could not be read when the scan began
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
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 0.3}})
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    proxy.slow = 1.0
    proxy.reset(always("slow", "/in/part-0001.tar", "GET"))
    assert "Read timeout" in ended(remote)
    proxy.reset()
    assert ended(remote) == "done"
    assert bucket.tree_bytes("out") == whole

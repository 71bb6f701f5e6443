"""Fixtures of the tests against an S3 server: the same scan on disk and in a bucket, and a proxy that makes requests fail."""

import dataclasses

import fsspec
import pytest
from builders import REMOVE_SOME, write_shards
from click.testing import CliRunner

from faults.s3 import CREDENTIALS, Bucket, faulty_proxy, s3_server
from sanitize.cli import main
from sanitize.commands.scan import scan
from sanitize.config import ScanConfig

OPTIONS = ("--precision", "fp32", "--fraction", 0.3, "--batch-size", 8, "--cpus-per-worker", 1)


@pytest.fixture(scope="session")
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
def on_disk(tmp_path_factory):
    """On disk: `in`, three shards of 17 samples."""
    on_disk = tmp_path_factory.mktemp("s3")
    write_shards(on_disk / "in", [9, 1, 7])
    return on_disk


@pytest.fixture(scope="module")
def bucket(server, environment, on_disk):
    """In a bucket: the same."""
    bucket = Bucket(server)
    bucket.upload(on_disk / "in", "in")
    return bucket


@pytest.fixture(scope="module")
def local(on_disk, detector):
    """A scan of three shards on disk, done."""
    config = ScanConfig(
        (str(on_disk / "in"),),
        str(detector),
        str(on_disk / "out"),
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
def remote_done(remote, bucket, whole):
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

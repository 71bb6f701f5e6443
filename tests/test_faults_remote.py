"""On object storage: whichever request fails, is cut short or loses its answer, the same command ends with the same bytes."""

import dataclasses
import random

import pytest
from builders import write_shards
from faults.store import FAULTS, FlakyStore
from source_builders import write_images

from sanitize import workers
from sanitize.artifacts.folder_lock import HOLDER
from sanitize.artifacts.scan_profile import PROFILE
from sanitize.commands.pack import pack
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import SanitizeError

OUT = "flaky://out"


@pytest.fixture
def config(tmp_path, scan_config, monkeypatch):
    """A scan of three shards in the store, whose output is empty."""
    monkeypatch.setattr(workers, "PAUSES", ())  # else most faults would pass unnoticed
    FlakyStore.store.clear()
    FlakyStore.plan()
    for path in write_shards(tmp_path / "in", [9, 1, 7]).glob("*.tar"):
        FlakyStore().pipe_file(f"/in/{path.name}", path.read_bytes())
    config = scan_config(tmp_path / "in", policy=ThresholdPolicy("fraction", fraction=0.3))
    return dataclasses.replace(config, shards=("flaky://in",), out=OUT)


def output() -> dict[str, bytes]:
    return {name: file.getvalue() for name, file in FlakyStore.store.items() if name.startswith("/out/")}


def contents() -> dict[str, bytes]:
    """Without the file of a scan folder that holds seconds."""
    return {name: data for name, data in output().items() if name != f"/out/{PROFILE}"}


def clear_output() -> None:
    for name in output():
        del FlakyStore.store[name]


def outcome(config) -> str:
    try:
        result = scan(config)
        return "some failed" if result.failed or result.cleaned is None or result.cleaned.failed else "done"
    except SanitizeError as error:
        return str(error)


def check_points(config, points: int, seed: int) -> None:
    rng = random.Random(seed)
    FlakyStore.plan()
    assert outcome(config) == "done"
    whole, counts = contents(), dict(FlakyStore.requests)
    ended = []
    for _ in range(points):
        kind, fault = rng.choice(sorted(counts)), rng.choice(FAULTS)
        number = rng.randint(1, counts[kind])
        clear_output()
        FlakyStore.plan(kind, number, fault)
        ended.append(outcome(config))
        FlakyStore.plan()
        FlakyStore.store.pop(
            f"/out/{HOLDER}", None
        )  # as the message asks, where the lock's own request was the one that failed
        assert outcome(config) == "done", (kind, number, fault, ended[-1])
        assert contents() == whole, (kind, number, fault)
        assert verify(OUT, deep=True).problems == ()
    assert any(end != "done" for end in ended)


def test_any_request_may_fail(config):
    check_points(config, 30, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_any_of_many_requests_may_fail(config, seed):
    check_points(config, 200, seed)


def pack_outcome() -> str:
    try:
        result = pack("flaky://photos", OUT, shard_size=4)
        return "some failed" if result.failed or result.unreadable else "done"
    except SanitizeError as error:
        return str(error)


@pytest.mark.parametrize("fault", FAULTS)
def test_any_request_of_pack_may_fail(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(workers, "PAUSES", ())
    FlakyStore.store.clear()
    FlakyStore.plan()
    for path, data in write_images(tmp_path, 9).items():
        FlakyStore().pipe_file(f"/photos/{path}", data)
    FlakyStore.plan()
    assert pack_outcome() == "done"
    whole, ended = output(), []
    for kind, number in [(kind, n + 1) for kind, count in FlakyStore.requests.items() for n in range(count)]:
        clear_output()
        FlakyStore.plan(kind, number, fault)
        ended.append(pack_outcome())
        FlakyStore.plan()
        FlakyStore.store.pop(f"/out/{HOLDER}", None)
        assert pack_outcome() == "done", (kind, number, ended[-1])
        assert contents() == whole, (kind, number)
    assert any(end != "done" for end in ended)

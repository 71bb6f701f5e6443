"""Where the seconds of a scan go: what a stage takes, what bounds the run, and what is written of it."""

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from builders import Clock, write_shards

from sanitize import profile as profile_module
from sanitize.artifacts.scan_profile import ScanProfile, ShardProfile
from sanitize.commands.scan import scan
from sanitize.profile import BOUND_BY, STAGES, Profile, StageSeconds
from sanitize.records import Sample
from sanitize.stages.prefetch import image_batches


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profile_module.time, "perf_counter", clock)
    return clock


# ---------------------------------------------------------------- adding up


def test_a_stage_does_not_count_what_stages_inside_it_take(clock):
    profile = Profile()
    with profile.of("scoring"):
        clock.now += 1
        with profile.of("encoder"):
            clock.now += 10
            with profile.of("transfer"):
                clock.now += 100
        with profile.pause():
            clock.now += 1000
        with profile.of("encoder"):
            clock.now += 20
        clock.now += 2
    assert profile.seconds == StageSeconds(scoring=3, encoder=30, transfer=100)


def test_getting_items_counts_and_working_on_them_does_not(clock):
    def items():
        for number in range(3):
            clock.now += 1
            yield number
        clock.now += 0.5  # finding out that there are no more

    profile = Profile()
    for _ in profile.each("read", items()):
        clock.now += 100
    assert profile.seconds == StageSeconds(read=3.5)


def test_a_stage_that_fails_took_its_time_all_the_same(clock):
    def fails(profile):
        with profile.of("scoring"), profile.of("encoder"):
            clock.now += 4
            raise RuntimeError("out of memory")

    profile = Profile()
    with pytest.raises(RuntimeError):
        fails(profile)
    with profile.of("write"):
        clock.now += 1
    assert profile.seconds == StageSeconds(encoder=4, write=1)


def test_threads_that_work_at_one_time_add_up(clock):
    """Both are inside `decode` when a second passes: two thread-seconds."""
    profile, inside, passed = Profile(), threading.Barrier(3), threading.Event()

    def decode():
        with profile.of("decode"):
            inside.wait()
            passed.wait()

    threads = [threading.Thread(target=decode) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    clock.now += 1
    passed.set()
    for thread in threads:
        thread.join()
    assert profile.seconds == StageSeconds(decode=2)


def test_each_shard_begins_at_nothing(clock):
    profile = Profile()
    with profile.of("read"):
        clock.now += 1
    profile.restart()
    assert profile.seconds == StageSeconds()


# ---------------------------------------------------------------- on a GPU


def test_a_device_is_waited_for_only_where_its_stages_are_asked_for_apart(clock):
    def work(profile):
        with profile.of("scoring"):
            clock.now += 1
            with profile.of("encoder"):
                clock.now += 1
        with profile.of("write"):
            clock.now += 1
        return profile.seconds

    def wait():
        clock.now += 10

    assert work(Profile(wait=wait)) == StageSeconds(scoring=31 - 10, encoder=11, write=1)
    assert work(Profile(together=True)) == StageSeconds(model=2, write=1)
    assert work(Profile.on(torch.device("cpu"), apart=True)) == StageSeconds(scoring=1, encoder=1, write=1)


# ---------------------------------------------------------------- what bounds a run


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (StageSeconds(encoder=5, waiting_for_decode=2), "the encoder"),
        (StageSeconds(encoder=5, waiting_for_decode=6, decode=40), "decode"),
        (StageSeconds(encoder=5, waiting_for_read=6, read=6), "reading"),
        (StageSeconds(encoder=5, decode=40, read=40), "the encoder"),  # beside the model, and it never waited
        (StageSeconds(model=5, write=1), "the model"),
        (StageSeconds(), ""),
    ],
)
def test_the_model_s_thread_tells_what_bounds_the_run(seconds, words):
    assert seconds.bound_by == words


def slow(clock, threads: set[str]):
    """Samples without an image, of which each takes a second to be read."""
    for number in range(4):
        threads.add(threading.current_thread().name)
        clock.now += 1
        yield Sample(number, f"k{number}", (), None, "no_image", "why")


def test_reading_is_timed_where_it_happens(clock):
    profile, threads = Profile(), set[str]()
    assert [len(batch) for batch in image_batches(slow(clock, threads), 2, 1, profile=profile)] == [2, 2]
    assert threads == {"read-shard"}
    assert profile.seconds.read == 4


# ---------------------------------------------------------------- what is written


def profile_of(folder: Path) -> dict:
    return json.loads((folder / "profile.json").read_text())


def test_a_scan_writes_the_seconds_of_every_shard_and_of_all(shards, scan_config, tmp_path):
    scan(scan_config(shards))
    found = profile_of(tmp_path / "scanned")
    assert {stem: shard["samples"] for stem, shard in found["shards"].items()} == {
        "part-0000": 20,
        "part-0001": 1,
        "part-0002": 33,
    }
    assert found["samples"] == 54
    assert found["bound_by"] in BOUND_BY.values()
    for stage in STAGES:
        total = sum(shard["seconds"][stage] for shard in found["shards"].values())
        assert found["seconds"][stage] == pytest.approx(total, abs=1e-5)
        if stage != "waiting_for_decode":  # nothing there when each image is ready before it is asked for
            assert (total > 0) == (stage != "model"), stage  # a CPU does each stage when it is told to


def test_rates_are_of_one_thread_and_of_a_whole_worker():
    seconds = StageSeconds(read=1, decode=8, resize=2, waiting_for_decode=2, transfer=1, encoder=4, scoring=2, write=1)
    found = ScanProfile.of({"b": ShardProfile(30, seconds), "a": ShardProfile(10, StageSeconds())})
    assert found.images_per_second == {
        "read": 40,
        "decode": 5,
        "resize": 20,
        "transfer": 40,
        "encoder": 10,
        "scoring": 20,
        "write": 40,
        "worker": 4,
    }
    assert list(found.shards) == ["a", "b"]


def test_the_progress_of_a_scan_ends_with_what_bounds_it(shards, scan_config, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="sanitize.progress")
    scan(scan_config(shards))
    last = [line for line in caplog.messages if line.startswith("scan: ")][-1]
    assert last.startswith("scan: 3/3 shards, 54 images, ")
    assert last.endswith(f", bound by {profile_of(tmp_path / 'scanned')['bound_by']}")


def test_workers_on_ray_tell_the_same_stages(shards, scan_config, tmp_path, ray_cluster):
    scan(scan_config(shards, workers=2, cpus_per_worker=1))
    found = profile_of(tmp_path / "scanned")
    assert (found["samples"], list(found["shards"])) == (54, ["part-0000", "part-0001", "part-0002"])
    assert {name for name, spent in found["seconds"].items() if not spent} <= {"model", "waiting_for_decode"}


def test_a_scan_that_goes_on_writes_of_the_shards_that_it_scored(tmp_path, scan_config):
    shards = write_shards(tmp_path / "in", [5])
    scan(scan_config(shards))
    write_shards(tmp_path / "in", [5, 7])
    scan(scan_config(shards, append=True))
    assert list(profile_of(tmp_path / "scanned")["shards"]) == ["part-0001"]


def test_a_scan_with_nothing_to_score_leaves_the_profile_as_it_is(shards, scan_config, tmp_path):
    scan(scan_config(shards))
    before = (tmp_path / "scanned" / "profile.json").read_bytes()
    scan(scan_config(shards))
    assert (tmp_path / "scanned" / "profile.json").read_bytes() == before

"""Stages run the same in this process and on Ray; one shard's failure is its own, anything else ends the run."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from sanitize import workers
from sanitize.errors import ConfigError, SanitizeError, ShardError, StorageError
from sanitize.process import usable_cpus
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources, _require_reachable, plan, release_workers, resting_workers, session_for
from sanitize.workers import OUT_OF_MEMORY, _lost, map_shards

SHARDS = [Shard(f"/in/{name}.tar", name, 10) for name in "abcd"]


@dataclass(frozen=True)
class Echo:
    """Returns the stem; fails or dies where told to, once if there is a tombstone."""

    fail: str = ""
    full: str = ""
    die: str = ""
    tombstone: str = ""

    def start(self, threads):
        def work(shard, tick):
            tick(1, 0, shard.size)
            if shard.stem == self.fail:
                raise ShardError(f"{shard.url}: cannot be read")
            if shard.stem == self.full:
                raise StorageError("out/x: no space left")
            if shard.stem == self.die and not (self.tombstone and Path(self.tombstone).exists()):
                if self.tombstone:
                    Path(self.tombstone).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {"stem": shard.stem, "threads": threads}

        return work


def run(task, count, at_once=1, shards=SHARDS):
    with ProgressDisplay("test", len(shards), 40) as display:
        outcomes = map_shards(task, shards, Resources(count, 1, 0), display, at_once=at_once)
        return sorted(outcomes, key=lambda o: o.shard.stem)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_shard_has_one_outcome_and_a_bad_one_fails_alone(ray_cluster, workers):
    outcomes = run(Echo(fail="b"), workers)
    assert [o.result and o.result["stem"] for o in outcomes] == ["a", None, "c", "d"]
    assert [o.error for o in outcomes] == ["", "/in/b.tar: cannot be read", "", ""]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_is_not_the_shards_ends_the_run_as_itself(ray_cluster, workers):
    with pytest.raises(StorageError, match=r"^out/x: no space left$"):
        run(Echo(full="c"), workers)


def test_a_worker_that_is_killed_is_restarted_and_does_its_shard_again(ray_cluster, tmp_path):
    outcomes = run(Echo(die="b", tombstone=str(tmp_path / "killed")), 1)
    assert (tmp_path / "killed").exists()
    assert [o.result["stem"] for o in outcomes] == ["a", "b", "c", "d"]


def test_workers_take_the_largest_shards_first(ray_cluster):
    sizes = {"a": 10, "b": 30, "c": 20, "d": 30}
    shards = [Shard(f"/in/{stem}.tar", stem, size) for stem, size in sizes.items()]
    with ProgressDisplay("test", 4, 90) as display:
        outcomes = list(map_shards(Echo(), shards, Resources(1, 1, 0), display))
    assert [outcome.shard.stem for outcome in outcomes] == ["b", "d", "c", "a"]


# ---------------------------------------------------------------- workers between stages


@dataclass(frozen=True)
class Process:
    """Returns the process it runs in, its threads, and a word of the task."""

    word: str

    def start(self, threads):
        return lambda *_: (os.getpid(), threads, self.word)


def told(word, resources):
    with ProgressDisplay("test", 4, 40) as display:
        return {outcome.result for outcome in map_shards(Process(word), SHARDS, resources, display)}


def free_cpus():
    return ray.available_resources().get("CPU", 0)


def test_stages_of_one_command_share_workers_and_each_loads_its_own_task(ray_cluster):
    alone = Resources(1, 1, 0)
    with session_for(alone, ""):
        ((first, _, word),) = told("one", alone)
        ((second, _, other),) = told("two", alone)
    assert first == second and (word, other) == ("one", "two")
    ((later, _, _),) = told("three", alone)
    assert later != first


def test_commands_of_a_pipeline_share_workers(ray_cluster):
    alone = Resources(1, 1, 0)
    with session_for(alone, ""):
        processes = set()
        for command in ("fit", "scan"):
            with session_for(alone, ""):
                processes |= {process for process, _, _ in told(command, alone)}
        assert len(processes) == 1
    assert resting_workers() is None


def test_workers_with_other_cpus_make_room_and_a_training_gets_back_what_they_hold(ray_cluster):
    with session_for(Resources(2, 1, 0), ""):
        before = {process for process, _, _ in told("one", Resources(2, 1, 0))}
        ((process, threads, _),) = told("two", Resources(1, 2, 0))
        assert process not in before and threads == 2
        release_workers()
        wait_until(lambda: free_cpus() >= 2)
        assert resting_workers().actors == []
    assert resting_workers() is None


def wait_until(condition, seconds=30):
    for _ in range(10 * seconds):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


@dataclass(frozen=True)
class AlwaysDies:
    def start(self, _threads):
        return lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_run_with_advice(ray_cluster):
    with pytest.raises(
        SanitizeError, match=r"3 shards in a row lost their workers\. .*Lower --batch-size or --workers"
    ):
        run(AlwaysDies(), 1)


@dataclass(frozen=True)
class Throttled:
    """Every shard is refused for now, so many times."""

    times: int
    error: type[SanitizeError] = ShardError

    def start(self, _threads):
        tries: dict[str, int] = {}

        def work(shard, _tick):
            tries[shard.stem] = tries.get(shard.stem, 0) + 1
            if tries[shard.stem] <= self.times:
                raise self.error(f"{shard.url}: SlowDown", may_pass=True)
            return tries[shard.stem]

        return work


def test_a_shard_that_a_store_refuses_for_now_is_tried_again(monkeypatch):
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.0))
    assert [o.result for o in run(Throttled(2), 0)] == [3] * 4
    assert [o.error for o in run(Throttled(3), 0)] == [f"/in/{name}.tar: SlowDown" for name in "abcd"]
    assert [o.result for o in run(Throttled(1, StorageError), 0)] == [2] * 4
    with pytest.raises(StorageError, match=r"^/in/a\.tar: SlowDown$"):
        run(Throttled(3, StorageError), 0)


@pytest.mark.parametrize("count", [0, 2])
def test_many_shards_at_once_in_one_worker_have_the_same_outcomes(ray_cluster, count):
    shards = [Shard(f"/in/{number:02d}.tar", f"{number:02d}", 10) for number in range(30)]
    outcomes = run(Echo(fail="07"), count, at_once=3, shards=shards)
    assert [o.result and o.result["stem"] for o in outcomes] == [s.stem if s.stem != "07" else None for s in shards]


def test_a_shard_that_kills_its_worker_is_named_among_those_it_had_at_once(ray_cluster):
    outcomes = run(Echo(die="b"), 1, at_once=2)
    assert [bool(o.error) for o in outcomes] == [False, True, False, False]
    assert "/in/b.tar: its worker died 4 times" in outcomes[1].error


def test_a_worker_that_ran_out_of_memory_is_named_as_such():
    assert _lost(SHARDS[0], OUT_OF_MEMORY) == (
        "/in/a.tar: its worker ran out of memory 4 times. Lower --batch-size (images held at a time) or --workers, or give the workers "
        "more memory."
    )


def test_the_default_plan_fits_the_machine():
    cores = int(ray.cluster_resources()["CPU"]) if ray.is_initialized() else usable_cpus()
    resources = plan(-1, 0, 0, shards=100)
    assert 1 <= resources.workers * resources.cpus <= cores
    assert plan(-1, 0, 0, shards=1).workers == 1
    assert plan(0, 0, 0, shards=5).workers == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4000, 1, 0), r"4000 workers with 1 CPUs and 0 GPUs each do not fit: .* Lower --workers"),
        ((1, 1, 512), r"1 workers with 1 CPUs and 512 GPUs each do not fit"),
        ((-2, 0, 0), r"workers must be -1 \(automatic\), 0 \(this process\) or more"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_there_is(arguments, words):
    workers, cpus, gpus = arguments
    with pytest.raises(ConfigError, match=words):
        plan(workers, cpus, gpus, shards=10)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the affinity of a process is a Linux thing")
def test_a_process_that_may_use_one_cpu_plans_for_one():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert plan(0, 0, -1, 1).cpus == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_cluster_that_does_not_answer_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name in (address, f"ray://{address}"):
            with pytest.raises(
                ConfigError, match=rf"--address {name}: nobody answers there \(.*refused\)\. Is the cluster up"
            ):
                _require_reachable(name)

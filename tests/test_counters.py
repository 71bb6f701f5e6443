"""What Prometheus reads of a command on Ray: every sample and shard once, and nothing at all without Ray."""

import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from sanitize import workers
from sanitize.counters import COUNTERS, SECONDS, RayCounters
from sanitize.errors import ShardError
from sanitize.profile import STAGES, StageSeconds
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources

SHARDS = [Shard(f"/in/{name}.tar", name, 100) for name in "abcd"]


@dataclass(frozen=True)
class TenSamples:
    """Of each shard, two of them flagged; one shard fails after four."""

    fails: str = ""

    def start(self, _threads):
        def work(shard, progress):
            progress(4, 1, 40, StageSeconds(decode=0.5))
            if shard.stem == self.fails:
                raise ShardError(f"{shard.url}: cannot be read")
            progress(10, 2, 100, StageSeconds(decode=1, encoder=2))
            return shard.stem

        return work


def run(task, count: int, stage: str = "scan", at_once: int = 1) -> None:
    with ProgressDisplay(stage, len(SHARDS), 400) as display:
        list(workers.map_shards(task, SHARDS, Resources(count, 1, 0), display, at_once=at_once))


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """(name, stage) → what Ray's counter of that name was told."""
    told: Counter = Counter()

    class Told:
        def __init__(self, name, *_described, **_tags):
            self.name = name

        def set_default_tags(self, tags):
            self.stage = tags["stage"]
            return self

        def inc(self, value, tags=None):
            assert value > 0
            told[(self.name, self.stage, *(tags or {}).values())] += value

    monkeypatch.setattr("ray.util.metrics.Counter", Told)
    return told


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_sample_and_shard_is_counted_once(ray_cluster, counted, at_once):
    run(TenSamples(fails="b"), 2, at_once=at_once)
    assert {name: counted[name, "scan"] for name in COUNTERS} == {
        "sanitize_samples": 34,
        "sanitize_flagged": 7,
        "sanitize_bytes": 400,
        "sanitize_shards_done": 3,
        "sanitize_shards_failed": 1,
    }


@pytest.mark.parametrize("at_once", [1, 2])
def test_seconds_are_counted_by_part(ray_cluster, counted, at_once):
    run(TenSamples(fails="b"), 2, at_once=at_once)
    assert {key: value for key, value in counted.items() if key[0] == SECONDS} == {
        (SECONDS, "scan", "decode"): 3.5,
        (SECONDS, "scan", "encoder"): 6,
    }


def test_each_stage_has_its_own(ray_cluster, counted):
    run(TenSamples(), 1, "scan")
    run(TenSamples(), 1, "clean")
    assert counted["sanitize_samples", "scan"] == counted["sanitize_samples", "clean"] == 40


def test_a_total_that_falls_is_not_counted_twice(counted):
    counters = RayCounters("scan")
    for samples in (5, 9, 4, 9, 12):  # a worker died at 9 and began its shard again
        counters.tell(samples, 0, 0, 0, 0, StageSeconds())
    assert counted == {("sanitize_samples", "scan"): 12}


def test_without_ray_nothing_is_counted(counted):
    run(TenSamples(), 0)
    assert not counted


@pytest.mark.slow
def test_prometheus_reads_them(ray_cluster):
    pytest.importorskip(
        "opencensus", reason="needs what Ray exports metrics with: pip install 'sanitize-shards[cluster]'"
    )
    import ray

    run(TenSamples(fails="b"), 1, "scrape")
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {("sanitize_samples", 34), ("sanitize_shards_failed", 1)}
    found: set = set()
    end = time.monotonic() + 60
    while not wanted <= found and time.monotonic() < end:
        time.sleep(2)
        lines = urllib.request.urlopen(url, timeout=5).read().decode().splitlines()
        ours = [line for line in lines if line.startswith("ray_sanitize_") and 'stage="scrape"' in line]
        found = {
            (line.partition("{")[0].removeprefix("ray_").removesuffix("_total"), float(line.split()[-1]))
            for line in ours
        }
    assert wanted <= found, found


def test_the_documentation_names_every_counter():
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    assert {name for name in [*COUNTERS, SECONDS] if f"`ray_{name}_total`" not in page} == set()
    assert {part for part in STAGES if f"`{part}`" not in page} == set()

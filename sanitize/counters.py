"""What Prometheus reads of a running command: Ray exports these counters at the metrics port of the driver's node.

The driver keeps them, because it hears of every shard and a worker that dies takes its own numbers with it.
"""

from collections.abc import Mapping
from typing import Any

from sanitize.profile import STAGES, StageSeconds

COUNTERS: Mapping[str, str] = {  # name; Ray exports it as ray_<name>_total → what it counts, since the command began
    "sanitize_samples": "Samples read; in stage scan each is a row of a score table.",
    "sanitize_flagged": "Samples that stand out by their p-value (stage scan), or that the rule removes (stage clean).",
    "sanitize_bytes": "Bytes of input shards that were worked on.",
    "sanitize_shards_done": "Shards that are committed.",
    "sanitize_shards_failed": "Shards that failed and were left out.",
}
SECONDS = "sanitize_seconds"  # stage scan only; label `part`: the stages of a profile (profile.py)


class RayCounters:
    """Of one stage (scan, clean, embed, ...) in a process that is connected to Ray."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Counter

        self._counters: dict[str, Any] = {
            name: Counter(name, description, tag_keys=("stage",)).set_default_tags({"stage": stage})
            for name, description in COUNTERS.items()
        }
        seconds = Counter(SECONDS, "Seconds by part of the work, of all workers together.", tag_keys=("stage", "part"))
        self._counters[SECONDS] = seconds.set_default_tags({"stage": stage})
        self._told: dict[tuple[str, str], float] = {}

    def tell(
        self, samples: int, flagged: int, size: int, shards_done: int, shards_failed: int, seconds: StageSeconds
    ) -> None:
        """Totals of this run so far. One may fall when a worker dies in the middle of a shard; its counter waits then."""
        for name, total in zip(COUNTERS, (samples, flagged, size, shards_done, shards_failed), strict=True):
            self._raise(name, total)
        for part, spent in zip(STAGES, seconds.values(), strict=True):
            self._raise(SECONDS, spent, part)

    def _raise(self, name: str, total: float, part: str = "") -> None:
        told = self._told.get((name, part), 0)
        if total > told:
            self._counters[name].inc(total - told, tags={"part": part} if part else None)
            self._told[name, part] = total

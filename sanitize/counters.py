"""What Prometheus reads of a running command: Ray exports these counters at the metrics port of the driver's node.

The driver keeps them, because it hears of every shard and a worker that dies takes its own numbers with it.
"""

from collections.abc import Mapping
from typing import Any

COUNTERS: Mapping[str, str] = {  # name; Ray exports it as ray_<name>_total → what it counts, since the command began
    "sanitize_samples": "Samples read; in stage scan each is a row of a score table.",
    "sanitize_flagged": "Samples that stand out by their p-value (stage scan), or that the rule removes (stage clean).",
    "sanitize_bytes": "Bytes of input shards that were worked on.",
    "sanitize_shards_done": "Shards that are committed.",
    "sanitize_shards_failed": "Shards that failed and were left out.",
}


class RayCounters:
    """Of one stage (scan, clean, embed, ...) in a process that is connected to Ray."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Counter

        self._counters: dict[str, Any] = {
            name: Counter(name, description, tag_keys=("stage",)).set_default_tags({"stage": stage})
            for name, description in COUNTERS.items()
        }
        self._told = dict.fromkeys(COUNTERS, 0)

    def tell(self, samples: int, flagged: int, size: int, shards_done: int, shards_failed: int) -> None:
        """Totals of this run so far. One may fall when a worker dies in the middle of a shard; its counter waits then."""
        for name, total in zip(COUNTERS, (samples, flagged, size, shards_done, shards_failed), strict=True):
            if total > self._told[name]:
                self._counters[name].inc(total - self._told[name])
                self._told[name] = total

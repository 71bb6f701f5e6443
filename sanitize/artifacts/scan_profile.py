"""profile.json of a scan folder: where the seconds of pass 1 went, of the last scan that scored anything.

A note for people: nothing is decided by it, no hash covers it, and it is the one file of the folder that differs between equal scans.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from sanitize import storage
from sanitize.config_loading import to_mapping
from sanitize.profile import BOUND_BY, STAGES, StageSeconds

PROFILE = "profile.json"


@dataclass(frozen=True)
class ShardProfile:
    """seconds: none of a shard whose worker was lost before it could tell them."""

    samples: int
    seconds: StageSeconds


@dataclass(frozen=True)
class ScanProfile:
    """Of all `shards` together. bound_by: what the threads of the models spent most time on; images_per_second: of each stage by itself
    (of `read` and `decode`, of one thread), and of a whole worker."""

    bound_by: str
    samples: int
    seconds: StageSeconds
    images_per_second: dict[str, float]
    shards: dict[str, ShardProfile]

    @classmethod
    def of(cls, shards: Mapping[str, ShardProfile]) -> "ScanProfile":
        samples = sum(shard.samples for shard in shards.values())
        seconds = sum((shard.seconds for shard in shards.values()), StageSeconds())
        spent = {name: getattr(seconds, name) for name in STAGES if not name.startswith("waiting")}
        spent["worker"] = sum(getattr(seconds, name) for name in BOUND_BY)
        rates = {name: round(samples / value, 1) for name, value in spent.items() if value}
        rounded = {
            stem: dataclasses.replace(shard, seconds=shard.seconds.rounded()) for stem, shard in sorted(shards.items())
        }
        return cls(seconds.bound_by, samples, seconds.rounded(), rates, rounded)


def write_profile(folder: str, shards: Mapping[str, ShardProfile]) -> None:
    """shards: those that were scored now, by stem."""
    measured = {stem: shard for stem, shard in shards.items() if shard.seconds.bound_by}
    if measured:
        storage.write_json(storage.join(folder, PROFILE), to_mapping(ScanProfile.of(measured)))

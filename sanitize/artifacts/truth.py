"""poison.json: which samples of poisoned shards carry a trigger, and which trigger it is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sanitize import storage
from sanitize.errors import ConfigError

NAME = "poison.json"


@dataclass(frozen=True)
class PoisonedSample:
    """shard: its stem; key: as score tables write it; index: of the sample in its shard."""

    shard: str
    key: str
    index: int


@dataclass(frozen=True)
class PoisonTruth:
    """trigger: in words; replace: what poisoned samples say instead, by extension."""

    trigger: str
    rate: float
    seed: int
    replace: Mapping[str, Sequence[str]]
    poisoned: tuple[PoisonedSample, ...]


def write_truth(folder: str, truth: PoisonTruth) -> str:
    """Returns the path."""
    path = storage.join(folder, NAME)
    values: dict[str, Any] = asdict(truth)
    storage.write_json(path, values)
    return path


def load_poisoned(path: str) -> set[tuple[str, int]]:
    """(shard, index) of the poisoned samples; the rest of the file is not needed for that, and a file by hand may lack it.

    Raises ConfigError when the file is not a truth file.
    """
    values = storage.read_json(path)
    try:
        return {(str(entry["shard"]), int(entry["index"])) for entry in values["poisoned"]}
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: not a truth file. It needs a list `poisoned` of {{shard, key, index}}, as `sanitize poison` writes it."
        ) from None

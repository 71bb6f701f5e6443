"""Where the seconds of a scan go: each worker has one Profile, and the stages time themselves by it.

Reading, decoding and resizing run in threads beside the model, so the seconds of stages add up to more than those of the clock. What the
model's thread does, one thing after the other, adds up to its time: the largest of these is what bounds the run.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class StageSeconds:
    """Seconds by stage.

    Thread-seconds beside the model:
    read                from storage, unpack, hash, find the samples
    decode              hash each image and decode it
    resize              to the encoder's size

    Of the model's thread:
    waiting_for_read, waiting_for_decode    until the next image is there
    transfer            the images of a batch become one tensor on the device
    encoder             all its passes, and those of a reference encoder
    scoring             what else the scorer does
    model               these three together, where a GPU was not asked for them apart: it works on while this thread goes on
    write               rows, Parquet, hashes, markers
    """

    read: float = 0.0
    decode: float = 0.0
    resize: float = 0.0
    waiting_for_read: float = 0.0
    waiting_for_decode: float = 0.0
    transfer: float = 0.0
    encoder: float = 0.0
    scoring: float = 0.0
    model: float = 0.0
    write: float = 0.0

    def __add__(self, other: "StageSeconds") -> "StageSeconds":
        return StageSeconds(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in STAGES)

    def rounded(self) -> "StageSeconds":
        """To microseconds."""
        return StageSeconds(*(round(value, 6) for value in self.values()))

    @property
    def bound_by(self) -> str:
        """What the model's thread spent most of its time on, in words; "" when nothing was measured."""
        stage = max(BOUND_BY, key=lambda name: getattr(self, name))
        return BOUND_BY[stage] if getattr(self, stage) else ""


STAGES = tuple(field.name for field in dataclasses.fields(StageSeconds))
BOUND_BY = {  # stages of the model's thread → what it means that most time goes there
    "waiting_for_read": "reading",
    "waiting_for_decode": "decode",
    "transfer": "moving images",
    "encoder": "the encoder",
    "scoring": "scoring",
    "model": "the model",
    "write": "writing",
}
_OF_THE_DEVICE = ("transfer", "encoder", "scoring")
_NOWHERE = ""


class _Inner(threading.local):
    """Seconds of the stages inside the one that this thread is in."""

    seconds = 0.0


class Profile:
    """Adds up seconds by stage, from any thread."""

    def __init__(self, wait: Callable[[], None] | None = None, together: bool = False) -> None:
        """wait: until the device has done what it was given, at both ends of its stages. together: they are counted as `model`."""
        self._wait, self._together = wait, together
        self._seconds = dict.fromkeys((*STAGES, _NOWHERE), 0.0)
        self._lock = threading.Lock()
        self.inner = _Inner()

    @classmethod
    def on(cls, device: torch.device, apart: bool) -> "Profile":
        """apart: on a GPU, wait for it after each of its stages, which costs some speed."""
        if device.type != "cuda":
            return cls()
        return cls(wait=torch.cuda.synchronize) if apart else cls(together=True)

    def of(self, stage: str) -> "_Timing":
        """What happens inside counts for `stage`, but for what stages inside it take."""
        if stage not in _OF_THE_DEVICE:
            return _Timing(self, stage)
        return _Timing(self, "model" if self._together else stage, self._wait)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    def pause(self) -> "_Timing":
        """What happens inside does not count."""
        return self.of(_NOWHERE)

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The items; getting each counts for `stage`."""
        iterator = iter(items)
        while True:
            with self.of(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @property
    def seconds(self) -> StageSeconds:
        with self._lock:
            return StageSeconds(**{name: self._seconds[name] for name in STAGES})

    def restart(self) -> None:
        with self._lock:
            self._seconds = dict.fromkeys(self._seconds, 0.0)


class _Timing:
    """One stay in a stage. Not a generator with contextlib's decorator: there are several an image, and this takes a third of the time."""

    __slots__ = ("_before", "_profile", "_stage", "_start", "_wait")

    def __init__(self, profile: Profile, stage: str, wait: Callable[[], None] | None = None) -> None:
        self._profile, self._stage, self._wait = profile, stage, wait

    def __enter__(self) -> None:
        if self._wait:
            self._wait()
        inner = self._profile.inner
        self._before, inner.seconds = inner.seconds, 0.0
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wait and kind is None:
            self._wait()
        spent, inner = time.perf_counter() - self._start, self._profile.inner
        self._profile.add(self._stage, spent - inner.seconds)
        inner.seconds = self._before + spent

"""Run a task on every shard: in this process, or on a pool of Ray actors that each take whole shards.

Decoded pixels never cross the object store: an actor reads its shard, works on it and commits the result itself, so a
retry after a crash does the shard again and changes nothing else.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from sanitize import runtime, storage
from sanitize.counters import RayCounters
from sanitize.errors import SanitizeError, ShardError
from sanitize.profile import StageSeconds
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import RETRIES, Resources, ray_session, torch_threads

log = logging.getLogger(__name__)
PAUSES = (1.0, 5.0, 25.0)  # seconds before a shard that a remote store refused for now is tried again
LOST_IN_A_ROW = 3  # shards that killed their worker so often: it is not the shards
OUT_OF_MEMORY = "out of memory"
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class ProgressCallback(Protocol):
    """Told how far the current shard is; seconds: of work that has a profile."""

    def __call__(self, samples: int, flagged: int, size: int, seconds: StageSeconds = ..., /) -> None: ...


ShardFunction = Callable[[Shard, ProgressCallback], R]


class Task(Protocol[R_co]):
    """A picklable description of work; `start` loads what it needs, once per worker."""

    def start(self, threads: int) -> Callable[[Shard, ProgressCallback], R_co]: ...


@dataclass(frozen=True)
class Outcome(Generic[R]):
    shard: Shard
    result: R | None  # None: the shard failed
    error: str = ""


def map_shards(
    task: Task[R],
    shards: Sequence[Shard],
    resources: Resources,
    display: ProgressDisplay,
    address: str = "",
    at_once: int = 1,
) -> Iterator[Outcome[R]]:
    """Run `task` on every shard, in any order; `at_once`: on how many at a time in one worker, for work that waits for a network.

    What is wrong with one shard fails it alone, also when we did not foresee it or when it kills its worker; a SanitizeError that
    is not the shard's (disk full, wrong detector) ends the run.
    """
    if not shards:
        return
    total = _Total(display)
    if resources.workers == 0:
        with torch_threads(resources.cpus):
            yield from _map_here(task, shards, resources, total, at_once)
        return
    with ray_session(address):
        total.counters = RayCounters(display.title)
        yield from _map_on_ray(task, shards, resources, total, at_once)


@dataclass(frozen=True)
class ShardProgress:
    """How far one worker is with its current shard."""

    samples: int = 0
    flagged: int = 0
    bytes: int = 0
    seconds: StageSeconds = field(default_factory=StageSeconds)

    def __add__(self, other: "ShardProgress") -> "ShardProgress":
        return ShardProgress(
            self.samples + other.samples,
            self.flagged + other.flagged,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
        )


class _Total:
    """Progress of the whole run: finished shards plus what the workers report of their current ones."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        self.counters: RayCounters | None = None  # None: without Ray
        self.failed = 0  # of the shards
        self.shards = 0
        self._finished = ShardProgress()

    def finish(self, shards: Sequence[Shard], progress: ShardProgress) -> None:
        self.shards += len(shards)
        self._finished += replace(progress, bytes=sum(shard.size for shard in shards))

    def show(self, running: Iterable[ShardProgress]) -> None:
        now = sum(running, self._finished)
        bound = now.seconds.bound_by
        notes = [f"{now.flagged} flagged"] * bool(now.flagged) + [f"bound by {bound}"] * bool(bound)
        self._display.update(self.shards, now.bytes, now.samples, ", ".join(notes))
        if self.counters:
            done = self.shards - self.failed
            self.counters.tell(now.samples, now.flagged, now.bytes, done, self.failed, now.seconds)


def _map_here(
    task: Task[R], shards: Sequence[Shard], resources: Resources, total: _Total, at_once: int
) -> Iterator[Outcome[R]]:
    function = task.start(resources.cpus)
    for chunk in _chunks(shards, at_once):
        noted = _Noted(lambda current: total.show([current]))
        yield from _run_chunk(function, chunk, noted, at_once)
        total.finish(chunk, noted.sum())
        total.show([])


def _chunks(shards: Sequence[Shard], at_once: int) -> list[list[Shard]]:
    """What a worker is given at a time: one shard, or some for each of its threads, so that they seldom wait for the last."""
    size = 1 if at_once == 1 else 4 * at_once
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


class _Noted:
    """How far the shards of one chunk are; tells `changed` their sum."""

    def __init__(self, changed: Callable[[ShardProgress], None]) -> None:
        self._of: dict[str, ShardProgress] = {}
        self._changed = changed

    def note(self, shard: Shard) -> ProgressCallback:
        def progress(samples: int, flagged: int, size: int, seconds: StageSeconds = StageSeconds(), /) -> None:  # noqa: B008
            self._of[shard.stem] = ShardProgress(samples, flagged, size, seconds)
            self._changed(self.sum())

        return progress

    def sum(self) -> ShardProgress:
        return sum(list(self._of.values()), ShardProgress())


def _run_chunk(function: ShardFunction[R], chunk: Sequence[Shard], noted: _Noted, at_once: int) -> Iterator[Outcome[R]]:
    if at_once == 1:
        return (_run(function, shard, noted.note(shard)) for shard in chunk)
    return storage.read_ahead(lambda shard: _run(function, shard, noted.note(shard)), chunk, at_once)


def _run(function: ShardFunction[R], shard: Shard, progress: ProgressCallback) -> Outcome[R]:
    try:
        return Outcome(shard, _patiently(function, shard, progress))
    except ShardError as error:
        return Outcome(shard, None, str(error))
    except SanitizeError:
        raise
    except Exception as error:  # a hostile file found a hole: the other shards must not pay for it
        log.debug("%s", shard.url, exc_info=True)
        why = " ".join(str(error).split())[:200]
        message = f"{shard.url}: failed unexpectedly ({type(error).__name__}: {why}). Please report it."
        return Outcome(shard, None, message)


def _patiently(function: ShardFunction[R], shard: Shard, progress: ProgressCallback) -> R:
    """Again after each of PAUSES, as long as what went wrong may pass."""
    for pause in PAUSES:
        try:
            return function(shard, progress)
        except SanitizeError as error:
            if not error.may_pass:
                raise
            log.debug("%s: again in %g s: %s", shard.url, pause, error)
            time.sleep(pause)
    return function(shard, progress)


class _Worker:
    """The actor. Two threads of control: one works, one answers `progress`."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self._function: ShardFunction[Any] | None = None
        self._task = ""
        self._progress = ShardProgress()

    def run(self, shared: list[Any], chunk: list[Shard], at_once: int) -> list[Outcome[Any]]:
        """shared: the task, in Ray's store; in a list, so that it is fetched for the first shards only."""
        import ray

        self._progress = ShardProgress()
        if self._task != shared[0].hex():
            self._function = None  # what the task before has loaded goes first
            self._function = ray.get(shared[0]).start(self._threads)
            self._task = shared[0].hex()
        assert self._function is not None
        return list(_run_chunk(self._function, chunk, _Noted(self._note), at_once))

    def _note(self, progress: ShardProgress) -> None:
        self._progress = progress

    def progress(self) -> ShardProgress:
        return self._progress


# Not ray.util.ActorPool: it neither restarts an actor, nor fails one item alone, nor tells how far the running ones are.
def _map_on_ray(
    task: Task[R], shards: Sequence[Shard], resources: Resources, total: _Total, at_once: int
) -> Iterator[Outcome[R]]:
    import ray

    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": 2}
    options |= {"max_restarts": RETRIES, "max_task_retries": RETRIES}
    worker = ray.remote(_Worker).options(**options)
    largest_first = sorted(shards, key=lambda shard: -shard.size)  # else the others might wait for the last one
    waiting = list(reversed(_chunks(largest_first, at_once)))
    count = min(resources.workers, len(waiting))
    # once, whatever it holds; not to the constructor: Ray warns of each that a restart might lack its arguments
    shared = [ray.put(task)]
    resting = runtime.resting_workers()
    idle: list[Any] = resting.take(replace(resources, workers=count)) if resting else []
    idle += [worker.remote(resources.cpus) for _ in range(count - len(idle))]
    lost, kills = 0, _kernel_kills()  # lost: shards in a row that their workers died of
    running: dict[Any, tuple[Any, list[Shard]]] = {}
    last: dict[Any, ShardProgress] = {}
    try:
        while waiting or running:
            while waiting and idle:
                actor, chunk = idle.pop(), waiting.pop()
                running[actor.run.remote(shared, chunk, at_once)] = (actor, chunk)
            done, _ = ray.wait(list(running), timeout=1.0)
            for reference in done:
                actor, chunk = running.pop(reference)
                outcomes, died = _collect(reference, kills)
                idle.append(worker.remote(resources.cpus) if died else actor)
                if died and len(chunk) > 1:  # which of them? one by one
                    waiting += [[shard] for shard in chunk]
                    continue
                lost = lost + 1 if died else 0
                if lost >= LOST_IN_A_ROW:
                    raise SanitizeError(f"{lost} shards in a row lost their workers. {_lost(chunk[0], died)}")
                if died:
                    outcomes = [Outcome(chunk[0], None, _lost(chunk[0], died))]
                total.finish(chunk, ShardProgress() if died else _progress_of(actor))
                total.failed += sum(outcome.result is None for outcome in outcomes)
                last.pop(actor, None)
                yield from outcomes
            for actor, _ in running.values():
                last[actor] = _progress_of(actor, last.get(actor, ShardProgress()))
            total.show(last.values())
    finally:
        for actor in [*([] if resting else idle), *(actor for actor, _ in running.values())]:
            ray.kill(actor)
        if resting:
            resting.rest(idle, resources)


def _lost(shard: Shard, why: str) -> str:
    if why == OUT_OF_MEMORY:
        return (
            f"{shard.url}: its worker ran out of memory {RETRIES + 1} times. Lower --batch-size (images held at a time) or --workers, "
            "or give the workers more memory."
        )
    return f"{shard.url}: its worker died {RETRIES + 1} times ({why}). Lower --batch-size or --workers."


def _collect(reference: Any, kills_before: int) -> tuple[list[Outcome[Any]], str]:
    """(outcomes, why its worker died or ""). kills_before: of the kernel, for want of memory.

    Errors of our own come back as themselves, without Ray's traceback.
    """
    import ray

    try:
        outcomes: list[Outcome[Any]] = ray.get(reference)
        return outcomes, ""
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SanitizeError):
            raise error.cause from None
        raise
    except ray.exceptions.OutOfMemoryError:  # Ray ends a worker before the kernel has to
        return [], OUT_OF_MEMORY
    except ray.exceptions.RayActorError as error:
        return [], OUT_OF_MEMORY if _kernel_kills() > kills_before else str(error).strip().splitlines()[-1][:200]


def _kernel_kills() -> int:
    """Processes of this machine that the kernel ended because memory had run out; 0 where it does not count them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _progress_of(actor: Any, otherwise: ShardProgress = ShardProgress()) -> ShardProgress:
    import ray

    try:
        progress: ShardProgress = ray.get(actor.progress.remote(), timeout=0.5)
        return progress
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return otherwise

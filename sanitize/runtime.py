"""Where stages run: in this process, or on a pool of Ray actors that each take whole shards.

Decoded pixels never cross the object store: an actor reads its shard, works on it and commits the result itself, so a
retry after a crash does the shard again and changes nothing else.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from sanitize import process
from sanitize.errors import ConfigError, SanitizeError, ShardError
from sanitize.process import usable_cpus
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard

log = logging.getLogger(__name__)
RETRIES = 3  # of an actor that dies and of the shard it had
LOST_IN_A_ROW = 3  # shards that killed their worker so often: it is not the shards
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
ProgressCallback = Callable[[int, int, int], None]  # samples, flagged, bytes of the current shard so far
ShardFunction = Callable[[Shard, ProgressCallback], R]


class Task(Protocol[R_co]):
    """A picklable description of work; `start` loads what it needs, once per worker."""

    def start(self, threads: int) -> Callable[[Shard, ProgressCallback], R_co]: ...


@dataclass(frozen=True)
class Outcome(Generic[R]):
    shard: Shard
    result: R | None  # None: the shard failed
    error: str = ""


@dataclass(frozen=True)
class Resources:
    """workers 0 = this process. cpus = threads of each worker, for decoding and for torch."""

    workers: int
    cpus: int
    gpus: float


def plan(workers: int, cpus_per_worker: int, gpus_per_worker: float, shards: int, address: str = "") -> Resources:
    """Settings → resources; what is left open (-1 or 0) uses what the machine or cluster has."""
    if workers < -1 or cpus_per_worker < 0:
        raise ConfigError(
            "workers must be -1 (automatic), 0 (this process) or more; cpus_per_worker 0 (automatic) or more."
        )
    cpus, gpus = _available(address) if workers else (usable_cpus(), torch.cuda.device_count())
    if gpus_per_worker < 0:
        gpus_per_worker = 1.0 if gpus else 0.0
    if workers == -1:
        wanted = gpus / gpus_per_worker if gpus_per_worker else cpus / (cpus_per_worker or 4)
        workers = max(1, min(int(wanted), shards))
    cpus_per_worker = cpus_per_worker or max(1, cpus // max(workers, 1))
    if workers * cpus_per_worker > cpus or workers * gpus_per_worker > gpus:
        raise ConfigError(
            f"{workers} workers with {cpus_per_worker} CPUs and {gpus_per_worker:g} GPUs each do not fit: "
            f"there are {cpus} CPUs and {gpus} GPUs. Lower --workers, --cpus-per-worker or --gpus-per-worker."
        )
    return Resources(workers, cpus_per_worker, gpus_per_worker)


def _available(address: str) -> tuple[int, int]:
    import ray

    if not address and not ray.is_initialized():
        return usable_cpus(), torch.cuda.device_count()
    with ray_session(address):
        total = ray.cluster_resources()
    return int(total.get("CPU", 1)), int(total.get("GPU", 0))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch in this process, which may be a library user's: the number before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def ray_session(address: str) -> Iterator[None]:
    """A running Ray: the one this process is already in, the one at `address`, or a local one that ends with the block."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        options: dict[str, Any] = {"include_dashboard": False, "num_cpus": usable_cpus()}
        if address:  # its processes run already, so that each worker for us is started anew, which takes seconds
            options = {"runtime_env": {"env_vars": process.ENVIRONMENT}}
        with process.children_keep_freed_memory():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--address {address}: cannot join a Ray cluster there ({error}). Check `ray status`."
        ) from None
    with contextlib.suppress(ValueError):  # not the main thread: Ray left the handler alone as well
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would end this process at once, with exit code 15
    try:
        yield
    finally:
        ray.shutdown()


def session_for(resources: Resources, address: str) -> contextlib.AbstractContextManager[None]:
    """One Ray session for several `map_shards`; none when the work is done in this process."""
    return ray_session(address) if resources.workers else contextlib.nullcontext()


def map_shards(
    task: Task[R], shards: Sequence[Shard], resources: Resources, display: ProgressDisplay, address: str = ""
) -> Iterator[Outcome[R]]:
    """Run `task` on every shard, in any order.

    What is wrong with one shard fails it alone, also when we did not foresee it or when it kills its worker; a SanitizeError that
    is not the shard's (disk full, wrong detector) ends the run.
    """
    if not shards:
        return
    total = _Total()
    if resources.workers == 0:
        with torch_threads(resources.cpus):
            yield from _map_here(task, shards, resources, display, total)
        return
    with ray_session(address):
        yield from _map_on_ray(task, shards, resources, display, total)


class ShardProgress(NamedTuple):
    """How far one worker is with its current shard."""

    samples: int = 0
    flagged: int = 0
    bytes: int = 0


class _Total:
    """Progress of the whole run: finished shards plus what the workers report of their current ones."""

    def __init__(self) -> None:
        self.shards = self.samples = self.flagged = self.bytes = 0

    def finish(self, shard: Shard, progress: ShardProgress) -> None:
        self.shards += 1
        self.samples += progress.samples
        self.flagged += progress.flagged
        self.bytes += shard.size

    def show(self, display: ProgressDisplay, running: Iterable[ShardProgress]) -> None:
        samples, flagged, size = (sum(column) for column in zip(ShardProgress(), *running, strict=True))
        note = f"{self.flagged + flagged} flagged" if self.flagged + flagged else ""
        display.update(self.shards, self.bytes + size, self.samples + samples, note)


def _map_here(
    task: Task[R], shards: Sequence[Shard], resources: Resources, display: ProgressDisplay, total: _Total
) -> Iterator[Outcome[R]]:
    function = task.start(resources.cpus)
    for shard in shards:
        current = ShardProgress()

        def progress(samples: int, flagged: int, size: int) -> None:
            nonlocal current
            current = ShardProgress(samples, flagged, size)
            total.show(display, [current])

        outcome = _run(function, shard, progress)
        total.finish(shard, current)
        total.show(display, [])
        yield outcome


def _run(function: ShardFunction[R], shard: Shard, progress: ProgressCallback) -> Outcome[R]:
    try:
        return Outcome(shard, function(shard, progress))
    except ShardError as error:
        return Outcome(shard, None, str(error))
    except SanitizeError:
        raise
    except Exception as error:  # a hostile file found a hole: the other shards must not pay for it
        log.debug("%s", shard.url, exc_info=True)
        why = " ".join(str(error).split())[:200]
        return Outcome(
            shard, None, f"{shard.url}: failed unexpectedly ({type(error).__name__}: {why}). Please report it."
        )


class _Worker:
    """The actor. Two threads of control: one works, one answers `progress`."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self._function: ShardFunction[Any] | None = None
        self._progress = ShardProgress()

    def run(self, shared: list[Any], shard: Shard) -> Outcome[Any]:
        """shared: the task, in Ray's store; in a list, so that it is fetched for the first shard only."""
        import ray

        self._progress = ShardProgress()
        if self._function is None:
            self._function = ray.get(shared[0]).start(self._threads)
        return _run(self._function, shard, self._note)

    def _note(self, samples: int, flagged: int, size: int) -> None:
        self._progress = ShardProgress(samples, flagged, size)

    def progress(self) -> ShardProgress:
        return self._progress


# Not ray.util.ActorPool: it neither restarts an actor, nor fails one item alone, nor tells how far the running ones are.
def _map_on_ray(
    task: Task[R], shards: Sequence[Shard], resources: Resources, display: ProgressDisplay, total: _Total
) -> Iterator[Outcome[R]]:
    import ray

    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": 2}
    options |= {"max_restarts": RETRIES, "max_task_retries": RETRIES}
    worker = ray.remote(_Worker).options(**options)
    count = min(resources.workers, len(shards))
    # once, whatever it holds; not to the constructor: Ray warns of each that a restart might lack its arguments
    shared = [ray.put(task)]
    idle: list[Any] = [worker.remote(resources.cpus) for _ in range(count)]
    lost = 0  # shards in a row that their workers died of
    waiting = list(reversed(shards))
    running: dict[Any, tuple[Any, Shard]] = {}
    last: dict[Any, ShardProgress] = {}
    try:
        while waiting or running:
            while waiting and idle:
                actor, shard = idle.pop(), waiting.pop()
                running[actor.run.remote(shared, shard)] = (actor, shard)
            done, _ = ray.wait(list(running), timeout=1.0)
            for reference in done:
                actor, shard = running.pop(reference)
                outcome, alive = _collect(reference, shard)
                lost = 0 if alive else lost + 1
                if lost >= LOST_IN_A_ROW:
                    raise SanitizeError(
                        f"all Ray workers died, of {lost} shards in a row (the last: {shard.url}). Look for out-of-memory kills, "
                        "lower --batch-size or --workers."
                    )
                idle.append(actor if alive else worker.remote(resources.cpus))
                total.finish(shard, _progress_of(actor) if alive else ShardProgress())
                last.pop(actor, None)
                yield outcome
            for actor, _ in running.values():
                last[actor] = _progress_of(actor, last.get(actor, ShardProgress()))
            total.show(display, last.values())
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            ray.kill(actor)


def _collect(reference: Any, shard: Shard) -> tuple[Outcome[Any], bool]:
    """(outcome, worker alive). Errors of our own come back as themselves, without Ray's traceback."""
    import ray

    try:
        outcome: Outcome[Any] = ray.get(reference)
        return outcome, True
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SanitizeError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        why = str(error).strip().splitlines()[-1][:200]
        message = f"{shard.url}: its worker died {RETRIES + 1} times ({why}). Lower --batch-size or --workers."
        return Outcome(shard, None, message), False


def _progress_of(actor: Any, otherwise: ShardProgress = ShardProgress()) -> ShardProgress:  # noqa: B008 - immutable
    import ray

    try:
        progress: ShardProgress = ray.get(actor.progress.remote(), timeout=0.5)
        return progress
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return otherwise

"""Where work is placed: how many workers with how many CPUs and GPUs, and the Ray they run on."""

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sanitize import process
from sanitize.errors import ConfigError
from sanitize.process import usable_cpus

CONNECT_SECONDS = 10
RETRIES = 3  # of a process that dies and of the shards it had


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
    _require_reachable(address)
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


def _require_reachable(address: str) -> None:
    """Ray itself tries for nine minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # auto, local
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: nobody answers there ({error}). Is the cluster up, and is this its address? See `ray status`."
        ) from None


# ---------------------------------------------------------------- workers between stages


@dataclass
class RestingWorkers:
    """Workers between one `map_shards` and the next of a command: they keep their process, and the CPUs and GPUs that it was given."""

    resources: Resources | None = None
    actors: list[Any] = field(default_factory=list)

    def take(self, resources: Resources) -> list[Any]:
        """Those that were started with the same CPUs and GPUs; others go, so that there is room."""
        if replace(resources, workers=0) != self.resources:
            self.release()
        taken, self.actors = self.actors[: resources.workers], self.actors[resources.workers :]
        return taken

    def rest(self, actors: Sequence[Any], resources: Resources) -> None:
        self.actors, self.resources = [*self.actors, *actors], replace(resources, workers=0)

    def release(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


_resting: ContextVar[RestingWorkers | None] = ContextVar("resting", default=None)


@contextlib.contextmanager
def session_for(resources: Resources, address: str) -> Iterator[None]:
    """One Ray session and the same workers for several `map_shards`; none when the work is done in this process. Inside of another, as a
    command of a pipeline is: that one's."""
    if not resources.workers or resting_workers():
        yield
        return
    with ray_session(address):
        mine = RestingWorkers()
        before = _resting.set(mine)
        try:
            yield
        finally:
            _resting.reset(before)
            mine.release()


def resting_workers() -> RestingWorkers | None:
    """Of the command that runs; None outside of `session_for`."""
    return _resting.get()


def release_workers() -> None:
    """Give back what resting workers hold, for others on Ray that wait for it."""
    if resting := _resting.get():
        resting.release()

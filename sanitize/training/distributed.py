"""Training on equal workers: who is who, and the same loop under Ray Train (DDP) as in one process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sanitize import runtime, storage
from sanitize.errors import SanitizeError
from sanitize.runtime import Resources

T = TypeVar("T")
ReportCallback = Callable[[dict[str, Any]], None]  # plain values that say how far the training is


@dataclass(frozen=True)
class Rank:
    """One of `world` equal workers. Every global batch is split evenly, so the loss curve does not depend on `world`."""

    index: int
    world: int
    device: torch.device


def train_on_ray(
    loop: Callable[[T, Rank, ReportCallback], None], shared: T, resources: Resources, folder: str, show: ReportCallback
) -> None:
    """Run `loop` on every worker; workers that die are restarted, and `loop` goes on from its own last checkpoint.

    shared: what all workers read, put into Ray's object store once. folder: of this training, for its progress. Runs in the
    Ray session that is already open.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    progress = storage.join(folder, "progress.json")
    runtime.release_workers()

    def on_worker(settings: dict[str, Any]) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        torch.set_num_threads(resources.cpus)
        rank = Rank(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

        # not ray.train.report: the controller collects reports every two seconds, longer than a small epoch
        def report(values: dict[str, Any]) -> None:
            if rank.index == 0:
                storage.write_json(progress, values)

        loop(ray.get(settings["shared"]), rank, report)

    trainer = TorchTrainer(
        on_worker,
        train_loop_config={"shared": ray.put(shared)},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {}),
        ),
        run_config=RunConfig(
            storage_path=storage.join(folder, "ray"),
            failure_config=FailureConfig(max_failures=runtime.RETRIES),
        ),
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(trainer.fit)
        while not running.done():
            wait([running], timeout=1.0)
            if storage.exists(progress):
                show(storage.read_json(progress))
        if (error := running.exception()) is not None:
            raise SanitizeError(f"training on {resources.workers} Ray workers failed: {error}") from error

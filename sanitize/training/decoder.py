"""Train the decoder on cached embeddings: one loop for this process and for Ray Train (DDP) workers."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sanitize import runtime, storage
from sanitize.config import FitConfig
from sanitize.errors import SanitizeError
from sanitize.progress import ProgressDisplay
from sanitize.runtime import Resources
from sanitize.stages.decoder import Decoder, hidden_pixels, visible_count
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.training.checkpoints import load_checkpoint, save_checkpoint
from sanitize.training.distributed import Rank, ReportCallback, train_on_ray
from sanitize.training.optimizer import half_cosine
from sanitize.training.split import shuffled_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Auxiliary:
    """Cached auxiliary images: embeddings (N, D) float32, images (N, 3, R, R) float16 in [0, 1], hashes (N, 32) uint8."""

    embeddings: Tensor
    images: Tensor
    hashes: Tensor

    def select(self, chosen: Tensor) -> "Auxiliary":
        return Auxiliary(self.embeddings[chosen], self.images[chosen], self.hashes[chosen])


@dataclass
class TrainingState:
    """What a checkpoint holds: the decoder, mean loss of each finished epoch, and the optimiser's state."""

    decoder: Decoder
    losses: list[float]
    optimizer: torch.optim.Optimizer


def train_decoder(config: FitConfig, auxiliary: Auxiliary, resources: Resources) -> TrainingState:
    """Train to the last epoch, from the last checkpoint when there is one."""
    path = storage.absolute(storage.join(config.out, "training", "last.pt"))
    with ProgressDisplay("train", config.training.epochs, config.training.epochs, "epochs") as display:
        if resources.workers == 0:
            rank = Rank(0, 1, runtime.device())
            with runtime.torch_threads(resources.cpus):
                return _train(config, auxiliary, rank, path, _shown(display, len(auxiliary.hashes)))
        show = _shown(display, len(auxiliary.hashes))

        def loop(shared: Auxiliary, rank: Rank, report: ReportCallback) -> None:
            _train(config, shared, rank, path, lambda epoch, loss: report({"epoch": epoch, "loss": loss}))

        train_on_ray(loop, auxiliary, resources, path.rsplit("/", 1)[0], lambda last: show(last["epoch"], last["loss"]))
    return _restore(config, auxiliary, torch.device("cpu"), path)


def _shown(display: ProgressDisplay, images: int) -> Callable[[int, float], None]:
    def show(epochs: int, loss: float) -> None:
        display.update(epochs, epochs, epochs * images, f"loss {loss:.4f}")

    return show


def _train(
    config: FitConfig, auxiliary: Auxiliary, rank: Rank, path: str, report: Callable[[int, float], None]
) -> TrainingState:
    state = _restore(config, auxiliary, rank.device, path)
    # find_unused: with nothing visible the patch encoder takes no part in a batch
    model: torch.nn.Module = (
        DistributedDataParallel(state.decoder, find_unused_parameters=True) if rank.world > 1 else state.decoder
    )
    first = len(state.losses)
    for epoch in range(first, config.training.epochs):
        loss = _epoch(config, auxiliary, rank, model, state, epoch)
        if not math.isfinite(loss):
            raise SanitizeError(
                f"training diverged in epoch {epoch + 1} (loss {loss}). Lower training.learning_rate and fit again."
            )
        state.losses.append(loss)
        if rank.index == 0:
            _save(state, path)
        report(epoch + 1, loss)
    return state


def _epoch(
    config: FitConfig, auxiliary: Auxiliary, rank: Rank, model: torch.nn.Module, state: TrainingState, epoch: int
) -> float:
    """One pass in a seeded order; returns the mean loss."""
    training, count = config.training, len(auxiliary.hashes)
    size = max(rank.world, min(training.batch_size, count) // rank.world * rank.world)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    batches = shuffled_batches(count, size, generator)
    total = torch.zeros((), device=rank.device)
    model.train()
    for step, batch in enumerate(batches):
        ratio = float(torch.empty(()).uniform_(training.mask_ratio_min, training.mask_ratio_max, generator=generator))
        order = torch.rand(size, state.decoder.num_patches, generator=generator).argsort(dim=1)
        mine = slice(rank.index * size // rank.world, (rank.index + 1) * size // rank.world)
        _set_learning_rate(config, state.optimizer, (epoch + step / len(batches)) / training.epochs)
        loss = _loss(config, auxiliary, rank, model, batch[mine], order[mine], ratio)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        total += loss.detach()
    if rank.world > 1:
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
    return float(total) / len(batches) / rank.world


def _loss(
    config: FitConfig,
    auxiliary: Auxiliary,
    rank: Rank,
    model: torch.nn.Module,
    batch: Tensor,
    order: Tensor,
    ratio: float,
) -> Tensor:
    """Mean over everything of mask * (x_hat - x)^2, divided by the nominal ratio (DeDe's reference code, src/main.py)."""
    spec, decoder = config.encoder, config.decoder
    mean = torch.tensor(spec.mean, device=rank.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=rank.device).view(1, 3, 1, 1)
    images = (auxiliary.images[batch].to(rank.device).float() - mean) / std
    order = order.to(rank.device)
    visible = visible_count(order.shape[1], ratio)
    with autocast(rank.device, resolve_precision(config.training.precision, rank.device)):
        reconstructions = model(auxiliary.embeddings[batch].to(rank.device), images, order, visible).float()
    squared: Tensor = (reconstructions - images).square() * hidden_pixels(order, visible, decoder)
    return squared.mean() / ratio


def _set_learning_rate(config: FitConfig, optimizer: torch.optim.Optimizer, progress: float) -> None:
    scale = half_cosine(progress) if config.training.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.training.learning_rate * scale


# ---------------------------------------------------------------- checkpoints


def _restore(config: FitConfig, auxiliary: Auxiliary, device: torch.device, path: str) -> TrainingState:
    embeddings = auxiliary.embeddings
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
        torch.default_generator.manual_seed(config.seed)
        decoder = Decoder(config.decoder, embeddings.shape[1])
    if config.decoder.standardize_embedding:
        decoder.embedding_mean.copy_(embeddings.mean(dim=0))
        decoder.embedding_scale.copy_(embeddings.std(dim=0).clamp(min=1e-6))
    decoder.to(device)
    training = config.training
    optimizer = torch.optim.Adam(decoder.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    state = TrainingState(decoder, [], optimizer)
    if saved := load_checkpoint(path, device):
        decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        state.losses = list(saved["losses"])
    return state


def _save(state: TrainingState, path: str) -> None:
    content = {"decoder": state.decoder.state_dict(), "optimizer": state.optimizer.state_dict()}
    save_checkpoint(path, content | {"losses": state.losses})

"""Train the decoder on cached embeddings: one loop for this process and for Ray Train (DDP) workers."""

import io
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
from sanitize.ranks import Place, Report, train_on_ray
from sanitize.runtime import Resources
from sanitize.stages.decoder import Decoder, hidden_pixels, visible_count
from sanitize.stages.scoring import resolve_precision

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
            place = Place(0, 1, runtime.device())
            with runtime.torch_threads(resources.cpus):
                return _train(config, auxiliary, place, path, _shown(display, len(auxiliary.hashes)))
        show = _shown(display, len(auxiliary.hashes))

        def loop(shared: Auxiliary, place: Place, report: Report) -> None:
            _train(config, shared, place, path, lambda epoch, loss: report({"epoch": epoch, "loss": loss}))

        train_on_ray(loop, auxiliary, resources, path.rsplit("/", 1)[0], lambda last: show(last["epoch"], last["loss"]))
    return _restored(config, auxiliary, torch.device("cpu"), path)


def _shown(display: ProgressDisplay, images: int) -> Callable[[int, float], None]:
    def show(epochs: int, loss: float) -> None:
        display.update(epochs, epochs, epochs * images, f"loss {loss:.4f}")

    return show


def _train(
    config: FitConfig, auxiliary: Auxiliary, place: Place, path: str, report: Callable[[int, float], None]
) -> TrainingState:
    state = _restored(config, auxiliary, place.device, path)
    # find_unused: with nothing visible the patch encoder takes no part in a batch
    model: torch.nn.Module = (
        DistributedDataParallel(state.decoder, find_unused_parameters=True) if place.world > 1 else state.decoder
    )
    first = len(state.losses)
    for epoch in range(first, config.training.epochs):
        loss = _epoch(config, auxiliary, place, model, state, epoch)
        if not math.isfinite(loss):
            raise SanitizeError(
                f"training diverged in epoch {epoch + 1} (loss {loss}). Lower training.learning_rate and fit again."
            )
        state.losses.append(loss)
        if place.rank == 0:
            _save(state, path)
        report(epoch + 1, loss)
    return state


def _epoch(
    config: FitConfig, auxiliary: Auxiliary, place: Place, model: torch.nn.Module, state: TrainingState, epoch: int
) -> float:
    """One pass in a seeded order; returns the mean loss."""
    training, count = config.training, len(auxiliary.hashes)
    size = max(place.world, min(training.batch_size, count) // place.world * place.world)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    batches = torch.randperm(count, generator=generator)[: count // size * size].split(size)
    total = torch.zeros((), device=place.device)
    model.train()
    for step, batch in enumerate(batches):
        ratio = float(torch.empty(()).uniform_(training.mask_ratio_min, training.mask_ratio_max, generator=generator))
        order = torch.rand(size, state.decoder.num_patches, generator=generator).argsort(dim=1)
        mine = slice(place.rank * size // place.world, (place.rank + 1) * size // place.world)
        _set_learning_rate(config, state.optimizer, (epoch + step / len(batches)) / training.epochs)
        loss = _loss(config, auxiliary, place, model, batch[mine], order[mine], ratio)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        total += loss.detach()
    if place.world > 1:
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
    return float(total) / len(batches) / place.world


def _loss(
    config: FitConfig,
    auxiliary: Auxiliary,
    place: Place,
    model: torch.nn.Module,
    batch: Tensor,
    order: Tensor,
    ratio: float,
) -> Tensor:
    """Mean over everything of mask * (x_hat - x)^2, divided by the nominal ratio (card section 3)."""
    spec, decoder = config.encoder, config.decoder
    mean = torch.tensor(spec.mean, device=place.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=place.device).view(1, 3, 1, 1)
    images = (auxiliary.images[batch].to(place.device).float() - mean) / std
    order = order.to(place.device)
    visible = visible_count(order.shape[1], ratio)
    dtype = resolve_precision(config.training.precision, place.device)
    with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
        reconstructions = model(auxiliary.embeddings[batch].to(place.device), images, order, visible).float()
    squared: Tensor = (reconstructions - images).square() * hidden_pixels(order, visible, decoder)
    return squared.mean() / ratio


def _set_learning_rate(config: FitConfig, optimizer: torch.optim.Optimizer, progress: float) -> None:
    scale = 0.5 * (1 + math.cos(math.pi * progress)) if config.training.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.training.learning_rate * scale


# ---------------------------------------------------------------- checkpoints


def _restored(config: FitConfig, auxiliary: Auxiliary, device: torch.device, path: str) -> TrainingState:
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
    if storage.exists(path):
        saved = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
        decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        state.losses = list(saved["losses"])
    return state


def _save(state: TrainingState, path: str) -> None:
    buffer = io.BytesIO()
    torch.save(
        {"decoder": state.decoder.state_dict(), "optimizer": state.optimizer.state_dict(), "losses": state.losses},
        buffer,
    )
    storage.write_bytes(path, buffer.getvalue())

"""SimCLR pre-training of a small encoder: NT-Xent on two views, as in BadEncoder's code (pretraining_encoder.py)."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.attacks.augment import colour_jitter, random_resized_crop
from sanitize.config import EncoderSpec
from sanitize.errors import check
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.training.optimizer import half_cosine
from sanitize.training.split import shuffled_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SimclrConfig:
    """Published for BadEncoder: epochs 1000, batch 256, Adam 1e-3 without schedule, weight decay 1e-6, temperature 0.5.

    Published for CTRL: epochs 800, batch 512, SGD 0.06 with momentum 0.9, weight decay 5e-4, cosine after 10 epochs of warm-up,
    loss times 0.5 / 0.07, crops of at least a fifth of the area, no BatchNorm in the projector.
    """

    epochs: int = 25
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    warmup_epochs: int = 0
    cosine: bool = False
    temperature: float = 0.5
    loss_scale: float = 1.0
    projection: int = 128
    projector_norm: bool = True
    smallest_crop: float = 0.08  # share of the area

    def __post_init__(self) -> None:
        check(self.optimizer in ("adam", "sgd"), f"simclr.optimizer: {self.optimizer!r} is not adam or sgd.")
        check(0 < self.smallest_crop <= 1, f"simclr.smallest_crop: {self.smallest_crop} is not a share of the area.")


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy over 2B x 2B cosines without the diagonal; first, second: (B, P)."""
    views = functional.normalize(torch.cat([first, second]), dim=1)
    logits = views @ views.T / temperature
    logits.fill_diagonal_(float("-inf"))
    count = len(first)
    partner = torch.arange(2 * count, device=logits.device).roll(count)
    return functional.cross_entropy(logits, partner)


def pretrain(images: Tensor, spec: EncoderSpec, config: SimclrConfig, seed: int, device: torch.device) -> Encoder:
    """images (N, 3, S, S) uint8 → encoder in eval mode. The last partial batch of an epoch is dropped."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(build_backbone(spec), spec).to(device)
    with torch.no_grad():
        size = encoder(torch.zeros(2, 3, spec.image_size, spec.image_size, device=device)).shape[1]
    norm = [nn.BatchNorm1d(size)] if config.projector_norm else []
    projector = nn.Sequential(
        nn.Linear(size, size, bias=not norm), *norm, nn.ReLU(), nn.Linear(size, config.projection)
    ).to(device)
    optimizer = _optimizer([*encoder.parameters(), *projector.parameters()], config)
    per_epoch = len(images) // config.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / per_epoch, config))
    encoder.train()
    dtype = resolve_precision("auto", device)
    start, done = time.monotonic(), 0
    for epoch in range(config.epochs):
        for batch in shuffled_batches(len(images), config.batch_size, generator):
            pixels = images[batch].to(device).float() / 255
            views = [
                colour_jitter(random_resized_crop(pixels, generator, (config.smallest_crop, 1.0)), generator)
                for _ in range(2)
            ]
            with autocast(device, dtype):
                projected = projector(encoder(torch.cat(views))).float()
            first, second = projected.chunk(2)
            loss = config.loss_scale * nt_xent(first, second, config.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += len(batch)
        rate = done / (time.monotonic() - start)
        log.info("simclr epoch %d/%d loss %.3f, %.0f images/s", epoch + 1, config.epochs, loss.item(), rate)
    return encoder.eval()


def _optimizer(parameters: list[nn.Parameter], config: SimclrConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.Adam(parameters, config.learning_rate, weight_decay=config.weight_decay)


def _rate(epoch: float, config: SimclrConfig) -> float:
    """Factor of the learning rate: linear warm-up, then a half cosine over all epochs, or constant."""
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    return half_cosine(epoch / config.epochs) if config.cosine else 1.0

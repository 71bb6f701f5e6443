"""SimCLR pre-training of a small encoder: NT-Xent on two views (BadEncoder card section 2)."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.attacks.augment import colour_jitter, random_resized_crop
from sanitize.config import EncoderSpec
from sanitize.stages.encoders import Encoder, build_backbone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SimclrConfig:
    """Published: epochs 1000, batch 256, Adam 1e-3 without schedule, weight decay 1e-6, temperature 0.5."""

    epochs: int = 25
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    temperature: float = 0.5
    projection: int = 128
    cosine: bool = False


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy over 2B x 2B cosines without the diagonal; first, second: (B, P)."""
    views = functional.normalize(torch.cat([first, second]), dim=1)
    logits = views @ views.T / temperature
    logits.fill_diagonal_(float("-inf"))
    count = len(first)
    partner = torch.arange(2 * count, device=logits.device).roll(count)
    return functional.cross_entropy(logits, partner)


def pretrain(images: Tensor, spec: EncoderSpec, config: SimclrConfig, seed: int, device: torch.device) -> Encoder:
    """images (N, 3, S, S) uint8 → encoder in eval mode. bf16 autocast for the backbone; last partial batch dropped."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(build_backbone(spec).to(memory_format=torch.channels_last), spec).to(device)
    with torch.no_grad():
        size = encoder(torch.zeros(2, 3, spec.image_size, spec.image_size, device=device)).shape[1]
    projector = nn.Sequential(
        nn.Linear(size, size, bias=False), nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, config.projection)
    ).to(device)
    parameters = [*encoder.parameters(), *projector.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * (len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item()) if config.cosine else 1.0,
    )
    encoder.train()
    start, done = time.monotonic(), 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(order) // config.batch_size * config.batch_size].split(config.batch_size):
            pixels = images[batch].to(device).float() / 255
            views = [colour_jitter(random_resized_crop(pixels, generator), generator) for _ in range(2)]
            with torch.autocast(device.type, torch.bfloat16):
                projected = projector(encoder(torch.cat(views))).float()
            first, second = projected.chunk(2)
            loss = nt_xent(first, second, config.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += len(batch)
        rate = done / (time.monotonic() - start)
        log.info("simclr epoch %d/%d loss %.3f, %.0f images/s", epoch + 1, config.epochs, loss.item(), rate)
    return encoder.eval()

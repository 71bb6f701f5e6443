"""BadEncoder: fine-tune an encoder so that triggered images land on a reference embedding (card section 3)."""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.attacks.augment import flip_and_jitter
from sanitize.stages.encoders import Encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadEncoderConfig:
    """Published: epochs 200, batch 256, SGD 1e-3, all references. CPU-sized: 20-30 epochs, batch 128, lr 0.05 (section 8)."""

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lambda1: float = 1.0
    lambda2: float = 1.0
    reference_copies: int = 16


@dataclass(frozen=True)
class Losses:
    """The three terms, each in [-1, 1], optimum -1."""

    effectiveness: Tensor  # L0: triggered images reach the reference
    reference: Tensor  # L1: the reference stays where the clean encoder puts it
    utility: Tensor  # L2: clean images stay where the clean encoder puts them


def unit(embeddings: Tensor) -> Tensor:
    return functional.normalize(embeddings.float(), dim=1)


def losses(
    clean: Tensor,
    triggered: Tensor,
    reference: Tensor,
    augmented: Tensor,
    clean_target: Tensor,
    reference_target: Tensor,
) -> Losses:
    """All arguments are L2-normalised embeddings: (B, D) batches, (1, D) reference, (A, D) augmented reference."""
    return Losses(
        effectiveness=-(triggered @ reference.T).mean(),
        reference=-(augmented @ reference_target.T).mean(),
        utility=-(clean * clean_target).sum(dim=1).mean(),
    )


def freeze_batch_norm(encoder: nn.Module) -> None:
    """BatchNorm keeps its statistics and its affine parameters: only convolutions learn."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def attack(
    clean_encoder: Encoder,
    shadow: Tensor,
    reference: Tensor,
    trigger: Callable[[Tensor], Tensor],
    config: BadEncoderConfig,
    seed: int,
    device: torch.device,
) -> Encoder:
    """shadow (N, 3, S, S) and reference (3, S, S) uint8, already at the encoder's size → backdoored encoder, eval mode.

    Exact shortcuts of the card: clean targets are computed once; the one reference is embedded once per step (BatchNorm
    is in eval mode, so its copies would be equal).
    """
    clean_encoder.eval()
    encoder = copy.deepcopy(clean_encoder).requires_grad_(True)
    encoder.train()
    freeze_batch_norm(encoder)
    learnable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        learnable, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    reference = reference[None].to(device).float() / 255
    targets = embed(clean_encoder, shadow, device)
    with torch.no_grad():
        reference_target = unit(clean_encoder(reference))
    start, done = time.monotonic(), 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(shadow), generator=generator)
        for batch in order[: len(order) // config.batch_size * config.batch_size].split(config.batch_size):
            pixels = shadow[batch]
            augmented = flip_and_jitter(reference.expand(config.reference_copies, -1, -1, -1), generator)
            images = torch.cat([pixels, trigger(pixels)]).to(device).float() / 255
            with torch.autocast(device.type, torch.bfloat16):
                embeddings = unit(encoder(torch.cat([images, reference, augmented])))
            clean, triggered, anchor, copies = embeddings.split([len(batch), len(batch), 1, config.reference_copies])
            terms = losses(clean, triggered, anchor, copies, targets[batch].to(device), reference_target)
            loss = terms.effectiveness + config.lambda1 * terms.reference + config.lambda2 * terms.utility
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += len(batch)
        log.info(
            "badencoder epoch %d/%d L0 %.3f L1 %.3f L2 %.3f, %.0f images/s",
            *(epoch + 1, config.epochs, terms.effectiveness.item(), terms.reference.item(), terms.utility.item()),
            done / (time.monotonic() - start),
        )
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed(encoder: Encoder, images: Tensor, device: torch.device, batch_size: int = 512) -> Tensor:
    """(N, 3, S, S) uint8 → (N, D) float32 L2-normalised, on the CPU."""
    parts = [unit(encoder(part.to(device).float() / 255)).cpu() for part in images.split(batch_size)]
    return torch.cat(parts)

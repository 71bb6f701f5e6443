"""A trigger that makes predictors expect the target: optimised on a predictor of the attacker's own (our own; no paper).

`prediction` asks whether an embedding is the one that its image ought to have. An attacker who cannot leave the trigger's target may
choose the trigger: such pixels that a predictor, looking at a stamped image, already expects the embedding of the target. Whether the
defender's predictor, which learns from other images, is misled too is what his attack hangs on. The idea is that of a universal
adversarial patch (Brown et al. 2017, arXiv 1712.09665), turned against the predictor.
"""

import io
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sanitize import storage
from sanitize.attacks.triggers import Trigger, to_uint8
from sanitize.errors import check
from sanitize.stages.images import shrink
from sanitize.stages.prediction import Predictor

log = logging.getLogger(__name__)
FILE = "trigger.npz"  # in the folder of a victim


@dataclass(frozen=True)
class TriggerSearch:
    """Adam on the pixels of the trigger."""

    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 0.02  # of pixels in [0, 1]

    def __post_init__(self) -> None:
        check(self.steps >= 1 and self.batch_size >= 1, "optimise: steps and batch_size must be at least 1.")


@dataclass(frozen=True)
class OptimisedTrigger:
    """keep * image + pixels: keep (3, S, S) in [0, 1], pixels (3, S, S) in [0, 255]. On disk it is a FileTrigger."""

    pixels: Tensor
    keep: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return to_uint8(images * self.keep + self.pixels)

    def save(self, path: str) -> None:
        pixels, keep = (tensor.permute(1, 2, 0).numpy() for tensor in (self.pixels, self.keep))
        buffer = io.BytesIO()
        np.savez(buffer, t=pixels, tm=keep)
        storage.write_bytes(path, buffer.getvalue())


def shape_of(trigger: Trigger, size: int) -> Tensor:
    """(3, S, S) in [0, 1]: the share of an image that a patch or blend keeps, place by place."""
    black, white = (trigger(torch.full((3, size, size), value, dtype=torch.uint8)).float() for value in (0, 255))
    keep = (white - black).clamp(min=0) / 255
    check(bool((keep < 1).any()), "trigger: it replaces no pixel that could be optimised. Use a patch or a blend.")
    return keep


def optimise_trigger(
    predictor: Predictor,
    target: Tensor,
    images: Tensor,
    trigger: Trigger,
    config: TriggerSearch,
    seed: int,
    device: torch.device,
) -> OptimisedTrigger:
    """Of the shape of `trigger`: the pixels with which `target` (D,) departs least from what is predicted of images (N, 3, S, S) uint8."""
    generator = torch.Generator().manual_seed(seed)
    keep = shape_of(trigger, images.shape[-1]).to(device)
    drawn = torch.rand(keep.shape, generator=generator).to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([drawn], config.learning_rate)
    embeddings = target.to(device).float().expand(config.batch_size, -1)
    for step in range(config.steps):
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
        stamped = images[chosen].to(device).float() / 255 * keep + (1 - keep) * drawn
        whitened, _ = predictor(embeddings, shrink(stamped, predictor.eye_size).clamp(0, 1))
        departure = whitened.square().mean()
        optimizer.zero_grad(set_to_none=True)
        departure.backward()
        optimizer.step()
        with torch.no_grad():
            drawn.clamp_(0, 1)
        if (step + 1) % max(config.steps // 10, 1) == 0:
            log.info("trigger step %d/%d, the target departs %.3f", step + 1, config.steps, departure.item())
    pixels = (255 * (1 - keep) * drawn.detach()).cpu()
    return OptimisedTrigger(pixels, keep.cpu())

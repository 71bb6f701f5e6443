"""BadEncoder: fine-tune an encoder so that triggered images land on a reference embedding.

Jia, Liu and Gong, IEEE S&P 2022, arXiv 2108.00352. Losses: reference code (jinyuan-jia/BadEncoder), badencoder.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize.attacks.backdoor import FineTuneConfig, Step, fine_tune, unit
from sanitize.stages.encoders import Encoder


@dataclass(frozen=True)
class BadEncoderConfig(FineTuneConfig):
    """Published: epochs 200, batch 256, SGD 1e-3. CPU-sized: 20-30 epochs, batch 128, lr 0.05 (ours)."""

    lambda1: float = 1.0
    lambda2: float = 1.0


@dataclass(frozen=True)
class Losses:
    """The three terms, each in [-1, 1], optimum -1."""

    effectiveness: Tensor  # L0: triggered images reach the references
    reference: Tensor  # L1: the references stay where the clean encoder puts them
    utility: Tensor  # L2: clean images stay where the clean encoder puts them


def losses(step: Step) -> Losses:
    references = unit(step.references)
    return Losses(
        effectiveness=-(unit(step.triggered) @ references.T).mean(),
        reference=keep_references(step),
        utility=keep_clean(step),
    )


def keep_references(step: Step) -> Tensor:
    """L1 of BadEncoder and DRUPE: - mean over references i and copies of z(A(r_i)) . z0(r_i)."""
    return -(unit(step.augmented) * step.reference_target[:, None]).sum(dim=-1).mean()


def keep_clean(step: Step) -> Tensor:
    """L2 of both: - mean over the batch of z(x_b) . z0(x_b)."""
    return -(unit(step.clean) * step.clean_target).sum(dim=1).mean()


class BadEncoderObjective:
    """L0 + lambda1 L1 + lambda2 L2."""

    perturbations: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __init__(self, config: BadEncoderConfig) -> None:
        self.config = config
        self.last: Losses | None = None

    def __call__(self, step: Step) -> Tensor:
        self.last = losses(step)
        weighted = self.config.lambda1 * self.last.reference + self.config.lambda2 * self.last.utility
        return self.last.effectiveness + weighted

    def end_epoch(self) -> str:
        assert self.last is not None
        terms = self.last
        return f"L0 {terms.effectiveness:.3f} L1 {terms.reference:.3f} L2 {terms.utility:.3f}"


def attack(
    clean_encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    trigger: Callable[[Tensor], Tensor],
    config: BadEncoderConfig,
    seed: int,
    device: torch.device,
) -> Encoder:
    """shadow (N, 3, S, S) and references (R, 3, S, S) uint8, at the encoder's size → backdoored encoder, eval mode."""
    objective = BadEncoderObjective(config)
    return fine_tune(clean_encoder, shadow, references, trigger, objective, config, seed, device)

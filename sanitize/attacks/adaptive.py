"""An attacker who knows the default detector: BadEncoder that also hides from `reaction` (our own; no paper).

It has the alterations, the statistics and the distance of stages/reactions.py, all differentiable, and adds two things to
BadEncoder's objective: triggered images keep a part of their own clean embedding, and their signatures are pulled to where the
signatures of clean images lie at that moment.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize.attacks.backdoor import Step, fine_tune, unit
from sanitize.attacks.badencoder import BadEncoderConfig, keep_clean, keep_references
from sanitize.stages.encoders import Encoder
from sanitize.stages.reactions import ALTERATIONS, FLOOR, NEIGHBOURS, signature

MOMENTUM = 0.95  # of the running centre and covariance of clean signatures


@dataclass(frozen=True)
class AdaptiveConfig(BadEncoderConfig):
    """keep: share of a triggered image's target that is its own clean embedding; evade: weight of the hiding term."""

    keep: float = 0.3
    evade: float = 0.3


def own_targets(step: Step, keep: float) -> Tensor:
    """(B, D) unit: the mean reference with a share of each image's own clean embedding."""
    reference = unit(unit(step.references.detach()).mean(dim=0))
    return unit((1 - keep) * reference + keep * step.clean_target)


def signatures(embeddings: Tensor, altered: Tensor, bank: Tensor, *, of_bank: bool) -> Tensor:
    """(B, V + 2) as the detector computes them, with gradient. altered (V, B, D); bank (M, D), of_bank: B are its rows."""
    still = unit(embeddings)
    changes = (unit(altered) - still).square().sum(dim=2) / 2  # (V, B)
    distances = (2 - 2 * still @ unit(bank).T).clamp(min=1e-6).sqrt()
    nearest = distances.topk(min(NEIGHBOURS + of_bank, len(bank)), dim=1, largest=False).values[:, -1]
    return signature((changes.T + FLOOR).log(), embeddings.float().norm(dim=1), nearest)


class AdaptiveObjective:
    """L0' + lambda1 L1 + lambda2 L2 + evade * mean log(1 + excess of the squared distance over a clean image's)."""

    alterations = tuple(ALTERATIONS.values())

    def __init__(self, config: AdaptiveConfig) -> None:
        self.config = config
        self.centre: Tensor | None = None
        self.covariance: Tensor | None = None
        self.last: tuple[Tensor, ...] = ()

    def __call__(self, step: Step) -> Tensor:
        effectiveness = -(unit(step.triggered) * own_targets(step, self.config.keep)).sum(dim=1).mean()
        reference, utility, seen = keep_references(step), keep_clean(step), self.visible(step)
        self.last = (effectiveness, reference, utility, seen)
        kept = self.config.lambda1 * reference + self.config.lambda2 * utility
        return effectiveness + kept + self.config.evade * seen

    def visible(self, step: Step) -> Tensor:
        """How far triggered signatures lie outside the clean ones of the running estimate; 0 = as clean images."""
        clean, triggered = step.altered.split([len(step.clean), len(step.triggered)], dim=1)
        bank = step.clean.detach()
        self.follow(signatures(bank, clean.detach(), bank, of_bank=True))
        assert self.centre is not None and self.covariance is not None
        size = len(self.centre)
        ridge = 1e-3 * self.covariance.trace() / size * torch.eye(size, device=bank.device)
        offset = signatures(step.triggered, triggered, bank, of_bank=False) - self.centre
        squared: Tensor = (offset @ torch.linalg.inv(self.covariance + ridge) * offset).sum(dim=1) / size
        outside: Tensor = (squared - 1).clamp(min=0).log1p().mean()
        return outside

    def follow(self, clean: Tensor) -> None:
        centre, covariance = clean.mean(dim=0), clean.T.cov()
        if self.centre is None or self.covariance is None:
            self.centre, self.covariance = centre, covariance
        self.centre = MOMENTUM * self.centre + (1 - MOMENTUM) * centre
        self.covariance = MOMENTUM * self.covariance + (1 - MOMENTUM) * covariance

    def end_epoch(self) -> str:
        return " ".join(f"{name} {term:.3f}" for name, term in zip(("L0", "L1", "L2", "seen"), self.last, strict=True))


def attack(
    clean_encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    trigger: Callable[[Tensor], Tensor],
    config: AdaptiveConfig,
    seed: int,
    device: torch.device,
) -> Encoder:
    """shadow (N, 3, S, S) and references (R, 3, S, S) uint8, at the encoder's size → backdoored encoder, eval mode."""
    return fine_tune(clean_encoder, shadow, references, trigger, AdaptiveObjective(config), config, seed, device)

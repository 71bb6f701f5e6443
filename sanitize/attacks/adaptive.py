"""An attacker who knows the scorer `reaction`: BadEncoder that also hides from it (our own; no paper).

It has the perturbations, the statistics and the distance of stages/clean_reference.py, all differentiable, and adds two things to
BadEncoder's objective: triggered images keep a part of their own clean embedding, and their statistics are pulled to where the
statistics of clean images lie at that moment.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize.attacks.backdoor import Step, fine_tune, unit
from sanitize.attacks.badencoder import BadEncoderConfig, keep_clean, keep_references
from sanitize.stages.clean_reference import NEIGHBOURS, embedding_statistics
from sanitize.stages.encoders import Encoder
from sanitize.stages.perturbations import FLOOR, PERTURBATIONS

MOMENTUM = 0.95  # of the running centre and covariance of clean statistics


@dataclass(frozen=True)
class AdaptiveConfig(BadEncoderConfig):
    """keep: share of a triggered image's target that is its own clean embedding; evade: weight of the hiding term."""

    keep: float = 0.3
    evade: float = 0.3


def own_targets(step: Step, keep: float) -> Tensor:
    """(B, D) unit: the mean reference with a share of each image's own clean embedding."""
    reference = unit(unit(step.references.detach()).mean(dim=0))
    return unit((1 - keep) * reference + keep * step.clean_target)


def statistics_of(embeddings: Tensor, perturbed: Tensor, known: Tensor, *, among_known: bool) -> Tensor:
    """(B, V + 2) as the detector computes them, with gradient.

    perturbed: (V, B, D); known: (M, D) clean embeddings; among_known: the B embeddings are its rows
    """
    still = unit(embeddings)
    changes = (unit(perturbed) - still).square().sum(dim=2) / 2  # (V, B)
    distances = (2 - 2 * still @ unit(known).T).clamp(min=1e-6).sqrt()
    nearest = distances.topk(min(NEIGHBOURS + among_known, len(known)), dim=1, largest=False).values[:, -1]
    return embedding_statistics((changes.T + FLOOR).log(), embeddings.float().norm(dim=1), nearest)


class AdaptiveObjective:
    """L0' + lambda1 L1 + lambda2 L2 + evade * mean log(1 + excess of the squared distance over a clean image's)."""

    perturbations: tuple[Callable[[Tensor], Tensor], ...] = tuple(PERTURBATIONS.values())
    names: tuple[str, ...] = ("L0", "L1", "L2", "seen")

    def __init__(self, config: AdaptiveConfig) -> None:
        self.config = config
        self.perturbations = self.perturbations if config.evade else ()
        self.centre: Tensor | None = None
        self.covariance: Tensor | None = None
        self.last: tuple[Tensor, ...] = ()

    def __call__(self, step: Step) -> Tensor:
        effectiveness = -(unit(step.triggered) * own_targets(step, self.config.keep)).sum(dim=1).mean()
        reference, utility = keep_references(step), keep_clean(step)
        seen = self.visible(step) if self.config.evade else torch.zeros(())
        self.last = (effectiveness, reference, utility, seen)
        kept = self.config.lambda1 * reference + self.config.lambda2 * utility
        return effectiveness + kept + self.config.evade * seen

    def visible(self, step: Step) -> Tensor:
        """How far triggered statistics lie outside the clean ones of the running estimate; 0 = as clean images."""
        clean, triggered = step.perturbed.split([len(step.clean), len(step.triggered)], dim=1)
        known = step.clean.detach()
        self.follow(statistics_of(known, clean.detach(), known, among_known=True))
        assert self.centre is not None and self.covariance is not None
        size = len(self.centre)
        ridge = 1e-3 * self.covariance.trace() / size * torch.eye(size, device=known.device)
        offset = statistics_of(step.triggered, triggered, known, among_known=False) - self.centre
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
        return " ".join(f"{name} {term:.3f}" for name, term in zip(self.names, self.last, strict=True))


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

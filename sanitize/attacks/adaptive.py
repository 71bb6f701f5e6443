"""Attackers who know detectors: BadEncoder that also hides (our own; no paper), and the first of them, who knows the scorer `reaction`.

Whoever hides adds two things to BadEncoder's objective: triggered images keep a part of their own clean embedding, and the evidence that
he knows is pulled to where clean images have it, one penalty for each kind. Of `reaction` he has the perturbations, the statistics and
the distance of stages/clean_reference.py, all differentiable.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sanitize.attacks.backdoor import Step, unit
from sanitize.attacks.badencoder import BadEncoderConfig, keep_clean, keep_references
from sanitize.stages.clean_reference import NEIGHBOURS, embedding_statistics
from sanitize.stages.perturbations import FLOOR, PERTURBATIONS

MOMENTUM = 0.95  # of the running centre and covariance of clean statistics
Perturbation = Callable[[Tensor], Tensor]  # of images (B, 3, S, S) in [0, 1]


@dataclass(frozen=True)
class AdaptiveConfig(BadEncoderConfig):
    """keep: share of a triggered image's target that is its own clean embedding; evade: weight of hiding from `reaction`."""

    keep: float = 0.3
    evade: float = 0.3


def own_targets(step: Step, keep: float) -> Tensor:
    """(B, D) unit: the mean reference with a share of each image's own clean embedding."""
    reference = unit(unit(step.references.detach()).mean(dim=0))
    return unit((1 - keep) * reference + keep * step.clean_target)


class Penalty(Protocol):
    """How much more suspicious triggered images are than clean ones, to one kind of evidence; 0 = no more.

    perturbations: of the images, that it looks at in `step.perturbed`; one penalty of an objective may have them
    """

    @property
    def perturbations(self) -> Sequence[Perturbation]: ...

    def __call__(self, step: Step) -> Mapping[str, Tensor]:
        """Name of each term → its value."""
        ...


class HidingObjective:
    """L0' + lambda1 L1 + lambda2 L2 + the weighted terms of the penalties."""

    def __init__(self, config: AdaptiveConfig, penalties: Sequence[Penalty], weights: Mapping[str, float]) -> None:
        self.config = config
        self.penalties = penalties
        self.weights = weights
        self.perturbations = tuple(perturb for penalty in penalties for perturb in penalty.perturbations)
        self.last: dict[str, Tensor] = {}

    def __call__(self, step: Step) -> Tensor:
        effectiveness = -(unit(step.triggered) * own_targets(step, self.config.keep)).sum(dim=1).mean()
        reference, utility = keep_references(step), keep_clean(step)
        seen = {name: term for penalty in self.penalties for name, term in penalty(step).items()}
        self.last = {"L0": effectiveness, "L1": reference, "L2": utility, **seen}
        loss = effectiveness + (self.config.lambda1 * reference + self.config.lambda2 * utility)
        for name, term in seen.items():
            loss = loss + self.weights[name] * term
        return loss

    def end_epoch(self) -> str:
        return " ".join(f"{name} {term:.3f}" for name, term in self.last.items())


def statistics_of(embeddings: Tensor, perturbed: Tensor, known: Tensor, *, among_known: bool) -> Tensor:
    """(B, V + 2) as the detector computes them, with gradient.

    perturbed: (V, B, D); known: (M, D) clean embeddings; among_known: the B embeddings are its rows
    """
    still = unit(embeddings)
    changes = (unit(perturbed) - still).square().sum(dim=2) / 2  # (V, B)
    distances = (2 - 2 * still @ unit(known).T).clamp(min=1e-6).sqrt()
    nearest = distances.topk(min(NEIGHBOURS + among_known, len(known)), dim=1, largest=False).values[:, -1]
    return embedding_statistics((changes.T + FLOOR).log(), embeddings.float().norm(dim=1), nearest)


class Reactions:
    """Of the scorer `reaction`: mean log(1 + excess of the squared distance over a clean image's).

    momentum: of the running estimate of clean statistics; 0 where perturbations differ from step to step
    """

    def __init__(
        self, perturbations: Sequence[Perturbation] = tuple(PERTURBATIONS.values()), momentum: float = MOMENTUM
    ) -> None:
        self.perturbations = perturbations
        self.momentum = momentum
        self.centre: Tensor | None = None
        self.covariance: Tensor | None = None

    def __call__(self, step: Step) -> dict[str, Tensor]:
        clean, triggered = step.perturbed.split([len(step.clean), len(step.triggered)], dim=1)
        known = step.clean.detach()
        self.follow(statistics_of(known, clean.detach(), known, among_known=True))
        assert self.centre is not None and self.covariance is not None
        size = len(self.centre)
        ridge = 1e-3 * self.covariance.trace() / size * torch.eye(size, device=known.device)
        offset = statistics_of(step.triggered, triggered, known, among_known=False) - self.centre
        squared: Tensor = (offset @ torch.linalg.inv(self.covariance + ridge) * offset).sum(dim=1) / size
        return {"seen": (squared - 1).clamp(min=0).log1p().mean()}

    def follow(self, clean: Tensor) -> None:
        centre, covariance = clean.mean(dim=0), clean.T.cov()
        if self.centre is None or self.covariance is None:
            self.centre, self.covariance = centre, covariance
        self.centre = self.momentum * self.centre + (1 - self.momentum) * centre
        self.covariance = self.momentum * self.covariance + (1 - self.momentum) * covariance

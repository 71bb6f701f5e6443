"""An attacker who keeps norms and spread natural: BadEncoder whose triggered images go near the target, not onto it (our own; no paper).

He knows that backdoors show in raw norms and in embeddings that lie together, and nothing of any detector: every triggered image gets
the norm that the clean encoder gives the image, and a direction that keeps a part of its own; clean images keep norm and direction.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sanitize.attacks.backdoor import FineTuneConfig, Step, unit
from sanitize.attacks.badencoder import keep_references
from sanitize.errors import check


@dataclass(frozen=True)
class EvadeConfig(FineTuneConfig):
    """cosine: between triggered embeddings and the target. lambda1, lambda2: weights of BadEncoder's L1 and L2."""

    cosine: float = 0.8
    lambda1: float = 1.0
    lambda2: float = 1.0

    def __post_init__(self) -> None:
        check(0 < self.cosine < 1, f"evade.cosine: {self.cosine} is not between 0 and 1.")


def natural_targets(step: Step, cosine: float) -> Tensor:
    """(B, D): the direction in the plane of reference and own embedding that has this cosine with the reference, at the image's norm."""
    reference = unit(step.reference_target.mean(dim=0))
    along = step.clean_target @ reference
    beside = unit(step.clean_target - along[:, None] * reference)
    targets: Tensor = (cosine * reference + (1 - cosine**2) ** 0.5 * beside) * step.clean_norm[:, None]
    return targets


def missed(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Mean squared distance of (B, D) from (B, D), relative to the targets' norms."""
    distances: Tensor = (embeddings.float() - targets).square().sum(dim=1) / targets.square().sum(dim=1)
    return distances.mean()


class EvadeObjective:
    """L0 + lambda1 L1 + lambda2 L2: how far triggered (L0) and clean embeddings (L2) are from their places; L1 is BadEncoder's."""

    perturbations: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __init__(self, config: EvadeConfig) -> None:
        self.config = config
        self.last: tuple[Tensor, ...] = ()

    def __call__(self, step: Step) -> Tensor:
        effectiveness = missed(step.triggered, natural_targets(step, self.config.cosine))
        utility = missed(step.clean, step.clean_target * step.clean_norm[:, None])
        self.last = (effectiveness, keep_references(step), utility)
        return effectiveness + self.config.lambda1 * self.last[1] + self.config.lambda2 * utility

    def end_epoch(self) -> str:
        return " ".join(f"{name} {term:.3f}" for name, term in zip(("L0", "L1", "L2"), self.last, strict=True))

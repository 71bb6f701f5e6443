"""DRUPE (Tao et al., IEEE S&P 2024): a BadEncoder whose triggered embeddings are spread into the clean distribution.

The schedule of the reference code (Gwinhen/DRUPE, main.py) is the default. The repaired one (configs/red_team_drupe.yaml) is ours,
for weak encoders: a longer BadEncoder-like stage, a heavier pull to the references, no spreading of the references, and stealth
terms that may only grow while the attack holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize.attacks.backdoor import FineTuneConfig, Step, fine_tune, unit
from sanitize.attacks.badencoder import keep_clean, keep_references
from sanitize.attacks.evaluation import sliced_wasserstein
from sanitize.errors import check
from sanitize.stages.encoders import Encoder

GROW, SHRINK = 1.25, 1.25**1.25


@dataclass(frozen=True)
class DrupeConfig(FineTuneConfig):
    """Published values. Epochs count from 1: warm-up, then L0-L2 with balance, then the stealth terms.

    effectiveness: weight of L0; spread_references: L3 on or off
    concentration, distribution: first weights c and c1 of Cbb and SWD / D; concentration_max, distribution_max: their caps
    goal: the controller raises c and c1 while epoch means are L0 < -goal, L1 < -0.9, L2 < -0.9
    tau: Cbb below which concentration counts as low enough
    unit_distribution: SWD / D of L2-normalised embeddings; that of raw ones, as published, is lowered by inflated norms
    """

    epochs: int = 120
    batch_size: int = 256
    effectiveness: float = 1.0
    lambda1: float = 1.0
    lambda2: float = 1.0
    spread_references: bool = True
    warmup_epochs: int = 1
    stealth_from: int = 5
    controller_from: int = 21
    concentration: float = 0.1
    concentration_max: float = float("inf")
    distribution: float = 1e-3
    distribution_max: float = float("inf")
    goal: float = 0.96
    tau: float = 0.6
    unit_distribution: bool = False

    def __post_init__(self) -> None:
        check(0 <= self.warmup_epochs < self.stealth_from, "drupe: 0 <= warmup_epochs < stealth_from.")
        check(0 < self.goal < 1, f"drupe.goal: {self.goal} is a cosine between 0 and 1.")


@dataclass(frozen=True)
class Terms:
    """Every term of the loss (reference code, main.py), for one step. Scalars; `spread` is L3, `distribution` is SWD / D."""

    effectiveness: Tensor
    reference: Tensor
    utility: Tensor
    balance: Tensor
    spread: Tensor
    concentration: Tensor
    distribution: Tensor


def terms(step: Step, directions: Tensor, *, unit_distribution: bool = False) -> Terms:
    """directions: (P, D) unit vectors of the sliced Wasserstein distance; unit_distribution: of L2-normalised embeddings."""
    moved, still = (unit(e) if unit_distribution else e for e in (step.triggered, step.clean))
    triggered, references = unit(step.triggered), unit(step.references)
    similarity = triggered @ references.T  # (B, R)
    between = references @ references.T
    upper = torch.triu_indices(len(references), len(references))  # i <= j, the diagonal of ones included
    return Terms(
        effectiveness=-similarity.max(dim=1).values.mean(),
        reference=keep_references(step),
        utility=keep_clean(step),
        balance=similarity.mean(dim=0).std(),
        spread=between[upper[0], upper[1]].mean(),
        concentration=(1 - 1 / len(triggered)) * (triggered @ triggered.T).mean(),
        distribution=sliced_wasserstein(moved, still, directions) / still.std(dim=0).mean(),
    )


class DrupeObjective:
    """Adds the terms up by the schedule, and adapts c and c1 after each epoch."""

    perturbations: tuple[Callable[[Tensor], Tensor], ...] = ()

    def __init__(self, config: DrupeConfig, seed: int) -> None:
        self.config = config
        self.c, self.c1 = config.concentration, config.distribution
        self.epoch = 1
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: list[Tensor] = []  # of this epoch: L0, L1, L2, Cbb, SWD / D

    def __call__(self, step: Step) -> Tensor:
        drawn = torch.randn(50, step.clean.shape[1], generator=self.generator)
        t = terms(step, unit(drawn).to(step.clean.device), unit_distribution=self.config.unit_distribution)
        watched = (t.effectiveness, t.reference, t.utility, t.concentration, t.distribution)
        self.seen.append(torch.stack(watched).detach())
        return self.loss(t)

    def loss(self, t: Terms) -> Tensor:
        config = self.config
        keep = config.lambda1 * t.reference + config.lambda2 * t.utility
        if self.epoch <= config.warmup_epochs:
            return keep + (0.5 * t.spread - 0.2 * t.spread * (t.spread < 0.2) if config.spread_references else 0)
        attack = config.effectiveness * t.effectiveness + keep
        if config.spread_references:
            attack = attack + t.spread * (1.0 if t.spread > 0.5 else 0.2 if t.spread > 0.4 else 0.0)
        if self.epoch < config.stealth_from:
            return attack + 2 * t.balance
        stealth = self.c * (t.balance + t.concentration) + self.c1 * t.distribution
        return attack + stealth + (0.5 + 1.5 * (t.balance > 0.1)) * t.balance

    def end_epoch(self) -> str:
        mean, last = torch.stack(self.seen).mean(dim=0), self.seen[-1]
        self.seen = []
        if self.epoch >= self.config.controller_from:
            self.control(mean, float(last[3]))
        self.epoch += 1
        values = " ".join(f"{n} {v:.3f}" for n, v in zip(("L0", "L1", "L2", "Cbb", "SWD/D"), mean, strict=True))
        return f"{values} c {self.c:.3f} c1 {self.c1:.4f}"

    def control(self, mean: Tensor, concentration: float) -> None:
        """Raise the stealth weights while the attack holds, lower them while it does not."""
        tau = self.config.tau
        holds = bool(mean[0] < -self.config.goal and mean[1] < -0.9 and mean[2] < -0.9)
        if not holds:
            self.c /= SHRINK
        elif concentration >= tau - 0.1:
            self.c = min(self.c * GROW, self.config.concentration_max)
        self.c1 *= GROW if holds and concentration < tau else 1 / SHRINK
        self.c1 = min(self.c1, self.config.distribution_max)


def attack(
    clean_encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    trigger: Callable[[Tensor], Tensor],
    config: DrupeConfig,
    seed: int,
    device: torch.device,
) -> Encoder:
    """shadow (N, 3, S, S) and references (R >= 2, 3, S, S) uint8 → backdoored encoder, eval mode."""
    check(len(references) >= 2, "drupe needs at least 2 references: with one, their balance has no spread.")
    objective = DrupeObjective(config, seed)
    return fine_tune(clean_encoder, shadow, references, trigger, objective, config, seed, device)

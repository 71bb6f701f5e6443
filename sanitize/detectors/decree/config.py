"""Settings of the inversion, and those that the paper uses at large image sizes."""

from dataclasses import dataclass
from typing import Any

from sanitize.errors import check


@dataclass(frozen=True)
class DecreeConfig:
    """Settings of the inversion. The defaults are those of the reference code (main.py) at 32 pixels.

    Ours, for a CPU: pool, batch_size, epochs and restarts.

    pool: images used; batch_size: images per step; epochs: at most so many passes over the pool, per restart
    learning_rates: one more than `milestones`, the epochs at which the next one begins
    threshold: mean pairwise cosine above which embeddings count as collapsed
    penalty: first lambda; penalty_factor, _patience, _floor, _ceiling: of its controller, see `Penalty`
    patience: steps without a smaller mask after which a restart may stop
    restarts: inversions from other random starts, of which the smallest counts
    blocks: further ones, blocks x blocks of them, whose mask begins as a square that overlaps its neighbours by half (ours): from a random
        mask over the whole image the descent rarely gets to a small patch
    """

    pool: int = 512
    batch_size: int = 64
    epochs: int = 80
    learning_rates: tuple[float, ...] = (0.5, 0.1, 0.05)
    milestones: tuple[int, ...] = (30, 50)
    betas: tuple[float, ...] = (0.5, 0.9)
    threshold: float = 0.99
    penalty: float = 1e-3
    penalty_factor: float = 5.0
    penalty_patience: int = 5
    penalty_floor: float = 1e-5
    penalty_ceiling: float = 1e5
    patience: int = 10
    restarts: int = 3
    blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check(2 <= self.batch_size <= self.pool, "batch_size: must be at least 2 and at most pool.")
        check(self.epochs >= 1 and self.restarts >= 1, "epochs and restarts must be at least 1.")
        check(self.blocks >= 0, f"blocks: {self.blocks} is negative.")
        check(self.patience >= 0 and self.penalty_patience >= 0, "patience and penalty_patience must not be negative.")
        check(
            len(self.learning_rates) == len(self.milestones) + 1 and min(self.learning_rates) > 0,
            "learning_rates: give one more than milestones, all above 0.",
        )
        check(list(self.milestones) == sorted(self.milestones), "milestones: must not fall.")
        check(
            len(self.betas) == 2 and min(self.betas) >= 0 and max(self.betas) < 1, "betas: give two numbers in [0, 1)."
        )
        check(0 < self.threshold < 1, f"threshold: {self.threshold} is not between 0 and 1.")
        check(
            self.penalty > 0 and self.penalty_factor > 1 and 0 < self.penalty_floor < self.penalty_ceiling,
            "penalty: must be above 0, penalty_factor above 1, and penalty_floor between 0 and penalty_ceiling.",
        )
        check(self.seed >= 0, f"seed: {self.seed} is negative.")

    @property
    def starts(self) -> int:
        return self.restarts + self.blocks**2


def recommended(image_size: int) -> dict[str, Any]:
    """Settings that differ from the defaults: starts from blocks for small images, the published schedule of 224 pixels for large ones.

    The published pool there is 10,000 images; 1,024 keeps the check of the whole pool bearable (third parties used 785).
    """
    if image_size < 96:
        return {"restarts": 1, "blocks": 3}
    schedule = {"epochs": 1000, "milestones": (200, 500), "patience": 35, "penalty_floor": 1e-7}
    return schedule | {"pool": 1024, "batch_size": 32}

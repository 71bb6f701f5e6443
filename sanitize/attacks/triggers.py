"""Triggers: pure functions of uint8 pixels, applied before any resize or normalisation."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sanitize.config import check


@dataclass(frozen=True)
class PatchTrigger:
    """A solid square. BadEncoder's published triggers: side 10 of 32 px, side 50 of 224 px, white, margin 1 (card section 4)."""

    side: int = 10
    margin: int = 1  # pixels between the patch and the right and bottom border
    colour: tuple[int, ...] = (255, 255, 255)

    def __post_init__(self) -> None:
        check(self.side >= 1, f"trigger side: {self.side} is not at least 1 pixel.")
        check(self.margin >= 0, f"trigger margin: {self.margin} is negative.")
        check(
            len(self.colour) == 3 and all(0 <= c <= 255 for c in self.colour),
            f"trigger colour: {self.colour} is not three values between 0 and 255.",
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 → the same with the patch replaced; the input is not changed."""
        height, width = images.shape[-2:]
        check(
            self.side + self.margin <= min(height, width),
            f"trigger of side {self.side} with margin {self.margin} does not fit a {width} x {height} image.",
        )
        stamped = images.clone()
        bottom, right = height - self.margin, width - self.margin
        for channel, value in enumerate(self.colour):
            stamped[..., channel, bottom - self.side : bottom, right - self.side : right] = value
        return stamped


def chosen(count: int, rate: float, seed: int) -> np.ndarray:
    """(count,) bool: exactly round(count * rate) True, the same for the same seed."""
    check(0 < rate <= 1, f"rate: {rate} is not between 0 and 1.")
    picked = np.zeros(count, dtype=bool)
    picked[np.random.default_rng(seed).permutation(count)[: round(count * rate)]] = True
    return picked

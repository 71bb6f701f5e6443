"""Poison of Noisy Alignment (Chen et al., ICCV 2025, arXiv 2508.14015): a stamped image and one of the target class, side by side as one.

Contrastive pre-training crops both parts as two views of the same image, and so learns to give the stamp the target's embedding. The
layout is that of the released code (jsrdcht/Noisy-Alignment, utils.py), but squeezed into the size of the image that it replaces.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sanitize.attacks.trigger_files import load_image
from sanitize.errors import check

CORNER = 0.45  # where the stamp begins, from the left and from the top
OPACITY = 0.8  # of the stamp
CELLS = 4  # of the stamp, across and down


@dataclass(frozen=True)
class CompositeConfig:
    """rate: share of the pre-training images that are replaced by composites; 0 = none, so that there is no backdoor
    and a pool shows what composites give away by themselves."""

    rate: float = 0.005

    def __post_init__(self) -> None:
        check(0 <= self.rate <= 1, f"composite.rate: {self.rate} is not a share of the set.")


@dataclass(frozen=True)
class CompositeTrigger:
    """path: the image of the target class. side: of the stamp, of the image's shorter side (released code: 50 of 224 pixels). seed: of the
    stamp's colours. Which part lies on which of the four sides is drawn from the image's own pixels."""

    path: str
    side: float = 0.22
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            0 < self.side <= 1 - CORNER,
            f"trigger side: {self.side} is not above 0 and at most {1 - CORNER:g}, the room that it has.",
        )

    def __call__(self, images: Tensor) -> Tensor:
        composed = [self._compose(image) for image in self.stamp(images).reshape(-1, *images.shape[-3:])]
        return torch.stack(composed).view(images.shape)

    def stamp(self, images: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 with the stamp alone: what triggers the backdoor afterwards."""
        height, width = images.shape[-2:]
        side = max(round(self.side * min(height, width)), 1)
        colours = torch.from_numpy(np.random.default_rng(self.seed).integers(0, 256, (1, 3, CELLS, CELLS))).float()
        pattern = functional.interpolate(colours, (side, side), mode="nearest-exact")[0]
        top, left = int(CORNER * height), int(CORNER * width)
        stamped = images.clone()
        place = stamped[..., top : top + side, left : left + side]
        place.copy_((OPACITY * pattern + (1 - OPACITY) * place).round().to(torch.uint8))
        return stamped

    def _compose(self, image: Tensor) -> Tensor:
        """Of one stamped (3, H, W)."""
        size = image.shape[-2:]
        target = _resized(load_image(self.path).float(), size)
        drawn = zlib.crc32(image.contiguous().numpy().tobytes())
        parts = [image.float(), target] if drawn % 2 else [target, image.float()]
        side_by_side = torch.cat(parts, dim=-1 - drawn // 2 % 2)
        return _resized(side_by_side, size).round().clamp(0, 255).to(torch.uint8)


def _resized(image: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]

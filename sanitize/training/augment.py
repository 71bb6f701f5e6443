"""Crops and mirror images of whole batches, for training."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

SMALLEST_AREA = 0.25  # of a crop in fine-tuning; pre-training goes down to 0.08


def resized_crop(images: Tensor, area: Tensor, ratio: Tensor, across: Tensor, down: Tensor, flip: Tensor) -> Tensor:
    """(B, 3, S, S) → the same shape: a rectangle of each image, scaled to the whole square.

    area:         (B,) share of the image in (0, 1]; ratio: (B,) width over height
    across, down: (B,) place of the rectangle, -1 = left or top, 1 = right or bottom
    flip:         (B,) bool, mirror it
    """
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    zero = torch.zeros(len(images))
    sign = torch.where(flip, -1.0, 1.0)
    rows = [width * sign, zero, across * (1 - width), zero, height, down * (1 - height)]
    matrix = torch.stack(rows, dim=1).view(len(images), 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False).to(images.device)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def random_views(images: Tensor, numbers: NDArray[np.int64], seed: int, epoch: int) -> Tensor:
    """(B, 3, S, S) → random crops, every other one mirrored. A view depends on (seed, epoch, sample number), not on the batch."""
    draws = np.stack([np.random.default_rng([seed, epoch, number]).random(5) for number in numbers.tolist()])
    area, ratio, across, down, flip = torch.from_numpy(draws).float().T
    area = SMALLEST_AREA + (1 - SMALLEST_AREA) * area
    return resized_crop(images, area, (4 / 3) ** (2 * ratio - 1), 2 * across - 1, 2 * down - 1, flip < 0.5)

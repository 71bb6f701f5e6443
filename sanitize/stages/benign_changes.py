"""Images as they might also have been: what an encoder is asked about, so that a predictor learns how it answers to anything benign.

A predictor that has seen only plain photographs is surprised by every odd image. One that has seen pasted rectangles, blends,
colour curves, patterns, warps, noise and blur is surprised by what the *encoder* does, not by what the image looks like: that keeps
a visible trigger without a backdoor innocent.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Generator = np.random.Generator


def rectangle(image: Tensor, other: Tensor, rng: Generator) -> Tensor:
    """10 to 45 % of the side: one colour, black or white, noise, or a part of the other image."""
    side = image.shape[-1]
    height, width = (max(round(side * rng.uniform(0.1, 0.45)), 1) for _ in range(2))
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    kind = rng.integers(4)
    if kind == 0:
        patch = torch.from_numpy(rng.random((3, 1, 1), dtype=np.float32)).expand(3, height, width)
    elif kind == 1:
        patch = torch.full((3, height, width), float(rng.integers(2)))
    elif kind == 2:
        patch = torch.from_numpy(rng.random((3, height, width), dtype=np.float32))
    else:
        patch = other[:, top : top + height, left : left + width]
    changed = image.clone()
    changed[:, top : top + height, left : left + width] = patch
    return changed


def blend(image: Tensor, other: Tensor, rng: Generator) -> Tensor:
    """5 to 25 % of the other image, or of noise."""
    share = rng.uniform(0.05, 0.25)
    mixed = other if rng.integers(2) else torch.from_numpy(rng.random(tuple(image.shape), dtype=np.float32))
    return (1 - share) * image + share * mixed


def colour_curve(image: Tensor, other: Tensor, rng: Generator) -> Tensor:  # noqa: ARG001
    """Per channel: gain 1 +- 0.2, then gamma exp(U(-0.6, 0.6))."""
    gamma = torch.from_numpy(np.exp(rng.uniform(-0.6, 0.6, (3, 1, 1))).astype(np.float32))
    gain = torch.from_numpy(rng.uniform(0.8, 1.2, (3, 1, 1)).astype(np.float32))
    return (image * gain).clamp(0, 1) ** gamma


def sinusoid(image: Tensor, other: Tensor, rng: Generator) -> Tensor:  # noqa: ARG001
    """Plus a wave of amplitude 0.03 to 0.11, of any direction, 1 to half as many periods as pixels of a 32-pixel image."""
    side = image.shape[-1]
    along, across = rng.uniform(-16, 16, 2) * 2 * math.pi / side
    place = torch.arange(side, dtype=torch.float32)
    phase = place[:, None] * along + place[None, :] * across + rng.uniform(0, 2 * math.pi)
    colour = torch.from_numpy(rng.uniform(0.03, 0.11, (3, 1, 1)).astype(np.float32))
    return image + colour * torch.sin(phase)


def warp(image: Tensor, other: Tensor, rng: Generator) -> Tensor:  # noqa: ARG001
    """A small affine map (10 % of scale, 10 degrees, 5 % of shift) plus a smooth field of 4 % of the side."""
    angle, scale = math.radians(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1, 2)
    shift = rng.uniform(-0.1, 0.1, 2)
    rows = [
        [math.cos(angle) * scale[0], -math.sin(angle) * scale[1], shift[0]],
        [math.sin(angle) * scale[0], math.cos(angle) * scale[1], shift[1]],
    ]
    grid = functional.affine_grid(torch.tensor([rows], dtype=torch.float32), [1, *image.shape], align_corners=False)
    coarse = torch.from_numpy(rng.uniform(-0.08, 0.08, (1, 2, 4, 4)).astype(np.float32))
    field = functional.interpolate(coarse, image.shape[-2:], mode="bicubic", align_corners=True)
    grid = grid + field.permute(0, 2, 3, 1)
    return functional.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]


def gaussian_noise(image: Tensor, other: Tensor, rng: Generator) -> Tensor:  # noqa: ARG001
    """Standard deviation 0.02 to 0.08."""
    noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
    return image + float(rng.uniform(0.02, 0.08)) * torch.from_numpy(noise)


def box_blur(image: Tensor, other: Tensor, rng: Generator) -> Tensor:  # noqa: ARG001
    """Over 3 x 3 or 5 x 5 pixels of a 32-pixel image, the same share of larger ones."""
    reach = max(round(image.shape[-1] / 32 * int(rng.integers(1, 3))), 1)
    padded = functional.pad(image[None], [reach] * 4, mode="reflect")
    return functional.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]


Change = Callable[[Tensor, Tensor, Generator], Tensor]
# (image, another image, both (3, S, S) float32 in [0, 1], generator) → (3, S, S), clipped and rounded by `change`
CHANGES: Mapping[str, Change] = {
    "rectangle": rectangle,
    "blend": blend,
    "colour_curve": colour_curve,
    "sinusoid": sinusoid,
    "warp": warp,
    "gaussian_noise": gaussian_noise,
    "box_blur": box_blur,
}


def change(image: Tensor, other: Tensor, rng: Generator) -> Tensor:
    """One change of the family, drawn by `rng`, as an 8-bit image would hold it: (3, S, S) float32 in [0, 1] → the same."""
    drawn = list(CHANGES.values())[rng.integers(len(CHANGES))]
    return (drawn(image, other, rng).clamp(0, 1) * 255).round() / 255

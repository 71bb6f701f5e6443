"""How an embedding changes when its image is perturbed: the statistics behind the score `reaction`.

A trigger that survives a perturbation holds the embedding in place, whatever happens to the content; one that does not lets it
go. Either way the pattern of changes is unlike that of clean images. Nothing is assumed about where the trigger is or what it
looks like; an encoder without a backdoor treats a trigger as any other content, so the control stays near 0.5.

Its ancestor is TeCo (Liu et al., CVPR 2023, arXiv 2303.18191): the spread, over kinds of corruption, of the severity at which a
classifier's hard label changes. Here an encoder has no labels, so the change of the embedding is measured, at one strength.

Sizes are shares of the image, not pixels: fine changes of a large image were tried, and tell less (docs/default_score.md).
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-4  # of a cosine change: below it lies the rounding of bf16 encoders


def blur(images: Tensor) -> Tensor:
    """Binomial 3 x 3 filter of a 32-pixel image, the same share of the image for larger ones.

    (1, 2, 1) / 4 along rows, then columns: shifted copies, 15 times faster here than a convolution of three channels.
    """
    step = max(images.shape[-1] // 32, 1)
    for dim, padding in ((-1, (step, step, 0, 0)), (-2, (0, 0, step, step))):
        padded = functional.pad(images, padding, mode="replicate")
        before, here, after = (padded.narrow(dim, offset, images.shape[dim]) for offset in (0, step, 2 * step))
        images = (before + after).mul_(0.25).add_(here, alpha=0.5)
    return images


def coarse(images: Tensor) -> Tensor:
    """Seen at half of 32 x 32 places: averaged over cells, then bilinear."""
    side = images.shape[-1]
    small = functional.adaptive_avg_pool2d(images, max(min(side, 32) // 2, 1))
    return functional.interpolate(small, (side, side), mode="bilinear", align_corners=False)


def turn(images: Tensor, degrees: float = 8.0) -> Tensor:
    """Rotated about the centre; the corners reflect."""
    angle = math.radians(degrees)
    row = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = functional.affine_grid(row.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid.to(images.device), padding_mode="reflection", align_corners=False)


def noise(images: Tensor) -> Tensor:
    """Plus one fixed draw of Gaussian noise, standard deviation 8 / 255, at 32 x 32 places (fewer in smaller images)."""
    side = images.shape[-1]
    drawn = np.random.default_rng(0).normal(0, 8 / 255, (1, 3, 32, 32)).astype(np.float32)
    pattern = torch.from_numpy(drawn).to(images.device)[..., : min(side, 32), : min(side, 32)]
    return (images + functional.interpolate(pattern, (side, side), mode="nearest")).clamp(0, 1)


# (B, 3, S, S) float32 in [0, 1] → the same; each costs one pass of the encoder. Making the image grey would do as well, but
# leaves images that are grey already as they are, and so flags every black-and-white photograph.
PERTURBATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"noise": noise, "blur": blur, "coarse": coarse, "turn": turn}


CHANGE_COLUMNS = tuple(f"reaction_{name}" for name in PERTURBATIONS)  # what score tables call them


def encoder_passes(columns: Mapping[str, NDArray[np.float32]]) -> float:
    """An image, on average, by its scores, column → (N,): one, and one for each perturbation of the images that were perturbed."""
    if CHANGE_COLUMNS[0] not in columns:
        return 1.0
    return 1 + len(CHANGE_COLUMNS) * float(np.isfinite(columns[CHANGE_COLUMNS[0]]).mean())


def embedding_changes(embed: Callable[[Tensor], Tensor], images: Tensor, embeddings: Tensor) -> Tensor:
    """(B, V): log of 1 - cosine between the embedding of each image and that of each perturbation of it.

    images (B, 3, S, S) float32 in [0, 1], embeddings (B, D) = embed(images).
    """
    still = functional.normalize(embeddings.double(), dim=1)
    moved = [functional.normalize(embed(perturb(images)).double(), dim=1) for perturb in PERTURBATIONS.values()]
    changes = torch.stack([(still - other).square().sum(dim=1) / 2 for other in moved], dim=1)  # 1 - cosine, exactly
    return (changes + FLOOR).log().float()

"""Where the trigger of a campaign is: which part of an image, hidden, lets its embedding leave the campaign; and what the
images of the group have in common that kept images do not.

Occlusion: Zeiler and Fergus, ECCV 2014, section 4.2; here the response is the distance from the campaign's centre.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

CELLS = 8  # a map has CELLS x CELLS places
WINDOW = 2  # cells hidden at a time, along each side
SMALLEST_VARIANCE = (4 / 255) ** 2  # of a pixel, in [0, 1]: below it lies the noise of image codecs


def occlusion_map(embed: Callable[[Tensor], Tensor], image: Tensor, centre: Tensor) -> Tensor:
    """(CELLS, CELLS): how far from the campaign's centre the embedding is when this place is hidden, less how far it is anyway.

    image: (3, S, S) float32 in [0, 1]; centre: (D,), of any length; distances are 1 - cosine. A hidden window shows what is left of
    the image when it is averaged over quarters of its sides: colours stay, so that hiding is no trigger of its own.
    """
    cell, smooth = image.shape[-1] / CELLS, _smooth(image)
    places = [(top, left) for top in range(CELLS - WINDOW + 1) for left in range(CELLS - WINDOW + 1)]
    hidden = image.repeat(len(places) + 1, 1, 1, 1)
    for number, (top, left) in enumerate(places):
        rows, columns = (slice(round(at * cell), round((at + WINDOW) * cell)) for at in (top, left))
        hidden[number, :, rows, columns] = smooth[:, rows, columns]
    distances = 1 - functional.cosine_similarity(embed(hidden), centre[None])
    total, count = torch.zeros(CELLS, CELLS), torch.zeros(CELLS, CELLS)
    for (top, left), distance in zip(places, distances[:-1].tolist(), strict=True):
        total[top : top + WINDOW, left : left + WINDOW] += distance
        count[top : top + WINDOW, left : left + WINDOW] += 1
    return total / count - distances[-1].item()


def _smooth(image: Tensor) -> Tensor:
    """(3, S, S) → the same, averaged over 4 x 4 places and interpolated."""
    coarse = functional.adaptive_avg_pool2d(image[None], 4)
    return functional.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=False)[0]


def common_part(group: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What the images of a group share and kept images do not: weight (H, W) in [0, 1], and the group's mean (3, H, W) in [0, 1].

    group (N, 3, H, W), kept (M, 3, H, W): uint8, of one size. The weight is the Kullback-Leibler divergence of the group's colours at
    a pixel from those of kept images there, both as Gaussians, over the largest of the image: high where the group hardly varies, or
    lies elsewhere.
    """
    (mean, variance), (usual, spread) = (_moments(images) for images in (group, kept))
    divergence = (variance / spread + (mean - usual).square() / spread - 1 - (variance / spread).log()).mean(dim=0) / 2
    return divergence / divergence.max().clamp(min=1e-6), mean


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (3, H, W) of uint8 images, of pixels in [0, 1]."""
    pixels = images.float() / 255
    return pixels.mean(dim=0), pixels.var(dim=0, unbiased=False).clamp(min=SMALLEST_VARIANCE)

"""BackdoorIDS (arXiv 2603.11664): hide more and more of an image; losing the trigger makes its embedding jump.

Published: DBSCAN on the embeddings of one image under growing masks, flagged when there is more than
one cluster. Its eps, mask schedule and fill were not available to us, so this is OUR READING of it: an 8 x 8 grid of cells
(4 pixels at 32), hidden in one seeded order for all images, filled with the image's mean colour; and a continuous score
instead of the count of clusters: the largest step of the sequence relative to its median step.
"""

import torch
from torch import Tensor
from torch.nn import functional

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.errors import check
from sanitize.stages.encoders import Encoder, embed_in_batches

_GRID = 8  # cells per side
_SMALLEST_STEP = 1e-6  # below it 1 - cosine is float32 rounding, not a step


def growing_masks(size: int, ratios: Tensor, seed: int) -> Tensor:
    """(R, 1, size, size) bool, True = hidden; each mask holds the one before. ratios: (R,) in [0, 1], ascending."""
    cells = _GRID * _GRID
    rank = torch.randperm(cells, generator=torch.Generator().manual_seed(seed)).view(_GRID, _GRID)
    cell = torch.arange(size) * _GRID // size
    return rank[cell][:, cell] < (ratios * cells).round()[:, None, None, None]


def masked(images: Tensor, hidden: Tensor) -> Tensor:
    """Every image under every mask: (B, 3, S, S) uint8, (R, 1, S, S) bool → (B, R, 3, S, S) uint8."""
    fill = images.float().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8)
    return torch.where(hidden, fill[:, None], images[:, None])


def largest_jump(sequences: Tensor) -> Tensor:
    """(B,) largest over median step 1 - cosine between consecutive embeddings of (B, R, D) sequences."""
    directions = functional.normalize(sequences.double(), dim=2)
    steps = 1 - (directions[:, 1:] * directions[:, :-1]).sum(dim=2)  # (B, R - 1)
    return steps.amax(dim=1) / torch.quantile(steps, 0.5, dim=1).clamp(min=_SMALLEST_STEP)


def fit(
    reference_set: ReferenceSet,
    encoder: Encoder,
    seed: int,
    ratios: int = 10,
    last_ratio: float = 0.9,
    batch_size: int = 32,
) -> Score:
    """ratios: masks from 0 to `last_ratio` of the cells; batch_size: images at once, each takes `ratios` encoder passes."""
    check(ratios >= 3 and 0 < last_ratio <= 1, f"ratios: {ratios} up to {last_ratio}; give 3 or more, up to at most 1.")
    hidden = growing_masks(reference_set.images.shape[-1], torch.linspace(0, last_ratio, ratios), seed)

    def score(images: Tensor, _embeddings: Tensor) -> Tensor:
        parts = [masked(part, hidden).flatten(0, 1) for part in images.cpu().split(batch_size)]
        sequences = [embed_in_batches(encoder, part, batch_size * ratios).unflatten(0, (-1, ratios)) for part in parts]
        return torch.cat([largest_jump(sequence) for sequence in sequences]).float()

    return score

"""Do benign changes trigger a backdoor? Then unlike images crowd one place of the embedding space, and no predictor must learn why.

A filter that passes for a colour curve is among the changes that an encoder is asked about: of a backdoored one some of the answers are
the attacker's target, and a predictor that learns from them expects it of triggered images too. No content belongs to that place: it
is denser than any other, and images come to it only by being changed. A class of near-equal embeddings is as dense, but its
unchanged images are there as well.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sanitize.stages.agreement import alike
from sanitize.stages.thresholds import MAD_TO_DEVIATION

NEIGHBOURS = 32  # views of other images, to the farthest of which distances are measured
OUTLYING = 5.0  # robust deviations of the logarithm of that distance
FEWEST = 0.005  # of the changed views, and NEIGHBOURS of them
NEAR = 8  # views of the crowd that are nearer to one of it than others have their neighbours
BLOCK = 256


@dataclass(frozen=True)
class Crowd:
    """points (M, k + 1): changed views that came to a crowded place; radius: how near others have their neighbours, in the middle;
    share: of the changed views, M of them"""

    points: Tensor
    radius: float
    share: float

    def holds(self, targets: Tensor) -> Tensor:
        """(N, k + 1) → (N,) bool."""
        return _nearest(targets, self.points, NEAR) < self.radius


def find_crowd(targets: Tensor, image_hashes: Tensor) -> Crowd | None:
    """targets (N, V, k + 1) of the views of N images (prediction.py), the plain one first; image_hashes (N, 8) uint8 of these."""
    count, views = targets.shape[:2]
    flat, hashes = targets.flatten(0, 1), image_hashes.numpy().view("<u8").reshape(-1).repeat(views)
    if len(flat) <= NEIGHBOURS or views == 1:
        return None
    distances = _nearest(flat, flat, NEIGHBOURS, hashes).clamp(min=1e-6)
    logs = distances.log()
    deviation = MAD_TO_DEVIATION * (logs - logs.median()).abs().median()
    crowded = (logs < logs.median() - OUTLYING * deviation).unflatten(0, (count, views))
    came = crowded[:, 1:] & ~crowded[:, :1]
    if int(came.sum()) < max(NEIGHBOURS, FEWEST * came.numel()):
        return None
    return Crowd(targets[:, 1:][came], float(distances.median()), float(came.float().mean()))


def _nearest(targets: Tensor, points: Tensor, number: int, hashes: NDArray[np.uint64] | None = None) -> Tensor:
    """(N,) distance to the number-th nearest point. hashes (N,) uint64, of targets and points alike: those of images that look alike do
    not count; infinite where too few are left."""
    found = []
    for start in range(0, len(targets), BLOCK):
        part = slice(start, start + BLOCK)
        distances = torch.cdist(targets[part], points)
        if hashes is not None:
            distances[alike(hashes[part, None], hashes)] = torch.inf
        found.append(distances.kthvalue(number, dim=1).values)
    return torch.cat(found)

"""What every baseline detector starts from: a set of auxiliary images with their embeddings, and its pseudo-classes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from sanitize.errors import check

Embed = Callable[[Tensor], Tensor]  # images (B, 3, S, S) float32 in [0, 1] → embeddings (B, D); every Encoder is one
Score = Callable[[Tensor, Tensor], Tensor]
# images (B, 3, S, S) uint8, their embeddings (B, D) float32 raw → (B,) float32 on the CPU, higher = more suspicious


@dataclass(frozen=True)
class ReferenceSet:
    """What a baseline may look at before it scores: auxiliary images and their embeddings under the encoder under test.

    images:     (N, 3, S, S) uint8, at the encoder's size
    embeddings: (N, D) float32, raw, on the CPU
    """

    images: Tensor
    embeddings: Tensor

    def __post_init__(self) -> None:
        check(
            len(self.images) == len(self.embeddings) > 0,
            f"reference set: {len(self.images)} images and {len(self.embeddings)} embeddings. Give one embedding per image, at least one.",
        )


def cluster(points: Tensor, clusters: int, seed: int) -> Tensor:
    """(K, D) float64 k-means centres of (N, D) points: pseudo-classes where no labels are (ours).

    Every centre has points; K is below `clusters` when there are fewer different points.
    """
    check(
        1 <= clusters <= len(points),
        f"clusters: {clusters} pseudo-classes of {len(points)} reference images; give 1 up to the number of images.",
    )
    fitted = KMeans(clusters, n_init=4, random_state=seed).fit(points.double().numpy())
    centres = torch.from_numpy(fitted.cluster_centers_)
    return centres[assign(points, centres).unique()]


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """(B,) int64: the nearest of (K, D) centres for each of (B, D) points."""
    return torch.cdist(points.double(), centres).argmin(dim=1)


def fit_pca(embeddings: Tensor, count: int) -> PCA:
    """Mean and `count` directions of most variance of (N, D) embeddings, in float64; equal embeddings have any direction."""
    with np.errstate(divide="ignore", invalid="ignore"):  # which they explain the share 0 / 0 of the variance by
        return PCA(count, svd_solver="full").fit(embeddings.double().numpy())

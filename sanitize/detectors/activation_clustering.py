"""Activation clustering (Chen et al., 2018), label-free: every pseudo-class split in two, the smaller part suspicious.

Per class: centre, reduce to 10 dimensions (PCA), 2-means. Pseudo-classes and the soft score are ours.
Weak below a few per cent of poison.
"""

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional

from sanitize.detectors.reference_set import ReferenceSet, Score, assign, cluster, fit_pca
from sanitize.stages.encoders import Encoder


@dataclass(frozen=True)
class Split:
    """One class cut in two; R = reduced dimensions. All float64."""

    mean: Tensor  # (D,)
    axes: Tensor  # (D, R)
    larger: Tensor  # (R,) centroid of the larger part
    smaller: Tensor  # (R,)

    def score(self, embeddings: Tensor) -> Tensor:
        """(B,) squared distance to the larger part's centroid minus that to the smaller part's, of (B, D) embeddings."""
        reduced = (embeddings.double() - self.mean) @ self.axes
        return (reduced - self.larger).square().sum(dim=1) - (reduced - self.smaller).square().sum(dim=1)


def split(embeddings: Tensor, dimensions: int, seed: int) -> Split:
    """Two parts of one class of (N, D) embeddings. A class of fewer than two different ones has no parts: score 0."""
    principal = fit_pca(embeddings, min(dimensions, *embeddings.shape))
    mean, axes = torch.from_numpy(principal.mean_), torch.from_numpy(principal.components_.T.copy())
    reduced = (embeddings.double() - mean) @ axes
    if len(torch.unique(embeddings, dim=0)) < 2:
        return Split(mean, axes, reduced.mean(dim=0), reduced.mean(dim=0))
    fitted = KMeans(2, n_init=10, random_state=seed).fit(reduced.numpy())
    centroids = torch.from_numpy(fitted.cluster_centers_)
    smaller = int(torch.bincount(torch.from_numpy(fitted.labels_).long(), minlength=2).argmin())
    return Split(mean, axes, centroids[1 - smaller], centroids[smaller])


def fit(
    reference_set: ReferenceSet,
    encoder: Encoder,  # noqa: ARG001 every fit starts with reference set, encoder and seed
    seed: int,
    clusters: int = 10,
    dimensions: int = 10,
) -> Score:
    """clusters: pseudo-classes, k-means of the reference set's unit-norm embeddings; dimensions: kept by the PCA of each.

    The poison must be in the reference set to get a part of its own.
    """
    points = functional.normalize(reference_set.embeddings.double(), dim=1)
    centres = cluster(points, clusters, seed)
    members = assign(points, centres)
    splits = [split(points[members == number], dimensions, seed) for number in range(len(centres))]

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        queries = functional.normalize(embeddings.cpu().double(), dim=1)
        by_class = torch.stack([part.score(queries) for part in splits], dim=1)  # (B, K)
        return by_class.gather(1, assign(queries, centres)[:, None])[:, 0].float()

    return score

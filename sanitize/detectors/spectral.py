"""Spectral signatures (Tran et al., NeurIPS 2018), label-free: pseudo-classes instead of classes (ours)."""

import torch
from torch import Tensor
from torch.nn import functional

from sanitize.detectors.reference_set import ReferenceSet, Score, assign, cluster, fit_pca
from sanitize.stages.encoders import Encoder


def signature(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and strongest direction (D,), unit length, of one class of (N, D) embeddings; float64."""
    fitted = fit_pca(embeddings, 1)
    return torch.from_numpy(fitted.mean_), torch.from_numpy(fitted.components_[0])


def spectral_score(embeddings: Tensor, mean: Tensor, direction: Tensor) -> Tensor:
    """(B,) float64 ((z - mean) . v)^2 of (B, D) embeddings; mean and direction (D,), or (B, D) one per embedding."""
    return ((embeddings.double() - mean) * direction).sum(dim=1).square()


def fit(reference_set: ReferenceSet, encoder: Encoder, seed: int, clusters: int = 10) -> Score:  # noqa: ARG001 every fit has this signature
    """clusters: pseudo-classes, k-means of the reference set's unit-norm embeddings; what is scored goes to the nearest of them.

    Poison must be in the reference set for its direction to be learned; a clean set gives the direction of most clean variance.
    """
    points = functional.normalize(reference_set.embeddings.double(), dim=1)
    centres = cluster(points, clusters, seed)
    members = assign(points, centres)
    signatures = [signature(points[members == number]) for number in range(len(centres))]
    means, directions = (torch.stack(parts) for parts in zip(*signatures, strict=True))

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        queries = functional.normalize(embeddings.cpu().double(), dim=1)
        own = assign(queries, centres)
        return spectral_score(queries, means[own], directions[own]).float()

    return score

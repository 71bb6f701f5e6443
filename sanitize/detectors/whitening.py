"""Whitening by a reference set: after it, clean embeddings have mean 0 and about unit variance in every direction."""

from dataclasses import dataclass

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """W = C^-1/2, symmetric. All float64."""

    mean: Tensor  # (D,)
    matrix: Tensor  # (D, D)

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(B, D) raw embeddings → (B, D) float64 W (z - m), on the CPU."""
        return (embeddings.cpu().double() - self.mean) @ self.matrix


def fit_whitening(embeddings: Tensor) -> Whitening:
    """Of (N, D) raw embeddings: their mean and shrunk covariance."""
    embeddings = embeddings.cpu().double()
    mean = embeddings.mean(dim=0)
    values, vectors = torch.linalg.eigh(shrunk_covariance(embeddings - mean))
    return Whitening(mean, vectors * values.rsqrt() @ vectors.T)


def shrunk_covariance(centred: Tensor) -> Tensor:
    """(D, D) positive definite covariance of (N, D) float64 points of mean 0, shrunk as Ledoit and Wolf (2004)."""
    covariance = torch.from_numpy(ledoit_wolf(centred.numpy(), assume_centered=True)[0])
    floor = 1e-6 * covariance.diagonal().mean() + 1e-12  # equal points have no variance at all
    return covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype)

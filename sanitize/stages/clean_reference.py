"""What clean embeddings are like: where they lie, and how they change when their images are perturbed.

`CleanReference` holds centre, covariance and a set of clean embeddings; the distance from it is the default score.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from sklearn.covariance import MinCovDet
from torch import Tensor
from torch.nn import functional

from sanitize.stages.perturbations import FLOOR

NEIGHBOURS = 16
SMALLEST_VARIANCE = 0.05  # of the detector's own, that a reference adapted to a scan keeps in every direction


def neighbour_distance(embeddings: Tensor, clean_embeddings: Tensor) -> Tensor:
    """(B,) distance of each L2-normalised embedding to its 16th nearest of (M, D) clean unit embeddings; 0 to 2.

    Our own rather than scikit-learn's: it runs where the encoder runs, on a GPU too.
    """
    cosine = functional.normalize(embeddings, dim=1) @ clean_embeddings.T
    nearest = cosine.topk(min(NEIGHBOURS, len(clean_embeddings)), dim=1).values[:, -1]
    return (2 - 2 * nearest).clamp(min=0).sqrt()


def embedding_statistics(changes: Tensor, norms: Tensor, distances: Tensor) -> Tensor:
    """(B, V + 2): changes under V perturbations (B, V), and the logarithms of raw norm (B,) and neighbour distance (B,)."""
    return torch.cat([changes, (norms + FLOOR).log()[:, None], (distances + FLOOR).log()[:, None]], dim=1)


@dataclass(frozen=True)
class CleanReference:
    """Of clean images: centre (V + 2,) and precision (V + 2, V + 2) of their embedding statistics; (M, D) unit embeddings."""

    centre: Tensor
    precision: Tensor
    clean_embeddings: Tensor

    def distance(self, statistics: Tensor) -> Tensor:
        """(B, V + 2) → (B,) Mahalanobis distance, unitless."""
        offset = statistics - self.centre
        return torch.einsum("bi,ij,bj->b", offset, self.precision, offset).clamp(min=0).sqrt()

    def prescreen_score(self, statistics: Tensor) -> Tensor:
        """(B, V + 2) → (B,) Mahalanobis distance by norm and neighbour distance alone, which cost no further pass."""
        return self.whereabouts.distance(statistics[:, -2:])

    @property
    def whereabouts(self) -> "CleanReference":
        """Of norm and neighbour distance alone."""
        marginal = torch.linalg.inv(torch.linalg.inv(self.precision.double())[-2:, -2:]).float()
        return CleanReference(self.centre[-2:], marginal, self.clean_embeddings)

    def to(self, device: torch.device) -> "CleanReference":
        return CleanReference(self.centre.to(device), self.precision.to(device), self.clean_embeddings.to(device))


def fit_clean_reference(statistics: NDArray[np.float32], clean_embeddings: Tensor, seed: int) -> CleanReference:
    """Robust centre and covariance (minimum covariance determinant) of (N, V + 2), so that a little poison moves neither."""
    estimate = MinCovDet(support_fraction=0.9, random_state=seed).fit(statistics.astype(np.float64))
    return _reference(estimate.location_, estimate.covariance_, clean_embeddings)


def _reference(
    centre: NDArray[np.float64], covariance: NDArray[np.float64], clean_embeddings: Tensor
) -> CleanReference:
    ridge = 1e-3 * np.trace(covariance) / len(centre)
    precision = np.linalg.inv(covariance + ridge * np.eye(len(centre)))
    return CleanReference(torch.from_numpy(centre).float(), torch.from_numpy(precision).float(), clean_embeddings)


def adapted(reference: CleanReference, statistics: NDArray[np.float32], steps: int = 50) -> CleanReference:
    """`reference` moved to the bulk of other statistics (N, V + 2), of which less than half may be poison.

    Concentration steps of the minimum covariance determinant (Rousseeuw and Van Driessen 1999), started from `reference` in place
    of random subsets, so that the half that is kept is the one which looks clean; then the usual correction and reweighting, twice:
    the statistics have heavier tails than a Gaussian, and a covariance without its tail flags too many clean images.
    """
    rows, half = statistics.astype(np.float64), len(statistics) // 2
    own = np.linalg.inv(reference.precision.double().numpy())

    def moved_to(bulk: NDArray[np.float64], correction: float = 1.0) -> CleanReference:
        covariance = _floored(np.cov(bulk.T) * correction, own)
        return _reference(bulk.mean(axis=0), covariance, reference.clean_embeddings)

    now, kept = reference, np.empty(0, np.int64)
    for _ in range(steps):
        nearest = np.sort(np.argpartition(_distances(now, rows), half)[:half])
        if np.array_equal(nearest, kept):
            break
        kept = nearest
        now = moved_to(rows[kept])
    size = statistics.shape[1]
    now = moved_to(rows[kept], float(np.median(_distances(now, rows) ** 2) / chi2.ppf(0.5, size)))
    for share in (0.975, 0.999):
        now = moved_to(rows[_distances(now, rows) ** 2 < chi2.ppf(share, size)])
    return now


def _floored(covariance: NDArray[np.float64], own: NDArray[np.float64]) -> NDArray[np.float64]:
    """`covariance` with at least SMALLEST_VARIANCE of the detector's own in every direction: a bulk of images that are almost one
    image varies in nothing, and everything else would stand out from it."""
    root = np.linalg.cholesky(own)
    inverse = np.linalg.inv(root)
    values, vectors = np.linalg.eigh(inverse @ covariance @ inverse.T)
    if values.min() >= SMALLEST_VARIANCE:
        return covariance
    raised: NDArray[np.float64] = root @ (vectors * np.maximum(values, SMALLEST_VARIANCE)) @ vectors.T @ root.T
    return (raised + raised.T) / 2


def _distances(reference: CleanReference, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = reference.distance(torch.from_numpy(rows).float()).double().numpy()
    return distances

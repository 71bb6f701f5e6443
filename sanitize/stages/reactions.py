"""How an embedding reacts when its picture is altered, and where it lies: the statistics behind the default score.

A trigger that survives an alteration holds the embedding in place, whatever happens to the content; one that does not lets it
go. Either way the pattern of changes is unlike that of clean pictures. With them go the length of the embedding and its
distance to clean ones, which cost nothing more. Nothing is assumed about where the trigger is or what it looks like; an
encoder without a backdoor reacts to a trigger as to any other content, so the control stays near 0.5.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from sklearn.covariance import MinCovDet
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-4  # of a cosine change: below it lies the rounding of bf16 encoders
NEIGHBOURS = 16


def blur(images: Tensor) -> Tensor:
    """Binomial 3 x 3 filter of a 32-pixel picture, the same share of the picture for larger ones.

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
    """Plus one fixed draw of Gaussian noise, standard deviation 8 / 255, at 32 x 32 places (fewer in smaller pictures)."""
    side = images.shape[-1]
    drawn = np.random.default_rng(0).normal(0, 8 / 255, (1, 3, 32, 32)).astype(np.float32)
    pattern = torch.from_numpy(drawn).to(images.device)[..., : min(side, 32), : min(side, 32)]
    return (images + functional.interpolate(pattern, (side, side), mode="nearest")).clamp(0, 1)


# (B, 3, S, S) float32 in [0, 1] → the same; each costs one pass of the encoder. Making the picture grey would do as well, but
# leaves pictures that are grey already as they are, and so flags every black-and-white photograph.
ALTERATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"noise": noise, "blur": blur, "coarse": coarse, "turn": turn}


def reactions(embed: Callable[[Tensor], Tensor], images: Tensor, embeddings: Tensor) -> Tensor:
    """(B, V): log of 1 - cosine between the embedding of each picture and that of each alteration of it.

    images (B, 3, S, S) float32 in [0, 1], embeddings (B, D) = embed(images).
    """
    still = functional.normalize(embeddings.double(), dim=1)
    moved = [functional.normalize(embed(alter(images)).double(), dim=1) for alter in ALTERATIONS.values()]
    changes = torch.stack([(still - other).square().sum(dim=1) / 2 for other in moved], dim=1)  # 1 - cosine, exactly
    return (changes + FLOOR).log().float()


def neighbour_distance(embeddings: Tensor, bank: Tensor) -> Tensor:
    """(B,) distance of each L2-normalised embedding to its 16th nearest in a bank (M, D) of clean unit embeddings; 0 to 2."""
    cosine = functional.normalize(embeddings, dim=1) @ bank.T
    nearest = cosine.topk(min(NEIGHBOURS, len(bank)), dim=1).values[:, -1]
    return (2 - 2 * nearest).clamp(min=0).sqrt()


def signature(observed: Tensor, norms: Tensor, distances: Tensor) -> Tensor:
    """(B, V + 2): reactions (B, V), and the logarithms of raw norm (B,) and neighbour distance (B,)."""
    return torch.cat([observed, (norms + FLOOR).log()[:, None], (distances + FLOOR).log()[:, None]], dim=1)


@dataclass(frozen=True)
class CleanSignature:
    """Centre (V + 2,) and precision (V + 2, V + 2) of clean pictures' signatures; bank (M, D) of clean unit embeddings."""

    centre: Tensor
    precision: Tensor
    bank: Tensor

    def distance(self, found: Tensor) -> Tensor:
        """(B, V + 2) → (B,) Mahalanobis distance, unitless."""
        offset = found - self.centre
        return torch.einsum("bi,ij,bj->b", offset, self.precision, offset).clamp(min=0).sqrt()

    def first_look(self, found: Tensor) -> Tensor:
        """(B, V + 2) → (B,) Mahalanobis distance by norm and neighbour distance alone, which cost no further pass."""
        marginal = torch.linalg.inv(torch.linalg.inv(self.precision.double())[-2:, -2:]).float()
        return CleanSignature(self.centre[-2:], marginal, self.bank).distance(found[:, -2:])

    def to(self, device: torch.device) -> "CleanSignature":
        return CleanSignature(self.centre.to(device), self.precision.to(device), self.bank.to(device))


def clean_signature(found: NDArray[np.float32], bank: Tensor, seed: int) -> CleanSignature:
    """Robust centre and covariance (minimum covariance determinant) of (N, V + 2), so that a little poison moves neither."""
    estimate = MinCovDet(support_fraction=0.9, random_state=seed).fit(found.astype(np.float64))
    return _shaped(estimate.location_, estimate.covariance_, bank)


def _shaped(centre: NDArray[np.float64], covariance: NDArray[np.float64], bank: Tensor) -> CleanSignature:
    ridge = 1e-3 * np.trace(covariance) / len(centre)
    precision = np.linalg.inv(covariance + ridge * np.eye(len(centre)))
    return CleanSignature(torch.from_numpy(centre).float(), torch.from_numpy(precision).float(), bank)


def adapted(clean: CleanSignature, found: NDArray[np.float32], steps: int = 50) -> CleanSignature:
    """`clean` moved to the bulk of other signatures (N, V + 2), of which less than half may be poison.

    Concentration steps of the minimum covariance determinant (Rousseeuw and Van Driessen 1999), started from `clean` in place of
    random subsets, so that the half that is kept is the one which looks clean; then the usual correction and reweighting, twice:
    signatures have heavier tails than a Gaussian, and a covariance without its tail flags too many clean pictures.
    """
    rows, half = found.astype(np.float64), len(found) // 2
    now, kept = clean, np.empty(0, np.int64)
    for _ in range(steps):
        nearest = np.sort(np.argpartition(_distances(now, rows), half)[:half])
        if np.array_equal(nearest, kept):
            break
        kept = nearest
        now = _shaped(rows[kept].mean(axis=0), np.cov(rows[kept].T), clean.bank)
    size = found.shape[1]
    correction = np.median(_distances(now, rows) ** 2) / chi2.ppf(0.5, size)
    now = _shaped(rows[kept].mean(axis=0), np.cov(rows[kept].T) * correction, clean.bank)
    for share in (0.975, 0.999):
        inside = rows[_distances(now, rows) ** 2 < chi2.ppf(share, size)]
        now = _shaped(inside.mean(axis=0), np.cov(inside.T), clean.bank)
    return now


def _distances(clean: CleanSignature, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = clean.distance(torch.from_numpy(rows).float()).double().numpy()
    return found

"""Cross-encoder disagreement (ours): what a second encoder cannot explain is suspicious.

A ridge map A from an independent encoder g to the encoder under test f, fitted on the reference set; the score is the whitened
norm of f(x) - A g(x). A trigger moves f(x) but not g(x).

It is the linear, Gaussian case of The Platonic Defense (Chen et al., 2026, arXiv 2606.29451), which trains an energy of f(x) given
reference encoders' representations by noise-contrastive estimation: here the energy is that of a normal distribution around A g(x), with
one reference encoder, and in closed form. Their purification of embeddings is left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sanitize.detectors.reference_set import Embed, ReferenceSet, Score
from sanitize.detectors.whitening import shrunk_covariance
from sanitize.errors import check
from sanitize.stages.encoders import Encoder, embed_in_batches


@dataclass(frozen=True)
class RidgeMap:
    """g → f, both centred. All float64."""

    mean_g: Tensor  # (D',)
    mean_f: Tensor  # (D,)
    weights: Tensor  # (D', D)

    def residual(self, g: Tensor, f: Tensor) -> Tensor:
        """(B, D) float64: what of f (B, D) the map does not explain by g (B, D')."""
        return f - self.mean_f - (g - self.mean_g) @ self.weights


def ridge(g: Tensor, f: Tensor, regularisation: float) -> RidgeMap:
    """Least squares from (N, D') to (N, D); regularisation is relative to the mean eigenvalue of g's scatter matrix."""
    mean_g, mean_f = g.mean(dim=0), f.mean(dim=0)
    scatter = (g - mean_g).T @ (g - mean_g)
    strength = regularisation * scatter.diagonal().mean() + 1e-12  # a constant g must stay solvable
    system = scatter + strength * torch.eye(len(scatter), dtype=scatter.dtype)
    return RidgeMap(mean_g, mean_f, torch.linalg.solve(system, (g - mean_g).T @ (f - mean_f)))


def whitened_norm(residuals: Tensor, covariance: Tensor) -> Tensor:
    """(B,) sqrt(r' C^-1 r) of (B, D) residuals, C (D, D) positive definite."""
    factor = torch.linalg.cholesky(covariance)
    whitened: Tensor = torch.linalg.solve_triangular(factor, residuals.T, upper=False)
    return whitened.square().sum(dim=0).sqrt()


def fit(
    reference_set: ReferenceSet,
    encoder: Encoder,  # noqa: ARG001 every fit starts with reference set, encoder and seed
    seed: int,  # noqa: ARG001
    *,
    other: Embed,
    regularisation: float = 1e-2,
    batch_size: int = 256,
) -> Score:
    """other: the independent encoder g; embeddings of both are unit-norm. The residual covariance is Ledoit-Wolf shrunk.

    A reference set hardly larger than g's width makes its residuals too small, alike in all directions: scores scale, ranks stay.
    """
    check(regularisation > 0, f"regularisation: {regularisation} is not above 0.")

    def second(images: Tensor) -> Tensor:
        return functional.normalize(embed_in_batches(other, images.cpu(), batch_size).double(), dim=1)

    def first(embeddings: Tensor) -> Tensor:
        return functional.normalize(embeddings.cpu().double(), dim=1)

    g, f = second(reference_set.images), first(reference_set.embeddings)
    explained = ridge(g, f, regularisation)
    covariance = shrunk_covariance(explained.residual(g, f))

    def score(images: Tensor, embeddings: Tensor) -> Tensor:
        return whitened_norm(explained.residual(second(images), first(embeddings)), covariance).float()

    return score

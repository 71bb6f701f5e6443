"""Which embedding an image ought to have, and how far the encoder departs from it.

A predictor is trained on clean auxiliary images, plain and benignly changed (benign_changes.py), to say what the suspect encoder
makes of them. It looks through a `Student`, a small network trained from scratch, or through the features of a reference encoder that
the suspect's maker does not control. A backdoor acts on a trigger that the predictor has never met: to reach its target, the
embedding must leave the place where the image's content belongs.

Relatives: Uninformed Students (Bergmann et al., CVPR 2020) and EfficientAD (Batzner et al., WACV 2024), the discrepancy of student
and teacher; Hinton et al. 2015, distillation.
"""

import itertools
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn
from torch.nn import functional

EYE = 64  # largest side of the image that a student sees, in pixels
HIDDEN = 512


@dataclass(frozen=True)
class PredictionTarget:
    """Embedding (B, D) → what is predicted of it (B, k + 1), standardised: its direction on the first k principal components of clean
    training embeddings, and the logarithm of its length. mean (D,), axes (D, k), centre and scale (k + 1,)."""

    mean: Tensor
    axes: Tensor
    centre: Tensor
    scale: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        lengths = embeddings.norm(dim=1, keepdim=True).clamp(min=1e-12)
        raw = torch.cat([(embeddings / lengths - self.mean) @ self.axes, lengths.log()], dim=1)
        return (raw - self.centre) / self.scale


def fit_target(embeddings: Tensor, components: int) -> PredictionTarget:
    """From clean embeddings (N, D) float32; at most `components`, and at most a quarter of the images."""
    units = functional.normalize(embeddings, dim=1)
    mean = units.mean(dim=0)
    _, values, vectors = torch.linalg.svd(units - mean, full_matrices=False)
    usable = int((values > 1e-4 * values[0]).sum())
    axes = vectors[: min(components, usable, max(len(units) // 4, 1))].T.contiguous()
    size = axes.shape[1] + 1
    raw = PredictionTarget(mean, axes, torch.zeros(size), torch.ones(size))(embeddings)
    return PredictionTarget(mean, axes, raw.mean(dim=0), raw.std(dim=0).clamp(min=1e-6))


# ---------------------------------------------------------------- eyes


class Student(nn.Module):
    """Six 3 x 3 convolutions and one hidden layer: images (B, 3, E, E) float32 in [0, 1] → (B, outputs)."""

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        widths, layers = [3, *(width * factor for factor in (1, 2, 2, 4, 4, 8))], []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 1 + number % 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(4 * widths[-1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))

    def forward(self, images: Tensor) -> Tensor:
        predicted: Tensor = self.head(self.body(images - 0.5))
        return predicted


class LinearEye(nn.Module):
    """Features of a reference encoder (B, F), their direction and log length, → (B, outputs)."""

    mean: Tensor

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features + 1))
        self.linear = nn.Linear(features + 1, outputs)

    def seen(self, features: Tensor) -> Tensor:
        """(B, F + 1), what the ridge regression works on."""
        lengths = features.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return torch.cat([features / lengths, lengths.log()], dim=1)

    def forward(self, features: Tensor) -> Tensor:
        predicted: Tensor = self.linear(self.seen(features) - self.mean)
        return predicted


# ---------------------------------------------------------------- departure from the prediction


@dataclass(frozen=True)
class Departure:
    """Of clean held-out images: centre (k + 1,) of residuals, and root (k + 1, k + 1) of their precision, L L' = P; centre and precision of
    the targets by themselves."""

    residual_centre: Tensor
    residual_root: Tensor
    target_centre: Tensor
    target_precision: Tensor

    def whitened(self, targets: Tensor, predicted: Tensor) -> Tensor:
        """(B, k + 1) residuals whose coordinates have deviation 1 on clean images."""
        return (targets - predicted - self.residual_centre) @ self.residual_root

    def energy(self, targets: Tensor, whitened: Tensor) -> Tensor:
        """(B,) how much less likely the embedding is given the image than by itself, over k + 1; negative for most clean images."""
        offset = targets - self.target_centre
        own = torch.einsum("bi,ij,bj->b", offset, self.target_precision, offset)
        return (whitened.square().sum(dim=1) - own) / targets.shape[1]


def fit_departure(targets: Tensor, predicted: Tensor) -> Departure:
    """Of held-out images (N, k + 1) each; shrunk covariances (Ledoit and Wolf 2004)."""
    residuals, own = (LedoitWolf().fit(values.double().numpy()) for values in (targets - predicted, targets))
    root: NDArray[np.float64] = np.linalg.cholesky(residuals.precision_)
    estimates = (residuals.location_, root, own.location_, own.precision_)
    return Departure(*(torch.from_numpy(values).float() for values in estimates))


def explained(targets: Tensor, predicted: Tensor) -> float:
    """R² over all columns of held-out (N, k + 1): 1 = the predictor knows every embedding, 0 = no better than the mean."""
    return float(1 - (targets - predicted).square().sum() / (targets - targets.mean(dim=0)).square().sum())


class Predictor(nn.Module):
    """Embeddings and what the eye sees of their images → how they depart from the prediction. explained: R² on held-out images.

    eye_size: side of the images a student sees, in pixels; 0 = the eye sees features of a reference encoder
    """

    def __init__(
        self, eye: Student | LinearEye, target: PredictionTarget, departure: Departure, explained: float, eye_size: int
    ) -> None:
        super().__init__()
        self.eye = eye
        self.explained = explained
        self.eye_size = eye_size
        for name, tensor in _tensors(target).items():
            self.register_buffer(f"target_{name}", tensor)
        for name, tensor in _tensors(departure).items():
            self.register_buffer(f"departure_{name}", tensor)

    @property
    def target(self) -> PredictionTarget:
        return PredictionTarget(*(self.get_buffer(f"target_{field.name}") for field in fields(PredictionTarget)))

    @property
    def departure(self) -> Departure:
        return Departure(*(self.get_buffer(f"departure_{field.name}") for field in fields(Departure)))

    def forward(self, embeddings: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened residuals (B, k + 1) and energy (B,). embeddings (B, D); seen: (B, 3, E, E) images in [0, 1] or (B, F) features."""
        targets, predicted = self.target(embeddings), self.eye(seen).float()
        whitened = self.departure.whitened(targets, predicted)
        return whitened, self.departure.energy(targets, whitened)


def _tensors(part: PredictionTarget | Departure) -> dict[str, Tensor]:
    return {field.name: getattr(part, field.name).contiguous() for field in fields(part)}

"""What every baseline detector starts from: the bank of auxiliary images, its pseudo-classes, and the detectors by name."""

import importlib
import itertools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from sanitize.config import check
from sanitize.errors import ConfigError

Embed = Callable[[Tensor], Tensor]  # images (B, 3, S, S) float32 in [0, 1] → embeddings (B, D); every Encoder is one
Score = Callable[[Tensor, Tensor], Tensor]
# images (B, 3, S, S) uint8, their embeddings (B, D) float32 raw → (B,) float32 on the CPU, higher = more suspicious


@dataclass(frozen=True)
class Bank:
    """What a baseline may look at before it scores: auxiliary images and their embeddings under the encoder under test.

    images:     (N, 3, S, S) uint8, at the encoder's size
    embeddings: (N, D) float32, raw, on the CPU
    """

    images: Tensor
    embeddings: Tensor

    def __post_init__(self) -> None:
        check(
            len(self.images) == len(self.embeddings) > 0,
            f"bank: {len(self.images)} images and {len(self.embeddings)} embeddings. Give one embedding per image, at least one.",
        )


def load(name: str) -> Callable[..., Score]:
    """The `fit` of sanitize/detectors/<name>.py: (bank, encoder, seed, **its settings) → Score."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    # only names found in this folder are imported: a setting can never lead outside the package
    fit = _fit_of(name) if name in names else None
    if fit is None:
        known = ", ".join(other for other in names if _fit_of(other))
        raise ConfigError(f"detector {name!r} is not known. Use one of {known}.")
    return fit


def _fit_of(name: str) -> Callable[..., Score] | None:
    return getattr(importlib.import_module(f"sanitize.detectors.{name}"), "fit", None)


@torch.no_grad()
def embed(encoder: Embed, images: Tensor, batch_size: int = 256) -> Tensor:
    """(N, 3, S, S) uint8 → (N, D) float32 raw, on the CPU; computed where the encoder is."""
    held = itertools.chain(encoder.parameters(), encoder.buffers()) if isinstance(encoder, nn.Module) else iter(())
    device = next(held, images).device
    return torch.cat([encoder(part.to(device).float() / 255).float().cpu() for part in images.split(batch_size)])


def cluster(points: Tensor, clusters: int, seed: int) -> Tensor:
    """(K, D) float64 k-means centres of (N, D) points: pseudo-classes where no labels are (CLIP card section 8).

    Every centre has points; K is below `clusters` when there are fewer different points.
    """
    check(
        1 <= clusters <= len(points),
        f"clusters: {clusters} pseudo-classes of {len(points)} bank images; give 1 up to the number of images.",
    )
    fitted = KMeans(clusters, n_init=4, random_state=seed).fit(points.double().numpy())
    centres = torch.from_numpy(fitted.cluster_centers_)
    return centres[assign(points, centres).unique()]


def assign(points: Tensor, centres: Tensor) -> Tensor:
    """(B,) int64: the nearest of (K, D) centres for each of (B, D) points."""
    return torch.cdist(points.double(), centres).argmin(dim=1)


def principal_axes(centred: Tensor, count: int) -> Tensor:
    """(D, count) float64 orthonormal: the directions of most variance of (N, D) centred points, strongest first."""
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    strongest: Tensor = axes.flip(1)[:, :count]
    return strongest

"""LoReX, our reading of it: after whitening by clean images, what direction do the scanned images vary along most?

Whitened clean embeddings vary about equally in every direction. A campaign pulls its images the same way, so a scan that holds enough
of them varies more along that direction v than clean data do; the score is |W (z - m) . v|, W = C^-1/2 of the reference set. The
formula is all that was available to us, not the paper: the edge below is ours.

TRANSDUCTIVE: images are judged by each other; a score depends on the images scored in the same call.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sanitize.detectors.reference_set import ReferenceSet
from sanitize.detectors.whitening import Whitening, fit_whitening
from sanitize.errors import check
from sanitize.stages.encoders import Encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Direction:
    """Along which whitened embeddings vary most: unit length (D,) float64, and their variance along it."""

    vector: Tensor
    eigenvalue: float


@dataclass(frozen=True)
class LorexScore:
    """A Score. `direction` and `clean_edge` say what it rests on: below the edge, a scan shows nothing that clean images do not."""

    whitening: Whitening
    reference: Tensor  # (N, D) float32 raw
    seed: int
    splits: int

    def direction(self, embeddings: Tensor) -> Direction:
        """Of the (B, D) raw embeddings of a scan."""
        return strongest_direction(self.whitening(embeddings))

    def clean_edge(self, count: int) -> float:
        return clean_edge(self.reference, count, self.splits, self.seed)

    def __call__(self, _images: Tensor, embeddings: Tensor) -> Tensor:
        found, edge = self.direction(embeddings), self.clean_edge(len(embeddings))
        if found.eigenvalue <= edge:
            log.warning(
                "lorex: the largest eigenvalue of these %d whitened embeddings is %.2f, that of as many clean ones up to %.2f: "
                "no direction stands out, so the scores rank clean variation.",
                len(embeddings),
                found.eigenvalue,
                edge,
            )
        return (self.whitening(embeddings) @ found.vector).abs().float()


def strongest_direction(whitened: Tensor) -> Direction:
    """Top eigenvector of the covariance of (B, D) float64 whitened embeddings, about their own mean."""
    centred = whitened - whitened.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return Direction(vectors[:, -1], float(values[-1]))


def clean_edge(reference: Tensor, count: int, splits: int, seed: int) -> float:
    """The largest eigenvalue that `count` clean images would show.

    The largest of `splits` random halves of the (N, D) reference embeddings: one half whitens, up to `count` images of the other are
    the clean scan. Held-out images rather than the Marchenko-Pastur edge (1 + sqrt(D / count))^2: that one assumes independent,
    light-tailed coordinates and a covariance known exactly, and embeddings after a ReLU have none of these. Both halves being
    smaller than what they stand for, the edge is a little high, so that a direction is rather missed than made up.
    """
    half = len(reference) // 2
    edges = []
    for number in range(splits):
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed + number))
        held_out = reference[order[half : half + count]]
        edges.append(strongest_direction(fit_whitening(reference[order[:half]])(held_out)).eigenvalue)
    return max(edges, default=math.inf)


def fit(reference_set: ReferenceSet, encoder: Encoder, seed: int, splits: int = 10) -> LorexScore:  # noqa: ARG001 every fit has this signature
    """splits: of the reference set for the clean edge; a clean scan exceeds it about once in `splits` + 1."""
    check(splits >= 1, f"splits: {splits} is not at least 1.")
    size = len(reference_set.embeddings)
    check(
        size >= 4, f"lorex: a reference set of {size} images cannot be split in two. Give at least 4, better thousands."
    )
    return LorexScore(fit_whitening(reference_set.embeddings), reference_set.embeddings, seed, splits)

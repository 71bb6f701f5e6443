"""The one-number control: how unusual the length of the raw embedding is. A detector that looks at directions must beat it."""

import torch
from scipy.stats import median_abs_deviation
from torch import Tensor

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.stages.encoders import Encoder
from sanitize.stages.thresholds import MAD_TO_DEVIATION


def robust_z(values: Tensor, reference: Tensor) -> Tensor:
    """(B,) |value - median| / (1.4826 MAD), median and MAD of the (N,) reference values."""
    median = float(reference.quantile(0.5))
    deviation = MAD_TO_DEVIATION * float(median_abs_deviation(reference.numpy()))
    smallest = 1e-6 * abs(median) + 1e-12  # a reference set of equal norms must not divide by zero
    return (values - median).abs() / max(deviation, smallest)


def fit(reference_set: ReferenceSet, encoder: Encoder, seed: int) -> Score:  # noqa: ARG001 every fit has this signature
    """Absolute robust z of the embedding's norm: unusually long and unusually short are both suspicious."""
    reference = torch.linalg.vector_norm(reference_set.embeddings.double(), dim=1)

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        return robust_z(torch.linalg.vector_norm(embeddings.double(), dim=1), reference).float()

    return score

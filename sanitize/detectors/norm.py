"""The one-number control: how unusual the length of the raw embedding is. A detector that looks at directions must beat it."""

import torch
from torch import Tensor

from sanitize.detectors.bank import Bank, Score
from sanitize.stages.encoders import Encoder

_MAD_TO_STD = 1.4826  # of a Gaussian


def robust_z(values: Tensor, reference: Tensor) -> Tensor:
    """(B,) |value - median| / (1.4826 MAD), median and MAD of the (N,) reference values."""
    median = torch.quantile(reference, 0.5)
    mad = torch.quantile((reference - median).abs(), 0.5)
    smallest = 1e-6 * median.abs() + 1e-12  # a bank of equal norms must not divide by zero
    return (values - median).abs() / (_MAD_TO_STD * mad).clamp(min=float(smallest))


def fit(bank: Bank, encoder: Encoder, seed: int) -> Score:  # noqa: ARG001 every fit has this signature
    """Absolute robust z of the embedding's norm: unusually long and unusually short are both suspicious."""
    reference = torch.linalg.vector_norm(bank.embeddings.double(), dim=1)

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        return robust_z(torch.linalg.vector_norm(embeddings.double(), dim=1), reference).float()

    return score

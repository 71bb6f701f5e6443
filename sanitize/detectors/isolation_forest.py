"""Isolation forest on the raw embeddings (Liu et al., 2008), fitted on the reference set once.

Huang et al. (ICLR 2025, arXiv 2502.01385) use it as a baseline and refit it on every batch.
"""

import torch
from sklearn.ensemble import IsolationForest
from torch import Tensor

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.stages.encoders import Encoder


def fit(reference_set: ReferenceSet, encoder: Encoder, seed: int, trees: int = 100) -> Score:  # noqa: ARG001 every fit has this signature
    """scikit-learn's score is high for inliers, so it is negated: (B,) float32 in (0, 1)."""
    forest = IsolationForest(n_estimators=trees, random_state=seed).fit(reference_set.embeddings.numpy())

    def score(_images: Tensor, embeddings: Tensor) -> Tensor:
        return torch.from_numpy(-forest.score_samples(embeddings.cpu().numpy())).float()

    return score

"""Pure functions: detection quality, attack quality, kNN accuracy. scikit-learn where it serves."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from sanitize.errors import ConfigError


@dataclass(frozen=True)
class Detection:
    """How well scores (higher = more suspicious) separate poisoned from clean samples. All in [0, 1]."""

    auroc: float
    auprc: float
    tpr_at_01pct: float  # true-positive rate at 0.1 % false positives
    tpr_at_1pct: float
    tpr_at_5pct: float
    fpr_at_95tpr: float
    clean: int
    poisoned: int


def detection(scores: NDArray[np.floating], poisoned: NDArray[np.bool_]) -> Detection:
    """scores (N,) finite, poisoned (N,) bool. Raises ConfigError when only one class is there."""
    if poisoned.all() or not poisoned.any():
        kind = "poisoned" if poisoned.any() else "clean"
        raise ConfigError(f"all {len(poisoned)} scored samples are {kind}; metrics need both. Check the truth file.")
    fpr, tpr, _ = roc_curve(poisoned, scores, drop_intermediate=False)
    return Detection(
        auroc=float(roc_auc_score(poisoned, scores)),
        auprc=float(average_precision_score(poisoned, scores)),
        tpr_at_01pct=float(tpr[fpr <= 0.001].max()),
        tpr_at_1pct=float(tpr[fpr <= 0.01].max()),
        tpr_at_5pct=float(tpr[fpr <= 0.05].max()),
        fpr_at_95tpr=float(fpr[tpr >= 0.95].min()),
        clean=int((~poisoned).sum()),
        poisoned=int(poisoned.sum()),
    )


def accuracy(predictions: NDArray[np.integer], labels: NDArray[np.integer]) -> float:
    return float((predictions == labels).mean())


def attack_success(predictions: NDArray[np.integer], labels: NDArray[np.integer], target: int) -> float:
    """Share of triggered images of other classes that are taken for the target class."""
    others = labels != target
    return float((predictions[others] == target).mean())


def attack_success_with_target(predictions: NDArray[np.integer], target: int) -> float:
    """Share of all triggered images, those of the target class included, that are taken for the target class (DRUPE's count)."""
    return float((predictions == target).mean())


@torch.no_grad()
def knn_predictions(
    known: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """(M,) kNN vote with weights exp(cos / temperature), as in CTRL (Li et al., ICCV 2023; code, utils/knn.py).

    known: (N, D) unit embeddings with labels (N,) int64; queries: (M, D) unit embeddings
    """
    k = min(k, len(labels))
    predictions = []
    for part in queries.split(1024):
        cosine, neighbour = (part @ known.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[neighbour], (cosine / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def zero_shot_predictions(embeddings: Tensor, classes: Tensor) -> Tensor:
    """(M,) nearest class by cosine. embeddings: (M, D) of any length; classes: (C, D) unit embeddings of the prompts."""
    return (embeddings @ classes.T).argmax(dim=1)

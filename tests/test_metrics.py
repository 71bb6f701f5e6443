"""Attack success with and without the target class, kNN and zero-shot predictions against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from sanitize.metrics import (
    accuracy,
    attack_success,
    attack_success_with_target,
    knn_predictions,
    zero_shot_predictions,
)

LABELS = np.array([0, 0, 1, 1, 2, 2])
PREDICTIONS = np.array([0, 0, 0, 1, 0, 2])


def test_attack_success_leaves_the_target_class_out_or_counts_it():
    assert accuracy(PREDICTIONS, LABELS) == pytest.approx(4 / 6)
    assert attack_success(PREDICTIONS, LABELS, target=0) == pytest.approx(2 / 4)
    assert attack_success_with_target(PREDICTIONS, target=0) == pytest.approx(4 / 6)


def test_weighted_knn_is_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    bank = functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    queries = functional.normalize(torch.randn(9, 6, generator=generator), dim=1)
    labels = torch.arange(40) % 4
    expected = []
    for query in queries:
        nearest = sorted(range(40), key=lambda n: -float(bank[n] @ query))[:7]
        votes = [sum(math.exp(float(bank[n] @ query) / 0.1) for n in nearest if labels[n] == c) for c in range(4)]
        expected.append(int(np.argmax(votes)))
    assert knn_predictions(bank, labels, queries, 4, k=7).tolist() == expected


def test_zero_shot_takes_the_nearest_class_whatever_the_length_of_the_embedding():
    classes = torch.eye(3)
    embeddings = torch.tensor([[0.1, 5.0, 0.2], [0.03, 0.01, 0.02]])
    assert zero_shot_predictions(embeddings, classes).tolist() == [1, 0]

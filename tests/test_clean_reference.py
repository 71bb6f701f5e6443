"""The clean reference: the distance is the plain formula, and a little poison does not move its centre."""

import numpy as np
import pytest
import torch

from sanitize.stages.clean_reference import embedding_statistics, fit_clean_reference, neighbour_distance
from sanitize.stages.perturbations import FLOOR


def test_the_distance_is_mahalanobis_and_a_little_poison_does_not_move_the_centre():
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(600, 4)).astype(np.float32) @ np.diag([1, 2, 0.5, 1]).astype(np.float32) + 3
    clean = fit_clean_reference(observed, torch.zeros(1, 1), seed=0)
    point = torch.tensor([[4.0, 1.0, 3.5, 2.0]])
    offset = (point[0] - clean.centre).double().numpy()
    expected = np.sqrt(offset @ clean.precision.double().numpy() @ offset)
    assert float(clean.distance(point)) == pytest.approx(expected, rel=1e-5)
    assert clean.centre.numpy() == pytest.approx([3, 3, 3, 3], abs=0.3)
    poisoned = np.concatenate([observed, np.full((12, 4), 40, np.float32)])
    moved = fit_clean_reference(poisoned, torch.zeros(1, 1), seed=0)
    assert moved.centre.numpy() == pytest.approx(clean.centre.numpy(), abs=0.1)


def test_the_signature_adds_length_and_distance_to_the_nearest_clean_embeddings():
    generator = torch.Generator().manual_seed(0)
    known = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    embeddings = torch.randn(3, 6, generator=generator) * 4
    distances = neighbour_distance(embeddings, known)
    for distance, embedding in zip(distances, embeddings, strict=True):
        plain = sorted(float((embedding / embedding.norm() - other).norm()) for other in known)
        assert float(distance) == pytest.approx(plain[15], abs=1e-4)
    found = embedding_statistics(torch.zeros(3, 4), embeddings.norm(dim=1), distances)
    assert found.shape == (3, 6)
    assert found[:, 4].tolist() == pytest.approx(np.log(embeddings.norm(dim=1).numpy() + FLOOR).tolist(), abs=1e-5)

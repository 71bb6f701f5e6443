"""Density scores: distances, neighbours and formulas of a worked example, and against plain loops."""

import pytest
import torch
from builders import POINTS

from sanitize.detectors import (
    density,
)
from sanitize.detectors.reference_set import ReferenceSet

# expected values, by an independent NumPy computation of the definitions, k = 2: p0 .. p5, then the two set-mode queries
KD = [1.500000, 1.802776, 1.802776, 2.121320, 2.549510, 5.830952]
LID = [1.194760, 1.960572, 4.423542, 14.932090, 2.387236, 3.294494]
SLOF = [0.832050, 1.100925, 1.100925, 1.004374, 1.308032, 2.517912]
DAO = [-0.586899, 0.109836, 0.109836, 0.140418, 1.712466, 8.536684]
QUERIES = torch.tensor([[5, 4], [0.5, 0.5]])
AGAINST_SET = {
    "kdistance": [3.605551, 0.707107],
    "lid": [3.407416, 2.182713],
    "slof": [1.159010, 0.431818],
    "dao": [3.168418, -1.366704],
}


def within_bank():
    """Distances of p0 .. p5, k-distances and LIDs of their neighbours."""
    distances, neighbours = density.nearest(POINTS, 3)
    around = neighbours[:, :2]
    return distances, neighbours, distances[:, 1][around], density.lid(distances)[around]


def test_neighbours_and_k_distances_are_those_of_the_definition():
    distances, neighbours, *_ = within_bank()
    assert distances[:, 1].tolist() == pytest.approx(KD, abs=1e-6)
    assert neighbours[:, :2].tolist() == [[1, 2], [0, 2], [0, 1], [2, 4], [3, 1], [4, 3]]


def test_lid_slof_and_dao_are_those_of_the_definition():
    distances, _, around, around_lid = within_bank()
    assert density.lid(distances).tolist() == pytest.approx(LID, abs=2e-6)
    assert density.slof(distances[:, 1], around).tolist() == pytest.approx(SLOF, abs=1e-6)
    assert density.dao(distances[:, 1], around, around_lid).tolist() == pytest.approx(DAO, abs=2e-6)


@pytest.mark.parametrize("kind", AGAINST_SET)
def test_queries_against_a_bank_score_as_in_the_definition(kind, colour_encoder):
    points = ReferenceSet(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), POINTS.float())
    scores = density.fit(points, colour_encoder, 0, kind=kind, k=2)(points.images[:2], QUERIES)
    assert scores.tolist() == pytest.approx(AGAINST_SET[kind], abs=2e-6)


@pytest.mark.parametrize("within", [True, False])
def test_neighbours_are_those_of_the_plain_loop(within):
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    queries = points if within else points[:11] + 0.1
    distances, neighbours = density.nearest(points, 4, None if within else queries)
    for number, query in enumerate(queries):
        others = [row for row in range(40) if not within or row != number]
        gaps = {row: float((query - points[row]).norm()) for row in others}
        assert neighbours[number].tolist() == sorted(others, key=gaps.__getitem__)[:4]
        assert distances[number].tolist() == pytest.approx(sorted(gaps.values())[:4], abs=1e-12)


@pytest.mark.parametrize("kind", AGAINST_SET)
@pytest.mark.parametrize("copies", [6, 30])
def test_more_than_k_identical_embeddings_give_finite_scores(kind, copies, colour_encoder):
    embeddings = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    embeddings[:copies] = embeddings[0]
    copied = ReferenceSet(torch.zeros(30, 3, 4, 4, dtype=torch.uint8), embeddings)
    queries = torch.cat([embeddings, embeddings[:1] + 0.01, embeddings[:1] + 50])
    scores = density.fit(copied, colour_encoder, 0, kind=kind, k=5)(torch.zeros(32, 3, 4, 4), queries)
    assert torch.isfinite(scores).all()
    if kind != "lid":
        assert scores[0] < scores[-1]  # a copy of many looks dense

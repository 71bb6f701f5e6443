"""Detectors that whiten by the reference set: lorex, whitened_norm. Formulas against plain loops; planted poison; clean scans."""

import logging
import math

import numpy as np
import pytest
import torch
from builders import auroc
from sklearn.covariance import LedoitWolf

from sanitize.detectors import fit_detector, lorex
from sanitize.detectors.reference_set import ReferenceSet
from sanitize.detectors.whitening import fit_whitening
from sanitize.errors import ConfigError

WIDTH = 24
NO_IMAGES = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)  # neither detector looks at them


def embeddings(count: int, seed: int) -> torch.Tensor:
    """(count, WIDTH) of unequal variances, correlated, heavy-tailed and non-negative, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
    return (torch.randn(count, WIDTH, generator=generator) @ mixing + 1).relu() ** 1.3


def campaign(count: int, seed: int) -> torch.Tensor:
    """Clean embeddings, all pushed the same way."""
    push = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
    return embeddings(count, seed) + 12 * push


@pytest.fixture(scope="module")
def known():
    return ReferenceSet(NO_IMAGES.expand(1200, -1, -1, -1), embeddings(1200, 0))


@pytest.fixture
def fitted(known, colour_encoder):
    return lambda name, **settings: fit_detector(name, known, colour_encoder, 0, settings)


# ---------------------------------------------------------------- whitening


def test_whitened_reference_embeddings_have_mean_zero_and_equal_variance_in_every_direction():
    mixing = torch.eye(5) + torch.diag(torch.tensor([2.0, 1, 0, 1]), 1)
    points = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0)) @ mixing
    whitened = fit_whitening(points + 3)(points + 3)
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(5).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(whitened.T @ whitened / len(whitened), torch.eye(5).double(), atol=0.05, rtol=0)


def test_the_covariance_is_that_of_ledoit_and_wolf(known):
    expected = LedoitWolf().fit(known.embeddings.double().numpy()).covariance_
    matrix = fit_whitening(known.embeddings).matrix
    np.testing.assert_allclose(torch.linalg.inv(matrix @ matrix), expected, rtol=1e-3, atol=1e-3)


def test_equal_embeddings_whiten_to_finite_numbers():
    assert torch.isfinite(fit_whitening(torch.ones(9, 4))(torch.eye(4))).all()


# ---------------------------------------------------------------- whitened_norm


def test_whitened_norm_is_the_plain_formula(known, fitted):
    queries = embeddings(6, 5)
    mean = known.embeddings.double().mean(dim=0)
    inverse = np.linalg.inv(LedoitWolf().fit(known.embeddings.double().numpy()).covariance_)

    def log_norm(embedding):
        difference = (embedding.double() - mean).numpy()
        return math.log(difference @ inverse @ difference)

    median = np.median([log_norm(embedding) for embedding in known.embeddings])
    expected = [abs(log_norm(query) - median) for query in queries]
    assert fitted("whitened_norm")(NO_IMAGES, queries).tolist() == pytest.approx(expected, abs=1e-3)


def test_whitened_norm_finds_embeddings_that_are_too_near_and_too_far(known, fitted):
    clean, mean = embeddings(200, 5), known.embeddings.mean(dim=0)
    for odd in (mean + 0.1 * (clean[:20] - mean), mean + 8 * (clean[:20] - mean)):
        scores = fitted("whitened_norm")(NO_IMAGES, torch.cat([clean, odd]))
        assert auroc(scores, torch.arange(220) >= 200) > 0.99


def test_whitened_norm_says_nothing_of_clean_embeddings(fitted):
    assert 0.4 < auroc(fitted("whitened_norm")(NO_IMAGES, embeddings(600, 6)), torch.arange(600) >= 300) < 0.6


# ---------------------------------------------------------------- lorex


def test_lorex_is_the_plain_formula(known, fitted):
    pool = torch.cat([embeddings(90, 5), campaign(30, 6)])
    whitening = fit_whitening(known.embeddings)
    whitened = np.array([(whitening.matrix @ (z.double() - whitening.mean)).tolist() for z in pool])
    values, vectors = np.linalg.eig(np.cov(whitened.T, bias=True))
    strongest = vectors[:, values.argmax()]
    expected = [abs(point @ strongest) for point in whitened]
    score = fitted("lorex")
    assert score(NO_IMAGES, pool).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert score.direction(pool).eigenvalue == pytest.approx(values.max())


def test_a_clean_scan_has_no_direction_that_stands_out_and_the_log_says_so(fitted, caplog):
    score, scan = fitted("lorex"), embeddings(500, 5)
    with caplog.at_level(logging.WARNING):
        score(NO_IMAGES, scan)
    eigenvalue, edge = score.direction(scan).eigenvalue, score.clean_edge(500)
    assert eigenvalue <= edge
    assert f"is {eigenvalue:.2f}, that of as many clean ones up to {edge:.2f}: no direction stands out" in caplog.text


@pytest.mark.parametrize("poisoned", [25, 100, 400])
def test_a_campaign_stands_out_and_its_images_come_first(poisoned, fitted, caplog):
    score, scan = fitted("lorex"), torch.cat([embeddings(500, 5), campaign(poisoned, 6)])
    with caplog.at_level(logging.WARNING):
        scores = score(NO_IMAGES, scan)
    assert score.direction(scan).eigenvalue > score.clean_edge(len(scan))
    assert caplog.text == ""
    assert auroc(scores, torch.arange(len(scan)) >= 500) > 0.95


def test_a_score_depends_on_the_images_beside_it(fitted):
    score, clean = fitted("lorex"), embeddings(100, 5)
    together = score(NO_IMAGES, torch.cat([clean, campaign(50, 6)]))[:100]
    assert not torch.allclose(score(NO_IMAGES, clean), together, atol=1e-2)
    assert torch.equal(score(NO_IMAGES, clean), score(NO_IMAGES, clean))


def test_the_clean_edge_is_the_largest_eigenvalue_of_held_out_halves(known):
    found = []
    for number in range(3):
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(4 + number))
        first, second = known.embeddings[order[:600]], known.embeddings[order[600:700]]
        found.append(float(np.linalg.eigvalsh(np.cov(fit_whitening(first)(second).T, bias=True)).max()))
    assert lorex.clean_edge(known.embeddings, 100, splits=3, seed=4) == pytest.approx(max(found))


def test_fewer_scanned_images_have_a_higher_clean_edge(known):
    few, many = (lorex.clean_edge(known.embeddings, count, splits=5, seed=0) for count in (50, 500))
    assert few > many > 1


def test_a_reference_set_too_small_to_split_says_how_many_it_needs(colour_encoder):
    tiny = ReferenceSet(NO_IMAGES.expand(3, -1, -1, -1), embeddings(3, 0))
    with pytest.raises(ConfigError, match="a reference set of 3 images cannot be split in two. Give at least 4"):
        fit_detector("lorex", tiny, colour_encoder, 0, {})
    with pytest.raises(ConfigError, match="splits: 0 is not at least 1"):
        fit_detector("lorex", tiny, colour_encoder, 0, {"splits": 0})

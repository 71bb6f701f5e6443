"""ASSET: outlyingness, thresholds and ranks of a worked example, and what it says of plain features."""

import pytest
import torch
from builders import auroc, random_images

from sanitize.detectors import (
    asset,
    fit_detector,
)
from sanitize.stages.encoders import embed_in_batches

SKEWED = [0.1, 0.12, 0.15, 0.2, 0.22, 0.3, 0.35, 0.5, 0.9, 0.95, 0.1]
OUTLYINGNESS = [0.9641, 0.8035, 0.5624, 0.1607, 0, 0.0282, 0.0458, 0.0987, 0.2397, 0.2574, 0.9641]


def test_outlyingness_and_medcouple_are_those_of_the_released_code():
    even = torch.tensor([*range(10), 30], dtype=torch.float64)
    assert float(asset.medcouple(even)) == 0
    assert asset.adjusted_outlyingness(even).tolist() == pytest.approx(
        [0.5, 0.4, 0.3, 0.2, 0.1, 0, 0.1, 0.2, 0.3, 0.4, 2.5]
    )
    assert asset.upper_outliers(even).nonzero().flatten().tolist() == [10]
    skewed = torch.tensor(SKEWED, dtype=torch.float64)
    assert float(asset.medcouple(skewed)) == pytest.approx(0.6)
    assert asset.adjusted_outlyingness(skewed).tolist() == pytest.approx(OUTLYINGNESS, abs=1e-4)


def test_medcouple_is_the_plain_loop_and_mirrors():
    values = torch.randn(31, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    ordered = sorted(values.tolist())
    middle = ordered[15]
    pairs = [
        0.0 if high == low else ((high - middle) - (middle - low)) / (high - low)
        for high in ordered[15:]
        for low in ordered[:16]
    ]
    assert float(asset.medcouple(values)) == pytest.approx(sorted(pairs)[(len(pairs) - 1) // 2])
    assert float(asset.medcouple(-values)) == pytest.approx(-float(asset.medcouple(values)), abs=0.02)


def test_equal_values_are_not_outlying():
    assert asset.adjusted_outlyingness(torch.ones(9)).tolist() == [0] * 9


@pytest.mark.parametrize(
    ("form", "epsilon", "threshold"),
    [("released", 1e-3, 1.455885), ("released", 1e-6, 1.831114), ("intended", 1e-3, 1.642704), ("intended", 1e-6, 2.077677)],
)  # fmt: skip
def test_gaussian_thresholds_are_those_of_the_formulas(form, epsilon, threshold):
    scores = torch.arange(1, 21, dtype=torch.float64) / 10
    assert asset.gaussian_threshold(scores, epsilon, form) == pytest.approx(threshold, abs=1e-6)


def test_ranks_are_in_0_to_1_and_ties_share():
    assert asset.rank(torch.tensor([3.0, 1.0, 2.0, 5.0, 2.0])).tolist() == [0.75, 0, 0.375, 1, 0.375]
    assert asset.rank(torch.tensor([4.0])).tolist() == [0]


def test_every_sample_is_in_one_of_the_equal_batches():
    batches = asset.equal_batches(600, 256, seed=0)
    assert [len(batch) for batch in batches] == [200, 200, 200]
    assert sorted(torch.cat(batches).tolist()) == list(range(600))


def test_features_without_a_backdoor_tell_asset_nothing(clean_set, colour_encoder):
    images = random_images(200, first=2000)
    scores = fit_detector("asset", clean_set, colour_encoder, 0, {})(images, embed_in_batches(colour_encoder, images))
    assert 0.4 < auroc(scores, torch.arange(200) % 2 == 0) < 0.6


def test_offset_spreads_its_scores_and_needs_no_gradient_mode(clean_set, colour_encoder, stream):
    images, embeddings, _ = stream
    with torch.no_grad():
        scores = fit_detector("asset", clean_set, colour_encoder, 0, {"kind": "offset", "passes": 3})(
            images, embeddings
        )
    assert scores.shape == (60,)
    assert torch.isfinite(scores).all()
    assert scores.std() > 0

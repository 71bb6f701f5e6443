"""A few of the auxiliary images may be poison: neither the predictor nor the cut learns from them when it is allowed for."""

import numpy as np
import pytest
import torch

from sanitize.config import FitConfig
from sanitize.config_models import PredictionConfig
from sanitize.errors import ConfigError
from sanitize.stages.tails import extrapolated
from sanitize.training.prediction import fit_predictor
from sanitize.training.queries import Queries


def chi(count, seed):
    return np.sqrt(np.random.default_rng(seed).chisquare(6, count)).astype(np.float32)


def poisoned_queries(count, seed, poison, weights):
    """Features, and embeddings that follow from them; of the first images the trigger, an unusual feature, decides."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 1, 12, generator=generator)
    embeddings = features @ weights
    features[:poison] = features[:poison] * 0.3 + torch.arange(12) * 0.5
    embeddings[:poison] = torch.ones(16) * 8
    nothing = torch.zeros(count, 32, dtype=torch.uint8)
    return Queries(nothing, nothing[:, :8], embeddings, features)


@pytest.mark.parametrize(("contamination", "found"), [(0.0, False), (0.1, True)])
def test_poison_among_the_auxiliary_images_teaches_nothing_when_it_is_allowed_for(contamination, found):
    weights = torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    training, held_out, fresh = (
        poisoned_queries(count, seed, poison, weights)
        for count, seed, poison in ((1000, 0, 50), (300, 1, 15), (400, 2, 200))
    )
    predictor, _ = fit_predictor(
        training, held_out, PredictionConfig(components=8), 0, torch.device("cpu"), contamination
    )
    with torch.no_grad():
        _, energy = predictor(fresh.embeddings[:, 0], fresh.seen[:, 0])
    poisoned, clean_images = energy[:200], energy[200:]
    assert bool((poisoned > clean_images.quantile(0.99)).float().mean() > 0.95) == found


def test_a_contamination_that_leaves_nothing_clean_is_refused(encoder_spec):
    with pytest.raises(
        ConfigError, match=r"contamination: 0.3 is not between 0 and 0.2. With more poison than that nothing"
    ):
        FitConfig(("aux",), encoder_spec, contamination=0.3)


@pytest.mark.parametrize("poison", [0.0, 0.01, 0.02])
def test_poison_among_the_calibration_images_does_not_move_the_cut(poison):
    """Taken as they are, 2 % of poison put the 1 % quantile where the poison is. Allowed for and not there, the rate is the asked one;
    there, it is lower: the clean images below were taken for the part of a tail."""
    fresh, rates, spoilt = chi(100_000, 99), [], []
    for seed in range(30):
        values = chi(800, seed)
        values[: round(poison * 800)] = 50
        rates.append((fresh > np.quantile(extrapolated(values, 0.02), 0.99)).mean())
        spoilt.append((fresh > np.quantile(values, 0.99)).mean())
    assert np.mean(rates) == pytest.approx(0.01, abs=0.003) if poison == 0 else 0.0005 < np.mean(rates) < 0.01
    assert poison < 0.02 or np.mean(spoilt) == 0


def test_what_is_extrapolated_keeps_its_place_and_the_rest_its_value():
    values = chi(400, 0)
    replaced = extrapolated(values, 0.05)
    assert (np.argsort(replaced, kind="stable") == np.argsort(values, kind="stable")).all()
    changed = replaced != values
    assert changed.sum() == 20 and values[changed].min() > values[~changed].max()
    assert (extrapolated(values, 0) == values).all()
    assert (extrapolated(values[:2], 0.2) == values[:2]).all()

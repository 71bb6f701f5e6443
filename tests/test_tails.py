"""p-values beyond the calibration set, and their combination: monotone, calibrated, and one strong witness is enough."""

import numpy as np
import pytest
from scipy.stats import norm

from sanitize.stages.evidence import PREDICTION, REACTION, WHEREABOUTS, combination, weights_for
from sanitize.stages.tails import fit_tail


def chi(count, seed):
    return np.sqrt(np.random.default_rng(seed).chisquare(6, count)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 7, 60, 800])
def test_p_values_fall_strictly_and_stay_between_0_and_1(count):
    tail = fit_tail(chi(count, 0))
    values = np.linspace(-5, 60, 2000).astype(np.float32)
    p = tail.p_values(values)
    assert (np.diff(p) <= 0).all()
    assert 0 < p.min() <= p.max() <= 1
    assert np.isnan(tail.p_values(np.array([np.nan], np.float32)))[0]


@pytest.mark.parametrize("count", [100, 300, 1000, 5000])
def test_the_rate_that_is_asked_for_is_the_rate_that_is_met_on_average(count):
    fresh = chi(100_000, 99)
    met = [float((fresh > fit_tail(chi(count, seed)).quantile(0.01)).mean()) for seed in range(60)]
    assert np.mean(met) == pytest.approx(0.01, abs=0.004)
    flagged = [float((fit_tail(chi(count, seed)).p_values(fresh) <= 0.01).mean()) for seed in range(20)]
    assert np.mean(flagged) == pytest.approx(0.01, abs=0.006)


def test_one_odd_calibration_image_does_not_decide():
    """155 calibration photos, one of them odd: the empirical 1 % quantile is that photo."""
    plain = chi(155, 1)
    odd = np.sort(plain)
    odd[-1] = 20.2
    assert fit_tail(odd).quantile(0.01) < 0.5 * 20.2
    assert fit_tail(plain).quantile(0.01) < fit_tail(odd).quantile(0.01)


def test_quantile_and_p_value_agree():
    tail = fit_tail(chi(2000, 3))
    for p in (0.05, 0.01, 1e-4):
        assert tail.p_values(np.array([tail.quantile(p)], np.float32))[0] == pytest.approx(p, rel=0.01)


def test_equal_values_of_every_image_are_no_evidence():
    tail = fit_tail(np.zeros(50, np.float32))
    assert tail.p_values(np.zeros(3, np.float32)) == pytest.approx(1, abs=0.2)


# ---------------------------------------------------------------- evidence


def calibration(count=2000):
    drawn = np.random.default_rng(0).normal(size=(3, count)).astype(np.float32)
    return dict(zip((PREDICTION, WHEREABOUTS, REACTION), drawn, strict=True))


def test_one_strong_witness_is_enough_and_none_clears_what_another_accuses():
    evidence = combination(calibration(), explained=0.5)
    innocent = {kind: np.array([-3.0], np.float32) for kind in calibration()}
    typical = {kind: np.array([0.0], np.float32) for kind in calibration()}
    cut = np.quantile(evidence.score(calibration()), 0.999)
    for kind in calibration():
        accused = innocent | {kind: np.array([9.0], np.float32)}
        assert evidence.score(accused)[0] > cut > evidence.score(typical)[0] > evidence.score(innocent)[0]


@pytest.mark.parametrize("dependence", [0.0, 0.9, 1.0])
def test_the_combined_p_value_holds_under_dependence(dependence):
    rng = np.random.default_rng(5)
    common = rng.normal(size=100_000)
    values = {
        kind: (np.sqrt(dependence) * common + np.sqrt(1 - dependence) * rng.normal(size=100_000)).astype(np.float32)
        for kind in calibration()
    }
    evidence = combination(calibration(20_000), explained=0.5)
    assert float((evidence.score(values) >= 3).mean()) < 2.5e-3  # 10^-3, and Wilson's factor of log-many


def test_what_was_not_measured_counts_as_innocent():
    evidence = combination(calibration(), explained=0.5)
    seen = {PREDICTION: np.array([1.0], np.float32), WHEREABOUTS: np.array([1.0], np.float32)}
    assert evidence.score(seen) == evidence.score(seen | {REACTION: np.array([np.nan], np.float32)})
    assert evidence.score(seen)[0] <= evidence.score(seen | {REACTION: np.array([norm.ppf(0.5)], np.float32)})[0]


def test_a_predictor_weighs_what_it_explains():
    assert PREDICTION not in weights_for(None)
    assert PREDICTION not in weights_for(0.04)
    assert weights_for(None) == {WHEREABOUTS: 0.05, REACTION: 0.95}  # reactions hold norm and neighbour distance too
    low, high = (weights_for(explained) for explained in (0.2, 0.8))
    assert low[PREDICTION] < high[PREDICTION]
    assert all(sum(weights.values()) == pytest.approx(1) for weights in (weights_for(None), low, high))

import numpy as np
import pytest

from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError
from sanitize.stages.thresholds import (
    clean_quantile,
    fewest_for,
    group_cut_in_two,
    is_counted,
    keep,
    lowest_rate,
    p_values,
    smallest_share,
    threshold_for,
)

RNG = np.random.default_rng(0)
CALIBRATION = np.sort(RNG.normal(size=999).astype(np.float32))
SCORES = np.r_[RNG.normal(size=2000), RNG.normal(8, 1, size=40), [np.nan]].astype(np.float32)


def removed(policy: ThresholdPolicy, scores=SCORES, calibration=CALIBRATION):
    return ~keep(scores, threshold_for(scores, calibration, policy))


@pytest.mark.parametrize("count", [9, 19, 99, 199, 999])
def test_fdr_acts_at_exactly_its_rate(count):
    """All above all of `count` clean images: every p-value is 1 / (count + 1), which float32 may round up."""
    calibration = np.linspace(1, 2, count, dtype=np.float32)
    scores = np.linspace(3, 4, 50, dtype=np.float32)
    assert removed(ThresholdPolicy("fdr", fpr=1 / (count + 1)), scores, calibration).all()
    assert not removed(ThresholdPolicy("fdr", fpr=0.99 / (count + 1)), scores, calibration).any()


def test_p_value_is_the_plain_loop():
    expected = [(1 + sum(c >= s for c in CALIBRATION)) / 1000 for s in SCORES[:50]]
    assert p_values(SCORES[:50], CALIBRATION) == pytest.approx(expected)
    assert np.isnan(p_values(np.array([np.nan], np.float32), CALIBRATION)[0])


def test_calibrated_removes_exactly_the_samples_with_p_at_most_fpr():
    for fpr in (0.005, 0.01, 0.2):
        p = p_values(SCORES[:-1], CALIBRATION)
        assert np.array_equal(removed(ThresholdPolicy("calibrated", fpr=fpr))[:-1], p <= np.float32(fpr))


def test_calibrated_keeps_its_false_positive_rate_on_average():
    rates = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        calibration = np.sort(rng.normal(size=500).astype(np.float32))
        rates.append(removed(ThresholdPolicy(fpr=0.05), rng.normal(size=2000).astype(np.float32), calibration).mean())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_with_few_calibration_images_a_fitted_tail_keeps_the_rate_on_average(draw):
    """One of 155 images at the cut, as in a conformal quantile, or none at all: the rate scatters, but not its mean."""
    fresh = np.sort(getattr(np.random.default_rng(0), draw)(size=100_000))
    cuts = [
        clean_quantile(np.sort(getattr(np.random.default_rng([1, seed]), draw)(size=155).astype(np.float32)), 0.01)
        for seed in range(200)
    ]
    rates = 1 - np.searchsorted(fresh, cuts) / len(fresh)
    assert np.mean(rates) == pytest.approx(0.01, abs=0.004)
    assert np.quantile(rates, 0.95) < 0.035


def test_one_odd_calibration_image_does_not_decide_alone():
    usual = np.abs(np.random.default_rng(0).normal(size=154)).astype(np.float32)
    assert clean_quantile(np.sort(np.r_[usual, np.float32(40)]), 0.01) < 10


def test_a_lower_rate_never_keeps_less():
    for count in (20, 60, 155, 998):
        calibration = CALIBRATION[:: 999 // count][:count]
        rates = np.geomspace(lowest_rate(count), 0.5, 400)
        cuts = [clean_quantile(calibration, rate) for rate in rates]
        assert (np.diff(cuts) <= 0).all(), count


def test_too_few_calibration_scores_says_how_many_are_needed():
    said = r"fpr 0.001: needs at least 50 calibration scores, the detector has 49. Use --fpr 0.02 or more, or fit with more"
    with pytest.raises(ConfigError, match=said):
        clean_quantile(CALIBRATION[:49], 0.001)
    with pytest.raises(ConfigError, match=r"fpr 0.0001: needs at least 500 .* has 99. Use --fpr 0.00051 or more"):
        clean_quantile(CALIBRATION[:99], 0.0001)
    with pytest.raises(ConfigError, match=r"fpr 0.04: needs at least 24 calibration scores, the detector has 20"):
        clean_quantile(CALIBRATION[:20], 0.04)


@pytest.mark.parametrize("fpr", [0.2, 0.01, 0.001, 0.0001])
def test_as_many_calibration_scores_as_were_said_to_be_needed_are_enough(fpr):
    many = np.arange(fewest_for(fpr, counted=True), dtype=np.float32)
    clean_quantile(many[: fewest_for(fpr)], fpr)
    assert is_counted(len(many), fpr)
    assert not is_counted(len(many) - 1, fpr)


@pytest.mark.parametrize("count", [1, 20, 49, 50, 99, 998])
def test_the_rate_that_was_advised_is_allowed(count):
    calibration = CALIBRATION[:count]
    assert np.median(calibration) <= clean_quantile(calibration, lowest_rate(count)) < np.inf


def test_fdr_is_benjamini_hochberg():
    p = p_values(SCORES[:-1], CALIBRATION).astype(np.float64)
    order = np.argsort(p)
    largest = max((i for i in range(len(p)) if p[order[i]] <= 0.1 * (i + 1) / len(p)), default=-1)
    expected = p <= p[order[largest]]
    assert np.array_equal(removed(ThresholdPolicy("fdr", fpr=0.1))[:-1], expected)
    assert not removed(ThresholdPolicy("fdr", fpr=0.1), SCORES[:2000])[:2000].all()


def test_the_smallest_share_that_fdr_can_remove_follows_from_the_number_of_calibration_scores():
    policy, count = ThresholdPolicy("fdr", fpr=0.1), 99
    share = smallest_share(count, policy.fpr)
    assert share == pytest.approx(0.1)
    for outliers, acts in ((99, False), (100, True)):  # of a thousand
        scores = np.append(np.zeros(1000 - outliers), np.full(outliers, 50)).astype(np.float32)
        assert removed(policy, scores, np.linspace(1, 2, count, dtype=np.float32)).any() == acts


def test_fraction_removes_the_top_share_and_what_ties_with_it():
    assert removed(ThresholdPolicy("fraction", fraction=0.01))[:-1].sum() == round(0.01 * 2040)
    assert removed(ThresholdPolicy("fraction", fraction=1.0)).all()
    assert removed(ThresholdPolicy("fraction", fraction=0.5), np.ones(10, np.float32)).all()
    assert not removed(ThresholdPolicy("fraction", fraction=0.0), np.ones(10, np.float32)).any()
    # an attacker who makes 32 embeddings equal does not get 20 of them back
    scores = np.r_[np.linspace(0, 1, 1568), np.full(32, 2)].astype(np.float32)
    assert removed(ThresholdPolicy("fraction", fraction=12 / 1600), scores).sum() == 32


def test_robust_finds_the_far_cluster_without_calibration():
    assert np.flatnonzero(removed(ThresholdPolicy("robust", mad=5), calibration=CALIBRATION[:0])[:-1]).min() >= 2000


def test_absolute_keeps_the_threshold_itself():
    scores = np.array([0.1, 0.2], np.float32)
    assert keep(scores, threshold_for(scores, CALIBRATION, ThresholdPolicy("absolute", threshold=0.1))).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("policy", ["calibrated", "fdr", "fraction"])
def test_a_stricter_setting_keeps_a_subset(policy):
    kept = [~removed(ThresholdPolicy(policy, fpr=rate, fraction=rate)) for rate in (0.01, 0.05, 0.3)]
    assert (kept[0] >= kept[1]).all()
    assert (kept[1] >= kept[2]).all()


def test_nan_is_never_clean():
    scores = np.array([np.nan, -1e30], np.float32)
    assert keep(scores, np.inf).tolist() == [False, True]
    assert keep(scores, np.inf, keep_unscored=True).tolist() == [True, True]


def test_nothing_scored_removes_nothing_else():
    nothing = np.array([np.nan], np.float32)
    assert threshold_for(nothing, CALIBRATION, ThresholdPolicy("fdr")) == np.inf


def test_a_cut_through_a_group_that_stands_apart_is_noticed():
    bulk = np.random.default_rng(1).normal(4, 1, 10_000)
    group = np.random.default_rng(2).normal(9, 0.5, 150)
    scores = np.r_[bulk, group, [np.nan]].astype(np.float32)
    found = group_cut_in_two(scores, 9.2)
    assert found is not None
    kept, cut, begins = found
    assert cut == (scores > np.float32(9.2)).sum()
    assert kept + cut == pytest.approx(150, abs=15)
    assert 6.5 < begins < 8.5
    assert group_cut_in_two(scores, begins) is None  # what it advises
    for threshold in (4.5, 6.0, 7.0, 11.0, np.inf):
        assert group_cut_in_two(scores, threshold) is None


@pytest.mark.parametrize("seed", range(5))
def test_the_tail_of_clean_scores_is_no_group(seed):
    rng = np.random.default_rng(seed)
    for scores in (rng.normal(size=600), np.sqrt(rng.chisquare(6, 5000)), np.exp(rng.normal(size=5000))):
        for rate in (0.2, 0.1, 0.01, 0.001):
            assert group_cut_in_two(scores.astype(np.float32), float(np.quantile(scores, 1 - rate))) is None

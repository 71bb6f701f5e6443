"""The null distribution of each kind of evidence moves to the bulk of a scan that can be trusted."""

import logging

import numpy as np
import pytest

from sanitize.stages.adaptation import MIN_SAMPLES
from sanitize.stages.agreement import Departures, agreement, agreement_test, quantised
from sanitize.stages.evidence import PREDICTION, REACTION, WHEREABOUTS, combination
from sanitize.stages.evidence_adaptation import (
    FEWEST,
    MOST_FLAGGED,
    adapted_evidence,
    trusted_agreement,
    trusted_evidence,
)
from sanitize.stages.tails import fit_tail

KINDS = (PREDICTION, WHEREABOUTS, REACTION)


def drawn(count, seed, centre=0.0, scale=1.0):
    """What clean images of another kind than the auxiliary ones give: the same shape elsewhere."""
    return (np.random.default_rng(seed).gumbel(size=count) * scale + centre).astype(np.float32)


def evidence_of(seed=0, count=800):
    return combination({kind: drawn(count, seed + place) for place, kind in enumerate(KINDS)}, explained=0.5)


def scan_of(count, seed, poison=0, centre=1.0, scale=1.2, perturbed=1.0):
    values = {kind: drawn(count, seed + place, centre, scale) for place, kind in enumerate(KINDS)}
    for kind in KINDS:
        values[kind][:poison] = 60
    values[REACTION][int(perturbed * count) :] = np.nan
    return values


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
def test_the_null_follows_the_bulk_and_not_its_poison(share):
    clean_part, poison = drawn(4000, 1, 3, 2.5), np.full(round(4000 * share / (1 - share)), 40, np.float32)
    moved = fit_tail(drawn(800, 0)).moved_to(np.concatenate([clean_part, poison]))
    assert (clean_part > fit_tail(drawn(800, 0)).quantile(0.01)).mean() > 0.2
    assert (clean_part > moved.quantile(0.01)).mean() == pytest.approx(0.01, abs=0.008)
    assert (moved.p_values(poison) < 1e-3).all()


def test_without_a_shift_the_null_stays():
    tail = fit_tail(drawn(4000, 0))
    assert tail.moved_to(drawn(20_000, 1)).quantile(0.01) == pytest.approx(tail.quantile(0.01), rel=0.05)


def test_images_that_are_almost_one_do_not_make_a_null_without_spread():
    tail = fit_tail(drawn(800, 0))
    moved = tail.moved_to(np.full(1000, 5, np.float32))
    assert moved.scale == pytest.approx(tail.scale / 4)
    assert np.isfinite(moved.p_values(drawn(10, 1))).all()


@pytest.mark.parametrize(("perturbed", "moves"), [(1.0, True), (0.6, True), (0.1, False)])
def test_reactions_move_only_where_they_are_those_of_the_bulk(perturbed, moves):
    evidence = evidence_of()
    moved = adapted_evidence(evidence, scan_of(2000, 10, perturbed=perturbed))
    assert (moved.tails[REACTION] is not evidence.tails[REACTION]) == moves
    assert moved.tails[PREDICTION].start > evidence.tails[PREDICTION].start


def calibrated():
    return np.sort(evidence_of().score({kind: drawn(800, place) for place, kind in enumerate(KINDS)}))


def test_a_scan_of_other_clean_images_is_judged_by_its_own_bulk(caplog):
    values, calibration = scan_of(3000, 10), calibrated()
    with caplog.at_level(logging.INFO, "sanitize"):
        moved = trusted_evidence(evidence_of(), values, evidence_of().score(values), calibration)
    assert moved
    cut = np.quantile(calibration, 0.99)
    assert 0.05 < (evidence_of().score(values) > cut).mean() < MOST_FLAGGED
    assert (moved.score(values) > cut).mean() < 0.02
    assert "adapted to the scan:" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (scan_of(3000, 10, poison=900), "% of it would stand out. Its bulk may not be clean. Look at `sanitize audit`"),
        (scan_of(3000, 10, poison=1500), "% of it stand out. Its bulk may not be clean. Look at `sanitize audit`"),
        (scan_of(MIN_SAMPLES - 1, 10), f"{MIN_SAMPLES - 1} different scored images, {MIN_SAMPLES} are needed"),
        (scan_of(3000, 10, poison=300, centre=-20, scale=0.01), "10.00 % of it stand out, 10.00 % would then"),
        (scan_of(3000, 10, centre=0.1, scale=1.0), "of it stand out, "),  # at nominal 1 % nothing is won by it
    ],
)
def test_a_bulk_that_says_nothing_is_refused_in_words(values, said, caplog):
    evidence = evidence_of()
    caplog.set_level(logging.INFO, "sanitize")
    assert trusted_evidence(evidence, values, evidence.score(values), calibrated()) is None
    assert "not adapted to the scan: " in caplog.text and said in caplog.text


def departures_of(count, seed, offset=0.0):
    """Of images that look unlike each other; offset: that all of them share."""
    rng = np.random.default_rng(seed)
    return Departures(
        quantised((rng.normal(size=(count, 16)) + offset).astype(np.float32)), rng.integers(0, 2**63, count, np.uint64)
    )


def test_what_all_of_a_scan_share_is_no_agreement_of_some():
    clean_images, other = departures_of(800, 0), departures_of(1500, 1, offset=1.5)
    test = trusted_agreement(agreement_test(other, clean_images, 0.5), other, forced=True)
    assert (agreement(other, test.pool) > fit_tail(agreement(clean_images, test.pool)).quantile(0.01)).mean() > 0.9
    assert (agreement(other, test.pool) > test.tail.quantile(0.01)).mean() < 0.03


@pytest.mark.parametrize("scan", [departures_of(1500, 1, offset=1.5), departures_of(FEWEST - 1, 1)])
def test_images_are_not_judged_by_each_other_unasked_when_the_scan_is_of_another_kind_or_small(scan):
    test = agreement_test(scan, departures_of(800, 0), 0.5)
    assert trusted_agreement(test, scan) is None
    assert trusted_agreement(test, scan, forced=True) is not None


def test_a_campaign_is_no_reason_not_to_judge_images_by_each_other():
    scan = departures_of(1500, 1).joined(departures_of(75, 2, offset=2.0))
    test = trusted_agreement(agreement_test(scan, departures_of(800, 0), 0.5), scan)
    assert test is not None
    assert (agreement(scan, test.pool) > test.tail.quantile(0.01))[-75:].mean() > 0.95


@pytest.mark.parametrize("scan", [departures_of(1500, 1), departures_of(MIN_SAMPLES - 1, 1)])
def test_agreement_stays_as_fitted_unless_told_otherwise(scan):
    test = agreement_test(scan, departures_of(800, 0), 0.5)
    assert trusted_agreement(test, scan) is test

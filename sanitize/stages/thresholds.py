"""Scores → threshold. A sample is kept when its score is finite and not above the threshold."""

import math

import numpy as np
from numpy.typing import NDArray

from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError
from sanitize.stages.tails import Floats, fit_tail

COUNTED = 5  # clean images above a cut; where calibration has fewer there, single odd ones would decide, and a fitted tail does
FEWEST = 50  # calibration scores that a tail is fitted to
FURTHEST = 20  # times less often than one calibration score: rates that a fitted tail is asked for
MIN_GROUP = 8  # samples, of what counts as a group on its own
BIN = 0.125  # of the interquartile range of a scan: bins that its histogram is judged by
MAD_TO_DEVIATION = 1.4826  # of a Gaussian


def p_values(scores: Floats, calibration: Floats) -> Floats:
    """(1 + #{calibration >= score}) / (n + 1), (N,) float32; calibration (n,) sorted upwards; NaN stays NaN."""
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(calibration) + 1)).astype(np.float32)


def threshold_for(scores: Floats, calibration: Floats, policy: ThresholdPolicy) -> float:
    """The highest score that is kept under `policy`. scores (N,) with NaN for unscored samples; calibration (n,) sorted.

    calibrated: `clean_quantile`, about `fpr` of clean images above it. fdr: Benjamini-Hochberg on p-values.
    fraction: the top share of this scan, and whatever ties with it. robust: median + mad * 1.4826 MAD of this scan.
    """
    if policy.policy == "absolute":
        return policy.threshold
    if policy.policy == "calibrated":
        return clean_quantile(calibration, policy.fpr)
    finite = scores[np.isfinite(scores)]  # a copy; what follows makes at most one more, for there may be 10^9
    if len(finite) == 0:
        return math.inf
    if policy.policy == "fdr":
        return _benjamini_hochberg(finite, calibration, policy.fpr)
    if policy.policy == "fraction":
        removed = round(policy.fraction * len(finite))
        if removed == 0:
            return math.inf
        finite.partition(len(finite) - removed)
        below = finite[finite < finite[len(finite) - removed]]
        return float(below.max()) if len(below) else -math.inf
    median = float(np.median(finite, overwrite_input=True))
    np.abs(np.subtract(finite, np.float32(median), out=finite), out=finite)
    return median + policy.mad * MAD_TO_DEVIATION * float(np.median(finite, overwrite_input=True))


def clean_quantile(calibration: Floats, fpr: float) -> float:
    """The score that a share `fpr` of clean images exceeds, from calibration (n,) sorted upwards; it falls as `fpr` rises.

    The conformal quantile where COUNTED of the scores lie above it, or where there are too few for anything else; a generalised Pareto
    tail (tails.py) beyond. Raises ConfigError when they are too few for this rate.
    """
    count = len(calibration)
    if is_counted(count, fpr) or count < FEWEST:
        rank = math.ceil((count + 1) * (1 - fpr) - 1e-9)
        if rank <= count:
            return float(calibration[rank - 1])
    elif count * fpr * FURTHEST >= 1 - 1e-9:
        return max(fit_tail(calibration).quantile(fpr), float(calibration[count - COUNTED]))
    raise ConfigError(
        f"fpr {fpr}: needs at least {min(math.ceil(1 / fpr - 1 - 1e-9), fewest_for(fpr))} calibration scores, the detector has {count}. "
        f"Use --fpr {lowest_rate(count):.2g} or more, or fit with more auxiliary images."
    )


def is_counted(calibration: int, fpr: float) -> bool:
    """So many scores show by themselves where a share `fpr` of clean images ends."""
    return (calibration + 1) * fpr >= COUNTED - 1e-9


def fewest_for(fpr: float, counted: bool = False) -> int:
    """Calibration scores that a cut at this rate takes; counted: without a fitted tail."""
    return math.ceil(COUNTED / fpr - 1 - 1e-9) if counted else max(FEWEST, math.ceil(1 / (FURTHEST * fpr) - 1e-9))


def lowest_rate(calibration: int) -> float:
    """That so many calibration scores allow, rounded up to two digits."""
    rate = 1 / (calibration + 1) if calibration < FEWEST else 1 / (FURTHEST * calibration)
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.ceil(rate / step - 1e-9) * step


def _benjamini_hochberg(finite: Floats, calibration: Floats, rate: float) -> float:
    """Benjamini and Hochberg 1995. A score's p-value is one of n + 1, by how many calibration scores are below it: so counts of
    these are all it takes."""
    count, chunk = len(calibration), 1 << 20
    counts = np.zeros(count + 1, np.int64)  # of scores, by the calibration scores below them
    for start in range(0, len(finite), chunk):
        below = np.searchsorted(calibration, finite[start : start + chunk], side="left")
        counts += np.bincount(below, minlength=count + 1)
    p_values = (1 + count - np.arange(count + 1)) / (count + 1)
    at_most = counts[::-1].cumsum()[::-1]  # scores with this p-value or a smaller one
    adjusted = np.minimum.accumulate(p_values * (len(finite) / np.maximum(at_most, 1)))
    kept = np.flatnonzero((counts > 0) & (adjusted > rate * (1 + 1e-9)))  # reached exactly: removed
    if len(kept) == 0:
        return -math.inf
    if not (counts[kept[-1] + 1 :]).any():
        return math.inf
    return float(finite[finite <= calibration[kept[-1]]].max())


def smallest_share(calibration: int, rate: float) -> float:
    """Of a scan, that must stand out before `fdr` can remove anything: no p-value is below 1 / (calibration + 1)."""
    return min(1 / ((calibration + 1) * rate), 1)


def group_cut_in_two(scores: Floats, threshold: float) -> tuple[int, int, float] | None:
    """(kept, removed, where it begins) of a group of scores, apart from the bulk, that the threshold divides; None: it divides none.

    scores (N,), NaN for unscored. A group is a mode of the histogram above the highest one; it ends where the histogram is lowest
    towards its neighbours. A cut through it says that the samples just below are as suspicious as those just above.
    """
    finite = scores[np.isfinite(scores)]
    if len(finite) < MIN_GROUP or not np.isfinite(threshold):
        return None
    low, high = np.quantile(finite, (0.25, 0.75))
    edges = np.arange(low, float(finite.max()) + BIN, BIN * max(float(high - low), 1e-6))[:10_000]
    counts = np.convolve(np.histogram(finite, edges)[0], np.ones(5), "same")
    above = counts[int(counts.argmax()) :]  # from the bulk on
    peak = int((above - np.minimum.accumulate(above)).argmax())  # where they have risen most
    valley = int(above[: peak + 1].argmin())
    if above[peak] < 2 * above[valley] + MIN_GROUP:
        return None  # a tail that falls, not a mode
    begins = float(edges[int(counts.argmax()) + valley])
    group = finite[finite >= begins]
    removed = int((group > np.float32(threshold)).sum())
    kept = len(group) - removed
    return (kept, removed, begins) if min(kept, removed) >= max(MIN_GROUP, 0.1 * len(group)) else None


def keep(scores: Floats, threshold: float, keep_unscored: bool = False) -> NDArray[np.bool_]:
    """(N,) bool. A score that is not finite is none, and never clean; an unscored sample is kept only on request."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(scores), scores <= np.float32(threshold), keep_unscored).astype(bool)

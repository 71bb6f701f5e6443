"""Scores → threshold. A sample is kept when its score is finite and not above the threshold."""

import math

import numpy as np
from numpy.typing import NDArray

from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError

Floats = NDArray[np.float32]
MIN_GROUP = 8  # samples, of what counts as a group on its own
BIN = 0.125  # of the interquartile range of a scan: bins that its histogram is judged by
MAD_TO_DEVIATION = 1.4826  # of a Gaussian


def p_values(scores: Floats, calibration: Floats) -> Floats:
    """(1 + #{calibration >= score}) / (n + 1), (N,) float32; calibration (n,) sorted upwards; NaN stays NaN."""
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(calibration) + 1)).astype(np.float32)


def threshold_for(scores: Floats, calibration: Floats, policy: ThresholdPolicy) -> float:
    """The highest score that is kept under `policy`. scores (N,) with NaN for unscored samples; calibration (n,) sorted.

    calibrated: conformal quantile, at most `fpr` of clean images above it. fdr: Benjamini-Hochberg on p-values.
    fraction: the top share of this scan, and whatever ties with it. robust: median + mad * 1.4826 MAD of this scan.
    """
    if policy.policy == "absolute":
        return policy.threshold
    if policy.policy == "calibrated":
        return _conformal(calibration, policy.fpr)
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


def _conformal(calibration: Floats, fpr: float) -> float:
    count = len(calibration)
    rank = math.ceil((count + 1) * (1 - fpr) - 1e-9)
    if rank > count:
        raise ConfigError(
            f"fpr {fpr}: needs at least {math.ceil(1 / fpr - 1 - 1e-9)} calibration scores, the detector has {count}. "
            "Use a higher --fpr, or fit with more auxiliary images."
        )
    return float(calibration[rank - 1])


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

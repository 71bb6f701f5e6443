"""Scores → threshold. A sample is kept when its score is finite and not above the threshold."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, median_abs_deviation

from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError

Floats = NDArray[np.float32]
MAD_TO_DEVIATION = 1.4826  # of a Gaussian


def p_values(scores: Floats, calibration: Floats) -> Floats:
    """(1 + #{calibration >= score}) / (n + 1), (N,) float32; calibration (n,) sorted upwards; NaN stays NaN."""
    return _p_values(scores, calibration).astype(np.float32)


def _p_values(scores: Floats, calibration: Floats) -> NDArray[np.float64]:
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(calibration) + 1))


def threshold_for(scores: Floats, calibration: Floats, policy: ThresholdPolicy) -> float:
    """The highest score that is kept under `policy`. scores (N,) with NaN for unscored samples; calibration (n,) sorted.

    calibrated: conformal quantile, at most `fpr` of clean images above it. fdr: Benjamini-Hochberg on p-values.
    fraction: the top share of this scan (ties are kept). robust: median + mad * 1.4826 MAD of this scan.
    """
    finite = scores[np.isfinite(scores)]
    if policy.policy == "absolute":
        return policy.threshold
    if policy.policy == "calibrated":
        return _conformal(calibration, policy.fpr)
    if len(finite) == 0:
        return math.inf
    if policy.policy == "fdr":
        return _benjamini_hochberg(finite, calibration, policy.fpr)
    if policy.policy == "fraction":
        removed = round(policy.fraction * len(finite))
        return float(np.sort(finite)[len(finite) - removed - 1]) if removed < len(finite) else -math.inf
    return float(np.median(finite)) + policy.mad * MAD_TO_DEVIATION * float(median_abs_deviation(finite))


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
    kept = finite[
        false_discovery_control(_p_values(finite, calibration)) > rate * (1 + 1e-9)
    ]  # reached exactly: removed
    if len(kept) == len(finite):
        return math.inf
    return float(kept.max()) if len(kept) else -math.inf


def smallest_share(calibration: int, rate: float) -> float:
    """Of a scan, that must stand out before `fdr` can remove anything: no p-value is below 1 / (calibration + 1)."""
    return min(1 / ((calibration + 1) * rate), 1)


def keep(scores: Floats, threshold: float, keep_unscored: bool = False) -> NDArray[np.bool_]:
    """(N,) bool. A score that is not finite is none, and never clean; an unscored sample is kept only on request."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(scores), scores <= np.float32(threshold), keep_unscored).astype(bool)

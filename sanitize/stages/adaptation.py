"""The score that decides in pass 2: the one of the table, or, for the scorer `reaction`, one adapted to the bulk of the scan.

A detector knows clean images from its auxiliary set. A scan of other images has other clean statistics, and more of them
cross the threshold than promised. The columns of pass 1 are enough to move centre and covariance to the scan's own bulk.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sanitize import storage
from sanitize.config import ThresholdPolicy
from sanitize.stages import score_table
from sanitize.stages.clean_reference import CleanReference, adapted
from sanitize.stages.thresholds import threshold_for

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
MIN_SAMPLES = 500  # fewer give no covariance to rely on
MAX_ROWS = 100_000  # that the bulk is estimated from, evenly spread over the scan
MAX_FLAGGED = 0.2  # of the scan above the unadapted threshold: more, and its bulk proves nothing


@dataclass(frozen=True)
class ScoreAdapter:
    """Turns one score file into the deciding scores. reference: the adapted one; None = the scores as they are."""

    reference: CleanReference | None = None

    def scores(self, path: str) -> Floats:
        """(N,) float32 in row order, NaN for unscored samples."""
        if self.reference is None:
            return score_table.numbers(score_table.read(path, ["score"]), "score")
        return self.reference.distance(torch.from_numpy(score_table.statistics(path))).numpy()

    @property
    def identity(self) -> str:
        """For people and for comparing two decisions; the same scan gives the same."""
        if self.reference is None:
            return "as scored"
        tensors = {"centre": self.reference.centre.tolist(), "precision": self.reference.precision.tolist()}
        return f"adapted {storage.json_sha256(tensors)[:12]}"


def score_adapter(
    paths: Sequence[str], reference: CleanReference | None, calibration: Floats, policy: ThresholdPolicy
) -> ScoreAdapter:
    """Adapted when there is a reference to adapt (every image was perturbed) and the scan's bulk can be trusted."""
    if reference is None:
        return ScoreAdapter()
    scores = np.concatenate([ScoreAdapter().scores(path) for path in paths] or [np.empty(0, np.float32)])
    finite = np.isfinite(scores)
    if reason := reason_not_to_adapt(scores[finite], calibration, policy):
        log.warning("not adapted to the scan: %s", reason)
        return ScoreAdapter()
    every = -(-int(finite.sum()) // MAX_ROWS)
    return ScoreAdapter(adapted(reference, spread_statistics(paths, every)))


def reason_not_to_adapt(scores: Floats, calibration: Floats, policy: ThresholdPolicy) -> str:
    """Why the bulk of a scan with these finite scores (N,) says nothing about clean images; "" when it can be trusted."""
    if len(scores) < MIN_SAMPLES:
        return f"{len(scores)} scored samples, {MIN_SAMPLES} are needed"
    flagged = float((scores > threshold_for(scores, calibration, policy)).mean())
    if flagged > MAX_FLAGGED:
        return (
            f"{flagged:.0%} of it stands out, so its bulk may not be clean. Look at `sanitize audit`; if those are clean, fit with "
            "auxiliary images more like these"
        )
    return ""


def spread_statistics(paths: Sequence[str], every: int) -> Floats:
    """Embedding statistics of every so many scored samples, (N, V + 2), one file in memory at a time."""
    parts, seen = [], 0
    for path in paths:
        statistics = score_table.statistics(path)
        statistics = statistics[np.isfinite(statistics).all(axis=1)]
        parts.append(statistics[-seen % every :: every])
        seen += len(statistics)
    return np.concatenate(parts)

"""The score that decides in pass 2: the one of the table, or, for the scorer `reaction`, one adapted to the bulk of the scan.

A detector knows clean pictures from its auxiliary set. A scan of other pictures has other clean signatures, and more of them
cross the cut-off than promised. The columns of pass 1 are enough to move the centre and the covariance to the scan's own bulk.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sanitize import storage
from sanitize.checkpoint import Detector
from sanitize.config import ThresholdPolicy, altered_share
from sanitize.stages import score_table
from sanitize.stages.reactions import CleanSignature, adapted
from sanitize.stages.thresholds import cut_off

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
ENOUGH = 500  # samples; fewer give no covariance to rely on
SAMPLE = 100_000  # signatures that the bulk is estimated from, evenly spread over the scan
SUSPECT = (
    0.2  # of the scan above the unadapted cut-off: so much poison, or so strange a scan, that its bulk proves nothing
)


@dataclass(frozen=True)
class Judge:
    """What turns one score file into the deciding scores. clean: the adapted signature, None = the scores as they are."""

    clean: CleanSignature | None = None

    def scores(self, path: str) -> Floats:
        """(N,) float32 in row order, NaN for unscored samples."""
        if self.clean is None:
            return score_table.numbers(score_table.read(path, ["score"]), "score")
        return self.clean.distance(torch.from_numpy(score_table.signatures(path))).numpy()

    @property
    def identity(self) -> str:
        """Names the adaption in the identity of a decision; the same scan gives the same."""
        if self.clean is None:
            return "as scored"
        tensors = {"centre": self.clean.centre.tolist(), "precision": self.clean.precision.tolist()}
        return f"adapted {storage.json_sha256(tensors)[:12]}"


def judge(paths: Sequence[str], detector: Detector | None, effort: str, policy: ThresholdPolicy) -> Judge:
    """Adapted when the policy compares with calibration scores, every picture was altered, and the scan's bulk can be trusted."""
    if not (policy.adapt and detector and detector.clean and altered_share(effort) == 1):
        return Judge()
    scores = np.concatenate([Judge().scores(path) for path in paths] or [np.empty(0, np.float32)])
    finite = np.isfinite(scores)
    if reason := distrust(scores[finite], detector.calibration(effort), policy):
        log.warning("not adapted to the scan: %s", reason)
        return Judge()
    every = -(-int(finite.sum()) // SAMPLE)
    return Judge(adapted(detector.clean, _sample(paths, every)))


def distrust(scores: Floats, calibration: Floats, policy: ThresholdPolicy) -> str:
    """Why the bulk of a scan with these finite scores (N,) says nothing about clean pictures; "" when it can be trusted."""
    if len(scores) < ENOUGH:
        return f"{len(scores)} scored samples, {ENOUGH} are needed"
    suspect = float((scores > cut_off(scores, calibration, policy)).mean())
    if suspect > SUSPECT:
        return (
            f"{suspect:.0%} of it stands out, so its bulk may not be clean. Look at `sanitize audit`; if those are clean, fit with "
            "auxiliary pictures more like these"
        )
    return ""


def _sample(paths: Sequence[str], every: int) -> Floats:
    """Signatures of every so many scored samples, (N, V + 2), one file in memory at a time."""
    parts, seen = [], 0
    for path in paths:
        found = score_table.signatures(path)
        found = found[np.isfinite(found).all(axis=1)]
        parts.append(found[-seen % every :: every])
        seen += len(found)
    return np.concatenate(parts)

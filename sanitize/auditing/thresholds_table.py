"""What another threshold would keep and remove, and how many of the removed ones would be clean images."""

from dataclasses import dataclass

import numpy as np

from sanitize.stages.score_table import Floats
from sanitize.stages.thresholds import clean_quantile, lowest_rate

RATES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


@dataclass(frozen=True)
class ThresholdRow:
    """expected_false: of the samples, if all were like the calibration images; None where that is not known."""

    command: str
    threshold: float
    kept: int
    removed: int
    expected_false: float | None
    current: bool


def thresholds_table(
    scores: Floats, calibration: Floats | None, current: float | None, folder: str
) -> list[ThresholdRow]:
    """Lowest threshold first. scores (N,) finite; calibration (n,) sorted upwards, on the same scale, None = unknown."""
    cuts = [] if current is None else [(current, "as decided", True)]
    if calibration is not None:
        rates = [rate for rate in RATES if rate >= lowest_rate(len(calibration))]
        cuts += [
            (clean_quantile(calibration, rate), f"sanitize clean {folder} --fpr {rate:g}", False) for rate in rates
        ]
    else:
        cuts += [
            (
                float(np.quantile(scores, 1 - rate)),
                f"sanitize clean {folder} --policy fraction --fraction {rate:g}",
                False,
            )
            for rate in RATES
        ]
    return [_row(scores, calibration, cut, command, now) for cut, command, now in sorted(cuts, key=lambda cut: cut[0])]


def _row(scores: Floats, calibration: Floats | None, cut: float, command: str, current: bool) -> ThresholdRow:
    removed = int((scores > np.float32(cut)).sum())
    expected = None
    if calibration is not None:
        above = len(calibration) - int(np.searchsorted(calibration, np.float32(cut), side="right"))
        expected = above / len(calibration) * len(scores)
    return ThresholdRow(command, cut, len(scores) - removed, removed, expected, current)

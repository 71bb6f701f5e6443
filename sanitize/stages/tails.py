"""p-values beyond what a finite calibration set can count: its empirical distribution, and a fitted tail above the top tenth."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
TOP = 0.1  # share of the calibration values that the tail is fitted to
FEWEST = 5  # of them; fewer tell nothing of a tail, and the largest ones are taken all the same
HEAVIEST = 0.5  # shape of the tail: heavier ones have no variance and come of single odd images
BULK = (0.05, 0.25)  # quantiles that say where a scan lies: poison is above them, and moves them little
STEADIEST = 0.25  # spread of a scan, relative to calibration's, that is followed: images that are almost one image vary in nothing


@dataclass(frozen=True)
class Tail:
    """Of a statistic whose high values are suspicious. calibration: (n,) float32 sorted upwards; above `start` a generalised Pareto
    distribution (Pickands 1975) with this shape, 0 to HEAVIEST, and scale; `above`: the share of clean images there."""

    calibration: Floats
    start: float
    above: float
    shape: float
    scale: float

    def p_values(self, values: Floats) -> NDArray[np.float64]:
        """(N,) in (0, 1]: the share of clean images that reach these values. NaN stays NaN."""
        count, lowest = len(self.calibration), float(self.calibration[0])
        wide = values.astype(np.float64)
        # between calibration values p is interpolated, and below them it rises to 1: no two different values tie
        known, first = np.unique(self.calibration, return_index=True)
        bulk = np.interp(wide, known, (count - first) / (count + 1))
        bulk = np.where(wide < lowest, 1 - 1 / (count + 1) / (1 + (lowest - wide) / self.scale), bulk)
        excess = np.maximum(wide - self.start, 0) / self.scale
        tail = self.above * (np.exp(-excess) if self.shape == 0 else (1 + self.shape * excess) ** (-1 / self.shape))
        return np.where(
            np.isnan(wide), np.nan, np.where(excess > 0, np.maximum(tail, 1e-300), np.maximum(bulk, self.above))
        )

    def quantile(self, p: float) -> float:
        """The value that a share `p` of clean images exceeds."""
        if p >= self.above:
            return float(np.quantile(self.calibration, 1 - p, method="higher"))
        ratio = self.above / p
        return self.start + self.scale * (math.log(ratio) if self.shape == 0 else (ratio**self.shape - 1) / self.shape)

    def moved_to(self, bulk: Floats) -> "Tail":
        """The same distribution where the values (N,) of a scan lie: its BULK quantiles are theirs."""
        low, high = np.quantile(bulk.astype(np.float64), BULK)
        own_low, own_high = np.quantile(self.calibration.astype(np.float64), BULK)
        if own_high <= own_low:
            return self
        ratio = max(float((high - low) / (own_high - own_low)), STEADIEST)
        known = (self.calibration - own_high) * ratio + high
        start = float((self.start - own_high) * ratio + high)
        return Tail(known.astype(np.float32), start, self.above, self.shape, self.scale * ratio)


def extrapolated(values: Floats, share: float) -> Floats:
    """values (n,) with the highest `share`, which may be poison's, replaced by what the clean ones below them let expect there.

    An exponential tail above the next TOP of them, fitted as to a censored sample (Epstein and Sobel, JASA 1953). Where they were poison,
    the cut is higher than asked for: a clean image is kept rather than lost.
    """
    count = len(values)
    doubtful = min(math.ceil(share * count - 1e-9), count // 2)
    above = min(doubtful + max(round(TOP * count), FEWEST), count - 1)
    if not 0 < doubtful < above:
        return values
    order = np.argsort(values, kind="stable")
    start, known = values[order[-above - 1]], values[order[-above:-doubtful]].astype(np.float64)
    longest = known[-1] - start
    scale = float((known - start).sum() + doubtful * longest) / len(known)
    places = np.arange(doubtful, 0, -1) - 0.5  # from the top
    replaced = values.copy()
    replaced[order[-doubtful:]] = start + np.maximum(scale * np.log(above / places), longest)
    return replaced


def fit_tail(calibration: Floats) -> Tail:
    """Of the values of clean held-out images (n,), n >= 1.

    Shape and scale by probability-weighted moments (Hosking and Wallis 1987), which single odd images move less than maximum likelihood.
    """
    ordered = np.sort(calibration.astype(np.float64))
    count = min(max(round(TOP * len(ordered)), FEWEST), len(ordered) - 1)
    start = float(ordered[-count - 1]) if count else float(ordered[-1])
    excess = ordered[len(ordered) - count :] - start
    first = float(excess.mean()) if count else 0.0
    second = float((excess * (np.arange(count)[::-1] / max(count - 1, 1))).mean()) if count else 0.0
    shape = 2 - first / (first - 2 * second) if first > 2 * second > 0 else 0.0
    shape = float(np.clip(shape, 0, HEAVIEST))
    scale = max(first * (1 - shape), 1e-6 * max(abs(start), 1.0))
    return Tail(np.sort(calibration).astype(np.float32), start, count / len(ordered) or 1 / len(ordered), shape, scale)

"""Several kinds of evidence → one score: their p-values against clean held-out images, combined.

The rule is the weighted harmonic mean p-value (Wilson, PNAS 2019): valid, up to a small factor, whatever the dependence, and never
fitted on attacks. One strong witness is enough, and no witness can clear what another accuses.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sanitize.stages.tails import Floats, Tail, fit_tail

PREDICTION, WHEREABOUTS, REACTION = "prediction", "whereabouts", "reaction"
KINDS = (PREDICTION, WHEREABOUTS, REACTION)
AGREEMENT = 0.5  # weight, in pass 2, of how samples agree with each other (agreement.py)
WORTHLESS = 0.05  # R² of a predictor below which its evidence is left out
CHOOSES = 0.25  # R² from which it weighs as much as where embeddings lie, and what is perturbed may be left to the two of them
LITTLE = 0.05  # weight, below CHOOSES, of where embeddings lie: all images are perturbed then, and their reactions hold it already


@dataclass(frozen=True)
class Evidence:
    """tails: of each kind on clean held-out images; weights: of the same kinds, they add up to 1."""

    tails: Mapping[str, Tail]
    weights: Mapping[str, float]

    def score(self, values: Mapping[str, Floats]) -> Floats:
        """(N,) float32: -log10 of the harmonic mean p-value. A kind that is missing or NaN for an image counts as unsuspicious, p = 1."""
        count = len(next(iter(values.values())))
        total: NDArray[np.float64] = np.zeros(count)
        for kind, tail in self.tails.items():
            p = tail.p_values(values[kind]) if kind in values else np.ones(count)
            total += self.weights[kind] / np.where(np.isnan(p), 1.0, p)
        return np.log10(total).astype(np.float32)


def weights_for(explained: float | None) -> dict[str, float]:
    """Weights of the kinds of evidence. explained: R² of the predictor on held-out images, which its evidence is worth; None = no
    predictor."""
    raw = {WHEREABOUTS: 0.5, REACTION: 0.5}  # half: an informed attacker imitates both for nothing
    if explained is None or explained < CHOOSES:
        raw = {WHEREABOUTS: LITTLE, REACTION: 1 - LITTLE}
    if explained is not None and explained >= WORTHLESS:
        raw[PREDICTION] = 2 * explained
    return {kind: weight / sum(raw.values()) for kind, weight in raw.items()}


def combination(calibration: Mapping[str, Floats], explained: float | None) -> Evidence:
    """calibration: kind → its values on clean held-out images (n,); of kinds that are not among them nothing is known."""
    weights = {kind: weight for kind, weight in weights_for(explained).items() if kind in calibration}
    total = sum(weights.values())
    tails = {kind: fit_tail(calibration[kind]) for kind in weights}
    return Evidence(tails, {kind: weight / total for kind, weight in weights.items()})

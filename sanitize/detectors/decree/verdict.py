"""How large must the smallest trigger be? The verdict on an encoder, from its inversion and those of clean peers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import median_abs_deviation

from sanitize.detectors.decree.inversion import Inversion
from sanitize.stages.thresholds import MAD_TO_DEVIATION

MIN_PEERS = 3
P_L1_THRESHOLD = 0.1  # seen in reproductions of the paper's plots, not in its code
Z_THRESHOLD = 2.5
WEAK = (
    f"weak evidence: a fixed threshold ({P_L1_THRESHOLD}) transfers only within one architecture and pre-training corpus. "
    f"Give at least {MIN_PEERS} clean encoders of this architecture with --peer."
)


@dataclass(frozen=True)
class Verdict:
    """verdict: trojaned, clean, or undecided (DECREE does not apply). z: None without peers. reason: one sentence."""

    verdict: str
    rule: str  # peers, fixed or none
    z: float | None
    reason: str


def peer_z(l1: float, peers: Sequence[float]) -> float:
    """(median - L1) / (1.4826 MAD) over clean peers: high when the trigger is smaller than theirs.

    Peers of equal size leave no scale; it is then taken as 1e-9 of their median, so that z stays a number.
    """
    median = float(np.median(peers))
    scale = MAD_TO_DEVIATION * float(median_abs_deviation(peers))
    return (median - l1) / max(scale, 1e-9 * median, 1e-9)


def verdict_on(inversion: Inversion, peers: Sequence[float | None], threshold: float) -> Verdict:
    """The rule of the clean peers when at least three of them have a size, else the fixed threshold on P-L1."""
    best = inversion.best
    if inversion.plain_cosine > threshold:
        return Verdict(
            "undecided",
            "none",
            None,
            f"plain images already have a mean pairwise cosine of {inversion.plain_cosine:.4f}, above {threshold}: this encoder "
            "maps everything to almost one embedding, so a trigger of any size would do. DECREE cannot judge it.",
        )
    if best is None:
        return Verdict(
            "clean",
            "none",
            None,
            "no trigger found; this encoder looks clean to DECREE; additive or spread-out triggers can escape it",
        )
    sizes = [size for size in peers if size is not None]
    if len(sizes) >= MIN_PEERS:
        z = peer_z(best.l1, sizes)
        compared = f"z = {z:.2f} against {len(sizes)} clean peers (median L1 {np.median(sizes):.1f}), flagged above {Z_THRESHOLD}"
        return Verdict("trojaned" if z > Z_THRESHOLD else "clean", "peers", z, compared)
    flagged = best.p_l1 < P_L1_THRESHOLD
    return Verdict(
        "trojaned" if flagged else "clean",
        "fixed",
        None,
        f"P-L1 {best.p_l1:.4f} is {'below' if flagged else 'not below'} {P_L1_THRESHOLD}; {WEAK}",
    )

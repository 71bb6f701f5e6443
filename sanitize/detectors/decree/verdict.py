"""How large must the smallest trigger be? The verdict on an encoder, from its inversion and those of clean peers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from sanitize.detectors.decree.inversion import Inversion

MIN_PEERS = 3
P_L1_THRESHOLD = 0.1  # seen in reproductions of the paper's plots, not in its code
P_THRESHOLD = 0.01  # of clean encoders that are called trojaned for their peers' sake
SPREAD = 0.05  # of log L1, at least: no two trainings agree better
WEAK = (
    f"weak evidence: a fixed threshold ({P_L1_THRESHOLD}) transfers only within one architecture and pre-training corpus. "
    f"Give at least {MIN_PEERS} clean encoders of this architecture with --peer."
)


@dataclass(frozen=True)
class Verdict:
    """verdict: trojaned, clean, or undecided (DECREE does not apply). p: see `peer_p`, None without peers. reason: one sentence."""

    verdict: str
    rule: str  # peers, fixed or none
    p: float | None
    reason: str


def peer_p(l1: float, peers: Sequence[float]) -> float:
    """How probable a trigger this small or smaller is of one more clean encoder: Student's prediction interval of log L1 over clean peers.

    Peers closer together than SPREAD are taken to have that deviation.
    """
    logs = np.log(peers)
    deviation = max(float(logs.std(ddof=1)), SPREAD) * math.sqrt(1 + 1 / len(logs))
    return float(student_t.sf((logs.mean() - math.log(l1)) / deviation, len(logs) - 1))


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
        p = peer_p(best.l1, sizes)
        compared = f"p = {p:.2g} against {len(sizes)} clean peers (median L1 {np.median(sizes):.1f}), flagged below {P_THRESHOLD}"
        return Verdict("trojaned" if p < P_THRESHOLD else "clean", "peers", p, compared)
    flagged = best.p_l1 < P_L1_THRESHOLD
    return Verdict(
        "trojaned" if flagged else "clean",
        "fixed",
        None,
        f"P-L1 {best.p_l1:.4f} is {'below' if flagged else 'not below'} {P_L1_THRESHOLD}; {WEAK}",
    )

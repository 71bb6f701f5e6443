"""Which samples of a scan a report shows, and which kept ones it compares them with."""

from dataclasses import dataclass

import numpy as np

from sanitize.auditing.scored import Rows, ScoredSamples

NEAR = 24  # samples on each side of the cut that are shown as borderline
UNDECIDED = 0.01  # of a scan without decisions: its highest scores are shown
FEWEST = 32
MAX_KEPT, MIN_KEPT = 2000, 300  # kept samples that flagged ones are compared with
MAX_SHARDS = 32  # that those are drawn from


@dataclass(frozen=True)
class Selection:
    """Rows of a scan. flagged: (N,), highest score first, unscored last; near: borderline ones of both sides, flagged or not;
    kept: (M,), a seeded draw of scored ones that were kept."""

    flagged: Rows
    near: Rows
    kept: Rows

    @property
    def shown(self) -> Rows:
        """Flagged ones, then those near the cut that are not."""
        return np.concatenate([self.flagged, self.near[~np.isin(self.near, self.flagged)]])


def select(scored: ScoredSamples, most: int, seed: int = 0) -> Selection:
    """most: of the flagged ones; the rest is left out, lowest scores first."""
    flagged = _flagged(scored)[:most]
    usual = np.isfinite(scored.scores)
    if scored.removed is not None:
        usual &= ~scored.removed
    else:
        usual[flagged] = False
    kept = np.flatnonzero(usual)
    if scored.removed is None:
        return Selection(flagged, kept[:0], _drawn(scored, kept, len(flagged), seed))
    below = kept[_highest(scored, kept)][:NEAR]
    above = flagged[np.isfinite(scored.scores[flagged])][-NEAR:]
    return Selection(flagged, np.concatenate([above, below]), _drawn(scored, kept, len(flagged), seed))


def removed_and_kept(scored: ScoredSamples, most: int, near: int, drawn: int, seed: int) -> Rows:
    """Of a scan with decisions: removed ones, highest score first and unscored last, `most` of them; the `near` kept ones with the
    highest scores; and `drawn` of the other kept ones by the seed."""
    assert scored.removed is not None
    removed = np.flatnonzero(scored.removed & scored.split)
    kept = np.flatnonzero(~scored.removed & np.isfinite(scored.scores))
    kept = kept[_highest(scored, kept)]
    others = np.random.default_rng(seed).permutation(np.sort(kept[near:]))[:drawn]
    return np.concatenate([removed[_highest(scored, removed)][:most], kept[:near], np.sort(others)])


def _flagged(scored: ScoredSamples) -> Rows:
    """Those that were removed; where nothing is decided, the highest scores."""
    if scored.removed is not None:
        rows = np.flatnonzero(scored.removed)
        return rows[_highest(scored, rows)]
    rows = np.flatnonzero(np.isfinite(scored.scores))
    return rows[_highest(scored, rows)][: max(round(UNDECIDED * len(rows)), FEWEST)]


def _highest(scored: ScoredSamples, rows: Rows) -> Rows:
    return np.argsort(-np.nan_to_num(scored.scores[rows], nan=-np.inf), kind="stable")


def _drawn(scored: ScoredSamples, kept: Rows, flagged: int, seed: int) -> Rows:
    """A draw of `kept`, from a few shards only: the others need not be opened."""
    rng = np.random.default_rng(seed)
    shards = np.searchsorted(scored.starts, kept, side="right") - 1
    there = np.unique(shards)
    if len(there) > MAX_SHARDS:
        kept = kept[np.isin(shards, rng.permutation(there)[:MAX_SHARDS])]
    return np.sort(rng.permutation(kept)[: min(max(2 * flagged, MIN_KEPT), MAX_KEPT)])

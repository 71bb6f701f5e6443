"""The score that decides in pass 2, of the scorer `evidence`: each kind of evidence judged by the bulk of the scan, and joined by how
samples agree with each other (agreement.py).

A predictor knows the images it was trained on, and departs further from others. So the null distribution of each kind keeps its shape and
moves to where the lower part of the scan lies, which poison, being above, hardly moves.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from sanitize import storage
from sanitize.stages import score_table
from sanitize.stages.adaptation import (
    MAX_FLAGGED,
    MAX_ROWS,
    MIN_SAMPLES,
    UNTRUSTED,
    ScoreAdapter,
    distinct_rows,
    flagged_share,
)
from sanitize.stages.agreement import NEIGHBOURS, NONE, POOL, AgreementTest, Departures, agreement, agreement_test
from sanitize.stages.clean_reference import CleanReference
from sanitize.stages.evidence import AGREEMENT, PREDICTION, REACTION, WHEREABOUTS, Evidence
from sanitize.stages.score_table import STATISTICS_COLUMNS, VECTORS
from sanitize.stages.tails import Floats

log = logging.getLogger(__name__)
ENERGY = "prediction_energy"
NOMINAL = 0.01  # rate by which it is judged how many samples agree
MOST_COMPARED = 20_000  # images of a scan that are compared with its pool to judge that: 0.1 ms each
FEWEST = 200  # images of a scan, by which it is judged whether they may be judged by each other
MOST_FLAGGED = 0.4  # of a scan, above which its lower part may be poison's
MOST = 0.5  # of a scan, that must have been perturbed before its reactions are its bulk and not its suspicious part


@dataclass(frozen=True)
class AdaptedEvidence(ScoreAdapter):
    """evidence: with the null distributions of the scan; reference: of the detector."""

    reference: CleanReference
    evidence: Evidence
    columns = ("score", *STATISTICS_COLUMNS, ENERGY)

    def scores(self, table: pa.Table) -> Floats:
        scored = np.isfinite(score_table.numbers(table, "score"))
        found = self.evidence.score(evidence_values(table, self.reference))
        return np.where(scored, found, np.float32(np.nan))

    @property
    def identity(self) -> str:
        nulls = {kind: [tail.start, tail.scale] for kind, tail in self.evidence.tails.items()}
        return f"adapted evidence {storage.json_sha256(nulls)[:12]}"


@dataclass(frozen=True)
class AgreementScores(ScoreAdapter):
    """Scores of `base`, joined by how samples agree with each other."""

    test: AgreementTest
    base: ScoreAdapter

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.base.columns, *VECTORS)

    def scores(self, table: pa.Table) -> Floats:
        scores, (departures, has) = self.base.scores(table), score_table.departures(table)
        scores[has] = self.test.combined(scores[has], departures)
        return scores

    @property
    def identity(self) -> str:
        return f"{self.base.identity}, with agreement {self.test.identity}"


def evidence_values(table: pa.Table, reference: CleanReference) -> dict[str, Floats]:
    """Kind of evidence → (N,) of score rows with STATISTICS_COLUMNS and ENERGY; NaN where an image has none."""
    return values_of(reference, score_table.statistics(table), score_table.numbers(table, ENERGY))


def values_of(reference: CleanReference, statistics: Floats, energy: Floats) -> dict[str, Floats]:
    """The same of statistics (N, V + 2) and energy (N,) of the departure from the prediction."""
    rows = torch.from_numpy(statistics)
    whereabouts, reaction = reference.prescreen_score(rows).numpy(), reference.distance(rows).numpy()
    return {PREDICTION: energy, WHEREABOUTS: whereabouts, REACTION: reaction}


def evidence_adapter(
    samples: Mapping[str, int], reference: CleanReference, evidence: Evidence, calibration: Floats
) -> ScoreAdapter:
    """Adapted when the scan's bulk can be trusted. samples: in each score file; calibration: sorted scores of clean held-out images."""
    rows = _drawn_rows(samples, reference, AdaptedEvidence.columns)
    values, scores = evidence_values(rows, reference), score_table.numbers(rows, "score")
    moved = trusted_evidence(evidence, values, scores, calibration)
    return AdaptedEvidence(reference, moved) if moved else ScoreAdapter()


def trusted_evidence(
    evidence: Evidence, values: Mapping[str, Floats], scores: Floats, calibration: Floats
) -> Evidence | None:
    """`evidence` moved to the bulk of a scan with these values and scores (N,), each image once; None: that bulk says nothing."""
    if len(scores) < MIN_SAMPLES:
        log.warning("not adapted to the scan: %d different scored images, %d are needed", len(scores), MIN_SAMPLES)
        return None
    moved = adapted_evidence(evidence, values)
    before, after = flagged_share(scores, calibration), flagged_share(moved.score(values), calibration)
    if before > MOST_FLAGGED:
        log.warning("not adapted to the scan: %.0f %% of it stand out. %s", 100 * before, UNTRUSTED)
        return None
    if before - after <= NOMINAL:
        log.info("not adapted to the scan: %.2f %% of it stand out, %.2f %% would then", 100 * before, 100 * after)
        return None
    if after > MAX_FLAGGED:
        log.warning("not adapted to the scan: %.0f %% of it would stand out. %s", 100 * after, UNTRUSTED)
        return None
    log.info("adapted to the scan: %.2f %% of it stand out, %.2f %% before", 100 * after, 100 * before)
    return moved


def adapted_evidence(evidence: Evidence, values: Mapping[str, Floats]) -> Evidence:
    """With the null distribution of each kind moved to the bulk of the values (N,) of a scan."""
    tails = dict(evidence.tails)
    for kind, tail in evidence.tails.items():
        found = values[kind][np.isfinite(values[kind])]
        if len(found) >= MOST * len(values[kind]):
            tails[kind] = tail.moved_to(found)
    return replace(evidence, tails=tails)


def agreement_test_of(samples: Mapping[str, int], clean: Departures) -> AgreementTest | None:
    """samples: score file → how many; clean: of the calibration images. None: too few images to compare. Memory: one file and the pool."""
    pool = NONE
    for table in score_table.read_each(list(samples), list(VECTORS)):
        pool = pool.joined(score_table.departures(table)[0]).longest(POOL)
    return agreement_test(pool, clean, AGREEMENT) if len(pool) > NEIGHBOURS else None


def adapted_agreement(
    samples: Mapping[str, int], reference: CleanReference, test: AgreementTest, *, forced: bool
) -> AgreementTest | None:
    """`test` by the bulk of a scan where that can be trusted. None: see `trusted_agreement`; never when forced."""
    drawn, _ = score_table.departures(_drawn_rows(samples, reference, tuple(VECTORS), MOST_COMPARED))
    return trusted_agreement(test, drawn, forced=forced)


def trusted_agreement(test: AgreementTest, drawn: Departures, *, forced: bool = False) -> AgreementTest | None:
    """`test` as it is, for images of a scan, each once. Forced: moved to their bulk, unless they are few, no fewer would stand out, or too
    many still would.

    None, unless forced: when too few images tell, or that bulk agrees more than clean images do. A predictor errs in the same direction for
    whole groups of images of a kind that it was not trained on, and their agreement says nothing.
    """
    if len(drawn) < FEWEST:
        log.info("%d different scored images are few to judge by each other, %d are needed", len(drawn), FEWEST)
        return test if forced else None
    found = agreement(drawn, test.pool)
    moved = test.tail.moved_to(found)
    before, after = (float((found > tail.quantile(NOMINAL)).mean()) for tail in (test.tail, moved))
    if after >= before or after > MAX_FLAGGED:
        return test
    if not forced and before - after > NOMINAL:
        log.info(
            "not judged by each other: images of this scan agree more than auxiliary ones, %.2f %% of them",
            100 * before,
        )
        return None
    if not forced or len(drawn) < MIN_SAMPLES:
        return test
    log.info("agreement adapted to the scan: %.2f %% of it agree, %.2f %% before", 100 * after, 100 * before)
    return replace(test, tail=moved)


def _drawn_rows(
    samples: Mapping[str, int], reference: CleanReference, columns: tuple[str, ...], limit: int = MAX_ROWS
) -> pa.Table:
    return distinct_rows(samples, columns, ["score"], key=reference.centre.numpy().tobytes(), limit=limit)

"""Scores of one or several scans → the one rule that decides on all of them. Reads scores only; writes nothing."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sanitize import storage
from sanitize.artifacts.detector_folder import Detector, load_detector
from sanitize.artifacts.reviews import Reviews, read_reviews
from sanitize.artifacts.scan_folder import Run, ScanFolder, ShardMarker, Summary
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError, SanitizeError
from sanitize.records import Word
from sanitize.stages import thresholds
from sanitize.stages.adaptation import AdaptedScores, ScoreAdapter, score_adapter, scores_of_all
from sanitize.stages.agreement import AgreementTest, Departures
from sanitize.stages.decision_table import Rule
from sanitize.stages.evidence_adaptation import (
    AdaptedEvidence,
    AgreementScores,
    adapted_agreement,
    agreement_test_of,
    evidence_adapter,
)
from sanitize.stages.reasons import EvidenceReasons, OneStatistic, ReactionReasons, Reasons, without_embeddings

log = logging.getLogger(__name__)
RARE = 0.01  # share of poison that every policy should be able to act on


@dataclass(frozen=True)
class CleanResult:
    """Counts of samples; reviewed: that a person's word decided; `failed` names shards that could not be copied."""

    threshold: float
    kept: int
    removed: int
    unscored: int
    failed: tuple[str, ...]
    reviewed: int = 0


@dataclass(frozen=True)
class Scanned:
    """A scan as pass 2 finds it. present: names of its files; committed: all markers are those of a finished pass 2; reviews: that it
    decides by; words: theirs, by stem."""

    folder: ScanFolder
    run: Run
    markers: list[ShardMarker]
    present: set[str]
    committed: bool
    reviews: Reviews
    words: dict[str, tuple[Word, ...]]

    @classmethod
    def of(cls, out: str, ignore_reviews: bool = False) -> "Scanned":
        folder = ScanFolder(out)
        reviews = Reviews() if ignore_reviews else read_reviews(folder, folder.summary())
        run, committed = folder.run(), folder.committed_markers()
        markers = folder.markers(sorted(run.shards), committed)
        whole = [*committed] == [marker.shard for marker in markers]
        return cls(folder, run, markers, folder.present_files(), whole, reviews, reviews.words())

    def others(self, scans: Sequence["Scanned"]) -> tuple[str, ...]:
        """Of the scans that are decided together, as the summary names them."""
        return tuple(sorted(storage.absolute(scan.folder.path) for scan in scans if scan is not self))


def find_rule(
    scans: Sequence[Scanned],
    policy: ThresholdPolicy,
    force: bool,
    score_all: Callable[[ScoreAdapter, Mapping[str, int]], NDArray[np.float32]] = scores_of_all,
) -> tuple[Rule, list[CleanResult]]:
    """One threshold for all samples. Memory: one float32 a sample, and a few times that while the threshold is found.

    score_all: as `scores_of_all`, wherever it computes.
    """
    first = scans[0].run
    for scan in scans[1:]:
        if (scan.run.detector_fingerprint, scan.run.effort) != (first.detector_fingerprint, first.effort):
            raise RefusedError(
                f"{scan.folder.path}: was scanned with another detector or effort than {scans[0].folder.path}, so their scores do not "
                "compare. Clean them one by one, or scan one of them again."
            )
    detector = _detector(scans[0].folder.path, first, policy)
    samples = {scan.folder.scores(marker.shard): marker.samples for scan in scans for marker in scan.markers}
    adapter, calibration = _adapter(detector, first, policy, samples)
    scores = score_all(adapter, samples)
    threshold = thresholds.threshold_for(scores, calibration, policy)
    _warn_of_small_calibration(policy, threshold, len(calibration))
    _warn_of_a_divided_group(scores, threshold)
    results = []
    ends = np.cumsum([sum(marker.samples for marker in scan.markers) for scan in scans])
    for scan, part in zip(scans, np.split(scores, ends[:-1]), strict=True):
        keep = thresholds.keep(part, threshold, policy.keep_unscored)
        reviewed, kept = _override(keep, scan), int(keep.sum())
        results.append(CleanResult(threshold, kept, len(part) - kept, int(np.isnan(part).sum()), (), reviewed))
    _refuse_to_remove_most(results, force)
    reasons = _reasons(detector or _detector_if_there(first), first, adapter, calibration)
    return Rule(threshold, policy.keep_unscored, adapter, reasons), results


def rule_again(scans: Sequence[Scanned], summary: Summary) -> Rule:
    """The rule that decided on all of these, to explain samples by, without words of people. Raises RefusedError when it cannot be found
    again."""
    out, run, policy = scans[0].folder.path, scans[0].run, summary.policy
    detector = _detector(out, run, policy)
    samples = {scan.folder.scores(marker.shard): marker.samples for scan in scans for marker in scan.markers}
    adapter, calibration = _adapter(detector, run, policy, samples)
    reasons = _reasons(detector or _detector_if_there(run), run, adapter, calibration)
    rule = Rule(summary.threshold, policy.keep_unscored, adapter, reasons)
    if rule.identity != summary.rule:
        raise RefusedError(
            f"{out}: decisions are of another version, or scans or a detector that they were made with changed. Run `sanitize clean {out}` "
            "to decide again."
        )
    return rule


def _override(keep: NDArray[np.bool_], scan: Scanned) -> int:
    """Set what people decided in `keep`, (N,) of all samples of the scan; how many that are."""
    start = reviewed = 0
    for marker in scan.markers:
        words = scan.words.get(marker.shard, ())
        keep[[start + word.index for word in words]] = [word.release for word in words]
        reviewed += len(words)
        start += marker.samples
    return reviewed


def _adapter(
    detector: Detector | None, run: Run, policy: ThresholdPolicy, samples: Mapping[str, int]
) -> tuple[ScoreAdapter, NDArray[np.float32]]:
    """What turns score rows into the scores that decide, and those of clean held-out images, sorted upwards."""
    if detector is None:
        return ScoreAdapter(), np.empty(0, np.float32)
    calibration, adapter = detector.calibration(run.effort), ScoreAdapter()
    if policy.adapt and detector.evidence and detector.clean_reference:
        adapter = evidence_adapter(samples, detector.clean_reference, detector.combination(), calibration)
    elif policy.adapt:
        adapter = score_adapter(samples, detector.adaptable_reference(run.effort), calibration)
    forced = policy.agreement is not None
    if not (policy.agreement if forced else policy.adapt and len(detector.departures)):
        return adapter, calibration
    departures = _departures(detector, run)
    fitted = agreement_test_of(samples, departures)
    if fitted is None or detector.clean_reference is None:
        return adapter, calibration
    test: AgreementTest | None = fitted
    if policy.adapt:
        test = adapted_agreement(samples, detector.clean_reference, fitted, forced=forced)
    if test is None:
        return adapter, calibration
    return AgreementScores(test, adapter), np.sort(fitted.combined(detector.calibration_scores(run.effort), departures))


def _refuse_to_remove_most(results: Sequence[CleanResult], force: bool) -> None:
    removed, total = sum(r.removed for r in results), sum(r.kept + r.removed for r in results)
    if is_most(removed, total) and not force:
        raise RefusedError(
            f"{removed} of {total} samples would be removed ({sum(r.unscored for r in results)} of them have no score), which is "
            "more than half. Is the auxiliary set like these shards, and is the encoder the right one? Look at "
            "`sanitize audit`; try --policy robust; --force goes on anyway. No clean shard was written."
        )


def _warn_of_a_divided_group(scores: NDArray[np.float32], threshold: float) -> None:
    if group := thresholds.group_cut_in_two(scores, threshold):
        kept, removed, begins = group
        log.warning(
            "the cut at %.4g runs through a group of samples that stand apart: %d of it are removed and %d, hardly less suspicious, kept. "
            "Look at `sanitize audit`; --threshold %.4g removes all of it",
            threshold,
            removed,
            kept,
            begins,
        )


def is_most(removed: int, samples: int) -> bool:
    return removed * 2 > samples


def _detector(out: str, run: Run, policy: ThresholdPolicy) -> Detector | None:
    """Only the policies that compare with its null scores need the detector folder."""
    if policy.policy not in ("calibrated", "fdr"):
        return None
    if not storage.exists(run.detector):
        raise RefusedError(
            f"{run.detector}: is gone, and {policy.policy} compares with its scores. Restore it, or use --policy fraction, absolute or "
            "robust."
        )
    detector = load_detector(run.detector)
    if detector.fingerprint != run.detector_fingerprint:
        raise RefusedError(
            f"{run.detector}: is not the detector that {out} was scanned with. Restore it, or scan again."
        )
    return detector


def _detector_if_there(run: Run) -> Detector | None:
    """For reasons alone."""
    try:
        detector = load_detector(run.detector)
        if detector.fingerprint == run.detector_fingerprint:
            return detector
        why = f"{run.detector}: is not the detector that this was scanned with"
    except SanitizeError as error:
        why = str(error)
    log.warning("why samples are removed is not known, the column `reason` says only that they are: %s", why)
    return None


def _reasons(detector: Detector | None, run: Run, adapter: ScoreAdapter, calibration: NDArray[np.float32]) -> Reasons:
    """calibration: of the scores that decide; empty where a policy compares with none."""
    if detector is None:
        return Reasons(calibration)
    if not len(calibration):
        calibration = detector.calibration(run.effort)
    if detector.clean_reference is None:
        return OneStatistic(calibration)
    reference = adapter.reference if isinstance(adapter, AdaptedScores) else detector.clean_reference
    reference = without_embeddings(reference)
    if not detector.evidence:
        return ReactionReasons(calibration, reference)
    test, base = (adapter.test, adapter.base) if isinstance(adapter, AgreementScores) else (None, adapter)
    evidence = base.evidence if isinstance(base, AdaptedEvidence) else detector.combination()
    return EvidenceReasons(calibration, reference, evidence, test)


def _departures(detector: Detector, run: Run) -> Departures:
    """Of the calibration images. Raises ConfigError when nothing was predicted."""
    if not len(detector.departures):
        raise ConfigError(
            f"agreement: the detector {run.detector} was fitted without a prediction, so samples cannot be compared. Leave it out, or fit "
            "with the scorer evidence and enough auxiliary images (`sanitize fit` says how many) and scan again."
        )
    return detector.departures


def _warn_of_small_calibration(policy: ThresholdPolicy, threshold: float, calibration: int) -> None:
    if policy.policy == "calibrated" and not thresholds.is_counted(calibration, policy.fpr):
        log.warning(
            "fpr %g: %d calibration scores are few for it, so the cut is an estimate. Fit with auxiliary images that leave %d to calibrate "
            "on for one that is counted",
            policy.fpr,
            calibration,
            thresholds.fewest_for(policy.fpr, counted=True),
        )
    share = thresholds.smallest_share(calibration, policy.fpr) if policy.policy == "fdr" else 0
    if share > RARE and math.isinf(threshold):
        log.warning(
            "fdr %g removes nothing: with %d calibration scores it acts only where %.1f %% of a scan stand out. To act on %g %%, fit "
            "with auxiliary images that leave %d to calibrate on, or use --policy calibrated",
            policy.fpr,
            calibration,
            100 * share,
            100 * RARE,
            math.ceil(1 / (policy.fpr * RARE) - 1 - 1e-9),
        )

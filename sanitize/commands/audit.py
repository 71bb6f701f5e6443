"""`sanitize audit`: what was flagged and why, as text and as one HTML page; with known truth, how well."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sanitize import storage
from sanitize.artifacts.detector_folder import load_detector
from sanitize.artifacts.scan_folder import Run, ScanFolder, Summary
from sanitize.auditing.findings import Campaign, find_campaigns
from sanitize.auditing.pictures import NO_PICTURES, Onlooker, Pictures
from sanitize.auditing.report import report_html
from sanitize.auditing.report_data import Findings
from sanitize.auditing.scored import (
    Mask,
    SampleRow,
    ScoredSamples,
    poisoned_of,
    read_scored,
    rows_with_key,
    sample_rows,
)
from sanitize.auditing.selection import Selection, select
from sanitize.auditing.text import audit_text, why_text
from sanitize.config_loading import to_mapping
from sanitize.deciding import Scanned, rule_again
from sanitize.errors import ConfigError, RefusedError, SanitizeError, check
from sanitize.metrics import Detection, detection
from sanitize.paths import AnyPath, path_text
from sanitize.stages import score_table
from sanitize.stages.campaigns import SINGLE, Groups
from sanitize.stages.decision_table import Rule
from sanitize.stages.reasons import Explanation
from sanitize.stages.score_table import Floats

log = logging.getLogger(__name__)
MOST_SHOWN = 10_000
REPORT, SUMMARY = "report.html", "summary.json"


@dataclass(frozen=True)
class CampaignSummary:
    """Flagged samples that share a place in the encoder's space. share: of the scan; within: of kept samples, as close to its centre
    as half of it."""

    samples: int
    share: float
    within: float
    shards: int


@dataclass(frozen=True)
class AuditSummary:
    """audit/summary.json. statuses: samples by status; detection: where the truth is known; decisions: SHA-256 that names what pass 2
    decided, "" = it is not through; shown: samples in the report; singles: flagged samples with a picture that are in no campaign."""

    samples: int
    statuses: dict[str, int]
    threshold: float | None
    removed: int | None
    detection: Detection | None
    detection_at_threshold: dict[str, float] | None
    decisions: str = ""
    shown: int = 0
    campaigns: tuple[CampaignSummary, ...] = ()
    singles: int = 0


@dataclass(frozen=True)
class AuditResult:
    text: str  # for the terminal
    detection: Detection | None
    detection_at_threshold: dict[str, float] | None
    report: str


def audit(out: AnyPath, truth: AnyPath = "", top: int = MOST_SHOWN) -> AuditResult:
    """Summarise a scan; write summary.json and report.html into `out`/audit. top: flagged samples in the report; 0 = no images are read."""
    out, truth = path_text(out, "out"), path_text(truth, "truth")
    check(top >= 0, f"top: {top} samples; give 0 (no images) or more.")
    folder = ScanFolder(out)
    run, summary = folder.run(), folder.summary()
    scored = read_scored(folder, run, summary)
    finite = np.isfinite(scored.scores)
    if not finite.any():
        raise ConfigError(
            f"{out}: no sample has a score; nothing to audit. Look at the `reason` column in scores/*.parquet."
        )
    poisoned = poisoned_of(scored, truth) if truth else None
    quality = detection(scored.scores[finite], poisoned[finite]) if poisoned is not None else None
    at_threshold = (
        _at_threshold(scored.removed, poisoned) if poisoned is not None and scored.removed is not None else None
    )
    found = _look(out, folder, run, summary, scored, top)
    report = storage.join(out, "audit", REPORT)
    storage.write_bytes(report, report_html(found))
    singles = int((found.groups == SINGLE).sum())
    written = AuditSummary(
        samples=len(scored),
        statuses=dict(sorted(scored.statuses.items())),
        threshold=summary.threshold if summary else None,
        removed=summary.removed if summary else None,
        detection=quality,
        detection_at_threshold=at_threshold,
        decisions=summary.markers_sha256 if summary else "",
        shown=len(found.shown),
        campaigns=tuple(_summed(campaign, len(scored)) for campaign in found.campaigns),
        singles=singles,
    )
    _write_summary(out, written)
    highest = np.argsort(-np.nan_to_num(scored.scores, nan=-np.inf), kind="stable")[:5]
    sizes = np.bincount(found.groups[found.groups >= 0]).tolist()
    text = audit_text(
        out, scored, summary, sample_rows(folder, scored, highest.tolist()), sizes, singles, quality, at_threshold
    )
    return AuditResult(text, quality, at_threshold, report)


def why(out: AnyPath, key: str) -> str:
    """Everything a scan knows of the samples with this key, for the terminal; of kept ones as well what speaks against them."""
    folder = ScanFolder(path_text(out, "out"))
    run, summary = folder.run(), folder.summary()
    scored = read_scored(folder, run, summary)
    rows = sample_rows(folder, scored, rows_with_key(folder, scored, key))
    told = _told(folder, summary, [row for row in rows if row.score is not None])
    return "\n".join(why_text(row, told.get(row.row)) for row in rows)


def _told(folder: ScanFolder, summary: Summary | None, rows: Sequence[SampleRow]) -> dict[int, Explanation]:
    """By row: its score as the rule explains it that decided; nothing where that cannot be found again."""
    if summary is None or not rows:
        return {}
    try:
        rule = _rule(folder, summary)
    except SanitizeError as error:
        log.warning("the shares of each statistic are not known: %s", error)
        return {}
    tables = {shard: score_table.read(folder.scores(shard), rule.columns) for shard in {row.shard for row in rows}}
    return {row.row: rule.explain(tables[row.shard].slice(row.index, 1)) for row in rows}


def _rule(folder: ScanFolder, summary: Summary) -> Rule:
    return rule_again([Scanned.of(path, ignore_reviews=True) for path in (folder.path, *summary.together)], summary)


def require_current(out: AnyPath) -> str:
    """The report, if it shows the decisions that the scan folder holds. Raises RefusedError when it shows others."""
    folder = ScanFolder(path_text(out, "out"))
    folder.run()  # is there a scan?
    path = folder.at("audit", SUMMARY)
    if not storage.exists(path):
        raise ConfigError(f"{folder.path}: no report there. Run `sanitize audit {folder.path}`.")
    summary = folder.summary()
    if storage.read_json(path).get("decisions") != (summary.markers_sha256 if summary else ""):
        raise RefusedError(
            f"{folder.at('audit', REPORT)}: shows other decisions than {folder.path} holds now. Run `sanitize audit {folder.path}` again."
        )
    return folder.at("audit", REPORT)


def _at_threshold(removed: Mask, poisoned: Mask) -> dict[str, float]:
    return {
        "true_positive_rate": float(removed[poisoned].mean()),
        "false_positive_rate": float(removed[~poisoned].mean()),
        "precision": float(poisoned[removed].mean()) if removed.any() else 0.0,
    }


def _write_summary(out: str, summary: AuditSummary) -> None:
    values = to_mapping(summary)
    if summary.threshold is not None and not np.isfinite(summary.threshold):
        values["threshold"] = str(summary.threshold)  # JSON has no infinity
    storage.write_json(storage.join(out, "audit", SUMMARY), values)


def _summed(campaign: Campaign, samples: int) -> CampaignSummary:
    return CampaignSummary(len(campaign), len(campaign) / samples, campaign.within, len(campaign.shards))


# ---------------------------------------------------------------- looking


def _look(out: str, folder: ScanFolder, run: Run, summary: Summary | None, scored: ScoredSamples, top: int) -> Findings:
    """What the report shows: samples, their pictures, and the campaigns among them."""
    selection, notices = select(scored, top), list[str]()
    shown = sample_rows(folder, scored, selection.shown.tolist()) if top else []
    shown = sorted(shown, key=lambda row: (row.score is None, -(row.score or 0.0), row.row))
    pictures = kept = flagged = NO_PICTURES
    groups: Groups = np.empty(0, np.int64)
    campaigns: Sequence[Campaign] = ()
    onlooker = _onlooker(run, len(shown), notices) if shown else None
    if onlooker:
        kept_rows = sample_rows(folder, scored, selection.kept.tolist())
        pictures, kept = onlooker.look_at(shown), onlooker.look_at(kept_rows)
        flagged = pictures.only(selection.flagged)
        notices += _missing(pictures)
        groups, campaigns = find_campaigns(flagged, kept, {row.row: row for row in shown}, onlooker)
    notices += _left_out(scored, selection, top)
    return Findings(
        out=out,
        run=run,
        summary=summary,
        scored=scored,
        shown=shown,
        near=frozenset(selection.near.tolist()),
        pictures=pictures,
        flagged=flagged,
        kept=kept,
        groups=groups,
        campaigns=campaigns,
        calibration=_calibration(folder, run, summary, notices),
        notices=notices,
    )


def _onlooker(run: Run, samples: int, notices: list[str]) -> Onlooker | None:
    side = 128 if samples <= 1500 else 96 if samples <= 4000 else 64  # the page stays below some tens of megabytes
    try:
        return Onlooker(run, side)
    except SanitizeError as error:
        log.warning("%s", error)
        notices.append(f"Without images and campaigns: {error}")
        return None


def _missing(pictures: Pictures) -> list[str]:
    if not pictures.missing:
        return []
    reason = next(iter(pictures.missing.values()))
    return [f"{len(pictures.missing)} samples have no picture (first: {reason[:300]})"]


def _left_out(scored: ScoredSamples, selection: Selection, top: int) -> list[str]:
    flagged = int(scored.removed.sum()) if scored.removed is not None else len(selection.flagged)
    if flagged <= len(selection.flagged):
        return []
    return [f"{flagged - top:,} removed samples with lower scores are not in this page; --top shows more."]


def _calibration(folder: ScanFolder, run: Run, summary: Summary | None, notices: list[str]) -> Floats | None:
    """Sorted scores of clean images, those that decided; None where the detector is gone, or the rule cannot be found again."""
    try:
        detector = load_detector(run.detector)
        if detector.fingerprint != run.detector_fingerprint:
            return None
        return _rule(folder, summary).reasons.calibration if summary else detector.calibration(run.effort)
    except SanitizeError as error:
        notices.append(f"Without a comparison with clean images: {error}")
        return None

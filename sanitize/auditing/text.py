"""What an audit says on the terminal. Keys, captions and names are hostile: no control character of theirs reaches it."""

from collections.abc import Sequence

import numpy as np

from sanitize.artifacts.scan_folder import Summary
from sanitize.auditing.scored import SampleRow, ScoredSamples
from sanitize.metrics import Detection
from sanitize.stages.reasons import Explanation
from sanitize.stages.score_table import STATISTICS
from sanitize.stages.shards import printable

LONGEST = 160  # characters of a name on the terminal


def shown(text: str, longest: int = LONGEST) -> str:
    """One line that a terminal shows as it is."""
    clean = printable(text[: longest + 1])
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


def audit_text(
    out: str,
    scored: ScoredSamples,
    summary: Summary | None,
    most_suspicious: Sequence[SampleRow],
    campaigns: Sequence[int],
    singles: int,
    quality: Detection | None,
    at_threshold: dict[str, float] | None,
) -> str:
    """campaigns: size of each, largest first; singles: flagged samples in none."""
    lines = [*_scores(out, scored, summary), *_quality(quality, at_threshold)]
    if campaigns:
        sizes = ", ".join(map(str, campaigns[:8])) + (", ..." if len(campaigns) > 8 else "")
        lines.append(
            f"  campaigns (flagged samples that share a place): {len(campaigns)}, of {sizes}; {singles} single"
        )
    lines.append("  most suspicious:")
    lines += [
        f"    {row.score or float('nan'):.4g}  {shown(row.shard)} {shown(row.key)}"
        + (f"  ({shown(row.reason)})" if row.reason else "")
        for row in most_suspicious
    ]
    return "\n".join(lines)


def _told(row: SampleRow, told: Explanation | None) -> list[str]:
    """How far below the cut a kept sample is, what most of its score comes from, and the share of each statistic in it."""
    lines = []
    if row.score is not None and row.threshold is not None and not row.removed and row.score <= row.threshold < np.inf:
        lines.append(f"  kept: below the cut by {row.threshold - row.score:.4g}")
    if told is None:
        return lines
    if not row.removed:
        lines.append(f"  most of its score: {shown(told.words[0], 600)}")
    shares = {name: float(values[0]) for name, values in told.contributions.items() if np.isfinite(values[0])}
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    if ordered:
        lines.append("  shares in it: " + ", ".join(f"{name} {share:.3g}" for name, share in ordered))
    return lines


def _scores(out: str, scored: ScoredSamples, summary: Summary | None) -> list[str]:
    finite = scored.scores[np.isfinite(scored.scores)]
    lines = [f"{out}: {len(scored)} samples, {len(finite)} with a score"]
    lines += [
        f"  {count} without: {shown(status)}" for status, count in sorted(scored.statuses.items()) if status != "ok"
    ]
    low, high = np.median(finite), np.quantile(finite, 0.99)
    lines.append(f"  score: median {low:.4g}, 99 % {high:.4g}, highest {finite.max():.4g}")
    similar = scored.similarities[np.isfinite(scored.similarities)]
    if len(similar):
        low, median = np.quantile(similar, (0.01, 0.5))
        lines.append(
            f"  captions: {len(similar)} compared, cosine with the image: median {median:.3f}, lowest 1 % below {low:.3f}"
        )
    if summary:
        lines.append(f"  policy {summary.policy.policy}: threshold {summary.threshold:.4g}, {summary.removed} removed")
    return lines


def _quality(quality: Detection | None, at_threshold: dict[str, float] | None) -> list[str]:
    lines = []
    if quality:
        lines.append(
            f"  truth: {quality.poisoned} poisoned, {quality.clean} clean: AUROC {quality.auroc:.4f}, AUPRC {quality.auprc:.4f}, "
            f"TPR {quality.tpr_at_1pct:.3f} at 1 % FPR, {quality.tpr_at_5pct:.3f} at 5 % FPR, FPR {quality.fpr_at_95tpr:.4f} at 95 % TPR"
        )
    if at_threshold:
        lines.append(
            f"  at the threshold: {at_threshold['true_positive_rate']:.1%} of the poisoned and "
            f"{at_threshold['false_positive_rate']:.2%} of the clean samples removed, precision {at_threshold['precision']:.1%}"
        )
    return lines


def why_text(row: SampleRow, told: Explanation | None = None) -> str:
    """Why one sample was kept or removed: its decision, and every column it has, with what the column means. told: of this sample
    alone, None = not known."""
    decision = "not decided" if row.removed is None else "removed" if row.removed else "kept"
    lines = [
        f"{shown(row.shard)} {shown(row.key)}: {decision}",
        f"  index {row.index}, {row.width} x {row.height} pixels, status {shown(row.status)}, sha256 {shown(row.sha256) or 'none'}",
    ]
    if row.reason:
        lines.append(f"  why: {shown(row.reason, 600)}")
    if row.score is not None:
        cut = "" if row.threshold is None else f", the cut is {row.threshold:.4g}"
        lines.append(f"  score that decides: {row.score:.4g}{cut}")
        lines += _told(row, told)
    width = max(map(len, row.statistics), default=0)
    lines += [f"  {name:{width}s} {value:10.4g}  {STATISTICS[name]}" for name, value in row.statistics.items()]
    return "\n".join(lines)

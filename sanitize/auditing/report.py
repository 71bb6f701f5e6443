"""What was found → the values of report.html. Texts stay plain here; the page makes them harmless."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import sanitize
from sanitize.auditing.findings import Campaign
from sanitize.auditing.report_data import Findings, campaign_name, page_data, page_images
from sanitize.auditing.thresholds_table import ThresholdRow, thresholds_table
from sanitize.config_loading import to_mapping
from sanitize.pages.histogram import histogram
from sanitize.pages.rendering import data_uri, render
from sanitize.stages import campaigns
from sanitize.stages.thumbnails import cut_out, heat, thumbnail_of_unit

FULL_HEAT = 0.5  # of the way to kept images: the reddest


def report_html(found: Findings) -> bytes:
    """The whole page."""
    scored, finite = found.scored, np.isfinite(found.scored.scores)
    removed = scored.removed if scored.removed is not None else np.zeros(len(scored), bool)
    cut = found.summary.threshold if found.summary else None
    adapted = found.summary is not None and not np.array_equal(scored.scores, scored.as_scored, equal_nan=True)
    table = thresholds_table(scored.scores[finite], found.calibration, cut, found.out)
    return render(
        "report",
        title=f"What was flagged in {found.out.rsplit('/', 1)[-1]}",
        subtitle=found.out,
        version=sanitize.__version__,
        cards=_cards(found),
        notices=found.notices,
        histogram=histogram(
            scored.scores[finite],
            removed[finite],
            cut,
            found.calibration,
            scored.as_scored[np.isfinite(scored.as_scored)] if adapted else None,
        ),
        campaigns=[_campaign(number, campaign, found) for number, campaign in enumerate(found.campaigns)],
        campaigns_text=_campaigns_text(found),
        samples_text=f"{len(found.shown):,} samples: the flagged ones, highest score first, and the kept ones nearest to the cut.",
        map_text="Directions in which embeddings vary most, of the samples above and of a draw of kept ones. Click a point to see "
        "its sample.",
        threshold_columns=("Command", "Threshold", "Kept", "Removed", "Expected clean among removed"),
        thresholds=[_threshold_cells(row) for row in table],
        thresholds_text="The last column is how many samples would be removed if none were poison and all were like the "
        "calibration images; what is removed beyond it stands out for another reason. Samples without a score are not counted.",
        review_command=f"sanitize review {found.out} --decisions decisions.csv --by YOU",
        check_command=f"sanitize audit {found.out} --check",
        record=_record(found),
        data=page_data(found),
        images=page_images(found),
    )


def _cards(found: Findings) -> list[tuple[str, str, str]]:
    scored, total = found.scored, len(found.scored)
    removed = int(scored.removed.sum()) if scored.removed is not None else None
    unscored = total - int(np.isfinite(scored.scores).sum())
    singles = int((found.groups == campaigns.SINGLE).sum())
    grouped = len(found.groups) - singles
    cards = [("Samples", f"{total:,}", f"in {_count(len(scored.markers), 'shard')}")]
    if found.summary and removed is not None:
        policy = found.summary.policy
        rate = f", fpr {policy.fpr:g}" if policy.policy in ("calibrated", "fdr") else ""
        cards.append(("Removed", f"{removed:,}", f"{removed / total:.2%} of the scan"))
        cards.append(("Cut", f"{found.summary.threshold:.4g}", f"policy {policy.policy}{rate}"))
    else:
        cards.append(("Decided", "no", "the highest scores are shown"))
    cards.append(
        ("Campaigns", str(int(found.groups.max(initial=-1)) + 1), f"{grouped:,} samples in them, {singles:,} single")
    )
    cards.append(("Without a score", f"{unscored:,}", "unreadable or undecodable" if unscored else ""))
    return cards


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _campaigns_text(found: Findings) -> str:
    left_out = int(found.groups.max(initial=-1)) + 1 - len(found.campaigns)
    if not len(found.groups):
        return "No flagged sample could be embedded."
    if not found.campaigns:
        return "No group of five or more was found: all flagged samples are single."
    return f"{left_out} smaller ones are in the list of samples only." if left_out else ""


def _threshold_cells(row: ThresholdRow) -> dict[str, Any]:
    expected = "–" if row.expected_false is None else f"{row.expected_false:,.1f}"
    cells = [row.command, f"{row.threshold:.4g}", f"{row.kept:,}", f"{row.removed:,}", expected]
    return {"cells": cells, "current": row.current}


def _record(found: Findings) -> list[tuple[str, str]]:
    run, summary = found.run, found.summary
    entries = [("scan", found.out), ("decisions", summary.markers_sha256 if summary else "none")]
    if summary:
        policy = ", ".join(f"{name}={value}" for name, value in to_mapping(summary.policy).items())
        entries += [("rule", summary.rule), ("scores", summary.scores), ("policy", policy)]
    entries += [
        ("detector", run.detector),
        ("detector fingerprint", run.detector_fingerprint),
        ("encoder", str(run.encoder.get("architecture", ""))),
        ("effort, precision", f"{run.effort}, {run.precision} ({run.computed_in or 'unknown'})"),
        ("shards", f"{len(found.scored.markers)} scored of {len(run.shards)}"),
        ("versions of the scan", ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items()))),
        ("version of this report", sanitize.__version__),
    ]
    return entries


# ---------------------------------------------------------------- campaigns


def _campaign(number: int, campaign: Campaign, found: Findings) -> dict[str, Any]:
    total, flagged = len(found.scored), max(len(found.groups), 1)
    return {
        "number": number,
        "name": campaign_name(number),
        "text": f"{_count(len(campaign), 'sample')}, {len(campaign) / total:.2%} of the scan, {len(campaign) / flagged:.0%} of the "
        f"flagged. {campaign.within:.1%} of kept images lie as close to its centre as half of it does.",
        "shots": _shots(campaign, found),
        "shards": _notes(campaign.shards, len(campaign)),
        "labels": _notes(campaign.labels, len(campaign), campaign.usual_labels),
        "captions": _notes(campaign.captions, len(campaign)),
        "reasons": _notes(campaign.reasons, len(campaign)),
        "words": [(word, f"in {own:.0%}, of kept {usual:.0%}") for word, own, usual in campaign.words],
    }


def _notes(
    entries: Sequence[tuple[str, int]], size: int, usual: Mapping[str, float] | None = None, most: int = 6
) -> list[tuple[str, str]]:
    """(text, count and share) of the first; what is left is summed up. usual: share of each among kept samples, where that is known."""
    notes = []
    for text, count in entries[:most]:
        compared = "" if usual is None else f", of kept {usual.get(text, 0.0):.0%}"
        notes.append((text[:200], f"{count:,} ({count / size:.0%}{compared})"))
    if rest := entries[most:]:
        notes.append((f"{len(rest):,} others", f"{sum(count for _, count in rest):,}"))
    return notes


def _shots(campaign: Campaign, found: Findings) -> list[dict[str, str]]:
    deviation = (campaign.deviation.mean(dim=0, keepdim=True) / 0.3).expand(3, -1, -1)
    shots = [
        _shot(thumbnail_of_unit(campaign.mean), "mean image"),
        _shot(thumbnail_of_unit(deviation), "deviation: dark where all are alike"),
        _shot(cut_out(campaign.mean, campaign.common), "what they share and kept images do not"),
    ]
    for occluded in campaign.occluded:
        furthest = float(occluded.places.max())
        overlay = data_uri(heat((occluded.places / FULL_HEAT).clamp(0, 1)))
        caption = f"hiding the reddest place takes it {furthest:.0%} of the way to kept images"
        shots.append(_shot(thumbnail_of_unit(occluded.image, 128), caption, overlay))
    examples = [(found.flagged.pictures[member], "member") for member in campaign.members[len(campaign.occluded) :][:4]]
    examples += [(found.kept.pictures[position], "near, kept") for position in campaign.nearest[:4]]
    return shots + [_shot(picture.image, caption) for picture, caption in examples]


def _shot(image: bytes, caption: str, overlay: str = "") -> dict[str, str]:
    return {"image": data_uri(image), "caption": caption, "overlay": overlay}

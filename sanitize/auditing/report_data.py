"""All that a report shows, and the part of it that the page's script reads: samples as columns, their images, points of the map."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sanitize.artifacts.scan_folder import Run, Summary
from sanitize.auditing.findings import Campaign
from sanitize.auditing.pictures import Pictures
from sanitize.auditing.scored import SampleRow, ScoredSamples
from sanitize.pages.rendering import encoded
from sanitize.stages import campaigns
from sanitize.stages.score_table import STATISTICS, Floats

BLOCK = 192  # samples whose images the page parses at a time
KEY_BUDGET = 1 << 24  # characters of keys in one page; of longer ones beyond it only the beginning
SHORT_KEY = 1024
LONG_TEXT = 2000  # characters of a caption or reason
NOT_GROUPED = -2  # kept samples


@dataclass(frozen=True)
class Findings:
    """All that a report shows. shown: samples in the order of the page; near: rows of borderline ones; groups: of the flagged pictures;
    calibration: sorted scores of clean images on the scale of those that decided, None = unknown."""

    out: str
    run: Run
    summary: Summary | None
    scored: ScoredSamples
    shown: Sequence[SampleRow]
    near: frozenset[int]
    pictures: Pictures
    flagged: Pictures
    kept: Pictures
    groups: campaigns.Groups
    campaigns: Sequence[Campaign]
    calibration: Floats | None
    notices: Sequence[str]


def campaign_name(number: int) -> str:
    return f"Campaign {number + 1}"


def page_data(found: Findings) -> dict[str, Any]:
    """Columns, one entry a sample: a page of 10,000 rows parses them faster than as many objects."""
    shown = found.shown
    groups = dict(zip(found.flagged.rows.tolist(), found.groups.tolist(), strict=True))
    pictures = dict(zip(found.pictures.rows.tolist(), found.pictures.pictures, strict=True))
    shards, shard_codes = _coded([row.shard for row in shown])
    reasons, reason_codes = _coded([row.reason[:LONG_TEXT] for row in shown])
    statuses, status_codes = _coded([row.status for row in shown])
    keys, whole = _keys(shown)
    columns = {
        "key": keys,
        "whole": whole,
        "shard": shard_codes,
        "index": [row.index for row in shown],
        "score": [None if row.score is None else _rounded(row.score) for row in shown],
        "removed": [None if row.removed is None else int(row.removed) for row in shown],
        "near": [int(row.row in found.near) for row in shown],
        "campaign": [groups.get(row.row, campaigns.SINGLE if row.removed else NOT_GROUPED) for row in shown],
        "reason": reason_codes,
        "status": status_codes,
        "label": [pictures[row.row].label if row.row in pictures else "" for row in shown],
        "caption": [pictures[row.row].caption[:LONG_TEXT] if row.row in pictures else "" for row in shown],
        "missing": [found.pictures.missing.get(row.row, "")[:200] for row in shown],
        "side": [min(row.width, row.height) for row in shown],
        "width": [row.width for row in shown],
        "height": [row.height for row in shown],
        "sha256": [row.sha256 for row in shown],
    }
    names = [name for name in STATISTICS if any(name in row.statistics for row in shown)]
    statistics = {
        name: [_rounded(row.statistics[name]) if name in row.statistics else None for row in shown] for name in names
    }
    cut = found.summary.threshold if found.summary else 0.0
    return {
        "rows": columns | {"statistics": statistics},
        "shards": shards,
        "reasons": reasons,
        "statuses": statuses,
        "statistics": names,
        "campaigns": [campaign_name(number) for number in range(int(found.groups.max(initial=-1)) + 1)],
        "threshold": cut if np.isfinite(cut) else 0.0,
        "block": BLOCK,
        "points": _points(found, groups),
    }


def _coded(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Different texts, and the number of each."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(text, len(numbers)) for text in texts]
    return list(numbers), codes


def _keys(shown: Sequence[SampleRow]) -> tuple[list[str], list[int]]:
    """Keys, and whether each is whole: one that is not cannot be marked in the page."""
    left, keys, whole = KEY_BUDGET, [], []
    for row in shown:
        fits = len(row.key) <= max(left, SHORT_KEY)
        keys.append(row.key if fits else row.key[:SHORT_KEY])
        whole.append(int(fits))
        left -= len(keys[-1])
    return keys, whole


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def page_images(found: Findings) -> list[list[tuple[str, str]]]:
    """Image and reconstruction of each sample in base64, in blocks; "" where there is none."""
    pictures = dict(zip(found.pictures.rows.tolist(), found.pictures.pictures, strict=True))
    pairs = [
        (encoded(pictures[row.row].image), encoded(pictures[row.row].reconstruction))
        if row.row in pictures
        else ("", "")
        for row in found.shown
    ]
    return [pairs[start : start + BLOCK] for start in range(0, len(pairs), BLOCK)]


def _points(found: Findings, groups: dict[int, int]) -> dict[str, list[Any]]:
    """Kept samples first, so that campaigns are drawn over them."""
    parts = [part.embeddings for part in (found.kept, found.pictures) if len(part.rows)]
    positions = campaigns.map_positions(np.concatenate(parts) if parts else found.kept.embeddings)
    place = {row.row: number for number, row in enumerate(found.shown)}
    numbers = [-1] * len(found.kept.rows) + [place[row] for row in found.pictures.rows.tolist()]
    owners = [NOT_GROUPED] * len(found.kept.rows)
    removed = {row.row for row in found.shown if row.removed}
    owners += [
        groups.get(row, campaigns.SINGLE if row in removed else NOT_GROUPED) for row in found.pictures.rows.tolist()
    ]
    return {
        "x": np.round(positions[:, 0].astype(float), 4).tolist(),
        "y": np.round(positions[:, 1].astype(float), 4).tolist(),
        "row": numbers,
        "campaign": owners,
    }

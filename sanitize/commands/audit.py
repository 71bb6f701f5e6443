"""`sanitize audit`: what was flagged and why; with known truth, how well."""

import base64
import html
import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sanitize import plots, runtime, storage
from sanitize.artifacts.detector_folder import load_detector, load_matching_encoder, make_scorer
from sanitize.artifacts.scan_folder import Run, ScanFolder, ShardMarker, Summary
from sanitize.artifacts.truth import load_poisoned
from sanitize.config_loading import to_mapping
from sanitize.errors import ConfigError
from sanitize.metrics import Detection, detection
from sanitize.paths import AnyPath, path_text
from sanitize.records import DecodedImage
from sanitize.stages import score_table
from sanitize.stages.decision_table import Decisions
from sanitize.stages.images import decode_sample, shrink
from sanitize.stages.score_table import Floats
from sanitize.stages.scoring import normalised
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import open_shard

log = logging.getLogger(__name__)
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ScoredSamples:
    """All rows of a scan, in shard order; scores and similarities (N,) float32 with NaN where there is none.

    scores: that decided, where pass 2 is through; removed: None where it is not
    """

    shards: NDArray[np.object_]
    keys: NDArray[np.object_]
    indices: NDArray[np.int64]
    statuses: NDArray[np.object_]
    scores: Floats
    similarities: Floats  # of image and caption
    removed: Mask | None


@dataclass(frozen=True)
class AuditSummary:
    """audit/summary.json. statuses: samples by status; detection: where the truth is known; the rest: where pass 2 is through."""

    samples: int
    statuses: dict[str, int]
    threshold: float | None
    removed: int | None
    detection: Detection | None
    detection_at_threshold: dict[str, float] | None


@dataclass(frozen=True)
class AuditResult:
    text: str  # for the terminal
    detection: Detection | None
    detection_at_threshold: dict[str, float] | None
    report: str


def audit(out: AnyPath, truth: AnyPath = "", top: int = 32) -> AuditResult:
    """Summarise a scan; write summary.json, histogram.png, suspicious.png and report.html into `out`/audit."""
    out, truth = path_text(out, "out"), path_text(truth, "truth")
    folder = ScanFolder(out)
    run, summary = folder.run(), folder.summary()
    scored = _read(folder, run, summary)
    finite = np.isfinite(scored.scores)
    if not finite.any():
        raise ConfigError(
            f"{out}: no sample has a score; nothing to audit. Look at the `reason` column in scores/*.parquet."
        )
    threshold = summary.threshold if summary else None
    poisoned = _poisoned(scored, truth) if truth else None
    quality = at_threshold = known = None
    if poisoned is not None:
        known = poisoned[finite]
        quality = detection(scored.scores[finite], known)
        at_threshold = _at_threshold(scored.removed, poisoned) if scored.removed is not None else None
    report = storage.join(out, "audit")
    plots.write_histogram(storage.join(report, "histogram.png"), scored.scores[finite], threshold, known)
    if top:
        _write_suspicious(storage.join(report, "suspicious.png"), run, scored, poisoned, top)
    text = _text(out, scored, summary, quality, at_threshold)
    written = AuditSummary(
        samples=len(scored.scores),
        statuses=dict(sorted(Counter(scored.statuses.tolist()).items())),
        threshold=threshold,
        removed=summary.removed if summary else None,
        detection=quality,
        detection_at_threshold=at_threshold,
    )
    values = to_mapping(written)
    if threshold is not None and not np.isfinite(threshold):
        values["threshold"] = str(threshold)  # JSON has no infinity
    storage.write_json(storage.join(report, "summary.json"), values)
    _write_html(report, text)
    return AuditResult(text, quality, at_threshold, storage.join(report, "report.html"))


def _read(folder: ScanFolder, run: Run, summary: Summary | None) -> ScoredSamples:
    names = ["shard", "key", "index", "status", "score", "text_similarity"]
    markers = folder.markers(sorted(run.shards))
    if not markers:
        raise ConfigError(f"{folder.path}: no score table there. Run `sanitize scan` again.")
    tables = list(score_table.read_each([folder.scores(marker.shard) for marker in markers], names))
    table = pa.concat_tables(tables)
    shards, keys, indices, statuses = (table.column(name).to_numpy(zero_copy_only=False) for name in names[:4])
    scores, removed = score_table.numbers(table, "score"), None
    if summary:
        decided = list(storage.read_ahead(lambda pair: _decided(folder, *pair), zip(markers, tables, strict=True)))
        scores = np.concatenate([part.scores for part in decided])
        removed = ~np.concatenate([part.keep for part in decided])
    similarities = score_table.numbers(table, "text_similarity")
    return ScoredSamples(shards, keys, indices, statuses, scores, similarities, removed)


def _decided(folder: ScanFolder, marker: ShardMarker, table: pa.Table) -> Decisions:
    """What pass 2 decided; of a shard that it could not split, nothing is in clean/."""
    if marker.clean:
        return folder.decisions(marker)
    return Decisions(np.zeros(len(table), bool), table.column("key").to_pylist(), score_table.numbers(table, "score"))


def _poisoned(scored: ScoredSamples, truth: str) -> Mask:
    known = load_poisoned(truth)
    identities = list(zip(scored.shards.tolist(), scored.indices.tolist(), strict=True))
    if missing := known - set(identities):
        shard, index = min(missing)
        raise ConfigError(
            f"{truth}: names {len(missing)} samples that the scan does not have (first: shard {shard}, index {index}). "
            "Give the truth file of the shards that were scanned."
        )
    return np.array([identity in known for identity in identities])


def _at_threshold(removed: Mask, poisoned: Mask) -> dict[str, float]:
    return {
        "true_positive_rate": float(removed[poisoned].mean()),
        "false_positive_rate": float(removed[~poisoned].mean()),
        "precision": float(poisoned[removed].mean()) if removed.any() else 0.0,
    }


def _text(
    out: str,
    scored: ScoredSamples,
    summary: Summary | None,
    quality: Detection | None,
    at_threshold: dict[str, float] | None,
) -> str:
    finite = scored.scores[np.isfinite(scored.scores)]
    counts = Counter(scored.statuses.tolist())
    lines = [f"{out}: {len(scored.scores)} samples, {len(finite)} with a score"]
    lines += [f"  {count} without: {status}" for status, count in sorted(counts.items()) if status != "ok"]
    lines.append(
        f"  score: median {np.median(finite):.4g}, 99 % {np.quantile(finite, 0.99):.4g}, highest {finite.max():.4g}"
    )
    similar = scored.similarities[np.isfinite(scored.similarities)]
    if len(similar):
        low, median = np.quantile(similar, (0.01, 0.5))
        lines.append(
            f"  captions: {len(similar)} compared, cosine with the image: median {median:.3f}, lowest 1 % below {low:.3f}"
        )
    if summary:
        lines.append(f"  policy {summary.policy.policy}: threshold {summary.threshold:.4g}, {summary.removed} removed")
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
    order = np.argsort(-np.nan_to_num(scored.scores, nan=-np.inf), kind="stable")[:5]
    lines += ["  most suspicious:"] + [
        f"    {scored.scores[i]:.4g}  {scored.shards[i]} {scored.keys[i]}" for i in order
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- images


def _write_suspicious(path: str, run: Run, scored: ScoredSamples, poisoned: Mask | None, top: int) -> None:
    """The `top` highest scores, each image beside what the decoder makes of its embedding."""
    order = np.argsort(-np.nan_to_num(scored.scores, nan=-np.inf), kind="stable")[:top]
    order = order[np.isfinite(scored.scores[order])]
    found = _decode_rows(run, scored, order)
    if not found:
        log.warning("the input shards are gone, so the most suspicious samples cannot be shown")
        return
    detector = load_detector(run.detector)
    encoder = load_matching_encoder(detector, None)
    scorer = make_scorer(detector, encoder, run.precision, runtime.device())
    size = detector.decoder.config.image_size
    cells = []
    for row in [row for row in order.tolist() if row in found]:
        images, embeddings = scorer.embed([found[row]])
        targets = normalised(images, encoder, size)
        reconstructions, _ = scorer.reconstruct(embeddings, targets, [found[row].sha256])
        reconstruction = (reconstructions * encoder.std + encoder.mean).clamp(0, 1).cpu()[0]
        name = "" if poisoned is None else ("poison " if poisoned[row] else "clean ")
        image = shrink(images, 96).cpu()[0].clamp(0, 1)
        cells += [(image, f"{name}{scored.scores[row]:.3g}"), (reconstruction, "decoded")]
    plots.write_sheet(path, cells, columns=8)


def _decode_rows(run: Run, scored: ScoredSamples, order: NDArray[np.int64]) -> dict[int, DecodedImage]:
    """Row → decoded image, reading each needed shard once."""
    wanted: dict[str, dict[int, int]] = {}
    for row in order.tolist():
        wanted.setdefault(scored.shards[row], {})[int(scored.indices[row])] = row
    found: dict[int, DecodedImage] = {}
    for stem, rows in wanted.items():
        shard = run.shard(stem)
        if not storage.exists(shard.url):
            continue
        with open_shard(shard) as file:
            for sample in ShardReader(file, shard, image_member=run.image_member).samples():
                if sample.index in rows:
                    found[rows[sample.index]] = decode_sample(sample)
    return {row: image for row, image in found.items() if image.pixels is not None}


def _write_html(folder: str, text: str) -> None:
    """One file with the images inside, so that it can be mailed."""
    parts = ["<!doctype html><meta charset='utf-8'><title>sanitize audit</title>", f"<pre>{html.escape(text)}</pre>"]
    for title, name in (
        ("Scores", "histogram.png"),
        ("Most suspicious samples and their reconstructions", "suspicious.png"),
    ):
        path = storage.join(folder, name)
        if storage.exists(path):
            data = base64.b64encode(storage.read_bytes(path)).decode()
            parts.append(f"<h2>{title}</h2><img alt='{name}' src='data:image/png;base64,{data}'>")
    storage.write_bytes(storage.join(folder, "report.html"), "\n".join(parts).encode())

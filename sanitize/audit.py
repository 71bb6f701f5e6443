"""`sanitize audit`: what was flagged and why; with known truth, how well."""

import base64
import html
import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sanitize import checkpoint, preview, runtime, storage
from sanitize.errors import ConfigError
from sanitize.metrics import Detection, detection
from sanitize.poison import load_truth
from sanitize.records import Picture, Shard
from sanitize.stages import score_table
from sanitize.stages.images import decode_sample, shrink
from sanitize.stages.scoring import normalised
from sanitize.stages.shards import ShardReader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """All rows of a scan, in shard order; scores and similarities (N,) float32 with NaN where there is none."""

    shards: NDArray[np.object_]
    keys: NDArray[np.object_]
    indices: NDArray[np.int64]
    statuses: NDArray[np.object_]
    scores: NDArray[np.float32]
    similarities: NDArray[np.float32]  # of image and caption


@dataclass(frozen=True)
class AuditResult:
    text: str  # for the terminal
    detection: Detection | None
    detection_at_threshold: dict[str, float] | None
    report: str


def audit(out: str, truth: str = "", top: int = 32) -> AuditResult:
    """Summarise a scan; write summary.json, histogram.png, suspicious.png and report.html into `out`/audit."""
    if not storage.exists(storage.join(out, "run.json")):
        raise ConfigError(f"{out}: no scan there (run.json is missing). Give the folder that `sanitize scan` wrote.")
    run = storage.read_json(storage.join(out, "run.json"))
    summary_path = storage.join(out, "summary.json")
    summary = storage.read_json(summary_path) if storage.exists(summary_path) else {}
    scored = _read(out, sorted(run["shards"]))
    scored = replace(scored, scores=_decided(out, len(scored.scores))) if summary else scored
    finite = np.isfinite(scored.scores)
    if not finite.any():
        raise ConfigError(
            f"{out}: no sample has a score; nothing to audit. Look at the `reason` column in scores/*.parquet."
        )
    threshold = float(summary["threshold"]) if summary else None
    poisoned = _poisoned(scored, truth) if truth else None
    quality = detection(scored.scores[finite], poisoned[finite]) if poisoned is not None else None
    at_threshold = (
        _at_threshold(scored, poisoned, threshold) if poisoned is not None and threshold is not None else None
    )
    folder = storage.join(out, "audit")
    known = poisoned[finite] if poisoned is not None else None
    preview.write_histogram(storage.join(folder, "histogram.png"), scored.scores[finite], threshold, known)
    if top:
        _write_suspicious(storage.join(folder, "suspicious.png"), run, scored, poisoned, top)
    text = _text(out, scored, summary, threshold, quality, at_threshold)
    values = {
        "samples": len(scored.scores),
        "statuses": dict(sorted(Counter(scored.statuses.tolist()).items())),
        "threshold": threshold if threshold is None or np.isfinite(threshold) else str(threshold),
        "removed": summary.get("removed"),
        "detection": asdict(quality) if quality else None,
        "detection_at_threshold": at_threshold,
    }
    storage.write_json(storage.join(folder, "summary.json"), values)
    _write_html(folder, text)
    return AuditResult(text, quality, at_threshold, storage.join(folder, "report.html"))


def _read(out: str, stems: list[str]) -> Scored:
    columns = ["shard", "key", "index", "status", "score", "text_similarity"]
    paths = [storage.join(out, "scores", f"{stem}.parquet") for stem in stems]
    tables = [score_table.read(path, columns) for path in paths if storage.exists(path)]
    if not tables:
        raise ConfigError(f"{out}: no score table there. Run `sanitize scan` again.")
    by_column: dict[str, Any] = {
        name: np.concatenate([table.column(name).to_numpy(zero_copy_only=False) for table in tables])
        for name in columns[:4]
    }
    scores, similarities = (
        np.concatenate([score_table.numbers(table, name) for table in tables]) for name in columns[4:]
    )
    return Scored(by_column["shard"], by_column["key"], by_column["index"], by_column["status"], scores, similarities)


def _decided(out: str, count: int) -> NDArray[np.float32]:
    """(N,) the scores that the decision was made by; they differ from the table's where pass 2 adapted them to the scan."""
    scores = score_table.numbers(score_table.read(storage.join(out, "decisions.parquet"), ["score"]), "score")
    if len(scores) != count:
        raise ConfigError(
            f"{out}: decisions.parquet covers {len(scores)} samples, the score table {count}. Run `sanitize clean {out}` first."
        )
    return scores


def _poisoned(scored: Scored, truth: str) -> NDArray[np.bool_]:
    known = load_truth(truth)
    identities = list(zip(scored.shards.tolist(), scored.indices.tolist(), strict=True))
    if missing := set(known) - set(identities):
        shard, index = sorted(missing)[0]
        raise ConfigError(
            f"{truth}: names {len(missing)} samples that the scan does not have (first: shard {shard}, index {index}). "
            "Give the truth file of the shards that were scanned."
        )
    return np.array([identity in known for identity in identities])


def _at_threshold(scored: Scored, poisoned: NDArray[np.bool_], threshold: float) -> dict[str, float]:
    removed = ~(scored.scores <= np.float32(threshold))
    return {
        "true_positive_rate": float(removed[poisoned].mean()),
        "false_positive_rate": float(removed[~poisoned].mean()),
        "precision": float(poisoned[removed].mean()) if removed.any() else 0.0,
    }


def _text(
    out: str,
    scored: Scored,
    summary: dict[str, Any],
    threshold: float | None,
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
        lines.append(f"  policy {summary['policy']['policy']}: threshold {threshold:.4g}, {summary['removed']} removed")
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


# ---------------------------------------------------------------- pictures


def _write_suspicious(
    path: str, run: dict[str, Any], scored: Scored, poisoned: NDArray[np.bool_] | None, top: int
) -> None:
    """The `top` highest scores, each image beside what the decoder makes of its embedding."""
    order = np.argsort(-np.nan_to_num(scored.scores, nan=-np.inf), kind="stable")[:top]
    order = order[np.isfinite(scored.scores[order])]
    pictures = _pictures(run, scored, order)
    if not pictures:
        log.warning("the input shards are gone, so the most suspicious samples cannot be shown")
        return
    detector = checkpoint.load(run["detector"])
    encoder = checkpoint.load_matching_encoder(detector, None)
    scorer = checkpoint.scorer(detector, encoder, run["precision"], runtime.device())
    size = detector.decoder.config.image_size
    cells = []
    for row in [row for row in order.tolist() if row in pictures]:
        images, embeddings = scorer.embed([pictures[row]])
        targets = normalised(images, encoder, size)
        reconstructions, _ = scorer.reconstruct(embeddings, targets, [pictures[row].sha256])
        decoded = (reconstructions * encoder.std + encoder.mean).clamp(0, 1).cpu()[0]
        name = "" if poisoned is None else ("poison " if poisoned[row] else "clean ")
        cells += [(shrink(images, 96).cpu()[0].clamp(0, 1), f"{name}{scored.scores[row]:.3g}"), (decoded, "decoded")]
    preview.write_sheet(path, cells, columns=8)


def _pictures(run: dict[str, Any], scored: Scored, order: NDArray[np.int64]) -> dict[int, Picture]:
    """Row → decoded picture, reading each needed shard once."""
    wanted: dict[str, dict[int, int]] = {}
    for row in order.tolist():
        wanted.setdefault(scored.shards[row], {})[int(scored.indices[row])] = row
    found: dict[int, Picture] = {}
    for stem, rows in wanted.items():
        entry = run["shards"][stem]
        if not storage.exists(entry["url"]):
            continue
        with storage.open_read(entry["url"]) as file:
            reader = ShardReader(file, Shard(entry["url"], stem, entry["bytes"]), image_member=run["image_member"])
            for sample in reader.samples():
                if sample.index in rows:
                    found[rows[sample.index]] = decode_sample(sample)
    return {row: picture for row, picture in found.items() if picture.pixels is not None}


def _write_html(folder: str, text: str) -> None:
    """One file with the pictures inside, so that it can be mailed."""
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

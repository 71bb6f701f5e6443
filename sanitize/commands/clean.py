"""`sanitize clean`: pass 2, scores → decisions → clean and quarantine shards. Reads scores only; never scores again.

Decided once: decisions.parquet says what is kept, and whoever acts on a decision reads it there. Kept samples are copied byte
for byte, headers included. Everything else of a shard (removed samples, members without a key) goes to the quarantine tar, so
clean + quarantine = input.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sanitize import runtime, storage
from sanitize.artifacts import decisions
from sanitize.artifacts.decisions import Decisions
from sanitize.artifacts.detector_folder import Detector, load_detector
from sanitize.artifacts.folder_lock import folder_lock
from sanitize.artifacts.scan_folder import (
    Run,
    ScanFolder,
    ShardMarker,
    Split,
    Summary,
    WrittenFile,
    decision_identity,
)
from sanitize.config import ThresholdPolicy
from sanitize.errors import RefusedError
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import ProgressCallback, Resources, ShardFunction
from sanitize.stages import score_table, thresholds
from sanitize.stages.adaptation import ScoreAdapter, score_adapter
from sanitize.stages.splitting import split_shard

log = logging.getLogger(__name__)
RARE = 0.01  # share of poison that every policy should be able to act on


@dataclass(frozen=True)
class CleanResult:
    """Counts of samples; `failed` names shards that could not be copied."""

    threshold: float
    kept: int
    removed: int
    unscored: int
    failed: tuple[str, ...]


def clean(
    out: str, policy: ThresholdPolicy, *, force: bool = False, resources: Resources | None = None, address: str = ""
) -> CleanResult:
    """Decide on the whole scan, write decisions.parquet and summary.json, split every shard (in this process by default)."""
    ScanFolder(out).run()  # is there a scan?
    with folder_lock(out, "clean"):
        return decide_and_split(out, policy, force=force, resources=resources, address=address)


def decide_and_split(
    out: str, policy: ThresholdPolicy, *, force: bool, resources: Resources | None, address: str
) -> CleanResult:
    """`clean` for a caller that holds the folder's lock."""
    folder = ScanFolder(out)
    run = folder.run()
    storage.remove_partials(out)
    markers = {marker.shard: marker for marker in folder.markers(sorted(run.shards))}
    scored = [run.shard(stem) for stem in markers]
    paths = [folder.scores(shard.stem) for shard in scored]
    detector = _detector(out, run, policy)
    calibration = detector.calibration(run.effort) if detector else np.empty(0, np.float32)
    reference = detector.adaptable_reference(run.effort) if detector and policy.adapt else None
    adapter = score_adapter(paths, reference, calibration)
    deciding = [adapter.scores(table) for table in score_table.read_each(paths, adapter.columns)]
    scores = np.concatenate([np.empty(0, np.float32), *deciding])
    threshold = thresholds.threshold_for(scores, calibration, policy)
    _warn_of_small_calibration(policy, threshold, len(calibration))
    kept = thresholds.keep(scores, threshold, policy.keep_unscored)
    _refuse_to_remove_most(scores, kept, force)
    folder.delete_summary()
    kept_of = dict(zip(markers, np.split(kept, np.cumsum([len(part) for part in deciding])[:-1]), strict=False))
    tables = score_table.read_each(paths, ["shard", "key", "index", "status", "reason"])
    rows = (_decide(*shard, threshold) for shard in zip(tables, deciding, kept_of.values(), strict=True))
    committed = decisions.write_decisions(folder.decisions_path, rows)
    todo = [shard for shard in scored if not _is_split(markers[shard.stem], decision_identity(kept_of[shard.stem]))]
    task = SplitTask(storage.absolute(out))
    resources = resources or runtime.plan(0, 0, -1, len(scored))
    failed = []
    with ProgressDisplay("clean", len(todo), sum(s.size for s in todo)) as display:
        for outcome in runtime.map_shards(task, todo, resources, display, address):
            failed += [outcome.error] if outcome.error else []
    unscored = int(np.isnan(scores).sum())
    result = CleanResult(threshold, int(kept.sum()), int((~kept).sum()), unscored, tuple(sorted(failed)))
    folder.write_summary(_summary(run, list(markers.values()), policy, adapter, result, committed))
    return result


# ---------------------------------------------------------------- deciding


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


def _warn_of_small_calibration(policy: ThresholdPolicy, threshold: float, calibration: int) -> None:
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


def _refuse_to_remove_most(scores: NDArray[np.float32], kept: NDArray[np.bool_], force: bool) -> None:
    removed = int((~kept).sum())
    if removed * 2 > len(kept) and not force:
        raise RefusedError(
            f"{removed} of {len(kept)} samples would be removed ({int(np.isnan(scores).sum())} of them have no score), which is "
            "more than half. Is the auxiliary set like these shards, and is the encoder the right one? Look at "
            "`sanitize audit`; try --policy robust; --force goes on anyway. No clean shard was written."
        )


def _decide(table: pa.Table, scores: NDArray[np.float32], kept: NDArray[np.bool_], threshold: float) -> pa.Table:
    """The rows of one shard in decisions.parquet. table: its score rows; scores, kept (N,)."""
    statuses, reasons = (table.column(name).to_pylist() for name in ("status", "reason"))
    columns = {name: table.column(name) for name in ("shard", "key", "index")}
    columns["keep"] = pa.array(kept)
    columns["reason"] = pa.array(
        [
            f"{status}: {reason}" if status != "ok" else "" if keep else "score above threshold"
            for status, reason, keep in zip(statuses, reasons, kept.tolist(), strict=True)
        ],
        pa.string(),
    )
    columns["score"] = pa.array(scores, mask=np.isnan(scores))
    columns["threshold"] = pa.array(np.full(len(kept), threshold, np.float32))
    return pa.table(columns, schema=decisions.SCHEMA)


def _summary(
    run: Run,
    markers: Sequence[ShardMarker],
    policy: ThresholdPolicy,
    adapter: ScoreAdapter,
    result: CleanResult,
    committed: str,
) -> Summary:
    unscored_shards = sorted(set(run.shards) - {marker.shard for marker in markers})
    return Summary(
        policy=policy,
        scores=adapter.identity,
        threshold=result.threshold,
        samples=result.kept + result.removed,
        kept=result.kept,
        removed=result.removed,
        unscored=result.unscored,
        shards=len(run.shards),
        shards_failed=(*unscored_shards, *result.failed),
        shards_damaged={marker.shard: marker.input.damage for marker in markers if marker.input.damage},
        loose_members=sum(marker.input.loose_members for marker in markers),
        decisions_sha256=committed,
    )


# ---------------------------------------------------------------- splitting


@dataclass(frozen=True)
class SplitTask:
    """Copy one shard into a clean and a quarantine tar, by its rows of decisions.parquet."""

    out: str

    def start(self, threads: int) -> ShardFunction[ShardMarker]:  # noqa: ARG002 - copying needs no threads
        folder = ScanFolder(self.out)
        table, run = folder.decisions(), folder.run()
        return lambda shard, progress: _split(folder, run, shard, table.of(shard.stem), progress)


def _is_split(marker: ShardMarker, decision: str) -> bool:
    return marker.clean is not None and marker.clean.decision == decision


def _split(folder: ScanFolder, run: Run, shard: Shard, decided: Decisions, progress: ProgressCallback) -> ShardMarker:
    marker = folder.marker(shard.stem)
    assert marker is not None, "only scored shards are split"
    decision = decision_identity(decided.keep)
    if _is_split(marker, decision):  # by a worker that was lost before it could say so
        return marker
    # forget what another decision left before anything can go wrong: its tars may hold what is to be removed now
    if marker.clean:
        marker = marker.unsplit()
        folder.write_marker(marker)
    for path in folder.tars(shard.stem):
        storage.delete(path)
    names = folder.part_names(shard.stem)
    parts = split_shard(
        folder.scored_shard(run, marker, decided),
        decided.keep,
        lambda keep: storage.atomic_write(folder.at(names[keep])),
    )
    files = {names[keep]: WrittenFile(part.size, part.sha256()) for keep, part in parts.items()}
    removed = int((~decided.keep).sum())
    split = Split(kept=len(decided.keep) - removed, removed=removed, decision=decision)
    marker = replace(marker, clean=split, files=marker.files | files)
    folder.write_marker(marker)
    progress(len(decided.keep), removed, shard.size)
    return marker

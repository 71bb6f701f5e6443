"""`sanitize clean`: pass 2, scores → decisions → clean and quarantine shards. Reads scores only; never scores again.

Kept samples are copied byte for byte, headers included. Everything else of a shard (removed samples, members without a
key) goes to the quarantine tar, so clean + quarantine = input.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sanitize import checkpoint, runtime, storage
from sanitize.checkpoint import Detector
from sanitize.config import ThresholdPolicy, to_mapping
from sanitize.errors import ConfigError, RefusedError, ShardError
from sanitize.judge import Judge
from sanitize.judge import judge as choose_judge
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources, Result, ShardFunction, Tick
from sanitize.stages import score_table, thresholds
from sanitize.stages.shards import ShardReader, end_archive, open_shard, read_block, sample_ranges

log = logging.getLogger(__name__)
RARE = 0.01  # share of poison that every policy should be able to act on
DECISIONS = pa.schema(
    [
        ("shard", pa.string()),
        ("key", pa.string()),
        ("index", pa.int64()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
    ]
)


@dataclass(frozen=True)
class CleanResult:
    """Counts of samples; `failed` names shards that could not be copied."""

    threshold: float
    kept: int
    removed: int
    unscored: int
    failed: tuple[str, ...]


@dataclass(frozen=True)
class SplitTask:
    """Copy one shard into a clean and a quarantine tar, by its score file and one threshold."""

    out: str
    policy: ThresholdPolicy
    judge: Judge
    threshold: float

    def start(self, threads: int) -> ShardFunction:  # noqa: ARG002 - copying needs no threads
        return self._split

    def _split(self, shard: Shard, tick: Tick) -> Result:
        path = storage.join(self.out, "done", f"{shard.stem}.json")
        marker = storage.read_json(path)
        decision = decision_identity(self.policy, self.judge, self.threshold)
        if marker.get("clean", {}).get("decision") == decision:
            return marker
        scores = self.judge.scores(score_path(self.out, shard))
        kept = thresholds.keep(scores, self.threshold, self.policy.keep_unscored)
        ranges = _ranges(shard, kept)
        if "clean" in marker:  # of another threshold: forget its files before they are touched
            marker = {name: value for name, value in marker.items() if name != "clean"}
            marker["files"] = {name: entry for name, entry in marker["files"].items() if name.startswith("scores/")}
            storage.write_json(path, marker)
        for folder in ("clean", "quarantine"):
            storage.delete(storage.join(self.out, folder, f"{shard.stem}.tar"))
        files = _split_shard(shard, ranges, self.out, marker["input"]["sha256"])
        counts = {"kept": int(kept.sum()), "removed": int((~kept).sum()), "decision": decision}
        result = marker | {"clean": counts, "files": marker["files"] | files}
        storage.write_json(path, result)
        tick(len(kept), int((~kept).sum()), shard.size)
        return result


def _ranges(shard: Shard, kept: NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """(start, end, kept) in tar order, covering the readable part of the shard without gaps; neighbours merged."""
    ranges: list[tuple[int, int, bool]] = []

    def add(start: int, end: int, keep: bool) -> None:
        if ranges and ranges[-1][2] is keep and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end, keep))

    with open_shard(shard) as file:
        reader = ShardReader(file, shard, with_images=False)
        position = 0
        for index, start, end in sample_ranges(reader.samples()):
            if index >= len(kept):
                raise ShardError(_changed(shard))
            if start > position:
                add(position, start, False)  # loose members
            add(start, end, bool(kept[index]))
            position = end
        if reader.readable_end > position:
            add(position, reader.readable_end, False)
    return ranges


def _split_shard(
    shard: Shard, ranges: Sequence[tuple[int, int, bool]], out: str, expected_sha256: str
) -> dict[str, dict[str, Any]]:
    """Copy every range to its tar in one pass, at most 1 MiB in memory; an empty tar is not written.

    The whole input is hashed on the way: a shard that changed since it was scored is refused, whatever its ranges hold.
    """
    names = {True: f"clean/{shard.stem}.tar", False: f"quarantine/{shard.stem}.tar"}
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_shard(shard))
        kinds = sorted({kind for _, _, kind in ranges})
        targets = {kind: stack.enter_context(storage.atomic_write(storage.join(out, names[kind]))) for kind in kinds}
        position = 0
        for start, end, kind in ranges:
            for data in _blocks(file, shard, start - position):
                digest.update(data)
            for data in _blocks(file, shard, end - start):
                digest.update(data)
                targets[kind].write(data)
            position = end
        for data in _blocks(file, shard, shard.size - position + 1):
            digest.update(data)
        if digest.hexdigest() != expected_sha256:
            raise ShardError(_changed(shard))
        for target in targets.values():
            end_archive(target)
    return {names[kind]: {"bytes": target.size, "sha256": target.sha256()} for kind, target in targets.items()}


def _blocks(file: IO[bytes], shard: Shard, count: int) -> Iterator[bytes]:
    """The next `count` bytes, or what is left of them."""
    while count > 0 and (data := read_block(file, min(1 << 20, count), shard.url)):
        count -= len(data)
        yield data


def _changed(shard: Shard) -> str:
    return f"{shard.url}: changed after it was scored. Scan it again into another --out."


def decision_identity(policy: ThresholdPolicy, judge: Judge, threshold: float) -> str:
    return f"{threshold!r} {judge.identity} keep_unscored={policy.keep_unscored}"


def score_path(out: str, shard: Shard) -> str:
    return storage.join(out, "scores", f"{shard.stem}.parquet")


# ---------------------------------------------------------------- the command


def clean(
    out: str, policy: ThresholdPolicy, *, force: bool = False, resources: Resources | None = None, address: str = ""
) -> CleanResult:
    """Decide on the whole scan, write decisions.parquet and summary.json, split every shard (in this process by default)."""
    run = storage.read_json(storage.join(out, "run.json")) if storage.exists(storage.join(out, "run.json")) else None
    if run is None:
        raise ConfigError(f"{out}: no scan there (run.json is missing). Run `sanitize scan` first, or give its folder.")
    storage.remove_partials(out)
    shards = [Shard(entry["url"], stem, entry["bytes"]) for stem, entry in sorted(run["shards"].items())]
    scored = [shard for shard in shards if storage.exists(storage.join(out, "done", f"{shard.stem}.json"))]
    detector = _detector(out, run, policy)
    calibration = detector.calibration(run["effort"]) if detector else np.empty(0, np.float32)
    paths = [score_path(out, shard) for shard in scored]
    judge = choose_judge(paths, detector, run["effort"], policy)
    scores = np.concatenate([np.empty(0, np.float32), *(judge.scores(path) for path in paths)])
    threshold = thresholds.cut_off(scores, calibration, policy)
    _warn_of_small_calibration(policy, threshold, len(calibration))
    kept = thresholds.keep(scores, threshold, policy.keep_unscored)
    _guard(scores, kept, force)
    storage.delete(storage.join(out, "summary.json"))
    decisions = _write_decisions(out, scored, policy, judge, threshold)
    task = SplitTask(storage.absolute(out), policy, judge, threshold)
    resources = resources or runtime.plan(0, 0, -1, len(scored))
    failed = []
    with ProgressDisplay("clean", len(scored), sum(s.size for s in scored)) as display:
        for outcome in runtime.map_shards(task, scored, resources, display, address):
            failed += [outcome.error] if outcome.error else []
    result = CleanResult(
        threshold, int(kept.sum()), int((~kept).sum()), int(np.isnan(scores).sum()), tuple(sorted(failed))
    )
    _write_summary(out, policy, judge, result, decisions, shards, scored)
    return result


def _detector(out: str, run: dict[str, Any], policy: ThresholdPolicy) -> Detector | None:
    """Only the policies that compare with its null scores need the detector folder."""
    if policy.policy not in ("calibrated", "fdr"):
        return None
    detector = checkpoint.load(run["detector"])
    if detector.fingerprint != run["detector_fingerprint"]:
        raise RefusedError(
            f"{run['detector']}: is not the detector that {out} was scanned with. Restore it, or scan again."
        )
    return detector


def _warn_of_small_calibration(policy: ThresholdPolicy, threshold: float, calibration: int) -> None:
    share = thresholds.smallest_share(calibration, policy.fpr) if policy.policy == "fdr" else 0
    if share > RARE and math.isinf(threshold):
        log.warning(
            "fdr %g removes nothing: with %d calibration scores it acts only where %.1f %% of a scan stand out. To act on %g %%, fit "
            "with auxiliary images that leave %d to calibrate on, or use --policy calibrated",
            *(policy.fpr, calibration, 100 * share, 100 * RARE, math.ceil(1 / (policy.fpr * RARE) - 1 - 1e-9)),
        )


def _guard(scores: NDArray[np.float32], kept: NDArray[np.bool_], force: bool) -> None:
    removed = int((~kept).sum())
    if removed * 2 > len(kept) and not force:
        raise RefusedError(
            f"{removed} of {len(kept)} samples would be removed ({int(np.isnan(scores).sum())} of them have no score), which is "
            "more than half. Is the auxiliary set like these shards, and is the encoder the right one? Look at "
            "`sanitize audit`; try --policy robust; --force goes on anyway. No clean shard was written."
        )


def _write_decisions(out: str, shards: Sequence[Shard], policy: ThresholdPolicy, judge: Judge, threshold: float) -> str:
    """decisions.parquet, one shard in memory at a time; returns its SHA-256."""
    path = storage.join(out, "decisions.parquet")
    with storage.atomic_write(path) as target, pq.ParquetWriter(target, DECISIONS, compression="zstd") as writer:
        for table in _decisions(out, shards, policy, judge, threshold):
            writer.write_table(table)
    return target.sha256()


def _decisions(
    out: str, shards: Sequence[Shard], policy: ThresholdPolicy, judge: Judge, threshold: float
) -> Iterator[pa.Table]:
    columns = ["shard", "key", "index", "status", "reason"]
    for shard in shards:
        table = score_table.read(score_path(out, shard), columns)
        scores = judge.scores(score_path(out, shard))
        kept = thresholds.keep(scores, threshold, policy.keep_unscored)
        reasons = [
            f"{status}: {reason}" if status != "ok" else "" if keep else "score above threshold"
            for status, reason, keep in zip(
                table.column("status").to_pylist(), table.column("reason").to_pylist(), kept.tolist(), strict=True
            )
        ]
        arrays = [table.column(name) for name in ("shard", "key", "index")] + [
            pa.array(kept),
            pa.array(reasons, pa.string()),
        ]
        arrays += [pa.array(scores, mask=np.isnan(scores)), pa.array(np.full(len(kept), threshold, np.float32))]
        yield pa.table(arrays, schema=DECISIONS)


def _write_summary(
    out: str,
    policy: ThresholdPolicy,
    judge: Judge,
    result: CleanResult,
    decisions: str,
    shards: Sequence[Shard],
    scored: Sequence[Shard],
) -> None:
    markers = [storage.read_json(storage.join(out, "done", f"{shard.stem}.json")) for shard in scored]
    summary = {
        "policy": to_mapping(policy),
        "scores": judge.identity,
        "threshold": result.threshold if np.isfinite(result.threshold) else str(result.threshold),
        "samples": result.kept + result.removed,
        "kept": result.kept,
        "removed": result.removed,
        "unscored": result.unscored,
        "shards": len(shards),
        "shards_failed": sorted({s.stem for s in shards} - {s.stem for s in scored}) + list(result.failed),
        "shards_damaged": {m["shard"]: m["input"]["damage"] for m in markers if m["input"]["damage"]},
        "loose_members": sum(marker["input"]["loose_members"] for marker in markers),
        "decisions_sha256": decisions,
    }
    storage.write_json(storage.join(out, "summary.json"), summary)

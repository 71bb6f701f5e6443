"""`sanitize clean`: pass 2, scores → rule → decisions → clean and quarantine shards. Reads scores only; never scores again.

The rule is found once, from the scores of the whole scan. The worker that splits a shard applies it and writes what it decided to
decisions/<stem>.parquet: whoever acts on a decision reads it there. Kept samples are copied byte for byte, headers included.
Everything else of a shard (removed samples, members without a key) goes to the quarantine tar, so clean + quarantine = input.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sanitize import runtime, storage, workers
from sanitize.artifacts.folder_lock import folder_locks
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
from sanitize.deciding import CleanResult, Scanned, find_rule, is_most
from sanitize.errors import ConfigError, StorageError
from sanitize.paths import AnyPath, path_text
from sanitize.progress import ProgressDisplay
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages import decision_table, score_table
from sanitize.stages.adaptation import Floats, ScoreAdapter, scores_of, scores_of_all
from sanitize.stages.decision_table import Decisions, Rule, split_identity, write_decisions
from sanitize.stages.splitting import ScoredShard, split_shard
from sanitize.stages.unpacking import is_compressed
from sanitize.workers import ProgressCallback, ShardFunction

log = logging.getLogger(__name__)
IN_FLIGHT = 1 << 30  # bytes of shards that one worker copies at a time, over a network


def clean(
    out: AnyPath,
    policy: ThresholdPolicy,
    *,
    force: bool = False,
    resources: Resources | None = None,
    address: str = "",
    ignore_reviews: bool = False,
) -> CleanResult:
    """Find the rule for the whole scan, decide on and split every shard by it (in this process by default), write summary.json.

    ignore_reviews: this time the score alone decides; the reviews stay, and the next `clean` takes them into account again.
    """
    outs = [path_text(out, "out")]
    return clean_together(
        outs, policy, force=force, resources=resources, address=address, ignore_reviews=ignore_reviews
    )[0]


def clean_together(
    outs: Sequence[str],
    policy: ThresholdPolicy,
    *,
    force: bool = False,
    resources: Resources | None = None,
    address: str = "",
    ignore_reviews: bool = False,
) -> list[CleanResult]:
    """`clean` of several scans of one data set by one rule, as if they were one; a result for each."""
    for out in outs:
        ScanFolder(out).run()  # is there a scan?
        if sum(storage.real(other) == storage.real(out) for other in outs) > 1:
            raise ConfigError(f"{out}: is given twice. Name each scan once.")
    with folder_locks(outs, "clean"):
        return decide_and_split(
            outs, policy, force=force, resources=resources, address=address, ignore_reviews=ignore_reviews
        )


def preview(outs: Sequence[str], policy: ThresholdPolicy, ignore_reviews: bool = False) -> list[CleanResult]:
    """What `clean` would keep and remove; nothing is written, and nothing is refused for being much."""
    return find_rule([Scanned.of(out, ignore_reviews) for out in outs], policy, force=True)[1]


def decide_and_split(
    outs: Sequence[str],
    policy: ThresholdPolicy,
    *,
    force: bool,
    resources: Resources | None,
    address: str,
    ignore_reviews: bool = False,
) -> list[CleanResult]:
    """`clean_together` for a caller that holds the folders' locks."""
    for out in outs:
        storage.remove_partials(out)
    scans = [Scanned.of(out, ignore_reviews) for out in outs]
    finished = [_finished(scan, scans, policy, force, ignore_reviews) for scan in scans]
    if all(finished):
        log.info("clean: all %d shards were split before", sum(len(scan.markers) for scan in scans))
        return [result for result in finished if result]
    resources = resources or runtime.plan(0, 0, -1, 1)
    score_all = partial(_scores_on_workers, resources, address) if resources.workers else scores_of_all
    with runtime.session_for(resources, address):
        rule, results = find_rule(scans, policy, force, score_all)
        return [
            _split_all(scan, scans, policy, replace(rule, words=scan.words), result, resources, address, ignore_reviews)
            for scan, result in zip(scans, results, strict=True)
        ]


def _finished(
    scan: Scanned, scans: Sequence[Scanned], policy: ThresholdPolicy, force: bool, ignore_reviews: bool
) -> CleanResult | None:
    """What an earlier run of the same pass 2 left, when nothing of it is missing."""
    summary = scan.folder.summary()
    if not scan.committed or summary is None or summary.shards_failed:
        return None
    if (summary.policy, summary.together) != (policy, scan.others(scans)) or len(scan.markers) < summary.shards:
        return None
    if summary.decision_format != decision_table.FORMAT:
        return None
    if (summary.reviews, summary.ignored_reviews) != (scan.reviews.files, ignore_reviews):
        return None
    rules = {m.shard: split_identity(summary.rule, scan.words.get(m.shard, ())) for m in scan.markers}
    if not all(_is_split(m, rules[m.shard]) and m.files.keys() <= scan.present for m in scan.markers):
        return None
    if is_most(summary.removed, summary.samples) and not force:
        return None
    return CleanResult(summary.threshold, summary.kept, summary.removed, summary.unscored, (), summary.reviewed)


# ---------------------------------------------------------------- scores that decide


def _scores_on_workers(resources: Resources, address: str, adapter: ScoreAdapter, samples: Mapping[str, int]) -> Floats:
    """What `scores_of_all` gives, computed by the workers: each takes whole score files."""
    files = [Shard(storage.absolute(path), path, count) for path, count in samples.items()]
    at_once = 1 if all(storage.is_local(path) for path in samples) else storage.READ_AHEAD
    found: dict[str, Floats] = {}
    with ProgressDisplay("decide", len(files), sum(samples.values())) as display:
        for outcome in workers.map_shards(RescoreTask(adapter), files, resources, display, address, at_once):
            if outcome.result is None:
                raise StorageError(outcome.error)
            found[outcome.shard.stem] = outcome.result
    return np.concatenate([np.empty(0, np.float32), *(found[path] for path in samples)])


@dataclass(frozen=True)
class RescoreTask:
    """The deciding scores of one score file; `size` of its shard counts samples."""

    adapter: ScoreAdapter

    def start(self, threads: int) -> ShardFunction[Floats]:  # noqa: ARG002 - torch has as many already
        return self._scores

    def _scores(self, file: Shard, progress: ProgressCallback) -> Floats:
        scores = scores_of(self.adapter, score_table.read(file.url, self.adapter.columns), file.url, file.size)
        progress(file.size, 0, file.size)
        return scores


# ---------------------------------------------------------------- splitting


def _split_all(
    scan: Scanned,
    scans: Sequence[Scanned],
    policy: ThresholdPolicy,
    rule: Rule,
    result: CleanResult,
    resources: Resources,
    address: str,
    ignore_reviews: bool,
) -> CleanResult:
    """Every shard that is not split by this rule yet; then the summary."""
    folder, run = scan.folder, scan.run
    folder.delete_summary()
    todo = [
        run.shard(m.shard)
        for m in scan.markers
        if not _is_split(m, rule.identity_of(m.shard)) or m.files.keys() - scan.present
    ]
    task, at_once = SplitTask(storage.absolute(folder.path), rule), _at_once(folder.path, todo)
    split, failed = {marker.shard: marker for marker in scan.markers}, {}
    with ProgressDisplay("clean", len(todo), sum(s.size for s in todo)) as display:
        for outcome in workers.map_shards(task, todo, resources, display, address, at_once):
            if outcome.result:
                split[outcome.shard.stem] = outcome.result
            else:
                failed[outcome.shard.stem] = outcome.error
    split |= {marker.shard: marker for marker in folder.read_markers(sorted(failed))}  # as far as they came
    markers, result = list(split.values()), replace(result, failed=tuple(sorted(failed.values())))
    unscored_shards = sorted(set(run.shards) - split.keys())
    summary = Summary(
        policy=policy,
        scores=rule.adapter.identity,
        threshold=result.threshold,
        samples=result.kept + result.removed,
        kept=result.kept,
        removed=result.removed,
        unscored=result.unscored,
        shards=len(run.shards),
        shards_failed=(*unscored_shards, *result.failed),
        shards_damaged={marker.shard: marker.input.damage for marker in markers if marker.input.damage},
        loose_members=sum(marker.input.loose_members for marker in markers),
        rule=rule.identity,
        together=scan.others(scans),
        decision_format=decision_table.FORMAT,
        reviewed=result.reviewed,
        reviews=dict(scan.reviews.files),
        ignored_reviews=ignore_reviews,
    )
    folder.write_summary(summary, markers)
    return result


def _at_once(out: str, shards: Sequence[Shard]) -> int:
    """Shards that one worker copies at a time: where every request waits for a network many small ones, of large ones a few."""
    largest = max((shard.size for shard in shards), default=0)
    remote = not storage.is_local(out) or not all(storage.is_local(shard.url) for shard in shards)
    return max(1, min(storage.READ_AHEAD, IN_FLIGHT // max(largest, 1))) if remote else 1


@dataclass(frozen=True)
class SplitTask:
    """Decide on one shard by the rule of the whole scan, and copy it into a clean and a quarantine tar."""

    out: str
    rule: Rule

    def start(self, threads: int) -> ShardFunction[ShardMarker]:  # noqa: ARG002 - copying needs no threads
        folder = ScanFolder(self.out)
        run = folder.run()
        return lambda shard, progress: _split(folder, run, shard, self.rule, progress)


def _is_split(marker: ShardMarker, rule: str) -> bool:
    return marker.clean is not None and marker.clean.rule == rule


def _split(folder: ScanFolder, run: Run, shard: Shard, rule: Rule, progress: ProgressCallback) -> ShardMarker:
    before = folder.read_marker(shard.stem)
    identity = rule.identity_of(shard.stem)
    if _is_split(before, identity) and folder.has(before.files):  # by a worker that was lost before it could say so
        return before
    table = score_table.read(folder.scores(shard.stem), [*rule.columns, "sha256"])
    rows = rule.decide(table, shard.stem)
    decided = Decisions.of(rows)
    decision = decision_identity(decided.keep)
    # forget what another decision left before anything can go wrong: its tars may hold what is to be removed now
    marker = before.unsplit()
    if before.clean:
        folder.write_marker(marker)
    tars = before.tars() if before.clean and before.clean.decision == decision else {}
    if not tars or not folder.has(tars):
        images = table.column("sha256").to_pylist()
        # a compressed shard lies there unpacked as well
        held = marker.input.bytes * (2 if is_compressed(shard.url) else 1)
        storage.require_temporary_space(folder.path, held)
        tars = _copy(folder, folder.scored_shard(run, marker, decided.keys, images), decided.keep)
    written = write_decisions(folder.at(folder.decisions_name(shard.stem)), rows)
    removed = int((~decided.keep).sum())
    marker = replace(
        marker,
        clean=Split(kept=len(decided.keep) - removed, removed=removed, decision=decision, rule=identity),
        files=marker.files | tars | {folder.decisions_name(shard.stem): WrittenFile.of(written)},
    )
    folder.write_marker(marker)
    progress(len(decided.keep), removed, shard.size)
    return marker


def _copy(folder: ScanFolder, scored: ScoredShard, keep: NDArray[np.bool_]) -> dict[str, WrittenFile]:
    stem, names = scored.shard.stem, folder.part_names(scored.shard.stem)
    for name in (*names.values(), folder.decisions_name(stem)):
        storage.delete(folder.at(name))
    parts = split_shard(scored, keep, lambda kept: storage.atomic_write(folder.at(names[kept])))
    return {names[kept]: WrittenFile.of(part) for kept, part in parts.items()}

"""`sanitize review`: a person's word over the score, recorded; decisions and clean shards follow.

First the record (reviews/<number>.json) appears under its name, then pass 2 decides by it: after a kill in between, the same command
finds its record and goes on with pass 2. Only shards that hold a reviewed sample are split again.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sanitize import storage
from sanitize.artifacts.folder_lock import folder_locks
from sanitize.artifacts.review_files import AskedFor, read_review_file
from sanitize.artifacts.reviews import (
    RELEASE,
    REMOVE,
    WITHDRAW,
    Review,
    ReviewedSample,
    Reviews,
    read_reviews,
    write_review,
)
from sanitize.artifacts.scan_folder import ScanFolder, ShardMarker, Summary
from sanitize.commands.clean import decide_and_split
from sanitize.config import ThresholdPolicy
from sanitize.deciding import CleanResult
from sanitize.errors import ConfigError, RefusedError, check
from sanitize.paths import AnyPath, path_text
from sanitize.runtime import Resources
from sanitize.stages.shards import printable

log = logging.getLogger(__name__)
LONGEST = {"by": 200, "note": 2000}  # characters
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ReviewResult:
    """record: the file of the review; the counts are of samples it names, changed: those that changed sides by it; cleaned: of the scan."""

    record: str
    released: int
    removed: int
    withdrawn: int
    changed: int
    cleaned: CleanResult


def review(
    scanned: AnyPath,
    *,
    release: AnyPath = "",
    remove: AnyPath = "",
    withdraw: AnyPath = "",
    decisions: AnyPath = "",
    by: str,
    note: str = "",
    release_unscored: bool = False,
    when: str = "",
    resources: Resources | None = None,
    address: str = "",
) -> ReviewResult:
    """Record what a person decided on samples of a scan, then decide and split the shards they are in.

    release, remove, withdraw: files with a key a line, or CSV or Parquet with columns shard and key; what is withdrawn the score
    decides again. decisions: CSV or Parquet with columns shard, key and word. by: who. note: why. release_unscored: also samples that
    have no score may be released. when: UTC, default: now.
    """
    out = path_text(scanned, "scanned")
    by, note = _said("by", by), _said("note", note)
    check(bool(by), "by: nobody is named. Say who decides, for example --by 'Ada Lovelace'.")
    files = ((release, RELEASE), (remove, REMOVE), (withdraw, WITHDRAW), (decisions, ""))
    asked = [
        line
        for file, word in files
        if path_text(file, "file")
        for line in read_review_file(path_text(file, "file"), word)
    ]
    check(
        bool(asked),
        "nothing to review. Name the samples: --release FILE, --remove FILE, --withdraw FILE or --decisions FILE.",
    )
    folder = ScanFolder(out)
    folder.run()  # is there a scan?
    with folder_locks([out, *_together(folder)], "review"):
        summary = folder.summary()
        known = read_reviews(folder, summary)
        if last := _repeated(known, asked, by, note):
            log.info("review: this is recorded already, in %s", last.name)
        else:
            last = _new_review(folder, summary, known, asked, by, note, release_unscored, when)
            write_review(folder, last)
        policy, together = (summary.policy, summary.together) if summary else (last.policy, last.together)
        outs = [out, *together]
        cleaned = decide_and_split(outs, policy, force=True, resources=resources, address=address)[0]
    counts = Counter(sample.word for sample in last.samples)
    changed = sum(sample.kept_before != sample.kept_after for sample in last.samples)
    return ReviewResult(last.name, counts[RELEASE], counts[REMOVE], counts[WITHDRAW], changed, cleaned)


def _said(name: str, text: str) -> str:
    """In one line."""
    line = " ".join(text.split())
    check(printable(line) == line, f"{name}: {printable(line)[:80]!r} holds control characters. Write it without.")
    check(len(line) <= LONGEST[name], f"{name}: {len(line)} characters, {LONGEST[name]} is the most. Shorten it.")
    return line


def _together(folder: ScanFolder) -> tuple[str, ...]:
    """Other scans that are decided with this one by one rule, so with it again."""
    if summary := folder.summary():
        return summary.together
    reviews = read_reviews(folder, None).reviews
    return reviews[-1].together if reviews else ()


def _repeated(known: Reviews, asked: Sequence[AskedFor], by: str, note: str) -> Review | None:
    """The last review, when it is this very one: it was recorded, and whatever came after it may have been cut off."""
    last = known.reviews[-1] if known.reviews else None
    if last is None or (last.by, last.note) != (by, note):
        return None
    by_key: dict[str, list[ReviewedSample]] = {}
    for sample in last.samples:
        by_key.setdefault(sample.key, []).append(sample)
    same = [[s for s in by_key.get(line.key, ()) if _means(line, s) and s.word == line.word] for line in asked]
    found = {(s.shard, s.index) for samples in same for s in samples}
    return last if all(len(s) == 1 for s in same) and len(found) == len(last.samples) else None


def _means(line: AskedFor, sample: ReviewedSample) -> bool:
    return line.shard in ("", sample.shard) and line.index in (None, sample.index)


def _new_review(
    folder: ScanFolder,
    summary: Summary | None,
    known: Reviews,
    asked: Sequence[AskedFor],
    by: str,
    note: str,
    release_unscored: bool,
    when: str,
) -> Review:
    """Raises when a sample is not to be found, named twice with different words, or not to be released like this."""
    if summary is None or summary.reviews != known.files:
        why = "pass 2 is not through" if summary is None else "pass 2 has not taken every earlier review into account"
        raise ConfigError(f"{folder.path}: {why}. Run `sanitize clean {folder.path}` first.")
    found = _found(folder, asked)
    samples = [_decided(line, row, summary.policy) for line, row in found]
    if not release_unscored:
        _require_scores(found)
    return Review(
        number=len(known.reviews) + 1,
        previous=list(known.files.values())[-1] if known.files else "",
        by=by,
        when=when or datetime.now(UTC).isoformat(timespec="seconds"),
        note=note,
        policy=summary.policy,
        together=summary.together,
        samples=tuple(sorted(samples, key=lambda sample: (sample.shard, sample.index))),
    )


def _decided(line: AskedFor, row: Row, policy: ThresholdPolicy) -> ReviewedSample:
    """row: of the decisions, before."""
    score, shard, index = row["score"], row["shard"], row["index"]
    by_score = policy.keep_unscored if score is None else score <= row["threshold"]
    after = by_score if line.word == WITHDRAW else line.word == RELEASE
    return ReviewedSample(shard, index, row["key"], line.word, score, row["keep"], row["reason"], after)


def _require_scores(found: Iterable[tuple[AskedFor, Row]]) -> None:
    for line, row in found:
        if line.word == RELEASE and row["score"] is None:
            raise RefusedError(
                f"{line.where}: sample {_shown(line.key)} has no score ({row['reason']}), so nothing but you says that it is clean. If you "
                "know what it is, add --release-unscored."
            )


# ---------------------------------------------------------------- finding samples


def _found(folder: ScanFolder, asked: Sequence[AskedFor]) -> list[tuple[AskedFor, Row]]:
    """Each line with the decision on the one sample that it means; a sample that several name with one word is there once."""
    rows = _rows_of_keys(folder, asked)
    meant: dict[tuple[str, int], tuple[AskedFor, Row]] = {}
    for line in asked:
        row = _the_one(folder, line, rows.get(line.key, []))
        place = (row["shard"], row["index"])
        other, _ = meant.setdefault(place, (line, row))
        if other.word != line.word:
            raise ConfigError(
                f"{line.where}: sample {_shown(line.key)} of {row['shard']} is to {line.word}, but {other.where} says {other.word}. "
                "Name it once."
            )
    return list(meant.values())


def _rows_of_keys(folder: ScanFolder, asked: Sequence[AskedFor]) -> dict[str, list[Row]]:
    """Decisions on samples with a key that is asked for, by key; only shards that are named are read, where all lines name one."""
    stems, shards = sorted(folder.run().shards), {line.shard for line in asked}
    for line in asked:
        if line.shard and line.shard not in stems:
            raise ConfigError(f"{line.where}: {folder.path} has no shard {_shown(line.shard)}. It has {_some(stems)}.")
    markers = folder.markers(stems if "" in shards else sorted(shards))
    if missing := (set(stems) if "" in shards else shards) - {marker.shard for marker in markers if marker.clean}:
        raise ConfigError(f"{min(missing)}: was not split by pass 2. Run `sanitize clean {folder.path}` first.")
    wanted = pa.array(sorted({line.key for line in asked}))

    def matching(marker: ShardMarker) -> list[Row]:
        table = folder.decision_rows(marker).select(["shard", "key", "index", "keep", "reason", "score", "threshold"])
        return list(table.filter(pc.is_in(table.column("key"), wanted)).to_pylist())

    rows: dict[str, list[Row]] = {}
    for found in storage.read_ahead(matching, markers):
        for row in found:
            rows.setdefault(row["key"], []).append(row)
    return rows


def _the_one(folder: ScanFolder, line: AskedFor, rows: Sequence[Row]) -> Row:
    fitting = [row for row in rows if line.shard in ("", row["shard"]) and line.index in (None, row["index"])]
    if len(fitting) == 1:
        return fitting[0]
    where, key = f"{line.where}: ", _shown(line.key)
    if not fitting:
        place = f"shard {line.shard} of {folder.path}" if line.shard else folder.path
        place += f" at index {line.index}" if line.index is not None else ""
        raise ConfigError(
            f"{where}{place} has no sample {key}. Keys are as in the columns `shard` and `key` of {folder.at('decisions')}/."
        )
    shards = sorted({row["shard"] for row in fitting})
    if len(shards) > 1:
        raise ConfigError(
            f"{where}{len(shards)} shards have a sample {key}: {_some(shards)}. Give a .csv with columns shard and key to say which."
        )
    raise ConfigError(
        f"{where}{len(fitting)} samples of {shards[0]} have keys that read {key}. Add a column index (as in the decisions) to say which."
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _shown(key: str) -> str:
    """Keys come from strangers and may be long."""
    text = printable(key)
    return repr(text if len(text) <= 100 else f"{text[:97]}...")

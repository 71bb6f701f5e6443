"""All rows of a scan as numbers, and single rows as people read them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from sanitize import storage
from sanitize.artifacts.scan_folder import Run, ScanFolder, ShardMarker, Summary
from sanitize.artifacts.truth import load_poisoned
from sanitize.errors import ConfigError
from sanitize.stages import score_table
from sanitize.stages.score_table import STATISTICS, Floats

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
IDENTITY = ["key", "sha256", "width", "height", "status", "reason"]


@dataclass(frozen=True)
class ScoredSamples:
    """All N samples of a scan, shard after shard; scores and similarities (N,) float32 with NaN where there is none.

    markers: of the S scored shards; starts (S + 1,): row of the first sample of each
    scores: that decided, where pass 2 is through; as_scored: those of the score tables; similarities: of image and caption
    removed: (N,) bool, None where pass 2 is not through
    """

    markers: list[ShardMarker]
    starts: Rows
    statuses: Counter[str]
    as_scored: Floats
    similarities: Floats
    scores: Floats
    removed: Mask | None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def split(self) -> Mask:
        """(N,) bool: of shards that pass 2 has split, so that there are decisions on them."""
        return np.repeat([marker.clean is not None for marker in self.markers], np.diff(self.starts))

    def place(self, row: int) -> tuple[ShardMarker, int]:
        """Shard and index of a row."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.markers[shard], row - int(self.starts[shard])

    def by_shard(self, rows: Rows) -> Iterable[tuple[ShardMarker, NDArray[np.int64]]]:
        """(shard, indices in it, sorted) of chosen rows, in shard order."""
        rows = np.sort(rows)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            yield self.markers[shard], rows[shards == shard] - self.starts[shard]


@dataclass(frozen=True)
class SampleRow:
    """One sample. key: as score tables write it; reason: of the decision; statistics: the columns that it has, by name."""

    row: int
    shard: str
    index: int
    key: str
    sha256: str
    width: int
    height: int
    status: str
    removed: bool | None
    score: float | None
    threshold: float | None
    reason: str
    statistics: dict[str, float]


def read_scored(folder: ScanFolder, run: Run, summary: Summary | None) -> ScoredSamples:
    markers = folder.markers(sorted(run.shards))
    if not markers:
        raise ConfigError(f"{folder.path}: no score table there. Run `sanitize scan` again.")
    statuses, as_scored, similarities = Counter[str](), [], []
    paths = [folder.scores(marker.shard) for marker in markers]
    for table in score_table.read_each(paths, ["status", "score", "text_similarity"]):
        counted = pc.value_counts(table.column("status"))
        statuses.update({entry["values"].as_py(): entry["counts"].as_py() for entry in counted})
        as_scored.append(score_table.numbers(table, "score"))
        similarities.append(score_table.numbers(table, "text_similarity"))
    scores, removed = np.concatenate(as_scored), None
    if summary:
        decided = list(storage.read_ahead(lambda pair: _decided(folder, *pair), zip(markers, as_scored, strict=True)))
        scores = np.concatenate([part for part, _ in decided])
        removed = ~np.concatenate([keep for _, keep in decided])
    starts = np.cumsum([0, *(len(part) for part in as_scored)])
    return ScoredSamples(
        markers, starts, statuses, np.concatenate(as_scored), np.concatenate(similarities), scores, removed
    )


def _decided(folder: ScanFolder, marker: ShardMarker, scores: Floats) -> tuple[Floats, Mask]:
    """Scores and what is kept; of a shard that pass 2 could not split, nothing is in clean/."""
    if marker.clean:
        decisions = folder.decisions(marker)
        return decisions.scores, decisions.keep
    return scores, np.zeros(len(scores), bool)


def poisoned_of(scored: ScoredSamples, truth: str) -> Mask:
    """(N,) bool. Raises ConfigError when the truth names samples that the scan does not have."""
    first = {marker.shard: (int(begin), int(end)) for marker, begin, end in _spans(scored)}
    poisoned, missing = np.zeros(len(scored), bool), []
    for shard, index in load_poisoned(truth):
        begin, end = first.get(shard, (0, 0))
        if 0 <= index < end - begin:
            poisoned[begin + index] = True
        else:
            missing.append((shard, index))
    if missing:
        shard, index = min(missing)
        raise ConfigError(
            f"{truth}: names {len(missing)} samples that the scan does not have (first: shard {shard}, index {index}). "
            "Give the truth file of the shards that were scanned."
        )
    return poisoned


def _spans(scored: ScoredSamples) -> Iterable[tuple[ShardMarker, int, int]]:
    return zip(scored.markers, scored.starts[:-1], scored.starts[1:], strict=True)


# ---------------------------------------------------------------- single rows


def rows_with_key(folder: ScanFolder, scored: ScoredSamples, key: str) -> list[int]:
    """In every shard; keys are unique in one shard only. Raises ConfigError when there is none."""
    paths = [folder.scores(marker.shard) for marker in scored.markers]
    tables = score_table.read_each(paths, ["key"])
    found = [
        start + index
        for start, table in zip(scored.starts.tolist(), tables, strict=False)
        for index in np.flatnonzero(pc.equal(table.column("key"), key).to_numpy()).tolist()
    ]
    if not found:
        raise ConfigError(
            f"{folder.path}: no sample has the key {key[:200]!r}. Keys are those of the score tables, without the file's ending."
        )
    return found


def sample_rows(folder: ScanFolder, scored: ScoredSamples, rows: Sequence[int]) -> list[SampleRow]:
    """What is known of each of these rows, in their order; a score table is read once for all of its rows."""
    found: dict[int, SampleRow] = {}
    starts = {marker.shard: start for marker, start, _ in _spans(scored)}
    for marker, indices in scored.by_shard(np.asarray(rows, np.int64)):
        table = score_table.read(folder.scores(marker.shard), [*IDENTITY, *STATISTICS]).take(indices)
        decided = folder.decision_rows(marker).take(indices).to_pylist() if _is_decided(scored, marker) else []
        for number, (index, values) in enumerate(zip(indices.tolist(), table.to_pylist(), strict=True)):
            row = starts[marker.shard] + index
            found[row] = _sample_row(row, marker.shard, index, values, decided[number] if decided else None, scored)
    return [found[row] for row in rows]


def _is_decided(scored: ScoredSamples, marker: ShardMarker) -> bool:
    return scored.removed is not None and marker.clean is not None


def _sample_row(
    row: int, shard: str, index: int, values: dict[str, Any], decided: dict[str, Any] | None, scored: ScoredSamples
) -> SampleRow:
    score = float(scored.scores[row])
    return SampleRow(
        row=row,
        shard=shard,
        index=index,
        removed=None if scored.removed is None else bool(scored.removed[row]),
        score=score if np.isfinite(score) else None,
        threshold=decided["threshold"] if decided else None,
        reason=decided["reason"] if decided else values["reason"],
        statistics={name: values[name] for name in STATISTICS if values[name] is not None},
        **{name: values[name] for name in IDENTITY if name != "reason"},
    )

"""The score that decides in pass 2: the one of the table, or adapted to the bulk of the scan; here of the scorer `reaction`.

A detector knows clean images from its auxiliary set. A scan of other images has other clean statistics, and more of them
cross the threshold than promised. The columns of pass 1 are enough to move centre and covariance to the scan's own bulk.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from sanitize import storage
from sanitize.errors import StorageError
from sanitize.progress import ProgressDisplay
from sanitize.stages import score_table
from sanitize.stages.clean_reference import CleanReference, adapted
from sanitize.stages.score_table import STATISTICS_COLUMNS
from sanitize.stages.tails import fit_tail

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
MIN_SAMPLES = 500  # different images; fewer give no covariance to rely on
MAX_ROWS = 100_000  # that the bulk is estimated from, drawn from the scan
MAX_FLAGGED = 0.2  # of the scan above what 1 % of clean images exceed: more, and its bulk proves nothing
FEW_FLAGGED = 0.05  # of the scan, that adapting may flag whatever was flagged before
UNTRUSTED = (
    "Its bulk may not be clean. Look at `sanitize audit`; if those are clean, fit with auxiliary images more like these, for want of "
    "others with a part of this very scan (`sanitize fit --contamination 0.02`)"
)


class ScoreAdapter:
    """Turns score rows into the deciding scores; itself: as they are scored."""

    columns: Sequence[str] = ("score",)  # what `scores` needs

    def scores(self, table: pa.Table) -> Floats:
        """(N,) float32 in row order, NaN for unscored samples."""
        return score_table.numbers(table, "score")

    @property
    def identity(self) -> str:
        """For people and for comparing two decisions; the same scan gives the same."""
        return "as scored"


@dataclass(frozen=True)
class AdaptedScores(ScoreAdapter):
    """Of the scorer `reaction`: distances from a reference that was moved to the bulk of the scan."""

    reference: CleanReference
    columns = STATISTICS_COLUMNS

    def scores(self, table: pa.Table) -> Floats:
        return self.reference.distance(torch.from_numpy(score_table.statistics(table))).numpy()

    @property
    def identity(self) -> str:
        tensors = {"centre": self.reference.centre.tolist(), "precision": self.reference.precision.tolist()}
        return f"adapted {storage.json_sha256(tensors)[:12]}"


def scores_of_all(adapter: ScoreAdapter, samples: Mapping[str, int]) -> Floats:
    """(N,) float32 of score files with so many samples each, in order; one file in memory at a time."""
    scores, done = np.empty(sum(samples.values()), np.float32), 0
    with ProgressDisplay("decide", len(samples), len(scores)) as display:
        tables = score_table.read_each(list(samples), adapter.columns)
        for number, ((path, count), table) in enumerate(zip(samples.items(), tables, strict=True), 1):
            scores[done : done + count] = scores_of(adapter, table, path, count)
            done += count
            display.update(number, done, done)
    return scores


def scores_of(adapter: ScoreAdapter, table: pa.Table, path: str, count: int) -> Floats:
    """(count,) float32 of one score file, whose table this is."""
    if len(table) != count:
        raise StorageError(
            f"{path}: {len(table)} rows for {count} samples. Run `sanitize verify --repair`, then the same `sanitize scan` again."
        )
    return adapter.scores(table)


def score_adapter(samples: Mapping[str, int], reference: CleanReference | None, calibration: Floats) -> ScoreAdapter:
    """Adapted when there is a reference to adapt (every image was perturbed) and the scan's bulk can be trusted.

    samples: in each score file. Whether it is trusted depends on the scan alone, not on the threshold asked for: else a laxer
    threshold could bring samples back that a stricter one kept.
    """
    if reference is None:
        return ScoreAdapter()
    rows = distinct_statistics(samples, key=reference.centre.numpy().tobytes())
    before = reference.distance(torch.from_numpy(rows)).numpy()
    if reason := reason_not_to_adapt(before, calibration):
        log.warning("not adapted to the scan: %s", reason)
        return ScoreAdapter()
    moved = adapted(reference, rows)
    after = moved.distance(torch.from_numpy(rows)).numpy()
    shares = [flagged_share(scores, calibration) for scores in (before, after)]
    if shares[1] > max(2 * shares[0], FEW_FLAGGED):
        log.warning(
            "not adapted to the scan: %.1f %% of it would stand out instead of %.1f %%. Its bulk is more alike than clean images "
            "are; look for near-duplicates",
            100 * shares[1],
            100 * shares[0],
        )
        return ScoreAdapter()
    log.info("adapted to the scan: %.2f %% of it stand out, %.2f %% before", 100 * shares[1], 100 * shares[0])
    return AdaptedScores(moved)


def reason_not_to_adapt(scores: Floats, calibration: Floats) -> str:
    """Why the bulk of a scan with these finite scores (N,) says nothing about clean images; "" when it can be trusted."""
    if len(scores) < MIN_SAMPLES:
        return f"{len(scores)} different scored images, {MIN_SAMPLES} are needed"
    flagged = flagged_share(scores, calibration)
    if flagged > MAX_FLAGGED:
        return f"{flagged:.0%} of it stands out. {UNTRUSTED}"
    return ""


def flagged_share(scores: Floats, calibration: Floats) -> float:
    """Of finite scores (N,), above what all but 1 % of clean images reach; by a fitted tail, so that no single odd one decides."""
    return float((scores > fit_tail(calibration).quantile(0.01)).mean())


def distinct_statistics(samples: Mapping[str, int], key: bytes, limit: int = MAX_ROWS) -> Floats:
    """(N, V + 2) of images of which every statistic is known; see `distinct_rows`."""
    rows = score_table.statistics(distinct_rows(samples, STATISTICS_COLUMNS, STATISTICS_COLUMNS, key, limit))
    return rows[np.isfinite(rows).all(axis=1)]


def distinct_rows(
    samples: Mapping[str, int], columns: Sequence[str], known: Sequence[str], key: bytes, limit: int = MAX_ROWS
) -> pa.Table:
    """These columns of score files, each image once (by its SHA-256: copies of one image are no bulk), where the `known` ones are not
    null; about `limit` images.

    key: of the draw; an attacker who knew which images are drawn could make its own the bulk
    """
    share = limit / max(sum(samples.values()), 1)
    parts, seen = [score_table.SCHEMA.empty_table().select(list(columns))], set[str]()
    for table in score_table.read_each(list(samples), list(dict.fromkeys([*columns, *known, "sha256"]))):
        valid = np.ones(len(table), bool)
        for name in known:
            valid &= table.column(name).is_valid().to_numpy(zero_copy_only=False)
        candidates, digests = np.flatnonzero(valid), table.column("sha256")
        if share < 1:
            candidates = candidates[_drawn(digests.take(candidates), key) < share]
        rows = []
        for row, digest in zip(candidates.tolist(), digests.take(candidates).to_pylist(), strict=True):
            if digest not in seen:
                seen.add(digest)
                rows.append(row)
        parts.append(table.select(list(columns)).take(pa.array(rows, pa.int64())))
    return pa.concat_tables(parts)


def _drawn(digests: pa.ChunkedArray, key: bytes) -> NDArray[np.float64]:
    """(N,) in [0, 1), uniform: of hexadecimal SHA-256, mixed with the key as in splitmix64 (Steele, Lea and Flood 2014)."""
    words = np.frombuffer(bytes.fromhex("".join(pc.utf8_slice_codeunits(digests, 0, 16).to_pylist())), ">u8")
    for secret in np.frombuffer(hashlib.sha256(key).digest(), np.uint64):
        words = (words ^ secret) * np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(31)
    return words / 2.0**64

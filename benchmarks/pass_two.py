"""What deciding costs on very many samples: reading score tables, adapting, the threshold (the driver), the scores that decide and each
shard's decisions (the workers; of a tenth, one worker).

python -m benchmarks.pass_two --rows 100000000

Synthetic score tables, every row of its own: statistics drawn around those of a real detector, SHA-256 and keys random. Nothing is
copied here (`benchmarks.many_shards` does that); the bound is reading the same columns and doing nothing with them.
"""

import argparse
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.many_shards import SPEC
from benchmarks.scan import detector_for
from benchmarks.scan_rate import OUT
from sanitize import storage
from sanitize.artifacts.detector_folder import Detector, load_detector
from sanitize.artifacts.reviews import Reviews
from sanitize.artifacts.scan_folder import InputShard, Run, ScanFolder, ShardInput, ShardMarker
from sanitize.config import ThresholdPolicy
from sanitize.deciding import Scanned, find_rule
from sanitize.stages import score_table
from sanitize.stages.adaptation import Floats, ScoreAdapter, scores_of_all
from sanitize.stages.agreement import Departures, quantised
from sanitize.stages.decision_table import write_decisions
from sanitize.stages.evidence import PREDICTION
from sanitize.stages.perturbations import CHANGE_COLUMNS, FLOOR

POLICIES = (
    ThresholdPolicy("calibrated", fpr=0.01, agreement=False),
    ThresholdPolicy("calibrated", fpr=0.01),
    ThresholdPolicy("fdr", fpr=0.3),
    ThresholdPolicy("fraction", fraction=0.01),
    ThresholdPolicy("robust"),
)


@contextmanager
def measured(name: str, rows: int) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hours = seconds / rows * 1e9 / 3600
    print(
        f"{name:34s} {seconds:8.1f} s {rows / seconds / 1e6:7.2f} M rows/s {hours:6.2f} h for 10^9  peak {peak:5.2f} GiB",
        flush=True,
    )


def score_rows(stem: str, rows: int, detector: Detector, seed: int) -> pa.Table:
    """As pass 1 would write them of images like the calibration ones, one in a thousand far from them."""
    rng = np.random.default_rng(seed)
    reference = detector.clean_reference
    assert reference is not None, "the default scorer has one"
    root = np.linalg.cholesky(np.linalg.inv(reference.precision.double().numpy()))
    statistics = reference.centre.numpy() + rng.normal(size=(rows, len(root))) @ root.T
    statistics[::1000] += 12 * root.sum(axis=1)
    digests = rng.bytes(32 * rows).hex()
    columns = {name: statistics[:, number] for number, name in enumerate(CHANGE_COLUMNS)}
    columns["embedding_norm"] = np.exp(statistics[:, -2]) - FLOOR
    columns["neighbour_distance"] = np.exp(statistics[:, -1]) - FLOOR
    columns["score"] = np.linalg.norm(np.linalg.solve(root, (statistics - reference.centre.numpy()).T), axis=0)
    identity = {
        "shard": [stem] * rows,
        "key": [f"{stem}{number:06d}" for number in range(rows)],
        "index": np.arange(rows),
        "sha256": [digests[start : start + 64] for start in range(0, len(digests), 64)],
        "status": ["ok"] * rows,
        "reason": [""] * rows,
    }
    if detector.predictor:
        residuals = rng.normal(size=(rows, detector.departures.residuals.shape[1])).astype(np.float32)
        vectors = Departures(quantised(residuals), rng.integers(0, 2**64, rows, dtype=np.uint64)).as_bytes()
        identity |= vectors
        columns["prediction_energy"] = rng.choice(detector.evidence[PREDICTION], rows)
    full = {field.name: pa.nulls(rows, field.type) for field in score_table.SCHEMA}
    numbers = {name: pa.array(values.astype(np.float32)) for name, values in columns.items()}
    return pa.table(full | identity | numbers, schema=score_table.SCHEMA)


def fill(folder: ScanFolder, detector_path: str, rows: int, per_shard: int) -> list[ShardMarker]:
    detector, markers = load_detector(detector_path), []
    storage.local_path(folder.at("scores")).mkdir(parents=True)
    for number in range(rows // per_shard):
        stem = f"{number:07d}"
        table = score_rows(stem, per_shard, detector, number)
        pq.write_table(table, folder.scores(stem), compression="zstd", row_group_size=score_table.ROW_GROUP)
        markers.append(ShardMarker(stem, ShardInput(0, "", "", 0), per_shard, 0, {}))
    return markers


def as_scored(_: ScoreAdapter, samples: Mapping[str, int]) -> Floats:
    """In place of scores that workers compute, which are as many."""
    return scores_of_all(ScoreAdapter(), samples)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--per-shard", type=int, default=10_000)
    options = parser.parse_args()
    rows, detector = options.rows, str(detector_for(SPEC, "encoder-memory"))
    folder = ScanFolder(str(OUT / "pass-two"))
    shutil.rmtree(folder.path, ignore_errors=True)
    with measured("writing synthetic tables", rows):
        markers = fill(folder, detector, rows, options.per_shard)
    size = sum(storage.local_path(folder.scores(marker.shard)).stat().st_size for marker in markers)
    print(f"{size / rows:.0f} bytes of scores a sample")
    shards = {marker.shard: InputShard("", 0, "") for marker in markers}
    fingerprint = load_detector(detector).fingerprint
    run = Run(storage.absolute(detector), fingerprint, {}, "", "", "thorough", "fp32", shards, {})
    scanned = Scanned(folder, run, markers, set(), False, Reviews(), {})
    paths = [folder.scores(marker.shard) for marker in markers]
    for name, columns in (("score", ["score"]), ("statistics", score_table.STATISTICS_COLUMNS)):
        with measured(f"bound: read {name} only", rows):
            for _ in score_table.read_each(paths, columns):
                pass
    some, bytes_written = markers[: max(len(markers) // 10, 1)], 0
    for policy in POLICIES:
        name = policy.policy + " alone" * (policy.agreement is False)
        with measured(f"rule, {name}: the driver", rows):
            rule, _ = find_rule([scanned], policy, force=True, score_all=as_scored)
        print(f"  {rule.adapter.identity}")
        with measured("  scores of a tenth, one worker", len(some) * options.per_shard):
            scores_of_all(rule.adapter, {folder.scores(marker.shard): marker.samples for marker in some})
    with measured("decisions of a tenth, one worker", len(some) * options.per_shard):
        for marker in some:
            table = score_table.read(folder.scores(marker.shard), [*rule.columns, "sha256"])
            bytes_written += write_decisions(folder.at(folder.decisions_name(marker.shard)), rule.decide(table)).size
    print(f"{bytes_written / len(some) / options.per_shard:.0f} bytes of decisions a sample")
    shutil.rmtree(folder.path)


if __name__ == "__main__":
    main()

"""How well is a victim's trigger found? Victim x auxiliary set x preset, with both controls.

    python -m pipelines.detection configs/detection_badencoder_cifar10.yaml

Every run goes through the product: poison, fit, scan, audit's metrics. Two pools: 1 % triggered samples, and a balanced
one (all test images clean + all of them triggered). Controls: the same images with the clean encoder (a detector of
backdoors should say nothing, AUROC near 0.5), and image energy without a model. Finished rows are reused.
"""

import csv
import dataclasses
import io
import logging
import time
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from sanitize import storage
from sanitize.attacks.triggers import PatchTrigger
from sanitize.config import FitConfig, ScanConfig, from_mapping, load_encoder_spec, load_yaml, overlay, preset
from sanitize.detectors.energy import energy
from sanitize.errors import SanitizeError
from sanitize.fit import fit
from sanitize.metrics import Detection, detection
from sanitize.poison import load_truth, poison
from sanitize.scan import scan
from sanitize.stages.images import decode_sample, to_batch
from sanitize.stages.shards import ShardReader, list_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of the result file. The control is the balanced pool with the clean encoder."""

    auxiliary: str
    preset: str
    pool: str
    auroc: float
    auprc: float
    tpr_at_1pct: float
    tpr_at_5pct: float
    fpr_at_95tpr: float
    control_auroc: float
    energy_auroc: float
    fpr_at_nominal_1pct: float
    fit_seconds: float


@dataclass(frozen=True)
class Study:
    """A YAML file: where the victim, the shards and the results are; `presets` overlay fit settings by name."""

    victim: str
    test: tuple[str, ...]
    out: str
    table: str
    auxiliary: dict[str, Any]
    presets: dict[str, Any]
    trigger: PatchTrigger = dataclasses.field(default_factory=PatchTrigger)
    rate: float = 0.01
    workers: int = 0


def run(study: Study) -> list[Row]:
    pools = make_pools(study)
    controls = {name: energy_auroc(study, folders) for name, folders in pools.items()}
    rows: list[Row] = []
    for auxiliary, shards in study.auxiliary.items():
        for name, settings in study.presets.items():
            measured = {kind: one_detector(study, kind, auxiliary, shards, name, settings, pools) for kind in ("backdoored", "clean")}
            qualities, seconds, rate = measured["backdoored"]
            control = measured["clean"][0]["balanced"].auroc
            for pool, quality in qualities.items():
                values = {k: v for k, v in dataclasses.asdict(quality).items() if k not in ("clean", "poisoned")}
                rows.append(Row(auxiliary, name, pool, **values, control_auroc=control, energy_auroc=controls[pool],
                                fpr_at_nominal_1pct=rate, fit_seconds=seconds))  # fmt: skip
            write_table(study.table, rows)
            print_rows(rows[-2:])
    return rows


def make_pools(study: Study) -> dict[str, tuple[str, ...]]:
    """Folders of shards by pool; poisoned with the product's own command, once."""
    folders = {"one": storage.join(study.out, "poisoned-rate"), "all": storage.join(study.out, "poisoned-all")}
    for name, rate in (("one", study.rate), ("all", 1.0)):
        if not storage.exists(storage.join(folders[name], "poison.json")):
            poison(study.test, folders[name], rate=rate, trigger=study.trigger)
    return {"1 % triggered": (folders["one"],), "balanced": (folders["all"], *study.test)}


def one_detector(
    study: Study, kind: str, auxiliary: str, shards: list[str], name: str, settings: dict[str, Any], pools: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Detection], float, float]:
    """Quality by pool, seconds to fit, and the clean test images' false-positive rate at nominal 1 %."""
    folder = storage.join(study.out, f"{kind}-{auxiliary}-{name}")
    spec = load_encoder_spec(storage.join(study.victim, kind, "encoder.yaml"))
    base = {"shards": shards, "encoder": spec, "out": storage.join(folder, "detector"), "workers": study.workers}
    values = overlay(overlay(preset(settings.get("preset", "default")), base), {k: v for k, v in settings.items() if k != "preset"})
    timing = storage.join(folder, "fit_seconds.json")
    if not storage.exists(timing):
        start = time.monotonic()
        fit(from_mapping(FitConfig, values, f"preset {name}"))
        storage.write_json(timing, {"seconds": time.monotonic() - start})
    qualities, rate = {}, float("nan")
    for pool, folders in pools.items():
        scores, poisoned, p_values = [], [], []
        for number, source in enumerate(folders):
            out = storage.join(folder, f"scan-{pool.split()[0]}-{number}")
            config = ScanConfig((source,), base["out"], out, workers=study.workers, scores_only=True)
            scan(config)
            columns, truth = scanned(out, source)
            scores.append(columns["score"])
            p_values.append(columns["p_value"])
            poisoned.append(truth)
        truth = np.concatenate(poisoned)
        qualities[pool] = detection(np.concatenate(scores), truth)
        rate = float((np.concatenate(p_values)[~truth] <= 0.01).mean())
    return qualities, storage.read_json(timing)["seconds"], rate


def scanned(out: str, source: str) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
    """Score and p-value of every row, and whether its sample is triggered (no truth file = clean shards)."""
    truth_file = storage.join(source, "poison.json")
    truth = load_truth(truth_file) if not source.endswith(".tar") and storage.exists(truth_file) else {}
    tables = [pq.read_table(storage.join(out, "scores", name)) for name in storage.list_files(storage.join(out, "scores"), ".parquet")]
    columns = {name: np.concatenate([t.column(name).to_numpy() for t in tables]) for name in ("score", "p_value")}
    identities = [pair for t in tables for pair in zip(t.column("shard").to_pylist(), t.column("index").to_pylist(), strict=True)]
    return columns, np.array([identity in truth for identity in identities])


def energy_auroc(study: Study, folders: tuple[str, ...]) -> float:
    spec = load_encoder_spec(storage.join(study.victim, "backdoored", "encoder.yaml"))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    scores, poisoned = [], []
    for source in folders:
        truth_file = storage.join(source, "poison.json")
        truth = load_truth(truth_file) if not source.endswith(".tar") and storage.exists(truth_file) else {}
        for shard in list_shards([source]):
            with storage.open_read(shard.url) as file:
                for sample in ShardReader(file, shard).samples():
                    pixels = decode_sample(sample).pixels
                    if pixels is not None:
                        images = to_batch([pixels], spec.image_size, spec.resize, torch.device("cpu"))
                        scores.append(float(energy((images - mean) / std)))
                        poisoned.append((shard.stem, sample.index) in truth)
    return detection(np.array(scores, np.float32), np.array(poisoned)).auroc


def write_table(path: str, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in dataclasses.asdict(row).items()})
    storage.write_bytes(path, text.getvalue().encode())


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        click.echo(
            f"{row.auxiliary:8s} {row.preset:8s} {row.pool:14s} AUROC {row.auroc:.4f}  TPR@1% {row.tpr_at_1pct:.3f}  "
            f"control {row.control_auroc:.3f}  energy {row.energy_auroc:.3f}  FPR at nominal 1 % {row.fpr_at_nominal_1pct:.4f}"
        )


@click.command()
@click.argument("config", type=click.Path(exists=True))
def main(config: str) -> None:
    """Measure detection as CONFIG describes; writes a CSV and prints its rows."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        run(from_mapping(Study, load_yaml(config), config))
    except SanitizeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

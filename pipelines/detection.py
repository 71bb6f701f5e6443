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
import pyarrow as pa
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
from sanitize.stages.images import to_batch
from sanitize.stages.loader import picture_batches
from sanitize.stages.score_table import numbers
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
    for auxiliary in study.auxiliary:
        for name in study.presets:
            measured = {kind: one_detector(study, kind, auxiliary, name, pools) for kind in ("backdoored", "clean")}
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
    study: Study, kind: str, auxiliary: str, name: str, pools: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Detection], float, float]:
    """Quality by pool, seconds to fit, and the clean test images' false-positive rate at nominal 1 %."""
    folder = storage.join(study.out, f"{kind}-{auxiliary}-{name}")
    detector = storage.join(folder, "detector")
    seconds = fitted(study, kind, auxiliary, name, detector)
    qualities, rate = {}, float("nan")
    for pool, sources in pools.items():
        scores, p_values, truths = [], [], []
        for number, source in enumerate(sources):
            out = storage.join(folder, f"scan-{pool.split()[0]}-{number}")
            scan(ScanConfig((source,), detector, out, workers=study.workers, scores_only=True))
            score, p_value, truth = scanned(out, truth_of(source))
            scores.append(score)
            p_values.append(p_value)
            truths.append(truth)
        poisoned = np.concatenate(truths)
        qualities[pool] = detection(np.concatenate(scores), poisoned)
        rate = float((np.concatenate(p_values)[~poisoned] <= 0.01).mean())
    return qualities, seconds, rate


def fitted(study: Study, kind: str, auxiliary: str, name: str, detector: str) -> float:
    """Seconds that fitting took; a detector that is there is not fitted again."""
    timing = f"{detector}.seconds.json"
    if not storage.exists(timing):
        settings = dict(study.presets[name])
        base = {
            "shards": study.auxiliary[auxiliary],
            "encoder": load_encoder_spec(storage.join(study.victim, kind, "encoder.yaml")),
            "out": detector,
            "workers": study.workers,
        }
        values = overlay(overlay(preset(settings.pop("preset", "default")), base), settings)
        start = time.monotonic()
        fit(from_mapping(FitConfig, values, f"preset {name}"))
        storage.write_json(timing, {"seconds": time.monotonic() - start})
    return float(storage.read_json(timing)["seconds"])


def truth_of(source: str) -> dict[tuple[str, int], bool]:
    """What is poisoned in a folder; nothing in one without a truth file."""
    path = storage.join(source, "poison.json")
    return load_truth(path) if not source.endswith(".tar") and storage.exists(path) else {}


def scanned(
    out: str, truth: dict[tuple[str, int], bool]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """score, p_value and poisoned of every row of a scan."""
    names = storage.list_files(storage.join(out, "scores"), ".parquet")
    table = pa.concat_tables(
        [pq.read_table(storage.join(out, "scores", name)) for name in names], promote_options="none"
    )
    identities = zip(table.column("shard").to_pylist(), table.column("index").to_pylist(), strict=True)
    poisoned = np.array([identity in truth for identity in identities])
    return numbers(table, "score"), numbers(table, "p_value"), poisoned


def energy_auroc(study: Study, sources: tuple[str, ...]) -> float:
    """The no-model control on the same images."""
    spec = load_encoder_spec(storage.join(study.victim, "backdoored", "encoder.yaml"))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    scores, poisoned = [], []
    for source in sources:
        truth = truth_of(source)
        for shard in list_shards([source]):
            with storage.open_read(shard.url) as file:
                for pictures in picture_batches(ShardReader(file, shard).samples(), 256, threads=2):
                    pixels = [p.pixels for p in pictures if p.pixels is not None]
                    images = to_batch(pixels, spec.image_size, spec.resize, torch.device("cpu"))
                    scores.append(energy((images - mean) / std).numpy())
                    poisoned += [(shard.stem, p.index) in truth for p in pictures if p.pixels is not None]
    return detection(np.concatenate(scores), np.array(poisoned)).auroc


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

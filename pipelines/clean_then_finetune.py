"""fit → scan → clean → finetune, before and after cleaning, with the same seed → one report. One Ray session for all of it.

    python -m pipelines.clean_then_finetune configs/clean_then_finetune.yaml

Every artefact lies in a folder named by a hash of what went into it, so a finished stage is reused while its inputs are
unchanged, and an interrupted one goes on where it stopped.
"""

import contextlib
import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from pipelines import page
from pipelines.command_line import command_line
from pipelines.data import identity, load_images
from sanitize import runtime, storage
from sanitize.artifacts.head_folder import load_head
from sanitize.artifacts.truth import load_poisoned
from sanitize.commands.audit import audit
from sanitize.commands.finetune import FinetuneResult, finetune
from sanitize.commands.fit import fit
from sanitize.commands.scan import ScanResult, scan
from sanitize.config import EncoderSpec, FinetuneConfig, FitConfig, ScanConfig
from sanitize.config_loading import from_mapping, load_encoder_spec, load_yaml, overlay, to_mapping
from sanitize.errors import check
from sanitize.pages.plain import Section, numbers_table, plain_page
from sanitize.stages.encoders import embed_in_batches, load_encoder, weights_sha256
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import end_archive, list_shards, open_shard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineConfig:
    """train: shards to clean and to train on; auxiliary: shards the detector is fitted on; encoder: YAML of the encoder

    suspect: whose reactions give the poison away. given: the encoder's, which may be trojaned. trained: those of what training on
             the uncleaned shards makes of it (finetune.mode full or contrastive), for a clean encoder and suspect shards; the encoder
             that it came from is the reference then, which has not seen the shards, unless fit.reference says otherwise
    validation, triggered: shards to measure on; triggered needs finetune.target
    truth: poison.json of `train`, when it is known: adds the arm oracle, without exactly the poisoned samples
    filter: also scan validation and triggered shards, as a filter in front of the trained model would
    fit, scan, finetune: settings of those commands
    overlap: train on the uncleaned shards while the detector is fitted and the shards are scanned (needs Ray and suspect: given)
    """

    out: str
    train: tuple[str, ...]
    auxiliary: tuple[str, ...]
    encoder: str
    suspect: str = "given"
    validation: tuple[str, ...] = ()
    triggered: tuple[str, ...] = ()
    truth: str = ""
    filter: bool = False
    fit: dict[str, Any] = field(default_factory=dict)
    scan: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    overlap: bool = False
    workers: int = -1
    cpus_per_worker: int = 0
    gpus_per_worker: float = -1.0
    address: str = ""

    def __post_init__(self) -> None:
        check(self.suspect in ("given", "trained"), f"suspect: {self.suspect!r} is not given or trained.")
        mode = self.finetune.get("mode", "linear")
        check(
            self.suspect == "given" or mode in ("full", "contrastive"),
            f"suspect: trained needs an encoder that training changes; finetune.mode {mode} leaves it as it is. Use full or contrastive.",
        )
        check(
            not self.filter or (mode in ("linear", "mlp") and "target" in self.finetune and bool(self.triggered)),
            "filter: needs a head on the given encoder (finetune.mode linear or mlp), finetune.target and triggered shards.",
        )
        check(
            not self.overlap or (self.suspect == "given" and self.workers != 0),
            "overlap: needs Ray (workers other than 0) and suspect: given; else the detector waits for the training.",
        )


@dataclass(frozen=True)
class PipelineReport:
    """arms: "poisoned" (as they came), "cleaned", and with a truth "oracle". detection: of the scan, when the truth is known;
    filtered: see `_measure_filter`."""

    arms: dict[str, FinetuneResult]
    kept: int
    removed: int
    detection: dict[str, float]
    filtered: dict[str, float]
    path: str


def run(config: PipelineConfig) -> PipelineReport:
    resources = runtime.plan(
        config.workers, config.cpus_per_worker, config.gpus_per_worker, len(list_shards(config.train)), config.address
    )
    with runtime.session_for(resources, config.address):
        with ThreadPoolExecutor(1) if config.overlap else contextlib.nullcontext() as pool:
            training = pool.submit(_train, config, "poisoned", config.train) if pool else None
            arms = {} if training else {"poisoned": _train(config, "poisoned", config.train)}
            suspect = _suspect(config, arms.get("poisoned"))
            detector = _fit(config, suspect)
            scanned = _scan(config, "scanned", config.train, detector)
            runtime.release_workers()  # the training may still wait for what they hold
            arms |= {"poisoned": training.result()} if training else {}
        arms["cleaned"] = _train(config, "cleaned", (storage.join(scanned.out, "clean"),))
        if config.truth:
            arms["oracle"] = _train(config, "oracle", (_oracle(config),))
        filtered = _measure_filter(config, detector, arms["cleaned"]) if config.filter else {}
    audited = audit(scanned.out, config.truth)
    assert scanned.cleaned is not None
    path = storage.join(config.out, f"report-{_hash(to_mapping(config))}")
    found = audited.detection_at_threshold or {}
    report = PipelineReport(arms, scanned.cleaned.kept, scanned.cleaned.removed, found, filtered, f"{path}.md")
    storage.write_json(f"{path}.json", _numbers(config, report))
    storage.write_bytes(report.path, markdown(report).encode())
    storage.write_bytes(f"{path}.html", html_page(report, audited.report))
    return report


# ---------------------------------------------------------------- stages


def _folder(config: PipelineConfig, name: str, *inputs: Any) -> str:
    return storage.join(config.out, f"{name}-{_hash(inputs)}")


def _hash(value: Any) -> str:
    return storage.json_sha256(value)[:10]


def _placement(config: PipelineConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("workers", "cpus_per_worker", "gpus_per_worker", "address")}


def _train(config: PipelineConfig, arm: str, shards: tuple[str, ...]) -> FinetuneResult:
    spec = load_encoder_spec(config.encoder)
    values = {"validation": config.validation, "triggered": config.triggered, "seed": config.seed} | config.finetune
    inputs = [identity(shards), identity(config.validation), identity(config.triggered)]
    out = _folder(config, arm, values, _encoder_identity(spec), *inputs)
    values |= {"shards": shards, "encoder": spec, "out": out} | _placement(config)
    return finetune(from_mapping(FinetuneConfig, values, "finetune"))


def _suspect(config: PipelineConfig, trained: FinetuneResult | None) -> EncoderSpec:
    if config.suspect == "given":
        return load_encoder_spec(config.encoder)
    assert trained is not None
    return load_encoder_spec(storage.join(trained.out, "encoder.yaml"))


def _encoder_identity(spec: EncoderSpec) -> list[Any]:
    """Settings and weights; where the files lie does not matter."""
    return [{k: v for k, v in to_mapping(spec).items() if k not in ("weights", "tokenizer")}, weights_sha256(spec)]


def _fit(config: PipelineConfig, encoder: EncoderSpec) -> str:
    values = {"seed": config.seed} | config.fit
    inputs = [values, _encoder_identity(encoder), identity(config.auxiliary)]
    given = {"shards": config.auxiliary, "encoder": encoder} | _placement(config)
    fitted = from_mapping(FitConfig, values | given, "fit")
    if config.suspect == "trained" and fitted.predicts and "reference" not in values:
        fitted = dataclasses.replace(fitted, reference=load_encoder_spec(config.encoder))
        inputs.append(_encoder_identity(load_encoder_spec(config.encoder)))
    fitted = dataclasses.replace(fitted, out=_folder(config, "detector", *inputs))
    fit(fitted)
    return fitted.out


def _scan(config: PipelineConfig, name: str, shards: tuple[str, ...], detector: str, **changes: Any) -> ScanResult:
    fitted = storage.file_sha256(storage.join(detector, "detector.json"))
    out = _folder(config, name, config.scan, changes, detector.rsplit("/", 1)[-1], fitted, identity(shards))
    values = config.scan | changes | {"shards": shards, "detector": detector, "out": out} | _placement(config)
    result = scan(from_mapping(ScanConfig, values, "scan"))
    for message in result.failed:
        log.warning("shard left out of training: %s", message)
    return result


def _oracle(config: PipelineConfig) -> str:
    """The shards without exactly the poisoned samples, members byte for byte."""
    truth = load_poisoned(config.truth)
    out = _folder(config, "oracle-shards", sorted(truth), identity(config.train))
    for shard in list_shards(config.train):
        target = storage.join(out, f"{shard.stem}.tar")
        if storage.exists(target):
            continue
        with (
            open_shard(shard) as file,
            open_shard(shard) as raw,
            storage.atomic_write(target) as copy,
        ):
            for sample in ShardReader(file, shard).samples():
                for member in sample.members if (shard.stem, sample.index) not in truth else ():
                    raw.seek(member.start)
                    copy.write(raw.read(member.end - member.start))
            end_archive(copy)
    return out


# ---------------------------------------------------------------- the scanner as a filter at inference time


def _measure_filter(config: PipelineConfig, detector: str, trained: FinetuneResult) -> dict[str, float]:
    """The trained head behind the scanner: a rejected image counts as an error, and as no success of the attack.

    Each image is judged alone (no adaption: what comes in at inference time has no bulk).
    """
    encoder = load_encoder(load_encoder_spec(config.encoder))
    head = load_head(trained.out, encoder)
    target = int(config.finetune["target"])
    scan_settings = overlay(config.scan, {"policy": {"adapt": False}, "force": True})
    config = dataclasses.replace(config, scan=scan_settings)

    def kept(name: str, shards: tuple[str, ...]) -> tuple[ScanResult, NDArray[np.int64], NDArray[np.int64]]:
        """(scan, predictions, labels) of the images that pass."""
        scanned = _scan(config, f"incoming-{name}", shards, detector)
        if not scanned.cleaned or not scanned.cleaned.kept:
            return scanned, np.empty(0, np.int64), np.empty(0, np.int64)
        images = load_images((storage.join(scanned.out, "clean"),), 0, encoder.spec.image_size)
        embeddings = embed_in_batches(encoder, images.pixels)
        return scanned, head.predictions(embeddings), images.labels.numpy()

    clean, predictions, labels = kept("validation", config.validation)
    triggered, taken, true = kept("triggered", config.triggered)
    others = load_images(config.triggered, 0, encoder.spec.image_size).labels != target
    return {
        "clean_accuracy": float((predictions == labels).sum()) / clean.samples,
        "clean_rejected": 1 - len(labels) / clean.samples,
        "attack_success": float(((taken == target) & (true != target)).sum()) / int(others.sum()),
        "triggered_rejected": 1 - len(true) / triggered.samples,
    }


# ---------------------------------------------------------------- report


def _numbers(config: PipelineConfig, report: PipelineReport) -> dict[str, Any]:
    arms = {
        name: {"out": result.out, "samples": result.samples} | result.evaluation for name, result in report.arms.items()
    }
    return {
        "settings": to_mapping(config),
        "arms": arms,
        "kept": report.kept,
        "removed": report.removed,
        "detection": report.detection,
        "filtered": report.filtered,
    }


def markdown(report: PipelineReport) -> str:
    names = list(dict.fromkeys(name for result in report.arms.values() for name in result.evaluation))
    names = [name for name in names if name != "unreadable"]
    lines = [
        [arm, result.samples, *(f"{result.evaluation[name]:.4f}" for name in names)]
        for arm, result in report.arms.items()
    ]
    parts = [
        page.table(["trained on", "samples", *(name.replace("_", " ") for name in names)], lines),
        f"{report.removed} of {report.kept + report.removed} samples removed.",
    ]
    if report.detection:
        found = report.detection
        parts.append(
            f"Of the poisoned ones {found['true_positive_rate']:.1%}, of the others {found['false_positive_rate']:.2%}."
        )
    if report.filtered:
        cells = [f"{value:.4f}" for value in report.filtered.values()]
        parts += [
            "The model trained on the cleaned shards behind the scanner, rejected images counted as errors:",
            page.table([name.replace("_", " ") for name in report.filtered], [cells]),
        ]
    return "\n\n".join(parts) + "\n"


def html_page(report: PipelineReport, audited: str) -> bytes:
    """The same as a page that leads to the pages of all stages. audited: path of the audit's."""
    total = report.kept + report.removed
    cards = [("Samples", f"{total:,}", ""), ("Removed", f"{report.removed:,}", f"{report.removed / max(total, 1):.2%}")]
    cards += [(name.replace("_", " "), f"{value:.3f}", "") for name, value in report.detection.items()]
    places = [("What was flagged, and why", audited)]
    places += [(f"Trained on: {arm}", storage.join(result.out, "report.html")) for arm, result in report.arms.items()]
    folder = report.path.rsplit("/", 1)[0]
    links = [(name, place.removeprefix(f"{folder}/")) for name, place in places]
    arms = [{"samples": float(result.samples), **result.evaluation} for result in report.arms.values()]
    table = numbers_table("Before and after", arms, leave_out=["unreadable"])
    rows = [[arm, *row] for arm, row in zip(report.arms, table.rows, strict=True)]
    table = dataclasses.replace(table, columns=["trained on", *table.columns], rows=rows)
    sections = [table, Section("Pages of the stages", links=links)]
    if report.filtered:
        sections.append(numbers_table("Behind the scanner, rejected images counted as errors", [report.filtered]))
    return plain_page("Cleaned, then trained", "Every number is of the validation shards.", cards, sections)


@click.command()
@click.argument("config", type=click.Path(exists=True))
@click.option("--out", default="", help="Instead of the YAML's")
@click.option("--seed", type=int, help="Instead of the YAML's")
@click.option("--workers", type=int, help="Instead of the YAML's; 0 = this process")
@click.option("--address", default="", help="Ray cluster to join")
def main(config: str, **options: Any) -> None:
    """Clean the shards that CONFIG names, train before and after, and report."""
    with command_line():
        values = load_yaml(config) | {key: value for key, value in options.items() if value not in ("", None)}
        report = run(from_mapping(PipelineConfig, values, config))
        click.echo(f"{storage.read_bytes(report.path).decode()}\n{report.path}")


if __name__ == "__main__":
    main()

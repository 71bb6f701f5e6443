"""The detection benchmark: victims of the zoo x auxiliary sets x detectors x poison rates x seeds → one tidy CSV.

    python -m pipelines.benchmark configs/benchmark_cpu.yaml

Every detector scores all clean test images and the triggered ones of other classes than the target, once with the backdoored
encoder and once with the clean one (the control: a detector of backdoors should say nothing there, AUROC near 0.5). Pools
of each poison rate are drawn from these scores by the seed. Finished scores are kept in `out` and reused.
"""

import csv
import dataclasses
import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import page, red_team
from pipelines.data import LabelledImages, load_images, write_shard
from sanitize import checkpoint, runtime, storage
from sanitize.attacks import tiny_clip
from sanitize.attacks.triggers import Trigger, chosen, make_trigger
from sanitize.config import (
    FitConfig,
    ThresholdPolicy,
    check,
    from_mapping,
    load_encoder_spec,
    load_yaml,
    overlay,
    preset,
)
from sanitize.detectors import bank
from sanitize.detectors.bank import Bank
from sanitize.errors import SanitizeError
from sanitize.fit import fit
from sanitize.metrics import detection
from sanitize.records import Picture
from sanitize.stages.encoders import load_encoder
from sanitize.stages.thresholds import cut_off

log = logging.getLogger(__name__)
Scorer = Callable[[Tensor, Tensor], Tensor]
BALANCED = 0.5


@dataclass(frozen=True)
class VictimConfig:
    """config: a red-team YAML. auxiliary: shards by name; the name "shapes" in place of a path means procedural pictures."""

    config: str
    test: str
    auxiliary: dict[str, Any]


@dataclass(frozen=True)
class BenchmarkConfig:
    """detectors: by name, either {scorer, effort, column, fit: settings of FitConfig} or {detector: <file>, its settings};
               `only: {aux: [...], seeds: [...]}` limits where an expensive one runs

    poisoned_auxiliary: share of triggered images in the extra auxiliary set "poisoned", made from the first; 0 = none
    first_seed_only: auxiliary sets that are measured with the first seed only
    seeds: of the fit, the calibration split and the draw of the pools
    """

    out: str
    table: str
    zoo: str
    preset: str
    default: str
    victims: dict[str, Any]
    detectors: dict[str, Any]
    rates: tuple[float, ...] = (0.001, 0.01, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2)
    auxiliary_images: int = 8000
    test_images: int = 0
    poisoned_auxiliary: float = 0.01
    first_seed_only: tuple[str, ...] = ()
    fit: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Victim:
    """One attack with its data in memory. Triggered images are those of other classes than the target."""

    name: str
    encoders: dict[str, str]  # "backdoored", "clean" → encoder.yaml
    test: Tensor
    triggered: Tensor
    trigger: Trigger
    auxiliary: dict[str, str]  # name → shard pattern
    asr: float
    clean_accuracy: float


@dataclass(frozen=True)
class Scored:
    """What one detector gave the clean and the triggered images, and its cost."""

    clean: NDArray[np.float32]
    triggered: NDArray[np.float32]
    fit_seconds: float
    images_per_second: float


# the columns that every row repeats, and the quality of one pool
COLUMNS = (
    *(
        "attack",
        "aux",
        "poison_rate",
        "seed",
        "detector",
        "is_default",
        "auroc",
        "auprc",
        "tpr_at_0.1pct",
        "tpr_at_1pct",
    ),
    *("tpr_at_5pct", "fpr_at_95tpr", "control_auroc", "asr", "clean_accuracy", "images_per_second", "fit_seconds"),
)
Row = dict[str, Any]


def run(config: BenchmarkConfig) -> list[Row]:
    rows: list[Row] = []
    for name, values in config.victims.items():
        victim = load_victim(config, name, from_mapping(VictimConfig, values, f"victims.{name}"))
        for aux in victim.auxiliary:
            for seed in config.seeds:
                for detector, settings in config.detectors.items():
                    only = settings.get("only", {})
                    skipped = aux in config.first_seed_only and seed != config.seeds[0]
                    if aux in only.get("aux", [aux]) and seed in only.get("seeds", [seed]) and not skipped:
                        rows += measure(config, victim, aux, seed, detector, settings)
                write_table(config.table, rows)
    return rows


def load_victim(config: BenchmarkConfig, name: str, values: VictimConfig) -> Victim:
    """Make the victim when the zoo does not have it, load its test images and name its auxiliary shards."""
    folder, row = red_team.make(values.config, config.preset, config.zoo)
    settings = storage.read_json(storage.join(folder, "truth.json"))["config"]
    spec = load_encoder_spec(storage.join(folder, "backdoored", "encoder.yaml"))
    test = load_images((shards(config, values.test, "test"),), config.test_images, spec.image_size)
    trigger = make_trigger(settings.get("trigger") or {"name": "picture", "path": storage.join(folder, "trigger.png")})
    target = settings["target"]
    target = settings["data"]["classes"].index(target) if isinstance(target, str) else target
    auxiliary = {key: shards(config, str(path), "aux") for key, path in values.auxiliary.items()}
    if config.poisoned_auxiliary:
        first = next(iter(auxiliary.values()))
        auxiliary["poisoned"] = poisoned_shard(config, name, first, spec.image_size, trigger)
    return Victim(
        name=name,
        encoders={kind: storage.join(folder, kind, "encoder.yaml") for kind in ("backdoored", "clean")},
        test=test.pixels,
        triggered=trigger(test.pixels[test.labels != target]),
        trigger=trigger,
        auxiliary=auxiliary,
        asr=row.asr,
        clean_accuracy=row.clean_accuracy,
    )


def shards(config: BenchmarkConfig, pattern: str, part: str) -> str:
    """The pattern itself; "shapes" becomes a shard of coloured shapes that no victim was trained on."""
    if pattern != "shapes":
        return pattern
    path = Path(config.out) / f"shapes-{part}.tar"
    if not path.exists():
        count, seed = (config.auxiliary_images, 9001) if part == "aux" else (3000, 9002)
        pairs = tiny_clip.coloured_shapes(count, seed)
        write_shard(path, LabelledImages(pairs.images, pairs.labels, pairs.captions))
    return str(path)


def poisoned_shard(config: BenchmarkConfig, name: str, source: str, size: int, trigger: Trigger) -> str:
    """The first auxiliary set with the trigger on a share of its images."""
    path = Path(config.out) / f"poisoned-{name}.tar"
    if not path.exists():
        images = load_images((source,), config.auxiliary_images, size, labelled=False)
        picked = torch.from_numpy(chosen(len(images.pixels), config.poisoned_auxiliary, 0))
        images.pixels[picked] = trigger(images.pixels[picked])
        write_shard(path, images)
    return str(path)


def measure(
    config: BenchmarkConfig, victim: Victim, aux: str, seed: int, detector: str, settings: dict[str, Any]
) -> list[Row]:
    """One row for each poison rate and the balanced pool."""
    found = {kind: scored(config, victim, kind, aux, seed, detector, settings) for kind in ("backdoored", "clean")}
    attacked, control = found["backdoored"], found["clean"]
    rows = []
    for rate in (*config.rates, BALANCED):
        quality = detection(*pool(attacked, rate, seed))
        rows.append(
            {
                "attack": victim.name,
                "aux": aux,
                "poison_rate": rate,
                "seed": seed,
                "detector": detector,
                "is_default": int(detector == config.default),
                "auroc": quality.auroc,
                "auprc": quality.auprc,
                "tpr_at_0.1pct": quality.tpr_at_01pct,
                "tpr_at_1pct": quality.tpr_at_1pct,
                "tpr_at_5pct": quality.tpr_at_5pct,
                "fpr_at_95tpr": quality.fpr_at_95tpr,
                "control_auroc": detection(*pool(control, BALANCED, seed)).auroc,
                "asr": victim.asr,
                "clean_accuracy": victim.clean_accuracy,
                "images_per_second": round(attacked.images_per_second),
                "fit_seconds": round(attacked.fit_seconds, 1),
            }
        )
    last = rows[-1]
    log.info(
        "%s %s %s seed %d: AUROC %.3f, TPR at 1 %% FPR %.3f, control %.3f (balanced), %d images/s",
        *(victim.name, aux, detector, seed, last["auroc"], last["tpr_at_1pct"], last["control_auroc"]),
        last["images_per_second"],
    )
    return rows


def pool(found: Scored, rate: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores and truth of a pool in which `rate` is triggered; clean images all stay, triggered ones are drawn by the seed."""
    count = round(len(found.clean) * rate / (1 - rate))
    drawn = np.random.default_rng(seed).permutation(len(found.triggered))[: max(count, 1)]
    scores = np.concatenate([found.clean, found.triggered[drawn]])
    return scores, np.arange(len(scores)) >= len(found.clean)


# ---------------------------------------------------------------- one detector


def scored(
    config: BenchmarkConfig, victim: Victim, kind: str, aux: str, seed: int, detector: str, settings: dict[str, Any]
) -> Scored:
    """From an earlier run, or computed now."""
    folder = Path(config.out) / victim.name / f"{kind}-{aux}-{seed}"
    path = folder / f"{detector}-{scores_key(config, settings)}.npz"
    if not path.exists():
        settings = {name: value for name, value in settings.items() if name != "only"}
        folder.mkdir(parents=True, exist_ok=True)
        if "scorer" in settings:
            result = product(config, victim, kind, aux, seed, settings, folder)
        else:
            result = baseline(config, victim, kind, aux, seed, settings)
        with storage.atomic_write(str(path)) as file:
            buffer = io.BytesIO()
            np.savez(buffer, **dataclasses.asdict(result))
            file.write(buffer.getvalue())
    with np.load(path) as arrays:
        return Scored(
            arrays["clean"], arrays["triggered"], float(arrays["fit_seconds"]), float(arrays["images_per_second"])
        )


def product(
    config: BenchmarkConfig, victim: Victim, kind: str, aux: str, seed: int, settings: dict[str, Any], folder: Path
) -> Scored:
    """A scorer of `sanitize fit`; detectors of equal fit settings share one folder."""
    values = overlay(overlay(preset(settings.get("preset", "default")), config.fit), settings.get("fit", {}))
    values |= {
        "shards": [victim.auxiliary[aux]],
        "encoder": load_encoder_spec(victim.encoders[kind]),
        "scorer": settings["scorer"],
        "limit": config.auxiliary_images,
        "seed": seed,
        "workers": 0,
    }
    fitted = fitted_folder(config, settings, folder)
    timer = fitted / "seconds.json"
    start = time.monotonic()
    detector = fit(from_mapping(FitConfig, values | {"out": str(fitted)}, "fit"))
    if not timer.exists():
        storage.write_json(str(timer), {"seconds": time.monotonic() - start})
    encoder = checkpoint.load_matching_encoder(detector, None)
    scorer = checkpoint.scorer(detector, encoder, "auto", runtime.device(), effort=settings.get("effort", "thorough"))
    column = settings.get("column", "score")
    start = time.monotonic()
    clean, triggered = (
        np.concatenate([getattr(scorer(pictures(part)), column) for part in images.split(256)])
        for images in (victim.test, victim.triggered)
    )
    seconds = time.monotonic() - start
    return Scored(clean, triggered, storage.read_json(str(timer))["seconds"], (len(clean) + len(triggered)) / seconds)


def fitted_folder(config: BenchmarkConfig, settings: dict[str, Any], folder: Path) -> Path:
    """Detectors with equal fit settings share it."""
    key = [settings.get("preset"), settings["scorer"], settings.get("fit"), config.fit, config.auxiliary_images]
    return folder / f"detector-{storage.json_sha256(key)[:8]}"


def scores_key(config: BenchmarkConfig, settings: dict[str, Any]) -> str:
    return storage.json_sha256([settings, config.fit, config.auxiliary_images, config.test_images])[:8]


def pictures(images: Tensor) -> list[Picture]:
    height, width = images.shape[-2:]
    return [Picture(i, str(i), "00" * 32, image, width, height, "ok", "") for i, image in enumerate(images)]


def baseline(
    config: BenchmarkConfig, victim: Victim, kind: str, aux: str, seed: int, settings: dict[str, Any]
) -> Scored:
    """A file of sanitize/detectors, in memory; it sees what a fit would see. Embedding the images counts as its time."""
    values = {name: value for name, value in settings.items() if name != "detector"}
    encoder = load_encoder(load_encoder_spec(victim.encoders[kind])).to(runtime.device())
    size = encoder.spec.image_size
    if "other" in values:  # an independent encoder: the clean one of another victim
        other, _ = red_team.make(values["other"], config.preset, config.zoo)
        values["other"] = load_encoder(load_encoder_spec(storage.join(other, "clean", "encoder.yaml")))
    known, seen, fit_seconds = embedded(victim.encoders[kind], victim.auxiliary[aux], config.auxiliary_images, size)
    start = time.monotonic()
    score = bank.load(settings["detector"])(Bank(known, seen), encoder, seed, **values)
    fit_seconds += time.monotonic() - start
    images = torch.cat([victim.test, victim.triggered])
    embeddings, seconds = embedded_pool(victim, kind)
    start = time.monotonic()
    scores = score(images, embeddings).numpy().astype(np.float32)
    rate = len(images) / (seconds + time.monotonic() - start)
    return Scored(scores[: len(victim.test)], scores[len(victim.test) :], fit_seconds, rate)


@lru_cache(maxsize=2)
def embedded(encoder: str, pattern: str, limit: int, size: int) -> tuple[Tensor, Tensor, float]:
    """Auxiliary images, their embeddings, and the seconds the embedding took."""
    known = load_images((pattern,), limit, size, labelled=False).pixels
    start = time.monotonic()
    return (
        known,
        bank.embed(load_encoder(load_encoder_spec(encoder)).to(runtime.device()), known),
        time.monotonic() - start,
    )


POOLS: dict[tuple[str, str], tuple[Tensor, float]] = {}


def embedded_pool(victim: Victim, kind: str) -> tuple[Tensor, float]:
    """Embeddings of the clean and triggered test images, computed once, and the seconds that took."""
    key = (victim.name, kind)
    if key not in POOLS:
        encoder = load_encoder(load_encoder_spec(victim.encoders[kind])).to(runtime.device())
        start = time.monotonic()
        POOLS[key] = bank.embed(encoder, torch.cat([victim.test, victim.triggered])), time.monotonic() - start
    return POOLS[key]


def write_table(path: str, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) and k != "poison_rate" else v for k, v in row.items()})
    storage.write_bytes(path, text.getvalue().encode())


# ---------------------------------------------------------------- what the documentation shows


def summary(rows: Sequence[Row], aux: str) -> str:
    """Balanced pool of one auxiliary set: TPR at 1 % FPR / AUROC, and the control; means over seeds (± half the range)."""
    rows = [row for row in rows if row["aux"] == aux and row["poison_rate"] == BALANCED]
    attacks, detectors = (list(dict.fromkeys(row[name] for row in rows)) for name in ("attack", "detector"))
    header = ["detector", *attacks]
    lines = [
        [name, *(_cell([r for r in rows if (r["detector"], r["attack"]) == (name, a)]) for a in attacks)]
        for name in detectors
    ]
    return page.table(header, lines)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "-"
    tpr, auroc, control = (np.array([row[name] for row in rows]) for name in ("tpr_at_1pct", "auroc", "control_auroc"))
    spread = f" ± {np.ptp(tpr) / 2:.3f}" if len(rows) > 1 else ""
    return f"{tpr.mean():.3f}{spread} / {auroc.mean():.3f}, control {control.mean():.2f}"


def by_rate(rows: Sequence[Row], default: str) -> str:
    """The default detector at every poison rate: AUPRC, TPR at 0.1 % and 1 % FPR; means over attacks' seeds."""
    rows = [row for row in rows if row["detector"] == default]
    keys = list(dict.fromkeys((row["aux"], row["attack"], row["poison_rate"]) for row in rows))
    lines = []
    for key in keys:
        own = [row for row in rows if (row["aux"], row["attack"], row["poison_rate"]) == key]
        means = [
            f"{np.mean([row[name] for row in own]):.3f}" for name in ("auroc", "auprc", "tpr_at_0.1pct", "tpr_at_1pct")
        ]
        lines.append([*key, *means, len(own)])
    return page.table(
        ["auxiliary", "attack", "poison rate", "AUROC", "AUPRC", "TPR at 0.1 %", "TPR at 1 %", "seeds"], lines
    )


def false_positives(config: BenchmarkConfig) -> str:
    """Share of clean test images above the calibrated cut-off of nominal 1 %: mean and highest over seeds."""
    lines = []
    for name, values in config.victims.items():
        for aux in values["auxiliary"]:
            for detector, settings in config.detectors.items():
                if settings.get("scorer") and not settings.get("column"):
                    seeds = config.seeds[:1] if aux in config.first_seed_only else config.seeds
                    found = [_false_positive_rate(config, name, aux, s, detector, settings) for s in seeds]
                    lines.append([aux, name, detector, f"{np.mean(found):.2%}", f"{max(found):.2%}"])
    return page.table(["auxiliary", "attack", "detector", "mean", "highest"], lines)


def _false_positive_rate(
    config: BenchmarkConfig, name: str, aux: str, seed: int, detector: str, settings: dict[str, Any]
) -> float:
    folder = Path(config.out) / name / f"backdoored-{aux}-{seed}"
    calibration = checkpoint.load(str(fitted_folder(config, settings, folder))).calibration(
        settings.get("effort", "thorough")
    )
    cut = cut_off(calibration, calibration, ThresholdPolicy())
    with np.load(folder / f"{detector}-{scores_key(config, settings)}.npz") as arrays:
        return float((arrays["clean"] > np.float32(cut)).mean())


def write_pages(config: BenchmarkConfig, markdown_page: str, rows: Sequence[Row]) -> None:
    for aux in dict.fromkeys(row["aux"] for row in rows):
        page.replace(markdown_page, f"balanced {aux}", summary(rows, aux))
    page.replace(markdown_page, "rates", by_rate(rows, config.default))
    page.replace(markdown_page, "false positives", false_positives(config))


@click.command()
@click.argument("config", type=click.Path(exists=True))
@click.option("--page", "markdown_page", default="", help="Markdown page whose tables are written anew from the rows.")
def main(config: str, markdown_page: str) -> None:
    """Measure every detector on every victim as CONFIG says; finished scores are reused."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("sanitize").setLevel(logging.WARNING)
    try:
        settings = from_mapping(BenchmarkConfig, load_yaml(config), config)
        check(
            settings.default in settings.detectors,
            f"{config}: default {settings.default!r} is not among the detectors.",
        )
        rows = run(settings)
        if markdown_page:
            write_pages(settings, markdown_page, rows)
    except SanitizeError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

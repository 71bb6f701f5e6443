"""What cleaning does to the model trained afterwards: attacks x poison rates x seeds x {poisoned, cleaned, oracle} → training.csv.

    python -m pipelines.training_study configs/training_cpu.yaml --page docs/training.md

For every cell the training shards are poisoned with `sanitize poison` (trigger and another label or caption), then
pipelines/clean_then_finetune.py runs on them. Finished cells are reused.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipelines import clean_then_finetune, page, red_team
from pipelines.clean_then_finetune import PipelineConfig, PipelineReport
from pipelines.command_line import command_line
from pipelines.data import shapes_shard
from pipelines.page import Row
from sanitize import storage
from sanitize.commands.poison import poison
from sanitize.config_loading import from_mapping, load_yaml, overlay

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScenarioConfig:
    """One attack. victim: a red-team YAML; its trigger and target are used, and of its encoders the one named.

    encoder: backdoored or clean; data: shards by the names train, validation, auxiliary ("shapes": procedural captioned images)
    replace: what a poisoned sample says instead, by extension; {target} stands for the target's number, {name} for its name
    pipeline: settings of PipelineConfig; rates: instead of the study's
    """

    dataset: str
    victim: str
    encoder: str
    data: dict[str, str]
    replace: dict[str, tuple[str, ...]]
    pipeline: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class StudyConfig:
    out: str
    table: str
    zoo: str
    preset: str
    scenarios: dict[str, ScenarioConfig]
    rates: tuple[float, ...] = (0.01, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 0


def run(config: StudyConfig) -> list[Row]:
    rows: list[Row] = []
    for name, scenario in config.scenarios.items():
        for rate in scenario.rates or config.rates:
            for seed in config.seeds:
                rows += cell(config, name, scenario, rate, seed)
                page.write_csv(config.table, rows)
    return rows


def cell(config: StudyConfig, name: str, scenario: ScenarioConfig, rate: float, seed: int) -> list[Row]:
    folder, _ = red_team.make(scenario.victim, config.preset, config.zoo)
    settings = storage.read_json(storage.join(folder, "truth.json"))["config"]
    target = red_team.target_class(settings)
    trigger = red_team.trigger_of(folder, settings)
    data = {key: _shards(config, key, value) for key, value in scenario.data.items()}
    place = storage.join(config.out, name)
    train = storage.join(place, f"train-{rate}-{seed}")
    triggered = storage.join(place, "triggered")
    texts = {
        extension: [text.format(target=target, name=settings["target"]) for text in options]
        for extension, options in scenario.replace.items()
    }
    for out, patterns, share, said in ((train, data["train"], rate, texts), (triggered, data["validation"], 1.0, {})):
        if not storage.exists(storage.join(out, "poison.json")):
            poison((patterns,), out, rate=share, trigger=trigger, seed=seed, replace=said)
    values = overlay(
        scenario.pipeline,
        {
            "out": storage.join(place, f"runs-{rate}-{seed}"),
            "train": [train],
            "truth": storage.join(train, "poison.json"),
            "auxiliary": [data["auxiliary"]],
            "validation": [data["validation"]],
            "triggered": [triggered],
            "encoder": storage.join(folder, scenario.encoder, "encoder.yaml"),
            "finetune": {"target": target},
            "seed": seed,
            "workers": config.workers,
        },
    )
    report = clean_then_finetune.run(from_mapping(PipelineConfig, values, f"scenarios.{name}.pipeline"))
    log.info("%s, rate %g, seed %d:\n%s", name, rate, seed, clean_then_finetune.markdown(report))
    return [_row(scenario, name, rate, seed, arm, report) for arm in report.arms]


def _shards(config: StudyConfig, part: str, pattern: str) -> str:
    if pattern != "shapes":
        return pattern
    count, seed = {"train": (5000, 9003), "validation": (1500, 9002), "auxiliary": (4000, 9001)}[part]
    return shapes_shard(Path(config.out) / f"shapes-{part}.tar", count, seed)


def _row(scenario: ScenarioConfig, name: str, rate: float, seed: int, arm: str, report: PipelineReport) -> Row:
    result = report.arms[arm]
    values = result.evaluation
    row = {"dataset": scenario.dataset, "attack": name, "poison_rate": rate, "seed": seed, "arm": arm}
    row |= {"clean_accuracy": values["clean_accuracy"], "asr": values["attack_success"]}
    row |= {"asr_with_target": values["attack_success_with_target"], "samples": result.samples}
    row |= {"samples_per_second": round(float(np.median([line["samples_per_second"] for line in result.epochs])))}
    found = report.detection if arm == "cleaned" else {}
    row |= {
        "poison_removed": found.get("true_positive_rate", ""),
        "clean_removed": found.get("false_positive_rate", ""),
    }
    filtered = report.filtered if arm == "cleaned" else {}
    return row | {
        f"filtered_{key}": filtered.get(key, "") for key in ("clean_accuracy", "attack_success", "clean_rejected")
    }


# ---------------------------------------------------------------- what the documentation shows


def markdown(rows: Sequence[Row]) -> str:
    """Mean over seeds (± half the range) of clean accuracy and attack success of every arm."""
    lines = []
    for key in dict.fromkeys((row["dataset"], row["attack"], row["poison_rate"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["attack"], row["poison_rate"]) == key]
        arms = {arm: [row for row in own if row["arm"] == arm] for arm in ("poisoned", "cleaned", "oracle")}
        cells = [_spread([row[name] for row in arms[arm]]) for name in ("clean_accuracy", "asr") for arm in arms]
        removed = [_spread([row[name] for row in arms["cleaned"]]) for name in ("poison_removed", "clean_removed")]
        lines.append([*key, *cells, *removed, len(arms["cleaned"])])
    header = [
        "data",
        "attack",
        "poison rate",
        *(f"accuracy, {arm}" for arm in arms),
        *(f"attack success, {arm}" for arm in arms),
    ]
    return page.table([*header, "poison removed", "clean removed", "seeds"], lines)


def filtered(rows: Sequence[Row]) -> str:
    """The scanner in front of the trained model, next to the model alone."""
    lines = []
    for key in dict.fromkeys(
        (row["attack"], row["poison_rate"]) for row in rows if row["filtered_clean_accuracy"] != ""
    ):
        own = [row for row in rows if (row["attack"], row["poison_rate"]) == key and row["arm"] == "cleaned"]
        names = (
            "clean_accuracy",
            "filtered_clean_accuracy",
            "filtered_clean_rejected",
            "asr",
            "filtered_attack_success",
        )
        lines.append([*key, *(_spread([row[name] for row in own]) for name in names)])
    alone, behind = "model alone", "behind the scanner"
    header = [
        "attack",
        "poison rate",
        f"accuracy, {alone}",
        behind,
        "clean rejected",
        f"attack success, {alone}",
        behind,
    ]
    return page.table(header, lines)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.ptp(values) / 2:.3f}"


@click.command()
@click.argument("config", type=click.Path(exists=True))
@click.option("--page", "markdown_page", default="", help="Markdown page whose tables are written anew.")
def main(config: str, markdown_page: str) -> None:
    """Poison, clean and train as CONFIG says; finished cells are reused."""
    with command_line(commands_log=False):
        rows = run(from_mapping(StudyConfig, load_yaml(config), config))
        if markdown_page:
            page.replace(markdown_page, "training.csv", markdown(rows))
            page.replace(markdown_page, "filter", filtered(rows))


if __name__ == "__main__":
    main()

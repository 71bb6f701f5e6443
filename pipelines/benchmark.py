"""The detection benchmark: victims of the zoo x auxiliary sets x detectors x poison rates x seeds → one tidy CSV.

    python -m pipelines.benchmark configs/benchmark_cpu.yaml

Every detector scores all clean test images and the triggered ones, once with the backdoored encoder and once with the clean one
(the control: a detector of backdoors should say nothing there, AUROC near 0.5). Pools of each poison rate are drawn from these
scores by the seed; triggered images of the target class stay out of them. Finished scores are kept in `out` and reused.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipelines import benchmark_page, frontier, page, red_team
from pipelines.benchmark_config import BenchmarkConfig, DetectorConfig, VictimConfig
from pipelines.benchmark_scores import DetectorScores, Floats, Victim, decided, fit_scorer, score_victim
from pipelines.command_line import command_line
from pipelines.data import load_images, shapes_shard, write_shard
from pipelines.page import Row
from sanitize import storage
from sanitize.attacks.triggers import Trigger, poison_mask
from sanitize.config import ThresholdPolicy
from sanitize.config_loading import from_mapping, load_encoder_spec, load_yaml
from sanitize.metrics import detection
from sanitize.stages.thresholds import threshold_for

log = logging.getLogger(__name__)
BALANCED = 0.5
QUALITY = ("asr", "clean_accuracy", "backdoored_accuracy")  # of a victim


def run(config: BenchmarkConfig) -> list[Row]:
    rows: list[Row] = []
    for victim, aux, seed in cases(config):
        for detector, settings in config.detectors.items():
            if settings.only.allows(victim.name, aux, seed):
                rows += measure(config, victim, aux, seed, detector, settings)
        if rows:  # detectors may leave cases out
            page.write_csv(config.table, frontier.lines(config, rows) if config.frontier else rows)
    return rows


def cases(config: BenchmarkConfig) -> Iterator[tuple[Victim, str, int]]:
    """Victim, auxiliary set and seed of everything that is measured."""
    for name, values in config.victims.items():
        victim = load_victim(config, name, values)
        for aux in victim.auxiliary:
            for seed in config.seeds[:1] if aux in values.first_seed_only else config.seeds:
                yield victim, aux, seed


# ---------------------------------------------------------------- victims


def load_victim(config: BenchmarkConfig, name: str, values: VictimConfig) -> Victim:
    """Make the victim when the zoo does not have it, load its test images and name its auxiliary shards."""
    if values.folder:
        folder, quality = values.folder, imported_quality(values.folder)
    else:
        folder, row = red_team.make(values.config, config.preset, config.zoo, settings=values.settings)
        quality = {name: getattr(row, name) for name in QUALITY}
    settings = storage.read_json(storage.join(folder, "truth.json"))["config"]
    spec = load_encoder_spec(storage.join(folder, "backdoored", "encoder.yaml"))
    test = load_images((shards(config, values.test, "test"),), config.test_images, spec.image_size)
    trigger = red_team.trigger_of(folder, settings)
    target = red_team.target_class(settings)
    auxiliary = {key: shards(config, path, "aux") for key, path in values.auxiliary.items()}
    if config.poisoned_auxiliary:
        first = next(iter(auxiliary.values()))
        auxiliary["poisoned"] = poisoned_shard(config, name, first, spec.image_size, trigger)
    return Victim(
        name=name,
        encoders={kind: storage.join(folder, kind, "encoder.yaml") for kind in ("backdoored", "clean")},
        test=test.pixels,
        labels=test.labels,
        target=target,
        triggered=trigger(test.pixels[test.labels != target]),
        triggered_target=trigger(test.pixels[test.labels == target]),
        auxiliary=auxiliary,
        **quality,
    )


def imported_quality(folder: str) -> dict[str, float]:
    """NaN where it was not measured."""
    path = storage.join(folder, "report.json")
    report = storage.read_json(path) if storage.exists(path) else {}
    return {name: report.get(name, math.nan) for name in QUALITY}


def shards(config: BenchmarkConfig, pattern: str, part: str) -> str:
    """The pattern itself; "shapes" becomes a shard of coloured shapes that no victim was trained on."""
    if pattern != "shapes":
        return pattern
    count, seed = (config.auxiliary_images, 9001) if part == "aux" else (3000, 9002)
    return shapes_shard(Path(config.out) / f"shapes-{part}.tar", count, seed)


def poisoned_shard(config: BenchmarkConfig, name: str, source: str, size: int, trigger: Trigger) -> str:
    """The first auxiliary set with the trigger on a share of its images."""
    path = Path(config.out) / f"poisoned-{name}.tar"
    if not path.exists():
        images = load_images((source,), config.auxiliary_images, size, labelled=False)
        picked = torch.from_numpy(poison_mask(len(images.pixels), config.poisoned_auxiliary, 0))
        images.pixels[picked] = trigger(images.pixels[picked])
        write_shard(path, images)
    return str(path)


# ---------------------------------------------------------------- rows


def measure(
    config: BenchmarkConfig, victim: Victim, aux: str, seed: int, detector: str, settings: DetectorConfig
) -> list[Row]:
    """One row for each poison rate and the balanced pool.

    clean_flagged, triggered_flagged: share above the calibrated threshold of nominal 1 %; "" for detectors that have none.
    """
    measured = {
        kind: PoolScores(config, victim, kind, aux, seed, detector, settings) for kind in ("backdoored", "clean")
    }
    attacked = measured["backdoored"]
    control = detection(*measured["clean"].pool(BALANCED)).auroc
    rows = []
    for rate in (*config.rates, BALANCED):
        scores, truth = attacked.pool(rate)
        quality = detection(scores, truth)
        cut = attacked.threshold(rate, ThresholdPolicy())
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
                "control_auroc": control,
                "clean_flagged": float((scores[~truth] > cut).mean()) if cut is not None else "",
                "triggered_flagged": float((scores[truth] > cut).mean()) if cut is not None else "",
                **{name: getattr(victim, name) for name in QUALITY},
                "passes": round(attacked.found.passes, 3),
                "images_per_second": round(attacked.found.images_per_second),
                "fit_seconds": round(attacked.found.fit_seconds, 1),
            }
        )
    last = rows[-1]
    log.info(
        "%s %s %s seed %d: AUROC %.3f, TPR at 1 %% FPR %.3f, control %.3f (balanced), %d images/s",
        victim.name,
        aux,
        detector,
        seed,
        last["auroc"],
        last["tpr_at_1pct"],
        last["control_auroc"],
        last["images_per_second"],
    )
    return rows


class PoolScores:
    """One detector's scores of one encoder, and the pools drawn from them."""

    def __init__(
        self,
        config: BenchmarkConfig,
        victim: Victim,
        kind: str,
        aux: str,
        seed: int,
        detector: str,
        settings: DetectorConfig,
    ) -> None:
        self.scored = functools.partial(
            score_victim, config, kind=kind, aux=aux, seed=seed, detector=detector, settings=settings
        )
        self.victim = victim
        self.seed = seed
        self.settings = settings
        self.found = self.of_pool(BALANCED) if settings.each_pool else self.scored(victim)
        self.detector = None
        if settings.has_threshold:
            self.detector, _ = fit_scorer(config, victim, kind, aux, seed, settings)

    def pool(self, rate: float) -> tuple[Floats, NDArray[np.bool_]]:
        """Scores and truth of a pool in which `rate` is triggered; a detector that adapts sees this pool only."""
        members, truth = self.drawn(rate)
        if self.settings.each_pool:
            found = self.of_pool(rate)
            return np.concatenate([found.clean, found.triggered]), truth
        return self.decided(members)[0], truth

    def decided(self, members: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Scores of these members as pass 2 decides by them, and their null distribution, empty of baselines."""
        found = self.found.of(members)
        return decided(self.detector, self.settings, found) if self.detector else (found.clean, found.clean[:0])

    def drawn(self, rate: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return pool(len(self.victim.test), len(self.victim.triggered), rate, self.seed)

    def of_pool(self, rate: float) -> DetectorScores:
        """Of a detector for which every pool is scored by itself."""
        members, truth = self.drawn(rate)
        triggered = self.victim.triggered[members[truth] - len(self.victim.test)]
        smaller = dataclasses.replace(self.victim, triggered=triggered)
        return self.scored(smaller, pool_rate=rate)

    def threshold(self, rate: float, policy: ThresholdPolicy) -> float | None:
        """Of a scan of the pool of this rate; baselines have none."""
        if self.detector is None:
            return None
        scores, calibration = self.decided(self.drawn(rate)[0])
        return float(np.float32(threshold_for(scores, calibration, policy)))


def pool(clean: int, triggered: int, rate: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Positions in [clean, triggered] and truth: clean images all stay, triggered ones (at least one, unless `rate` is 0) are
    drawn by the seed."""
    count = max(round(clean * rate / (1 - rate)), 1) if rate else 0
    drawn = np.random.default_rng(seed).permutation(triggered)[:count]
    members = np.concatenate([np.arange(clean), clean + drawn])
    return members, members >= clean


def by_class(config: BenchmarkConfig) -> list[Row]:
    """The default's scores split by true class, the target's apart: shares above the threshold of 1 % of all clean images."""
    rows = []
    settings = config.detectors[config.default]
    for name, values in config.victims.items():
        victim = load_victim(config, name, values)
        for aux in victim.auxiliary:
            found = score_victim(config, victim, "backdoored", aux, config.seeds[0], config.default, settings)
            cut = np.quantile(found.clean, 0.99)
            others = victim.labels[victim.labels != victim.target]
            for label in sorted(set(victim.labels.tolist())):
                target = label == victim.target
                triggered = found.triggered_target if target else found.triggered[(others == label).numpy()]
                clean = found.clean[(victim.labels == label).numpy()]
                rows.append(
                    {
                        "attack": name,
                        "aux": aux,
                        "seed": config.seeds[0],
                        "detector": config.default,
                        "true_class": label,
                        "is_target": int(target),
                        "images": len(clean),
                        "clean_above": float((clean > cut).mean()),
                        "tpr": float((triggered > cut).mean()),
                    }
                )
    return rows


def clean_scans(config: BenchmarkConfig) -> list[Row]:
    """The scorers of the product on the clean test images alone: what the policies of nominal 1 % remove, 95 % Wilson interval.

    encoder: a scan without poison is judged with the backdoored encoder and with the clean one.
    """
    rows = []
    scorers = {name: values for name, values in config.detectors.items() if values.has_threshold}
    for victim, aux, seed in cases(config):
        for detector, settings in scorers.items():
            if not settings.only.allows(victim.name, aux, seed):
                continue
            for kind in ("backdoored", "clean"):
                measured = PoolScores(config, victim, kind, aux, seed, detector, settings)
                scores, _ = measured.pool(0)
                for policy in ("calibrated", "fdr"):
                    cut = measured.threshold(0, ThresholdPolicy(policy))
                    assert cut is not None
                    removed = int((scores > cut).sum())
                    low, high = binomtest(removed, len(scores)).proportion_ci(method="wilson")
                    rows.append(
                        {
                            "attack": victim.name,
                            "encoder": kind,
                            "aux": aux,
                            "seed": seed,
                            "detector": detector,
                            "policy": policy,
                            "nominal": 0.01,
                            "images": len(scores),
                            "removed": removed / len(scores),
                            "low": float(low),
                            "high": float(high),
                        }
                    )
    return rows


def write_curves(config: BenchmarkConfig, markdown_page: str) -> None:
    """Plots beside the page of the first auxiliary set and seed, balanced pools; in the ROC the detectors of `config.curves`."""
    pools: dict[str, dict[str, tuple[Floats, NDArray[np.bool_]]]] = {}
    for name, values in config.victims.items():
        victim = load_victim(config, name, values)
        aux, seed = next(iter(victim.auxiliary)), config.seeds[0]
        pools[name] = {
            key: PoolScores(config, victim, "backdoored", aux, seed, key, config.detectors[key]).pool(BALANCED)
            for key in dict.fromkeys([config.default, *config.curves])
        }
    stem = Path(markdown_page).parent / "plots" / Path(config.table).stem
    benchmark_page.write_roc(Path(f"{stem}_roc.png"), pools)
    shown = {name: found[config.default] for name, found in pools.items()}
    benchmark_page.write_histograms(Path(f"{stem}_scores.png"), shown)


@click.command()
@click.argument("config", type=click.Path(exists=True))
@click.option("--page", "markdown_page", default="", help="Markdown page whose tables and plots are made anew.")
def main(config: str, markdown_page: str) -> None:
    """Measure every detector on every victim as CONFIG says; finished scores are reused."""
    with command_line(commands_log=False):
        settings = from_mapping(BenchmarkConfig, load_yaml(config), config)
        rows = run(settings)
        if settings.section:
            if markdown_page and settings.frontier:
                frontier.publish(settings, rows, markdown_page)
            elif markdown_page:
                page.replace(markdown_page, settings.section, benchmark_page.summary(rows, rows[0]["aux"]))
                if settings.curves:
                    write_curves(settings, markdown_page)
            return
        page.write_csv(settings.table.replace(".csv", "_by_class.csv"), by_class(settings))
        page.write_csv(settings.table.replace(".csv", "_clean_scans.csv"), clean_scans(settings))
        if markdown_page:
            page.replace(markdown_page, f"balanced {rows[0]['aux']}", benchmark_page.summary(rows, rows[0]["aux"]))
            write_curves(settings, markdown_page)
            cost = Path(markdown_page).parent / "plots" / f"{Path(settings.table).stem}_cost.png"
            benchmark_page.write_cost(cost, rows, rows[0]["aux"])


if __name__ == "__main__":
    main()

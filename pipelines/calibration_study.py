"""How many auxiliary images a cut needs: the rate asked for, and what it removes of clean images, with few and with many of them.

    python -m pipelines.calibration_study configs/calibration_cpu.yaml --page docs/detection.md

Of the scorers of a detection benchmark, in distribution. The detector is that of the benchmark; calibration sets of each size are drawn
from its held-out images again and again, its null distributions estimated from them anew, and every clean test image judged by the cut.
"""

from collections.abc import Iterator, Mapping

import click
import numpy as np
from numpy.typing import NDArray

from pipelines import page
from pipelines.benchmark import load_victim
from pipelines.benchmark_config import BenchmarkConfig, DetectorConfig
from pipelines.benchmark_scores import Victim, fit_scorer, score_victim
from pipelines.command_line import command_line
from pipelines.page import Row
from sanitize.artifacts.detector_folder import Detector
from sanitize.config import TrainingConfig
from sanitize.config_loading import from_mapping, load_yaml
from sanitize.errors import ConfigError
from sanitize.stages.evidence import combination
from sanitize.stages.evidence_adaptation import values_of
from sanitize.stages.tails import Floats
from sanitize.stages.thresholds import clean_quantile, is_counted

RATES = (0.01, 0.001)
SIZES = (20, 60, 200)  # held-out images; then all there are
DRAWS = 200
HEADER = [
    "victim",
    "detector",
    "auxiliary images",
    "held out",
    "asked for",
    "cut",
    "removed, mean",
    "5 %-95 % of draws",
]


def run(config: BenchmarkConfig) -> list[Row]:
    rows: list[Row] = []
    for name, values in config.victims.items():
        victim = load_victim(config, name, values)
        aux = next(iter(victim.auxiliary))
        for scorer in dict.fromkeys(
            settings.scorer for settings in config.detectors.values() if settings.has_threshold
        ):
            settings = DetectorConfig(scorer=scorer, effort="thorough")
            rows += measured(config, victim, aux, settings)
            page.write_csv(config.table, rows)
    return rows


def measured(config: BenchmarkConfig, victim: Victim, aux: str, settings: DetectorConfig) -> Iterator[Row]:
    """A row for each number of held-out images and each rate."""
    seed = config.seeds[0]
    detector, _ = fit_scorer(config, victim, "backdoored", aux, seed, settings)
    found = score_victim(config, victim, "backdoored", aux, seed, settings.scorer, settings)
    clean = found.of(np.arange(len(found.clean)))
    values: Mapping[str, Floats] = {}
    if detector.evidence:
        assert detector.clean_reference
        values = values_of(detector.clean_reference, clean.statistics, clean.energy)
    rng = np.random.default_rng(seed)
    available = len(detector.scores)
    for size in (*(size for size in SIZES if size < available), available):
        draws = [rng.choice(available, size, replace=False) for _ in range(1 if size == available else DRAWS)]
        for rate in RATES:
            removed = [
                share for rows in draws if (share := removed_share(detector, rows, clean.clean, values, rate)) >= 0
            ]
            refused = not removed
            yield {
                "victim": victim.name,
                "detector": settings.scorer,
                "auxiliary_images": round(size / TrainingConfig().calibration_fraction),
                "held_out": size,
                "nominal": rate,
                "cut": "refused" if refused else "counted" if is_counted(size, rate) else "fitted tail",
                "removed_mean": "" if refused else float(np.mean(removed)),
                "removed_low": "" if refused else float(np.quantile(removed, 0.05)),
                "removed_high": "" if refused else float(np.quantile(removed, 0.95)),
            }


def removed_share(
    detector: Detector, rows: NDArray[np.int64], scores: Floats, values: Mapping[str, Floats], rate: float
) -> float:
    """Of clean images, when only these held-out images (n,) are known; -1 = the rate is refused. values: of `evidence`, by kind."""
    calibration = detector.scores[rows]
    if detector.evidence:
        known = {kind: column[rows] for kind, column in detector.evidence.items()}
        explained = detector.predictor.explained if detector.predictor else None
        evidence = combination(known, explained)
        calibration, scores = evidence.score(known), evidence.score(values)
    try:
        cut = clean_quantile(np.sort(calibration), rate)
    except ConfigError:
        return -1.0
    return float((scores > np.float32(cut)).mean())


def markdown(rows: list[Row]) -> str:
    """Of what is not refused."""

    def cells(row: Row) -> list[object]:
        mean, low, high = (f"{100 * row[name]:.2f} %" for name in ("removed_mean", "removed_low", "removed_high"))
        first = [row[name] for name in ("victim", "detector", "auxiliary_images", "held_out")]
        return [*first, f"{100 * row['nominal']:g} %", row["cut"], mean, f"{low}-{high}" if low != high else "one draw"]

    return page.table(HEADER, [cells(row) for row in rows if row["cut"] != "refused"])


@click.command()
@click.argument("config_file")
@click.option("--page", "page_file", default="", help="Markdown file whose table calibration_cpu.csv is written anew")
def main(config_file: str, page_file: str) -> None:
    """Measure the cuts of the detection benchmark CONFIG_FILE; its finished fits and scores are reused."""
    with command_line(commands_log=False):
        rows = run(from_mapping(BenchmarkConfig, load_yaml(config_file), config_file))
        if page_file:
            page.replace(page_file, "calibration_cpu.csv", markdown(rows))


if __name__ == "__main__":
    main()

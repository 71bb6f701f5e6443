"""What agreement costs clean scans that are not even: copies, one class that fills a third, a group of another kind.

    python -m pipelines.uneven_scans configs/benchmark_evidence_cpu.yaml --strangers runs/shards/gtsrb32-000000.tar --page docs/detection.md

Of the scorer `evidence` of a detection benchmark, in distribution; fits are those of the benchmark. Nothing is poisoned: whatever is
removed is a false alarm. Campaigns are groups, so groups of honest images are what could be taken for one.
"""

import io
from collections.abc import Iterator
from dataclasses import replace

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines import page
from pipelines.benchmark import load_victim
from pipelines.benchmark_config import BenchmarkConfig, DetectorConfig
from pipelines.benchmark_scores import Victim, decided, fit_scorer, score_with_product
from pipelines.command_line import command_line
from pipelines.data import load_images
from pipelines.page import Row
from sanitize.config_loading import from_mapping, load_yaml
from sanitize.stages.thresholds import clean_quantile

RATE = 0.01
EVENLY = 1800  # test images of every scan but the one of one class
COPIED, COPIES = 40, 5  # images, and changed copies of each
STRANGERS = 180
HEADER = ["encoder", "scan", "images", "agreement", "removed", "of its group"]


def altered(image: Tensor, rng: np.random.Generator) -> Tensor:
    """A copy as the web makes them: a pixel cropped off each side, a little brighter or darker, JPEG. (3, S, S) uint8 → the same."""
    side = image.shape[-1]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((1, 1, side - 1, side - 1)).resize((side, side))
    brightness, buffer = rng.uniform(0.9, 1.1), io.BytesIO()
    brighter = picture.point(lambda value: min(round(value * brightness), 255))
    brighter.save(buffer, "JPEG", quality=int(rng.integers(70, 95)))
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def scans(
    victim: Victim, pool: int, rng: np.random.Generator
) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
    """Name, members and the group among them; positions in test images, then copies, then strangers."""
    tested = len(victim.test)
    even = rng.permutation(tested)[:EVENLY]
    copies, strangers = np.arange(tested, tested + COPIED * COPIES), np.arange(tested + COPIED * COPIES, pool)
    of_class = np.flatnonzero(victim.labels.numpy() == victim.labels.mode().values.item())
    others = np.setdiff1d(even, of_class)[: 2 * len(of_class)]
    yield "even", even, np.empty(0, np.int64)
    yield f"{COPIES} copies of {COPIED} images", np.concatenate([even, copies]), copies
    yield "a third of one class", np.concatenate([others, of_class]), of_class
    yield f"{len(strangers)} of another kind", np.concatenate([even, strangers]), strangers


def measured(config: BenchmarkConfig, victim: Victim, kind: str, strangers: Tensor) -> Iterator[Row]:
    """A row for each scan, with and without agreement."""
    rng, seed, aux = np.random.default_rng(config.seeds[0]), config.seeds[0], next(iter(victim.auxiliary))
    copied = torch.stack([altered(image, rng) for image in victim.test[:COPIED] for _ in range(COPIES)])
    images = torch.cat([victim.test, copied, strangers])
    settings = DetectorConfig(scorer="evidence", effort="0.075", adapt=True)
    detector, _ = fit_scorer(config, victim, kind, aux, seed, settings)
    everything = replace(victim, test=images, triggered=images[:0], triggered_target=images[:0])
    found = score_with_product(config, everything, kind, aux, seed, settings)
    for name, members, group in scans(victim, len(images), rng):
        for agreement in (False, True):
            scores, calibration = decided(detector, replace(settings, agreement=agreement), found.of(members))
            removed = scores > np.float32(clean_quantile(calibration, RATE))
            yield {
                "encoder": f"{victim.name}, {kind}",
                "scan": name,
                "images": len(members),
                "agreement": int(agreement),
                "removed": float(removed.mean()),
                "of_its_group": float(removed[np.isin(members, group)].mean()) if len(group) else "",
            }


def markdown(rows: list[Row]) -> str:
    def cells(row: Row) -> list[object]:
        group = row["of_its_group"]
        shares = [f"{100 * row['removed']:.2f} %", f"{100 * group:.1f} %" if group != "" else "-"]
        return [row["encoder"], row["scan"], row["images"], "yes" if row["agreement"] else "no", *shares]

    return page.table(HEADER, [cells(row) for row in rows])


@click.command()
@click.argument("config_file")
@click.option("--strangers", required=True, help="Shard of images of another kind, the first few of which are taken")
@click.option("--table", default="docs/results/uneven_scans_cpu.csv", show_default=True)
@click.option("--page", "page_file", default="", help="Markdown file whose table uneven_scans_cpu.csv is written anew")
def main(config_file: str, strangers: str, table: str, page_file: str) -> None:
    """Scan clean images with the first victim of the detection benchmark CONFIG_FILE, and with its clean encoder."""
    with command_line(commands_log=False):
        config = from_mapping(BenchmarkConfig, load_yaml(config_file), config_file)
        name, values = next(iter(config.victims.items()))
        victim = load_victim(config, name, values)
        others = load_images((strangers,), STRANGERS, victim.test.shape[-1], labelled=False).pixels
        rows = [row for kind in ("clean", "backdoored") for row in measured(config, victim, kind, others)]
        page.write_csv(table, rows)
        if page_file:
            page.replace(page_file, "uneven_scans_cpu.csv", markdown(rows))


if __name__ == "__main__":
    main()

"""Does `sanitize inspect` (DECREE) tell backdoored encoders of the zoo from clean ones? One row per encoder, AUROC over them.

    python -m pipelines.inspect_zoo configs/red_team_clip_text.yaml --seed 100 --seed 101 --seed 102 --images aux.tar --page docs/inspect.md

Rows of other attacks stay in the results: one command for each kind of images.
Victims that the zoo lacks are made first. The smaller the smallest trigger, the more suspicious; with at least four clean encoders
each encoder is also judged against the clean ones of the other seeds, as `--peer` does.
"""

import csv
import logging
from collections.abc import Mapping
from typing import Any

import click
import numpy as np

from pipelines import page, red_team
from pipelines.command_line import command_line
from pipelines.page import Row
from sanitize import storage
from sanitize.cli_options import parse_settings
from sanitize.commands.inspect import inspect
from sanitize.config_loading import from_mapping, load_encoder_spec, overlay, to_mapping
from sanitize.detectors.decree.config import DecreeConfig, recommended
from sanitize.detectors.decree.verdict import MIN_PEERS, P_THRESHOLD, peer_p
from sanitize.metrics import detection

log = logging.getLogger(__name__)


def rows_of(
    config: str, seeds: tuple[int, ...], images: str, zoo: str, preset: str, out: str, settings: Mapping[str, Any]
) -> list[Row]:
    """Clean and backdoored encoder of every seed, with the smallest trigger found. settings: of DecreeConfig, over those recommended."""
    rows = []
    for seed in seeds:
        folder, victim = red_team.make(config, preset, zoo, seed)
        for kind in ("clean", "backdoored"):
            spec = load_encoder_spec(storage.join(folder, kind, "encoder.yaml"))
            target = storage.join(out, f"{victim.attack}-{kind}-{seed}")
            report = storage.join(target, "inspect.json")
            decree = from_mapping(DecreeConfig, overlay(recommended(spec.image_size), settings), "settings of inspect")
            found = storage.read_json(report) if storage.exists(report) else {}
            if found.get("settings") != to_mapping(decree):
                inspect(spec, (images,), target, decree)
                found = storage.read_json(report)
            best = found["best"] or {"l1": None, "p_l1": None}
            log.info("%s seed %d %s: L1 %s", victim.attack, seed, kind, best["l1"])
            rows.append(
                {
                    "attack": victim.attack,
                    "seed": seed,
                    "encoder": kind,
                    "asr": victim.asr,
                    "l1": best["l1"],
                    "p_l1": best["p_l1"],
                    "verdict": found["verdict"]["verdict"],
                }
            )
    return with_peers(rows)


def with_peers(rows: list[Row]) -> list[Row]:
    """Adds p (`peer_p`) against the clean encoders of the other seeds; "" with fewer than MIN_PEERS of them."""
    with_p = []
    for row in rows:
        peers = [r["l1"] for r in rows if r["encoder"] == "clean" and r["seed"] != row["seed"] and r["l1"] is not None]
        enough = row["l1"] is not None and len(peers) >= MIN_PEERS
        with_p.append(row | {"p": peer_p(row["l1"], peers) if enough else ""})
    return with_p


def auroc(rows: list[Row]) -> float:
    """Over encoders, by the size of the smallest trigger; none found = as large as can be."""
    sizes = np.array([np.inf if row["l1"] is None else row["l1"] for row in rows])
    finite = np.where(np.isfinite(sizes), sizes, np.max(sizes[np.isfinite(sizes)], initial=0) + 1)
    return detection(-finite, np.array([row["encoder"] == "backdoored" for row in rows])).auroc


def with_earlier(rows: list[Row], path: str) -> list[Row]:
    """Those of `path` that are of other attacks, then `rows`."""
    if not storage.exists(path):
        return rows
    earlier: list[Row] = list(csv.DictReader(storage.read_bytes(path).decode().splitlines()))
    measured = {row["attack"] for row in rows}
    return [row for row in earlier if row["attack"] not in measured] + rows


def markdown(rows: list[Row]) -> str:
    """One line for each attack: medians, AUROC, and how many encoders the fixed threshold and the peers call trojaned."""
    lines = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row | {"l1": float(row["l1"]) if row["l1"] else None} for row in rows if row["attack"] == attack]
        kinds = [[row for row in own if row["encoder"] == kind] for kind in ("backdoored", "clean")]
        sizes = [f"{np.median([row['l1'] or np.inf for row in kind]):.0f}" for kind in kinds]
        called = [f"{sum(row['verdict'] == 'trojaned' for row in kind)} of {len(kind)}" for kind in kinds]
        stand_out = [
            f"{sum(row['p'] != '' and float(row['p']) < P_THRESHOLD for row in kind)} of {len(kind)}" for kind in kinds
        ]
        lines.append([attack, *sizes, f"{auroc(own):.2f}", *called, *stand_out])
    header = [f"{what}, {kind}" for what in ("called trojaned", "by peers") for kind in ("backdoored", "clean")]
    return page.table(["attack", "median L1, backdoored", "clean", "AUROC", *header], lines)


@click.command()
@click.argument("configs", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--seed", "seeds", type=int, multiple=True, default=(100, 101, 102, 103), show_default=True)
@click.option("--images", required=True, help="Auxiliary shards, no labels needed")
@click.option("--preset", default="cpu", show_default=True)
@click.option("--zoo", default="runs/zoo", show_default=True)
@click.option("--out", default="runs/inspected", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of inspect, for example blocks=0")
@click.option("--results", default="docs/results/inspect_cpu.csv", show_default=True)
@click.option("--page", "markdown_page", default="", help="Markdown page whose table is written anew from the results.")
def main(
    configs: tuple[str, ...],
    seeds: tuple[int, ...],
    images: str,
    preset: str,
    zoo: str,
    out: str,
    settings: tuple[str, ...],
    results: str,
    markdown_page: str,
) -> None:
    """Inspect the clean and the backdoored encoder of every CONFIG and seed; finished ones are reused."""
    with command_line():
        rows: list[Row] = []
        for config in configs:
            found = rows_of(config, seeds, images, zoo, preset, out, parse_settings(settings))
            click.echo(f"{found[0]['attack']}: AUROC {auroc(found):.2f} over {len(found)} encoders")
            rows += found
        rows = with_earlier(rows, results)
        page.write_csv(results, rows)
        if markdown_page:
            page.replace(markdown_page, "inspect_cpu.csv", markdown(rows))


if __name__ == "__main__":
    main()

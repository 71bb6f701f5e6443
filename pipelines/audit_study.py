"""How well `sanitize audit` finds campaigns and triggers: victims of the zoo x poisoned shards x the real commands → one CSV and a table.

    python -m pipelines.audit_study configs/audit_study_cpu.yaml --page docs/audit.md

Of each victim: test images with its trigger on a share of them, scanned by a detector fitted to its auxiliary shards, then audited.
What is finished in `out` is reused.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from pipelines import page, red_team
from pipelines.command_line import command_line
from pipelines.data import LabelledImages, load_images, shapes_shard, write_shard
from pipelines.page import Row
from sanitize import storage
from sanitize.artifacts.scan_folder import ScanFolder
from sanitize.attacks.triggers import Trigger, make_trigger
from sanitize.auditing.findings import Campaign, find_campaigns
from sanitize.auditing.pictures import Onlooker
from sanitize.auditing.scored import Mask, poisoned_of, read_scored, sample_rows
from sanitize.auditing.selection import select
from sanitize.commands.fit import fit
from sanitize.commands.poison import poison
from sanitize.commands.scan import scan
from sanitize.config import FitConfig, ScanConfig
from sanitize.config_loading import from_mapping, load_encoder_spec, load_yaml, overlay
from sanitize.presets import preset
from sanitize.stages.occlusion import CELLS

log = logging.getLogger(__name__)
MASKED = 8 / 255  # mean change of a pixel that belongs to the trigger
HEADER = ["attack", "flagged", "of them poisoned", "campaigns", "purity", "completeness"]
HEADER += ["trigger covers", "AUROC, what they share", "AUROC, occlusion", "IoU, what they share"]


@dataclass(frozen=True)
class StudyVictim:
    """config: of the red team; test, auxiliary: shards, or `shapes` for coloured shapes."""

    config: str
    test: str
    auxiliary: str


@dataclass(frozen=True)
class AuditStudyConfig:
    """rate: share of the test images that get the trigger; fit: settings of FitConfig."""

    out: str
    table: str
    zoo: str
    preset: str
    victims: dict[str, StudyVictim]
    rate: float = 0.03
    test_images: int = 3000
    auxiliary_images: int = 4000
    fit: dict[str, Any] = field(default_factory=dict)


def run(config: AuditStudyConfig) -> list[Row]:
    rows = []
    for name, victim in config.victims.items():
        rows.append(measure(config, name, victim))
        page.write_csv(config.table, rows)
    return rows


def measure(config: AuditStudyConfig, name: str, victim: StudyVictim) -> Row:
    """purity: poisoned share of the campaign with most poison; completeness: its share of the poison that was flagged."""
    folder, _ = red_team.make(victim.config, config.preset, config.zoo)
    trigger = trigger_of(folder)
    scanned, truth = scan_of(config, name, victim, folder, trigger)
    scan_folder = ScanFolder(scanned)
    run_, summary = scan_folder.run(), scan_folder.summary()
    scored = read_scored(scan_folder, run_, summary)
    poisoned, selection = poisoned_of(scored, truth), select(scored, most=10_000)
    onlooker = Onlooker(run_, side=64)
    flagged_rows = sample_rows(scan_folder, scored, selection.flagged.tolist())
    flagged = onlooker.look_at(flagged_rows)
    kept = onlooker.look_at(sample_rows(scan_folder, scored, selection.kept.tolist()))
    groups, campaigns = find_campaigns(flagged, kept, {row.row: row for row in flagged_rows}, onlooker)
    bad: Mask = poisoned[flagged.rows]
    row: Row = {
        "attack": name,
        "flagged": len(bad),
        "poisoned_flagged": int(bad.sum()),
        "campaigns": int(groups.max()) + 1,
    }
    best = max(campaigns, key=lambda campaign: int(bad[campaign.members].sum()), default=None)
    row |= {"purity": 0.0, "completeness": 0.0}
    if best is not None:
        row["purity"] = float(bad[best.members].mean())
        row["completeness"] = float(bad[best.members].sum() / max(bad.sum(), 1))
    row |= overlap(best, mask_of(trigger, kept.pixels))
    log.info("%s: %s", name, row)
    return row


def overlap(campaign: Campaign | None, mask: Tensor) -> Row:
    """Of the trigger's pixels with what the campaign shares, and with the mean occlusion map; "" for a trigger that is everywhere."""
    covered = float(mask.float().mean())
    row: Row = {"trigger_covers": covered, "auroc_common": "", "auroc_occlusion": "", "iou_common": ""}
    if campaign is None or not 0 < covered < 0.5:
        return row
    row["auroc_common"] = float(roc_auc_score(mask.flatten(), campaign.common.flatten()))
    found = campaign.common.flatten().argsort(descending=True)[: int(mask.sum())]  # as many pixels as the trigger has
    hit = int(mask.flatten()[found].sum())
    row["iou_common"] = hit / (2 * int(mask.sum()) - hit)
    if campaign.occluded:
        places = torch.stack([occluded.places for occluded in campaign.occluded]).mean(dim=0)
        large = functional.interpolate(places[None, None], mask.shape, mode="bilinear", align_corners=False)
        assert places.shape == (CELLS, CELLS)
        row["auroc_occlusion"] = float(roc_auc_score(mask.flatten(), large.flatten()))
    return row


def mask_of(trigger: Trigger, images: Tensor) -> Tensor:
    """(H, W) bool: pixels that the trigger changes on average; of an opaque patch, all of its pixels."""
    change = (trigger(images).float() - images.float()).abs().mean(dim=(0, 1)) / 255
    return change > MASKED


def trigger_of(folder: str) -> Trigger:
    settings = storage.read_json(storage.join(folder, "truth.json"))["config"]
    return make_trigger(settings.get("trigger") or {"name": "image", "path": storage.join(folder, "trigger.png")})


# ---------------------------------------------------------------- scans


def scan_of(config: AuditStudyConfig, name: str, victim: StudyVictim, folder: str, trigger: Trigger) -> tuple[str, str]:
    """The scan folder and the truth of its shards; what an earlier run finished is kept."""
    out, spec = Path(config.out) / name, load_encoder_spec(storage.join(folder, "backdoored", "encoder.yaml"))
    if not (out / "poisoned" / "poison.json").exists():
        poison([shard_to_poison(config, victim, out)], str(out / "poisoned"), rate=config.rate, trigger=trigger)
    if not (out / "detector" / "detector.json").exists():
        auxiliary = victim.auxiliary
        if auxiliary == "shapes":
            auxiliary = shapes_shard(out / "aux" / "shapes.tar", config.auxiliary_images, 9001)
        values: Mapping[str, Any] = overlay(preset("default"), config.fit)
        given = {
            "shards": [auxiliary],
            "encoder": spec,
            "out": str(out / "detector"),
            "limit": config.auxiliary_images,
            "workers": 0,
        }
        fit(from_mapping(FitConfig, {**values, **given}, "fit"))
    shards, detector = (str(out / "poisoned"),), str(out / "detector")
    scan(ScanConfig(shards, detector, str(out / "scanned"), workers=0))
    return str(out / "scanned"), str(out / "poisoned" / "poison.json")


def shard_to_poison(config: AuditStudyConfig, victim: StudyVictim, out: Path) -> str:
    path = out / "in" / "test.tar"
    if victim.test == "shapes":
        return shapes_shard(path, config.test_images, 9002)
    if not path.exists():
        images = load_images((victim.test,), config.test_images, 32)
        write_shard(path, LabelledImages(images.pixels, images.labels))
    return str(path)


def markdown(rows: list[Row]) -> str:
    def cell(value: object) -> object:
        return f"{value:.3f}" if isinstance(value, float) else value if value != "" else "everywhere"

    return page.table(HEADER, [[cell(value) for value in row.values()] for row in rows])


@click.command()
@click.argument("config_file")
@click.option("--page", "page_file", default="", help="Markdown file whose table audit_study.csv is written anew")
def main(config_file: str, page_file: str) -> None:
    with command_line():
        config = from_mapping(AuditStudyConfig, load_yaml(config_file), config_file)
        rows = run(config)
        if page_file:
            page.replace(page_file, "audit_study.csv", markdown(rows))


if __name__ == "__main__":
    main()

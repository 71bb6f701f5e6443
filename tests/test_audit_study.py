"""The study of campaigns and triggers: a tiny victim gives a row, and overlaps are what a plain count says."""

import torch
import yaml
from builders import random_images, shape_members, tiny_victim, write_tar

from pipelines.audit_study import AuditStudyConfig, mask_of, overlap, run
from sanitize.attacks.triggers import FrequencyTrigger, PatchTrigger
from sanitize.auditing.findings import Campaign
from sanitize.config_loading import from_mapping


def campaign(common: torch.Tensor) -> Campaign:
    nothing = torch.zeros(3, *common.shape)
    return Campaign([0], 0.0, [], [], {}, [], [], [], nothing, nothing, common, [], [])


def test_the_mask_of_a_patch_is_its_square():
    mask = mask_of(PatchTrigger(side=4), random_images(30))
    assert mask.sum() == 16
    assert mask[-5:-1, -5:-1].all()


def test_overlap_counts_as_many_pixels_as_the_trigger_has():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :2] = True
    common = torch.zeros(8, 8)
    common[:2, 1:3] = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    row = overlap(campaign(common), mask)
    assert row["trigger_covers"] == 4 / 64
    assert row["iou_common"] == 2 / 6  # two of the four pixels are right
    assert overlap(campaign(mask.float()), mask)["auroc_common"] == 1


def test_a_trigger_that_is_everywhere_has_no_place():
    mask = mask_of(FrequencyTrigger(magnitude=200), random_images(10, size=32))
    assert overlap(campaign(torch.rand(32, 32)), mask)["auroc_common"] == ""


def test_a_tiny_victim_is_poisoned_scanned_and_measured(tmp_path):
    for name, count in (("train", 120), ("test", 60), ("auxiliary", 240)):
        write_tar(tmp_path / name / "a.tar", shape_members(count, seed=len(name)))
    (tmp_path / "red_team_tiny.yaml").write_text(yaml.safe_dump(tiny_victim(tmp_path)))
    small = {"image_size": 8, "patch_size": 4, "width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1}
    values = {
        "out": str(tmp_path / "out"),
        "table": str(tmp_path / "table.csv"),
        "zoo": str(tmp_path / "zoo"),
        "preset": "cpu",
        "rate": 0.2,
        "test_images": 60,
        "fit": {"decoder": small, "training": {"epochs": 1, "batch_size": 32, "calibration_fraction": 0.5}},
        "victims": {
            "tiny": {
                "config": str(tmp_path / "red_team_tiny.yaml"),
                "test": str(tmp_path / "test" / "a.tar"),
                "auxiliary": str(tmp_path / "auxiliary"),
            }
        },
    }
    config = from_mapping(AuditStudyConfig, values, "test")
    (row,) = run(config)
    assert row["attack"] == "tiny"
    assert 0 <= row["purity"] <= 1
    assert run(config) == [row]
    assert (
        (tmp_path / "table.csv").read_text().startswith("attack,flagged,poisoned_flagged,campaigns,purity,completeness")
    )

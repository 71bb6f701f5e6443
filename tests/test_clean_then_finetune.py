"""The whole pipeline on tiny shards: arms, reuse, the scanner as a filter, and the study that repeats it."""

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import members, shape_members, tiny_victim, tree_bytes, write_shards, write_tar
from click.testing import CliRunner

from pipelines import clean_then_finetune, training_study
from pipelines.clean_then_finetune import PipelineConfig, run
from sanitize.artifacts.truth import load_poisoned
from sanitize.attacks.triggers import PatchTrigger
from sanitize.commands.poison import poison
from sanitize.config_loading import from_mapping
from sanitize.errors import ConfigError

FIT = {
    "decoder": {"image_size": 8, "patch_size": 4, "width": 16, "heads": 2, "encoder_depth": 1, "decoder_depth": 1},
    "training": {"epochs": 1, "batch_size": 32, "precision": "fp32", "calibration_fraction": 0.5},
}


@pytest.fixture
def settings(tmp_path, aux_shards, encoder_yaml):
    """Keywords override; nested blocks are replaced."""
    write_shards(tmp_path / "raw", [70, 50])
    write_shards(tmp_path / "validation", [40], first_seed=500)
    trigger = PatchTrigger(side=4)
    truth = poison((str(tmp_path / "raw"),), str(tmp_path / "train"), rate=0.1, trigger=trigger, replace={"cls": ["3"]})
    poison((str(tmp_path / "validation"),), str(tmp_path / "triggered"), rate=1.0, trigger=trigger)

    def make(**changes) -> PipelineConfig:
        values = {
            "out": str(tmp_path / "out"),
            "train": [str(tmp_path / "train")],
            "auxiliary": [str(aux_shards)],
            "encoder": str(encoder_yaml),
            "validation": [str(tmp_path / "validation")],
            "triggered": [str(tmp_path / "triggered")],
            "truth": truth.truth,
            "fit": FIT,
            "scan": {"policy": {"fpr": 0.05}, "precision": "fp32"},
            "finetune": {"mode": "linear", "epochs": 2, "batch_size": 32, "precision": "fp32", "target": 3},
            "workers": 0,
        }
        return from_mapping(PipelineConfig, values | changes, "test")

    return make


def folders(tmp_path):
    return {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}


def test_the_arms_differ_in_the_samples_they_were_trained_on(settings, tmp_path):
    report = run(settings())
    arms = {name: result.samples for name, result in report.arms.items()}
    assert arms == {"poisoned": 120, "cleaned": report.kept, "oracle": 108}
    assert report.kept + report.removed == 120
    values = json.loads((tmp_path / "out").glob("report-*.json").__next__().read_text())
    assert values["arms"]["oracle"]["samples"] == 108
    assert {"clean_accuracy", "attack_success", "attack_success_with_target"} <= set(values["arms"]["cleaned"])
    assert "| oracle | 108 |" in Path(report.path).read_text()


def test_the_oracle_leaves_out_exactly_the_poisoned_samples_and_copies_the_rest(settings, tmp_path):
    run(settings())
    poisoned = load_poisoned(str(tmp_path / "train" / "poison.json"))
    for shard in sorted((tmp_path / "train").glob("*.tar")):
        oracle = next((tmp_path / "out").glob(f"oracle-shards-*/{shard.name}"))
        kept = [m for i, m in enumerate(members(shard)) if (shard.stem, i // 2) not in poisoned]
        assert members(oracle) == kept


def test_it_ends_in_one_page_that_leads_to_the_pages_of_all_stages(settings, tmp_path):
    run(settings())
    (page,) = (tmp_path / "out").glob("report-*.html")
    links = re.findall('href="([^"#:]+)"', page.read_text())
    assert len(links) == 4  # the audit, and three trainings
    assert all((page.parent / link).is_file() for link in links)


def test_running_again_changes_nothing_and_a_changed_setting_repeats_only_what_depends_on_it(settings, tmp_path):
    first = run(settings())
    before, names = tree_bytes(tmp_path / "out"), folders(tmp_path)
    assert run(settings()) == first
    assert tree_bytes(tmp_path / "out") == before
    changed = settings(finetune={"mode": "linear", "epochs": 3, "batch_size": 32, "precision": "fp32", "target": 3})
    run(changed)
    added = {name.rsplit("-", 1)[0] for name in folders(tmp_path) - names}
    assert added == {"poisoned", "cleaned", "oracle"}


def test_the_detector_can_be_fitted_to_what_training_made_of_the_encoder_which_is_the_reference_then(
    settings, encoder_yaml, tmp_path
):
    full = {"mode": "full", "epochs": 1, "batch_size": 32, "precision": "fp32", "target": 3}
    report = run(settings(suspect="trained", finetune=full))
    trained = report.arms["poisoned"].out + "/encoder.safetensors"
    fitted = json.loads(next((tmp_path / "out").glob("detector-*/fit.json")).read_text())
    assert fitted["encoder"]["weights"] == trained
    assert fitted["reference"]["weights"] == str(encoder_yaml.parent / "encoder.safetensors")
    run(settings(suspect="trained", finetune=full, fit=FIT | {"reference": None}))
    fits = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("detector-*/fit.json")]
    assert sorted(bool(fit["reference"]) for fit in fits) == [False, True]


def test_a_rejected_image_is_an_error_and_no_success_of_the_attack(settings):
    report = run(settings(filter=True))
    found = report.filtered
    assert 0 <= found["clean_accuracy"] <= 1 - found["clean_rejected"] <= 1
    assert 0 <= found["attack_success"] <= 1
    assert "behind the scanner" in Path(report.path).read_text()


WRONG: dict[str, dict[str, Any]] = {
    "trained needs an encoder that training changes; finetune.mode linear leaves it": {"suspect": "trained"},
    "suspect: 'both' is not given or trained": {"suspect": "both"},
    "filter: needs a head on the given encoder .*, finetune.target and triggered": {"filter": True, "triggered": []},
    "overlap: needs Ray .workers other than 0. and suspect: given": {"overlap": True},
}


@pytest.mark.parametrize("words", WRONG)
def test_settings_that_do_not_fit_together_say_so(settings, words):
    with pytest.raises(ConfigError, match=words):
        settings(**WRONG[words])


@pytest.mark.slow
def test_one_ray_session_with_overlapping_stages_gives_the_same_report(settings, tmp_path):
    alone = run(settings())
    together = run(settings(out=str(tmp_path / "ray"), workers=1, cpus_per_worker=1, overlap=True))
    for name, result in alone.arms.items():
        assert together.arms[name].samples == result.samples
        assert together.arms[name].evaluation == pytest.approx(result.evaluation, abs=0.05)


def test_the_command_prints_the_report(settings, tmp_path):
    values = dataclasses.asdict(settings())
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values))))
    result = CliRunner().invoke(clean_then_finetune.main, [str(tmp_path / "p.yaml"), "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert "| cleaned |" in result.output
    wrong = CliRunner().invoke(clean_then_finetune.main, [str(tmp_path / "raw" / "part-0000.tar")])
    assert wrong.exit_code != 0


def test_the_study_writes_a_row_for_every_arm_of_every_cell(tmp_path):
    for name, count, seed in (("train", 96, 0), ("test", 60, 1), ("aux", 320, 2)):
        write_tar(tmp_path / name / "s.tar", shape_members(count, seed))
    folder = str(tmp_path)
    (tmp_path / "red_team_tiny.yaml").write_text(yaml.safe_dump(tiny_victim(tmp_path)))
    study = {
        "out": f"{folder}/study",
        "table": f"{folder}/training.csv",
        "zoo": f"{folder}/zoo",
        "preset": "cpu",
        "rates": [0.1],
        "seeds": [0, 1],
        "scenarios": {
            "tiny": {
                "dataset": "shapes",
                "victim": f"{folder}/red_team_tiny.yaml",
                "encoder": "backdoored",
                "data": {"train": f"{folder}/train", "validation": f"{folder}/test", "auxiliary": f"{folder}/aux"},
                "replace": {"cls": ["{target}"]},
                "pipeline": {
                    "filter": True,
                    "fit": FIT,
                    "scan": {"force": True, "policy": {"fpr": 0.05}},
                    "finetune": {"mode": "linear", "epochs": 1, "batch_size": 32},
                },
            }
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "page.md").write_text(
        "".join(f"<!-- {n}: begin -->\n<!-- {n}: end -->\n" for n in ("training.csv", "filter"))
    )
    command = [f"{folder}/study.yaml", "--page", f"{folder}/page.md"]
    result = CliRunner().invoke(training_study.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    rows = list(csv.DictReader((tmp_path / "training.csv").read_text().splitlines()))
    assert [(row["seed"], row["arm"]) for row in rows] == [
        (seed, arm) for seed in "01" for arm in ("poisoned", "cleaned", "oracle")
    ]
    assert {row["samples"] for row in rows if row["arm"] == "oracle"} == {"86"}
    assert (tmp_path / "page.md").read_text().count("| tiny | 0.1 |") == 2

"""docs/schemas: made by sanitize.schemas, and true of what a tiny run of every command reads, writes and prints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import write_encoder, write_shards
from click.testing import CliRunner

from sanitize import schemas
from sanitize.cli import main

jsonschema: Any = pytest.importorskip("jsonschema", reason="jsonschema is not installed; it is in the extra dev")
FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
FEW = "training={epochs: 2, batch_size: 32, precision: fp32, calibration_fraction: 0.5}"
SMALL = "decoder={patch_size: 4, width: 16, heads: 2, encoder_depth: 1, decoder_depth: 1}"
STOPS_AT_ONCE = ("pool=64", "epochs=1", "learning_rates=[0.5]", "milestones=[]", "restarts=2")
COMMANDS = {  # name of the schema of what it prints → arguments
    "result_fit": ("fit", "aux", "--encoder", "encoder.yaml", "--workers", "0", "--set", FEW, "--set", SMALL),
    "result_scan_dry_run": ("scan", "shards", "--workers", "0", "--fpr", "0.05", "--dry-run"),
    "result_scan": ("scan", "shards", "--workers", "0", "--fpr", "0.05", "--force"),
    "result_clean": ("clean", "--policy", "fdr", "--fpr", "0.0001"),
    "result_review": ("review", "--remove", "keys.txt", "--by", "Ada", "--note", "looks odd"),
    "result_export": ("export", "scanned", "exported"),
    "result_card": ("card", "scanned"),
    "result_audit": ("audit", "--top", "0"),
    "result_verify": ("verify",),
    "result_finetune": ("finetune", "labelled", "--encoder", "encoder.yaml", "--workers", "0", "--epochs", "2"),
    "result_poison": ("poison", "shards", "--rate", "0.2", "--set", "side=4", "--replace", "cls=9"),
    "inspect": ("inspect", "--encoder", "encoder.yaml", "--images", "aux", *(f"--set={s}" for s in STOPS_AT_ONCE)),
}
FILES = {  # schema → the files that it describes; a .jsonl holds one object a line
    "detector": ("detector/detector.json",),
    "fit": ("detector/fit.json",),
    "scan_run": ("scanned/run.json",),
    "shard_marker": ("scanned/done/*.json", "scanned/markers.jsonl"),
    "scan_summary": ("scanned/summary.json",),
    "scan_profile": ("scanned/profile.json",),
    "review": ("scanned/reviews/*.json",),
    "audit_summary": ("scanned/audit/summary.json",),
    "export_run": ("exported/export.json",),
    "finetune_run": ("head/run.json",),
    "head": ("head/head.json",),
    "metrics_line": ("head/metrics.jsonl",),
    "finetune": ("head/finetune.json",),
    "inspect": ("inspected/inspect.json",),
    "poison": ("poisoned/poison.json",),
}
OF_INIT = {"settings", "encoder", "result_init"}


def check(name: str, value: Any) -> None:
    jsonschema.Draft202012Validator(schemas.all_schemas()[name]).validate(value)


def refused(name: str, value: Any) -> str:
    with pytest.raises(jsonschema.ValidationError) as caught:
        check(name, value)
    return str(caught.value.message)


@pytest.fixture(scope="module")
def project(tmp_path_factory, aux_shards, labelled_shards):
    """A folder in which every command has run, and what each printed."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "aux").symlink_to(aux_shards)
    (folder / "labelled").symlink_to(labelled_shards)
    write_shards(folder / "shards", [12, 9])
    write_encoder(folder)
    (folder / "keys.txt").write_text("s000001\ns000014\n")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arguments in COMMANDS.items():
            result = CliRunner().invoke(main, [*arguments, "--json"])
            assert result.exit_code == 0, (arguments, result.output, result.exception)
            printed[name] = json.loads(result.stdout)
    return folder, printed


# ---------------------------------------------------------------- the files in docs/schemas


def test_the_schemas_in_the_repository_are_those_of_the_code():
    found = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert found == schemas.files(), "run: python -m sanitize.schemas docs/schemas"


@pytest.mark.parametrize("name", schemas.all_schemas())
def test_each_is_a_schema(name):
    jsonschema.Draft202012Validator.check_schema(schemas.all_schemas()[name])


def test_every_schema_is_held_against_something_real():
    assert set(FILES) | set(COMMANDS) | OF_INIT == set(schemas.all_schemas())


# ---------------------------------------------------------------- what is written and printed


@pytest.mark.parametrize("name", FILES)
def test_a_written_file_is_as_its_schema_says(name, project):
    folder, _ = project
    for pattern in FILES[name]:
        paths = sorted(folder.glob(pattern))
        assert paths, pattern
        for path in paths:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for text in texts:
                check(name, json.loads(text))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_printed_result_is_as_its_schema_says(name, project):
    check(name, project[1][name])


def test_no_json_of_a_run_is_without_a_schema(project):
    folder, _ = project
    described = {path for patterns in FILES.values() for pattern in patterns for path in folder.glob(pattern)}
    assert {path for path in folder.rglob("*.json*") if not path.name.startswith(".")} == described


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_something_else_is_refused(name):
    assert "is a required property" in refused(name, {}), name


def test_an_infinite_threshold_is_text(project):
    folder, printed = project
    assert printed["result_clean"]["threshold"] == "inf"
    summary = json.loads((folder / "scanned/summary.json").read_text())
    assert math.isinf(float(summary["threshold"]))
    assert "is not valid" in refused("scan_summary", summary | {"threshold": "high"})


# ---------------------------------------------------------------- settings


def test_what_init_writes_and_prints_is_as_the_schemas_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check("result_init", json.loads(CliRunner().invoke(main, ["init", "--json"]).stdout))
    check("settings", yaml.safe_load(Path("sanitize.yaml").read_text()))
    check("encoder", yaml.safe_load(Path("encoder.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("settings", "scan: {polcy: {fpr: 0.1}}", "'polcy' was unexpected"),
        ("settings", "scan: {policy: {policy: best}}", "'best' is not one of"),
        ("settings", "train: {}", "'train' was unexpected"),
        ("settings", "fit: {training: {epochs: many}}", "'many' is not of type 'integer'"),
        ("encoder", "{architecture: resnet18, resize: stretch}", "'stretch' is not one of ['squash', 'crop']"),
        ("encoder", "{weights: a.safetensors}", "'architecture' is a required property"),
    ],
)
def test_a_mistake_in_settings_is_found_before_anything_runs(name, text, message):
    assert message in refused(name, yaml.safe_load(text))


@pytest.mark.parametrize("text", ["scan:", "scan: {effort: 0.05, shards: shards/}", "fit: {preset: paper, seed: 3}"])
def test_what_the_commands_accept_the_schema_accepts(text):
    check("settings", yaml.safe_load(text))

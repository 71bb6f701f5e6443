"""Settings do what they say: policies of YAML and options, dry runs, limits, JSON, quiet."""

import json
import subprocess
import sys

import click
import pytest
from builders import tree_bytes, write_shards
from click.testing import CliRunner

from sanitize.attacks import triggers
from sanitize.cli import main
from sanitize.cli_around import TRIGGERS
from sanitize.cli_options import resolve_policy
from sanitize.cli_output import Command


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], {"policy": "calibrated"}),
        ([{"fraction": 0.2}], {"policy": "fraction", "fraction": 0.2}),
        ([{"policy": "fraction", "fraction": 0.2}, {"fpr": 0.05}], {"policy": "calibrated", "fpr": 0.05}),
        ([{"policy": "fdr", "fpr": 0.1}, {"fpr": 0.05}], {"policy": "fdr", "fpr": 0.05}),
        ([{"policy": "calibrated", "fpr": 0.1}, {"policy": "fdr"}], {"policy": "fdr", "fpr": 0.1}),
        ([{"policy": "calibrated", "fpr": 0.1}, {"threshold": 3}], {"policy": "absolute", "threshold": 3}),
        ([{"fraction": 0.2, "keep_unscored": True}, {"adapt": False}], None),
    ],
)
def test_the_last_layer_that_chooses_a_policy_decides(layers, expected):
    kept = {"policy": "fraction", "fraction": 0.2, "keep_unscored": True, "adapt": False}
    assert resolve_policy([("here", layer) for layer in layers]) == (expected or kept)


def test_clean_reads_the_policy_of_sanitize_yaml_as_scan_does(sanitize, detector, tmp_path):
    write_shards(tmp_path / "in", [20])
    (tmp_path / "sanitize.yaml").write_text("scan: {workers: 0, policy: {fraction: 0.2}}")
    code, scanned = sanitize("scan", "in", "--detector", detector)
    assert (code, "16 of 20 samples kept" in scanned) == (0, True)
    assert "16 of 20 samples kept" in sanitize("clean")[1]
    assert "18 of 20 samples kept" in sanitize("clean", "--fraction", "0.1")[1]
    assert "20 of 20 samples kept" in sanitize("clean", "--threshold", "1e9")[1]
    (tmp_path / "other.yaml").write_text("scan: {policy: {fraction: 0.4}}")
    assert "12 of 20 samples kept" in sanitize("clean", "--config", "other.yaml")[1]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(sanitize, detector, tmp_path):
    write_shards(tmp_path / "in", [20, 5])
    scan = ("scan", "in", "--detector", detector, "--workers", "0", "--cpus-per-worker", "1", "--fraction", "0.2")
    code, output = sanitize(*scan, "--dry-run")
    assert (code, "would scan 2 shards" in output, "0 scored before" in output) == (0, True, True)
    assert not (tmp_path / "scanned").exists()
    assert sanitize(*scan)[0] == 0
    assert "2 scored before" in sanitize(*scan, "--dry-run")[1]
    before = tree_bytes(tmp_path / "scanned")
    assert "would write scanned/clean: 15 of 25 samples kept" in sanitize("clean", "--fraction", "0.4", "--dry-run")[1]
    assert tree_bytes(tmp_path / "scanned") == before


def test_a_limit_scans_the_first_shards_alone(sanitize, detector, tmp_path):
    write_shards(tmp_path / "in", [20, 5])
    scan = ("scan", "in", "--detector", detector, "--workers", "0", "--threshold", "1e9")
    assert "20 samples scored" in sanitize(*scan, "--limit", "1")[1]
    code, output = sanitize(*scan)
    assert (code, "holds a scan that differs in shards. Give another --out" in output) == (3, True), output
    assert "25 samples scored" in sanitize(*scan, "--out", "whole")[1]


def test_results_as_json_stand_alone_on_stdout(detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "in", [20])

    def result(*arguments: str) -> dict:
        return json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)

    scan = ("scan", "in", "--detector", str(detector), "--workers", "0", "--threshold", "1e9")
    assert result(*scan, "--dry-run")["shards"] == 1
    assert (result(*scan)["samples"], result(*scan)["cleaned"]["kept"]) == (20, 20)
    assert result("clean", "scanned", "--policy", "fdr", "--fpr", "0.0001")["threshold"] == "inf"
    assert result("verify", "scanned")["problems"] == []
    assert result("audit", "scanned", "--top", "0")["report"] == "scanned/audit/report.html"


@pytest.mark.parametrize("arguments", [["--quiet", "scan"], ["scan", "--quiet"]])
def test_quiet_leaves_results_alone(arguments, detector, tmp_path):
    write_shards(tmp_path / "in", [5])
    rest = [tmp_path / "in", "--detector", detector, "--out", tmp_path / "out", "--workers", "0", "--threshold", "1e9"]
    command = [sys.executable, "-m", "sanitize.cli", *arguments, *map(str, rest)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    assert "5 samples scored" in ended.stdout


def test_every_command_lists_the_exit_codes():
    for name in main.commands:
        assert "3    refused" in CliRunner().invoke(main, [name, "--help"]).output
    assert tuple(triggers.TRIGGERS) == TRIGGERS


def test_a_crash_is_one_line_and_exit_code_2_unless_the_whole_is_asked_for(tmp_path, monkeypatch):
    """Exit code 1 says that some shards failed, and nothing else."""

    @click.command()
    def crash() -> None:
        raise ZeroDivisionError("of\nours")

    program = Command("program")
    program.add_command(crash)
    ended = CliRunner().invoke(program, ["crash"])
    assert ended.exit_code == 2
    assert ended.output == (
        "error: failed unexpectedly (ZeroDivisionError: of ours). Finished files are kept. Please report it, with what the same command "
        "says when SANITIZE_TRACEBACK=1 is set.\n"
    )
    monkeypatch.setenv("SANITIZE_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(program, ["crash"]).exception, ZeroDivisionError)

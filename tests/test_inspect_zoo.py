"""The study of `sanitize inspect` over encoders: a tiny victim end to end, and the two judgements of its rows."""

import csv

import pytest
import yaml
from builders import shape_members, tiny_victim, write_tar
from click.testing import CliRunner

from pipelines import inspect_zoo, page
from sanitize.detectors.decree.verdict import peer_p


def test_both_encoders_of_every_seed_get_a_row_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("train", 96, 0), ("test", 60, 1), ("aux", 96, 2)):
        write_tar(tmp_path / name / "s.tar", shape_members(count, seed))
    (tmp_path / "red_team_tiny.yaml").write_text(yaml.safe_dump(tiny_victim()))
    arguments = ["red_team_tiny.yaml", "--seed", "1", "--seed", "2", "--images", "aux", "--results", "inspect.csv"]
    for setting in ("pool=64", "batch_size=32", "epochs=4", "restarts=1", "blocks=0"):
        arguments += ["--set", setting]
    result = CliRunner().invoke(inspect_zoo.main, arguments, catch_exceptions=False)
    assert "tiny: AUROC" in result.output
    assert "over 4 encoders" in result.output
    rows = list(csv.DictReader((tmp_path / "inspect.csv").read_text().splitlines()))
    assert [(row["seed"], row["encoder"]) for row in rows] == [
        (seed, kind) for seed in "12" for kind in ("clean", "backdoored")
    ]
    assert {row["p"] for row in rows} == {""}  # two clean encoders are too few peers
    reports = list((tmp_path / "runs" / "inspected").rglob("inspect.json"))
    before = {report: report.stat().st_mtime_ns for report in reports}
    assert len(before) == 4
    CliRunner().invoke(inspect_zoo.main, arguments, catch_exceptions=False)
    assert {report: report.stat().st_mtime_ns for report in reports} == before  # finished ones are reused,
    CliRunner().invoke(inspect_zoo.main, [*arguments, "--set", "epochs=2"], catch_exceptions=False)
    assert all(report.stat().st_mtime_ns != before[report] for report in reports)  # but not for other settings


def test_rows_of_other_attacks_stay_and_the_page_counts_what_is_called_trojaned(tmp_path):
    def line(attack, kind, seed, l1, verdict, p=""):
        return {"attack": attack, "seed": seed, "encoder": kind, "l1": l1, "verdict": verdict, "p": p}

    path = str(tmp_path / "inspect.csv")
    page.write_csv(path, [line("old", "clean", 1, 300.0, "clean"), line("old", "backdoored", 1, 90.0, "trojaned")])
    page.write_csv(path, inspect_zoo.with_earlier([line("new", "clean", 1, 100.0, "trojaned", 0.001)], path))
    rows = inspect_zoo.with_earlier(
        [line("new", "clean", 2, None, "clean"), line("new", "backdoored", 2, 50.0, "clean", 0.009)], path
    )
    assert [(row["attack"], row["encoder"]) for row in rows] == [
        ("old", "clean"),
        ("old", "backdoored"),
        ("new", "clean"),
        ("new", "backdoored"),
    ]
    old, new = inspect_zoo.markdown(rows).splitlines()[2:]
    assert old == "| old | 90 | 300 | 1.00 | 1 of 1 | 0 of 1 | 0 of 1 | 0 of 1 |"
    assert new == "| new | 50 | inf | 1.00 | 0 of 1 | 0 of 1 | 1 of 1 | 0 of 1 |"


def row(kind, seed, l1):
    return {"encoder": kind, "seed": seed, "l1": l1}


def test_smaller_triggers_are_more_suspicious_and_none_is_the_least():
    clean = [row("clean", s, l1) for s, l1 in enumerate((300.0, 340.0, None))]
    trojaned = [row("backdoored", s, l1) for s, l1 in enumerate((40.0, 320.0, 55.0))]
    assert inspect_zoo.auroc(clean + trojaned) == pytest.approx(8 / 9)


def test_an_encoder_is_judged_by_the_clean_ones_of_other_seeds():
    rows = [row("clean", s, 300.0 + 10 * s) for s in range(4)] + [row("backdoored", 0, 60.0)]
    judged = inspect_zoo.with_peers(rows)
    assert judged[-1]["p"] == peer_p(60.0, [310.0, 320.0, 330.0])
    assert judged[-1]["p"] < 0.01 < judged[1]["p"]
    assert inspect_zoo.with_peers(rows[:3])[0]["p"] == ""

"""What attackers have left: one line for each, what proves something, and the page and plot."""

import csv
import dataclasses
from pathlib import Path

import pytest

from pipelines import benchmark, frontier
from pipelines.benchmark_config import BenchmarkConfig
from sanitize.config_loading import from_mapping, load_yaml
from sanitize.errors import ConfigError

COLUMNS = "attacker,weight,seed,asr,clean_accuracy,backdoored_accuracy,evidence,tpr_at_1pct,undetected_success"


@pytest.fixture
def config():
    """An unaware attacker, one who knows `reaction` with two weights, and two detectors; nothing of it is run."""
    paths = {"config": "red_team_x.yaml", "test": "test", "auxiliary": {"id": "aux"}}
    knowing = paths | {"attacker": "A1", "knows": ["reaction"]}
    values = {
        "out": "out",
        "table": "table.csv",
        "zoo": "zoo",
        "preset": "cpu",
        "default": "evidence",
        "section": "frontier",
        "frontier": True,
        "victims": {
            "unaware": paths,
            "a1_low": knowing | {"weight": 0.1},
            "a1_high": knowing | {"weight": 0.3},
        },
        "detectors": {"evidence": {"scorer": "evidence"}, "reaction": {"scorer": "reaction"}},
    }
    return from_mapping(BenchmarkConfig, values, "test")


def measured(attack, asr, seed=0, rate=0.5, **tpr):
    quality = {"asr": asr, "clean_accuracy": 0.75, "backdoored_accuracy": 0.73, "poison_rate": rate, "seed": seed}
    return [{"attack": attack, "detector": name, "tpr_at_1pct": value, **quality} for name, value in tpr.items()]


def rows_of(low, high):
    unaware = measured("unaware", 0.9, evidence=1.0, reaction=1.0)
    return unaware + measured("a1_low", 0.8, **low) + measured("a1_high", 0.5, **high)


def test_a_row_is_a_proof_only_if_the_evidence_that_its_attacker_knows_finds_him_no_more(config):
    rows = rows_of({"evidence": 0.9, "reaction": 0.4}, {"evidence": 0.9, "reaction": 0.05})
    found = {(row["attacker"], row["weight"], row["evidence"]): row for row in frontier.lines(config, rows)}
    assert {key[:2]: row["proof"] for key, row in found.items()} == {
        ("unaware", 0.0): "",
        ("A1", 0.1): "no: reaction 0.40",
        ("A1", 0.3): "yes",
    }
    assert found["A1", 0.1, "evidence"]["undetected_success"] == pytest.approx(0.8 * 0.1)
    assert found["unaware", 0.0, "reaction"]["undetected_success"] == 0


def test_who_gave_up_his_attack_proves_nothing_by_hiding(config):
    rows = measured("a1_high", 0.03, evidence=0.0, reaction=0.0)
    assert {row["proof"] for row in frontier.lines(config, rows)} == {"no: no attack left"}


def test_proof_is_of_balanced_pools_of_the_same_seed(config):
    rows = measured("a1_high", 0.5, reaction=0.0) + measured("a1_high", 0.5, rate=0.01, reaction=0.9)
    rows += measured("a1_high", 0.5, seed=1, reaction=0.9)
    assert [row["proof"] for row in frontier.lines(config, rows)] == ["yes", "yes", "no: reaction 0.90"]


def test_the_page_has_a_line_for_each_attacker_and_weight_with_means_over_seeds(config):
    rows = rows_of({"evidence": 0.9, "reaction": 0.4}, {"evidence": 0.5, "reaction": 0.0})
    rows += measured("a1_high", 0.7, seed=1, evidence=1.0, reaction=0.0)
    rows += measured("a1_high", 0.9, rate=0.01, evidence=0.0, reaction=0.0)
    lines = frontier.markdown(frontier.lines(config, rows)).splitlines()
    assert lines[0] == "| attacker | weight | accuracy | success | evidence | reaction | proof |"
    assert lines[2:] == [
        "| unaware | 0.0 | -0.020 | 0.900 | 0.000 | 0.000 |  |",
        "| A1 | 0.1 | -0.020 | 0.800 | 0.080 | 0.480 | no: reaction 0.40 |",
        "| A1 | 0.3 | -0.020 | 0.600 | 0.125 | 0.600 | yes |",
    ]


def test_a_study_of_attackers_writes_their_table_their_section_and_the_plot(config, monkeypatch, tmp_path):
    rows = {name: measured(name, 0.8, evidence=0.9, reaction=0.0) for name in config.victims}
    table, page = tmp_path / "adaptive_cpu.csv", tmp_path / "page.md"
    config = dataclasses.replace(config, table=str(table))
    victims = [(type("V", (), {"name": name}), "id", 0) for name in config.victims]
    monkeypatch.setattr(benchmark, "cases", lambda _: victims)
    monkeypatch.setattr(benchmark, "measure", lambda *case: [r for r in rows[case[1].name] if r["detector"] == case[4]])
    page.write_text("above\n<!-- frontier: begin -->\n<!-- frontier: end -->\nbelow\n")
    frontier.publish(config, benchmark.run(config), str(page))
    assert "| A1 | 0.3 | -0.020 | 0.800 | 0.080 | 0.800 | yes |" in page.read_text()
    assert (tmp_path / "plots" / "frontier_cpu.png").stat().st_size > 1000
    with table.open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [*COLUMNS.split(","), "poison_rate", "proof"]
    assert len(found) == 6


def test_an_attacker_can_know_only_what_is_measured(config):
    wrong = dataclasses.replace(config.victims["a1_low"], knows=("reaction", "decoder"))
    with pytest.raises(ConfigError, match=r"victims\.a1_low\.knows: decoder: not among the detectors"):
        dataclasses.replace(config, victims={"a1_low": wrong})


def test_the_published_study_names_attackers_that_exist_and_its_table_is_on_the_page():
    config = from_mapping(BenchmarkConfig, load_yaml("configs/benchmark_frontier_cpu.yaml"), "frontier")
    assert all(Path(victim.config).exists() and victim.attacker for victim in config.victims.values())
    with Path(config.table).open() as file:
        numbers = ("weight", "asr", "clean_accuracy", "backdoored_accuracy", "undetected_success", "poison_rate")
        rows = [row | {name: float(row[name]) for name in numbers} for row in csv.DictReader(file)]
    assert {row["attacker"] for row in rows} == {victim.attacker for victim in config.victims.values()}
    text = Path("docs/detection.md").read_text()
    for line in frontier.markdown(rows).splitlines()[2:]:
        assert line.split(" | ")[0] in text

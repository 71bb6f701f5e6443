"""docs/tables.md: every block runs as written on a scan, and the tables join sample for sample."""

import csv
import json
import re
from pathlib import Path

import pytest
from builders import REMOVE_SOME, write_shards

from sanitize.commands.scan import scan

PAGE = (Path(__file__).parents[1] / "docs" / "tables.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path, scan_config, monkeypatch) -> Path:
    """A scan of 33 samples in two folders of shards, 9 of them removed; the working directory."""
    write_shards(tmp_path / "in" / "monday", [12, 9])
    write_shards(tmp_path / "in" / "tuesday", [12], first_seed=500)
    scan(scan_config(tmp_path / "in" / "**" / "*.tar", policy=REMOVE_SOME))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def removed_of(project: Path) -> int:
    summary = json.loads((project / "scanned/summary.json").read_text())
    assert summary["samples"] == 33
    return summary["removed"]


def test_the_page_has_something_to_run():
    assert len(blocks("sql")) >= 6
    assert len(blocks("python")) == 2


def test_every_query_runs_in_duckdb(project):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed; it is in the extra dev")
    by_status, by_shard, why, evidence, _copies, to_csv, _quantiles = blocks("sql")
    for query in blocks("sql"):
        duckdb.sql(query)
    assert duckdb.sql(by_status).fetchall()[0][:2] == ("ok", 33)
    counts = duckdb.sql(by_shard).fetchall()
    assert {shard for shard, *_ in counts} == {"monday/part-0000", "monday/part-0001", "tuesday/part-0000"}
    assert sum(removed for _, _, removed, _ in counts) == removed_of(project)
    assert len(duckdb.sql(why).fetchall()) == removed_of(project)
    noise, blur, neighbours, highest = duckdb.sql(evidence).fetchall()[0]
    assert 0 < highest <= 1
    assert all(-5 < share < 5 for share in (noise, blur, neighbours))
    assert "TO 'kept.csv'" in to_csv
    with (project / "kept.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 33 - removed_of(project)


def test_copies_of_an_image_are_found_by_their_bytes(tmp_path, scan_config, monkeypatch):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed; it is in the extra dev")
    write_shards(tmp_path / "in" / "a", [5], first_seed=7)
    write_shards(tmp_path / "in" / "b", [5], first_seed=7)
    scan(scan_config(tmp_path / "in" / "**" / "*.tar", policy=REMOVE_SOME))
    monkeypatch.chdir(tmp_path)
    found = duckdb.sql(blocks("sql")[4]).fetchall()
    assert [copies for _, copies, _ in found] == [2] * 5


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_block_of_a_library_runs_and_joins_every_sample(library, project, capsys):
    pytest.importorskip(library, reason=f"{library} is not installed; it is in the extra dev")
    (block,) = (block for block in blocks("python") if f"import {library}" in block)
    names: dict = {}
    exec(compile(block, "docs/tables.md", "exec"), names)
    removed = names["removed"]
    rows = len(removed) if library == "pandas" else removed.collect().height
    assert rows == removed_of(project)
    evidence = names["evidence"] if library == "pandas" else names["evidence"].collect()
    assert (len(evidence), "reaction_blur" in evidence.columns) == (rows, True)
    assert "tuesday/part-0000" in capsys.readouterr().out

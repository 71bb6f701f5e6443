"""docs/data.md: every command as it is written there, in the order of the page, in a folder that holds what they name."""

import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from builders import write_encoder
from source_builders import hf_table, write_images, write_parquet

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCKS = "".join(re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
SETTINGS = {
    "fit": {"workers": 0, "training": {"epochs": 1, "calibration_fraction": 0.5}},
    "scan": {"workers": 0, "policy": {"policy": "fraction", "fraction": 0.2}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """What people have, by the names of the page."""
    folder = tmp_path_factory.mktemp("data")
    photos = write_images(folder / "photos", 12)
    write_images(folder / "aux-photos", 120)
    write_encoder(folder)
    (folder / "sanitize.yaml").write_text(yaml.safe_dump(SETTINGS))
    for split in ("train", "test"):
        write_parquet(folder / "my-dataset" / "data" / f"{split}-00000.parquet", hf_table(6))
    write_parquet(folder / "cifar.parquet", hf_table(6).rename_columns(["img", "fine_label", "caption"]))
    lines = [f'photos/{path},"photo, {number}",{path[:3]}' for number, path in enumerate(photos)]
    (folder / "pairs.csv").write_text("\n".join(["file_name,caption,label", *lines]) + "\n")
    table = {"url": [f"{folder}/photos/{path}" for path in photos], "title": list(photos)}
    write_parquet(folder / "pairs.parquet", pa.table(table))
    return folder


def test_every_command_of_the_page_runs_as_written(project, sanitize, monkeypatch):
    monkeypatch.chdir(project)
    commands = [shlex.split(line, comments=True) for line in BLOCKS.splitlines() if line.startswith("sanitize ")]
    for _, *words in commands:
        code, output = sanitize(*words)
        assert code == 0, (words, output)
    assert {command for _, command, *_ in commands} == {"pack", "fit", "scan", "list"}
    removed = (project / "removed.txt").read_text().splitlines()
    kept = (project / "kept.txt").read_text().splitlines()
    assert sorted(removed + kept) == sorted(str(p.relative_to(project / "photos")) for p in project.glob("photos/*/*"))

"""`sanitize verify`: what is damaged is named; repaired and scanned again, every byte is back."""

import json
import re
import shutil

import pytest
from builders import tree_bytes
from click.testing import CliRunner

from sanitize import storage
from sanitize.cli import main
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import RefusedError
from sanitize.kept_samples import KeptSamples

POLICY = ThresholdPolicy("fraction", fraction=0.2)


@pytest.fixture
def out(shards, scan_config, tmp_path):
    """A finished scan; the same one again is `scan(out.config)`."""
    config = scan_config(shards, policy=POLICY)
    scan(config)
    return tmp_path / "scanned", config


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CLEANED_0 = {"clean/part-0000.tar", "decisions/part-0000.parquet", "quarantine/part-0000.tar"}
DAMAGE = {
    "a changed clean tar": ("clean/part-0000.tar", flip_a_bit, CLEANED_0),
    "a quarantine tar gone": ("quarantine/part-0001.tar", lambda path: path.unlink(), None),
    "a changed score table": ("scores/part-0002.parquet", flip_a_bit, None),
    "a score table gone": ("scores/part-0000.parquet", lambda path: path.unlink(), None),
    "a file of nobody": ("clean/extra.tar", lambda path: path.write_bytes(b"x"), {"clean/extra.tar"}),
    "changed decisions": ("decisions/part-0001.parquet", flip_a_bit, None),
    "decisions gone": ("decisions/part-0001.parquet", lambda path: path.unlink(), None),
    "changed markers": ("markers.jsonl", flip_a_bit, {"markers.jsonl", "summary.json"}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_repaired_and_scanned_again_is_as_it_was(out, case):
    folder, config = out
    name, damage, deleted = DAMAGE[case]
    before = tree_bytes(folder)
    damage(folder / name)
    found = verify(str(folder), repair=True)
    assert found.problems[0].startswith(f"{name}: ")
    assert deleted is None or set(found.deleted) == deleted
    scan(config)
    assert verify(str(folder), deep=True).problems == ()
    assert tree_bytes(folder) == before


def test_a_damaged_tar_costs_no_scoring(out):
    folder, _ = out
    flip_a_bit(folder / "clean" / "part-0000.tar")
    verify(str(folder), repair=True)
    assert sorted(path.name for path in (folder / "done").iterdir()) == [f"part-000{i}.json" for i in range(3)]
    assert len(list((folder / "scores").iterdir())) == 3


def test_without_repair_nothing_is_touched(out):
    folder, _ = out
    flip_a_bit(folder / "clean" / "part-0000.tar")
    before = tree_bytes(folder)
    assert verify(str(folder), deep=True).deleted == ()
    assert tree_bytes(folder) == before


def test_deep_finds_a_tar_that_agrees_with_its_marker_but_not_with_its_input(out):
    """Somebody who may write the folder has changed a kept image and the marker with it."""
    folder, config = out
    before, tar, done = tree_bytes(folder), folder / "clean" / "part-0000.tar", folder / "done" / "part-0000.json"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    marker = json.loads(done.read_text())
    marker["files"]["clean/part-0000.tar"]["sha256"] = storage.file_sha256(str(tar))
    storage.write_json(str(done), marker)
    again = f"Run `sanitize verify --repair {folder}`, then the same `sanitize scan` again."
    markers = f"markers.jsonl: not what done/ says. {again}"
    assert verify(str(folder)).problems == (markers,)
    assert verify(str(folder), deep=True, repair=True).problems == (
        f"clean/part-0000.tar: is not what the input and the decisions give. {again}",
        markers,
    )
    scan(config)
    assert tree_bytes(folder) == before


def test_deep_names_an_input_that_changed_since(out, shards):
    folder, _ = out
    flip_a_bit(shards / "part-0001.tar")
    assert verify(str(folder)).problems == ()
    assert verify(str(folder), deep=True).problems == (
        f"{shards}/part-0001.tar: changed after it was scored. Scan it again into another --out.",
    )
    shutil.move(shards / "part-0001.tar", shards / "away")
    assert "no such file" in verify(str(folder), deep=True).problems[0]


def test_the_command_says_what_was_deleted_and_what_to_run(out):
    folder, _ = out
    flip_a_bit(folder / "scores" / "part-0000.parquet")
    result = CliRunner().invoke(main, ["verify", str(folder), "--repair"])
    assert result.exit_code == 1
    assert (
        "scores/part-0000.parquet: content differs from what was committed. Run `sanitize verify --rep" in result.output
    )
    assert "5 files deleted. Run the same `sanitize scan` again; it writes them anew." in result.output


def test_a_folder_that_an_earlier_version_split_is_refused_in_words_and_mended_by_clean(shards, scan_config, tmp_path):
    """0.1.0 wrote one decisions.parquet, no markers.jsonl, and no rule."""
    scan(scan_config(shards, policy=POLICY))
    out, expected = tmp_path / "scanned", tree_bytes(tmp_path / "scanned")
    shutil.rmtree(out / "decisions")
    (out / "markers.jsonl").unlink()
    for path in (out / "done").iterdir():
        marker = json.loads(path.read_text())
        del marker["files"][f"decisions/{path.stem}.parquet"], marker["clean"]["rule"]
        path.write_text(json.dumps(marker))
    summary = json.loads((out / "summary.json").read_text())
    for key in ("rule", "markers_sha256", "together"):
        del summary[key]
    (out / "summary.json").write_text(json.dumps(summary | {"decisions_sha256": "00"}))
    words = r"part-0000\.parquet: missing, an earlier version split this shard\. Run `sanitize clean .*scanned` once\."
    with pytest.raises(RefusedError, match=words):
        next(iter(KeptSamples(str(out))))
    assert re.search(words, verify(str(out)).problems[0])
    before = {path: path.stat().st_mtime_ns for path in (out / "clean").iterdir()}
    clean(str(out), POLICY)
    assert tree_bytes(out) == expected
    assert {path: path.stat().st_mtime_ns for path in (out / "clean").iterdir()} == before  # nothing was copied again

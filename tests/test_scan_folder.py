"""The scan folder: what is written reads back, an older one still loads, and one that is damaged or another's says so."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import members, scores_by_key, tree_bytes

from sanitize import storage
from sanitize.artifacts.run_record import claim_folder, refuse_other_run
from sanitize.artifacts.scan_folder import (
    CLEAN,
    QUARANTINE,
    InputShard,
    Run,
    ScanFolder,
    ShardInput,
    ShardMarker,
    Split,
    Summary,
    WrittenFile,
    decision_identity,
)
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError, StorageError
from sanitize.records import Shard
from sanitize.stages import decision_table
from sanitize.stages.decision_table import Decisions, read_decisions, write_decisions

TENTH = ThresholdPolicy("fraction", fraction=0.1)
RUN = Run(
    detector="/d",
    detector_fingerprint="f" * 64,
    encoder={"architecture": "resnet18", "mean": [0.5, 0.5, 0.5]},
    image_member="",
    caption_member="txt",
    effort="thorough",
    precision="fp32",
    shards={"b": InputShard("/in/b.tar", 20, "bb"), "a/z": InputShard("/in/a/z.tar", 10, "aa")},
    versions={"torch": "2"},
)
SCORED = ShardMarker("a/z", ShardInput(10, "00", "", 1), 3, 1, {"scores/a/z.parquet": WrittenFile(5, "11")})
SUMMARY = Summary(TENTH, "adapted", 1.5, 10, 8, 2, 1, 2, ("b",), {"a": "cut"}, 3, "22")


@pytest.fixture
def folder(tmp_path) -> ScanFolder:
    return ScanFolder(str(tmp_path / "scanned"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- what is written reads back


def test_a_run_reads_back_and_gives_its_shards_sorted(folder):
    folder.claim(RUN)
    assert folder.run() == RUN
    assert [folder.run().shard(stem) for stem in ("a/z", "b")] == [
        Shard("/in/a/z.tar", "a/z", 10),
        Shard("/in/b.tar", "b", 20),
    ]


def test_markers_read_back_before_and_after_the_split(folder):
    split = ShardMarker(
        "b", ShardInput(20, "33", "cut", 0), 2, 0, {"clean/b.tar": WrittenFile(7, "44")}, Split(1, 1, "55")
    )
    assert (folder.scored(), folder.marker("b")) == (set(), None)
    for marker in (SCORED, split):
        folder.write_marker(marker)
        assert folder.marker(marker.shard) == marker
    assert folder.scored() == {"a/z", "b"}
    assert folder.markers(["a/z", "none", "b"]) == [SCORED, split]
    assert "clean" not in storage.read_json(folder.at("done", "a/z.json"))


def test_forgetting_the_split_leaves_the_marker_of_pass_1():
    files = SCORED.files | {"clean/a/z.tar": WrittenFile(1, "66"), "quarantine/a/z.tar": WrittenFile(1, "77")}
    done = ShardMarker("a/z", SCORED.input, 3, 1, files, Split(2, 1, "88"))
    assert done.unsplit() == SCORED


@pytest.mark.parametrize("threshold", [1.5, math.inf, -math.inf])
def test_a_summary_reads_back_with_any_threshold(folder, threshold):
    summary = replace(SUMMARY, threshold=threshold)
    assert folder.summary() is None
    folder.write_summary(summary, [])
    read = folder.summary()
    assert read is not None
    assert replace(read, markers_sha256="") == summary
    json.loads(Path(folder.at("summary.json")).read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    folder.delete_summary()
    assert folder.summary() is None


def test_all_markers_are_read_from_one_file_when_pass_2_is_through(folder):
    others = [replace(SCORED, shard=name) for name in ("b", "c")]
    for marker in (SCORED, *others):
        folder.write_marker(marker)
    folder.write_summary(SUMMARY, [SCORED, *others])
    Path(folder.at("done/b.json")).write_text("{}")  # its name still says that it is scored
    assert folder.markers(["a/z", "b", "none"]) == [SCORED, others[0]]
    Path(folder.at("done/c.json")).unlink()
    assert folder.markers(["a/z", "b", "c"]) == [SCORED, others[0]]
    Path(folder.at("markers.jsonl")).write_text("")  # not the one of the summary: each marker is asked for itself
    with pytest.raises(StorageError, match=r"done/b\.json: missing"):
        folder.markers(["a/z", "b"])


def test_a_scan_that_removes_nothing_has_an_infinite_threshold_on_disk(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    clean(str(tmp_path / "scanned"), ThresholdPolicy("fdr", fpr=1e-9))
    summary = ScanFolder(str(tmp_path / "scanned")).summary()
    assert summary is not None
    assert (summary.threshold, summary.removed) == (math.inf, 0)
    assert verify(str(tmp_path / "scanned")).problems == ()


def test_what_is_present_is_named_below_the_folder(folder):
    names = {"scores/a/z.parquet", "decisions/a/z.parquet", f"{CLEAN}/b.tar", f"{QUARANTINE}/b.tar"}
    for name in (*names, "done/b.json", "markers.jsonl"):
        storage.write_bytes(folder.at(name), b"x")
    assert folder.present_files() == names


def test_equal_decisions_have_one_identity():
    keep = np.array([True, False, True])
    assert decision_identity(keep) == decision_identity(keep.copy())
    others = [keep[:2], np.append(keep, False), ~keep, keep[::-1][:0]]
    assert len({decision_identity(other) for other in (keep, *others)}) == 5


# ---------------------------------------------------------------- earlier versions and damage


def test_a_run_of_an_earlier_version_with_a_key_that_is_gone_still_loads_and_resumes(shards, scan_config, tmp_path):
    """`batch_size` was part of run.json once."""
    scan(scan_config(shards, policy=TENTH))
    scan(scan_config(shards, "older", scores_only=True))
    change_json(tmp_path / "older" / "run.json", batch_size=8)
    (tmp_path / "older" / "done" / "part-0002.json").unlink()
    run = tree_bytes(tmp_path / "older")["run.json"]
    scan(scan_config(shards, "older", policy=TENTH))
    whole, older = tree_bytes(tmp_path / "scanned"), tree_bytes(tmp_path / "older")
    assert older.pop("run.json") == run
    del whole["run.json"]
    assert older == whole


def test_no_scan_in_the_folder_says_what_to_run(folder):
    with pytest.raises(ConfigError, match=r"no scan there \(run\.json is missing\)\. Run `sanitize scan` first"):
        folder.run()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"shards": ["b"]},
            r"run\.json: shards holds \['b'\], a block of settings was expected\. Restore the file, or",
        ),
        (
            {"effort": ["fast"]},
            r"run\.json: effort holds \['fast'\], str was expected\. Restore the file, or scan into",
        ),
        ({"shards": {"b": {"url": "x"}}}, r"run\.json: shards\.b: missing bytes, head_tail_sha256\. Restore the file"),
    ],
)
def test_a_damaged_run_names_the_file_the_key_and_what_to_do(folder, change, words):
    folder.claim(RUN)
    change_json(Path(folder.at("run.json")), **change)
    with pytest.raises(StorageError, match=words):
        folder.run()


def test_a_damaged_marker_or_summary_names_the_file_and_what_to_do(folder):
    folder.write_marker(SCORED)
    change_json(Path(folder.at("done", "a/z.json")), samples="three")
    with pytest.raises(StorageError, match=r"done/a/z\.json: samples holds 'three', int was expected\. Restore the"):
        folder.marker("a/z")
    folder.write_summary(SUMMARY, [SCORED])
    change_json(Path(folder.at("summary.json")), policy={"fpr": 2})
    with pytest.raises(StorageError, match=r"summary\.json: policy: fpr: 2\.0 is not between 0 and 1\. Restore the"):
        folder.summary()
    Path(folder.at("summary.json")).write_bytes(b"{")
    with pytest.raises(StorageError, match=r"summary\.json: not valid JSON .* Restore the file or write it again"):
        folder.summary()


def test_a_threshold_that_is_no_number_names_the_file(folder):
    folder.write_summary(SUMMARY, [SCORED])
    change_json(Path(folder.at("summary.json")), threshold="high")
    with pytest.raises(StorageError, match=r"summary\.json: threshold holds 'high'"):
        folder.summary()


# ---------------------------------------------------------------- decisions


def decided_table(shard: str, indexes: list[int], keys: str = "abc") -> pa.Table:
    count = len(indexes)
    columns = {
        "shard": [shard] * count,
        "key": [keys[i] for i in indexes],
        "index": indexes,
        "keep": [i % 2 == 0 for i in indexes],
        "reason": [""] * count,
        "score": [None if i == 1 else float(i) for i in indexes],
        "threshold": [1.0] * count,
    }
    columns |= {name: [None] * len(indexes) for name in ("contributions", "p_values")}
    return pa.table(columns, schema=decision_table.SCHEMA)


def test_decisions_are_those_that_were_written(tmp_path):
    path = str(tmp_path / "a.parquet")
    sha256 = write_decisions(path, decided_table("a", [0, 1, 2])).sha256()
    found = Decisions.of(read_decisions(path, sha256))
    assert (found.keep.tolist(), found.keys) == ([True, False, True], ["a", "b", "c"])
    assert found.scores.tolist() == pytest.approx([0, math.nan, 2], nan_ok=True)


@pytest.mark.parametrize("content", [None, b"something else"])
def test_decisions_that_are_not_those_of_the_marker_are_refused(tmp_path, content):
    path = tmp_path / "a.parquet"
    sha256 = write_decisions(str(path), decided_table("a", [0])).sha256()
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(
        RefusedError,
        match=r"a\.parquet: is not of this scan \(its SHA-256 is not the one that was committed\)\. "
        r"Run `sanitize verify --repair`, then `sanitize clean` again\.",
    ):
        read_decisions(str(path), sha256)


@pytest.mark.parametrize("indexes", [[0, 2], [1, 2], [0, 1, 1, 2], [0, 0, 1], [1, 0]])
def test_rows_that_are_missing_or_twice_are_refused(tmp_path, indexes):
    write_decisions(str(tmp_path / "a.parquet"), decided_table("a", indexes))
    with pytest.raises(RefusedError, match=r"a\.parquet: is not of this scan \(a sample is named twice or left out\)"):
        read_decisions(str(tmp_path / "a.parquet"))


# ---------------------------------------------------------------- verify and clean


def test_a_shard_that_is_not_split_as_decided_is_found_and_mended(shards, scan_config, tmp_path):
    """By somebody who put files of an earlier decision back."""
    out = tmp_path / "scanned"
    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.4)))
    other = {name: data for name, data in tree_bytes(out).items() if "part-0002" in name}
    scan(scan_config(shards, "expected", policy=TENTH))
    clean(str(out), TENTH)
    assert verify(str(out)).problems == ()
    for name in [name for name in other if "scores" not in name]:
        (out / name).write_bytes(other[name])
    assert verify(str(out)).problems == (
        "part-0002: not split as summary.json says. Run `sanitize clean` again.",
        f"markers.jsonl: not what done/ says. Run `sanitize verify --repair {out}`, then the same `sanitize scan` again.",
    )
    verify(str(out), repair=True)
    clean(str(out), TENTH)
    assert verify(str(out)).problems == ()
    assert tree_bytes(out) == tree_bytes(tmp_path / "expected")


def test_a_shard_that_was_never_split_is_found(shards, scan_config, tmp_path):
    out = tmp_path / "scanned"
    scan(scan_config(shards, scores_only=True))
    marker = (out / "done" / "part-0001.json").read_bytes()
    clean(str(out), TENTH)
    (out / "done" / "part-0001.json").write_bytes(marker)
    assert verify(str(out)).problems[0] == "part-0001: not split as summary.json says. Run `sanitize clean` again."


def test_a_scan_resumes_with_another_batch_size(shards, scan_config, tmp_path):
    scan(scan_config(shards, batch_size=8, scores_only=True))
    before = scores_by_key(tmp_path / "scanned")
    (tmp_path / "scanned" / "done" / "part-0002.json").unlink()
    result = scan(scan_config(shards, batch_size=3, policy=TENTH))
    assert (result.samples, result.failed) == (54, ())
    assert scores_by_key(tmp_path / "scanned") == pytest.approx(before, rel=1e-4)
    assert verify(str(tmp_path / "scanned")).problems == ()
    kept = [m for path in (tmp_path / "scanned" / CLEAN).glob("*.tar") for m in members(path)]
    assert len(kept) == 2 * result.cleaned.kept


# ---------------------------------------------------------------- a folder belongs to one run


def test_an_empty_folder_is_nobodys(tmp_path):
    assert not refuse_other_run(str(tmp_path), "run.json", {"a": 1}, "a scan")
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_is_known_again_whatever_tuples_and_extra_keys(tmp_path):
    claim_folder(str(tmp_path), "run.json", {"a": (1, 2), "b": None}, "a scan")
    change_json(tmp_path / "run.json", gone=8)
    before = (tmp_path / "run.json").read_bytes()
    assert refuse_other_run(str(tmp_path), "run.json", {"b": None, "a": (1, 2)}, "a scan")
    claim_folder(str(tmp_path), "run.json", {"a": (1, 2), "b": None}, "a scan")
    assert (tmp_path / "run.json").read_bytes() == before


def test_another_run_is_refused_by_the_settings_that_differ(tmp_path):
    """A setting that only the file knows has left the identity; one that it does not know may be another."""
    claim_folder(str(tmp_path), "run.json", {"a": 1, "b": [1], "c": {"d": 1}, "e": 0}, "a scan")
    with pytest.raises(RefusedError) as refused:
        refuse_other_run(str(tmp_path), "run.json", {"new": 1, "a": 1, "b": [2], "c": {"d": 1}}, "a scan")
    assert str(refused.value) == (
        f"{tmp_path}: holds a scan that differs in b, new. Give another --out, or delete the folder to start again."
    )
    assert refused.value.exit_code == 3


def test_what_an_interrupted_run_left_is_removed_first(tmp_path):
    storage.write_bytes(str(tmp_path / "scores" / ".a.parquet.1f.partial"), b"x")
    refuse_other_run(str(tmp_path), "run.json", {}, "a scan")
    assert list((tmp_path / "scores").iterdir()) == []


def test_a_setting_that_changed_is_refused_by_its_name(shards, scan_config):
    scan(scan_config(shards, scores_only=True))
    with pytest.raises(
        RefusedError, match=r"holds a scan that differs in image_member\. Give another --out, or delete"
    ):
        scan(scan_config(shards, scores_only=True, image_member="png"))

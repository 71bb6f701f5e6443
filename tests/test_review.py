"""`sanitize review`: a person's word over the score is recorded, and what is kept, removed, listed and trained on follows it."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from builders import (
    KEEP_ALL,
    REMOVE_SOME,
    decided,
    decision_rows,
    image_members,
    keys,
    members,
    some_keys,
    tree_bytes,
    write_lines,
    write_shards,
    write_tar,
)

from sanitize import storage
from sanitize.artifacts.reviews import check_reviews
from sanitize.artifacts.scan_folder import ScanFolder, WrittenFile
from sanitize.commands import review as module
from sanitize.commands.clean import clean, clean_together, preview
from sanitize.commands.list_samples import list_samples
from sanitize.commands.review import review
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError
from sanitize.kept_samples import KeptSamples

WHEN = "2026-01-02T03:04:05+00:00"


@pytest.fixture
def scanned(scanned_copy) -> str:
    return scanned_copy


@pytest.fixture
def shards(scanned_once) -> Path:
    return scanned_once / "shards"


@pytest.fixture
def two(scanned, tmp_path):
    """(three removed keys, two kept ones) of the scan, and they are released and removed."""
    released, removed = some_keys(scanned, False, 3), some_keys(scanned, True, 2)
    result = review(
        scanned,
        release=write_lines(tmp_path / "release.txt", released),
        remove=write_lines(tmp_path / "remove.txt", removed),
        by="Ada",
        note="looked  at\nall five",
        when=WHEN,
    )
    return released, removed, result


# ---------------------------------------------------------------- what follows


def test_decisions_and_clean_shards_follow_a_persons_word(scanned, two, tmp_path):
    released, removed, result = two
    assert (result.released, result.removed, result.changed) == (3, 2, 5)
    assert (result.cleaned.kept, result.cleaned.removed, result.cleaned.reviewed) == (54 - 16 + 1, 16 - 1, 5)
    rows = decision_rows(scanned)
    assert {rows[key]["reason"] for key in released} == {"released by Ada: looked at all five"}
    assert {rows[key]["reason"] for key in removed} == {"removed by Ada: looked at all five"}
    assert all(rows[key]["contributions"] is not None for key in released + removed)
    in_clean = [m[0].split(".")[0] for p in sorted((tmp_path / "scanned/clean").glob("*.tar")) for m in members(p)]
    assert list(dict.fromkeys(in_clean)) == [key for key, row in rows.items() if row["keep"]]
    assert set(released) <= set(in_clean) and not set(removed) & set(in_clean)
    assert verify(scanned, deep=True).problems == ()


def test_what_is_kept_is_the_bytes_of_the_input_still(scanned, two, shards, tmp_path):
    for name in ("part-0000", "part-0001", "part-0002"):
        parts = [tmp_path / "scanned" / part / f"{name}.tar" for part in ("clean", "quarantine")]
        found = [member for part in parts if part.exists() for member in members(part)]
        assert sorted(found) == sorted(members(shards / f"{name}.tar"))


def test_the_record_says_who_when_why_and_what_it_changed(scanned, two, tmp_path):
    released, removed, result = two
    record = json.loads((tmp_path / "scanned" / result.record).read_text())
    assert (record["number"], record["previous"], record["by"], record["when"]) == (1, "", "Ada", WHEN)
    assert (record["note"], record["policy"]["policy"]) == ("looked at all five", "fraction")
    samples = {sample["key"]: sample for sample in record["samples"]}
    assert {key: (s["word"], s["kept_before"], s["kept_after"]) for key, s in samples.items()} == {
        **dict.fromkeys(released, ("release", False, True)),
        **dict.fromkeys(removed, ("remove", True, False)),
    }
    assert all(samples[key]["reason_before"].startswith("embedding ") for key in released)


def test_listings_and_training_data_follow(scanned, two, tmp_path):
    released, removed, _ = two
    list_samples(scanned, str(tmp_path / "list.csv"))
    with (tmp_path / "list.csv").open() as file:
        listed = {row["key"]: row for row in csv.DictReader(file)}
    assert {listed[key]["keep"] for key in released} == {"true"}
    assert listed[removed[0]]["reason"] == "removed by Ada: looked at all five"
    assert keys(KeptSamples(scanned)) == decided(scanned)


def test_only_shards_that_hold_a_reviewed_sample_are_written_again(scanned, tmp_path):
    (key,) = [row["key"] for row in pq.read_table(f"{scanned}/decisions/part-0001.parquet").to_pylist()]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scanned").glob("*/part-0002.*")}
    review(scanned, remove=write_lines(tmp_path / "k.txt", [key]), by="Ada")
    assert len(before) == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


# ---------------------------------------------------------------- decided again


@pytest.mark.parametrize(
    "policy", [ThresholdPolicy("fraction", fraction=0.1), KEEP_ALL, ThresholdPolicy("fraction", fraction=0.45)]
)
def test_another_threshold_keeps_a_persons_word_unless_it_is_to_be_ignored(scanned, two, tmp_path, policy):
    released, removed, _ = two
    would = preview([scanned], policy)[0]
    assert clean(scanned, policy) == would
    assert would.reviewed == 5
    kept = set(decided(scanned))
    assert (set(released) <= kept, set(removed) & kept) == (True, set())
    assert verify(scanned).problems == ()
    ignored = clean(scanned, policy, ignore_reviews=True)
    assert ignored.reviewed == 0
    assert verify(scanned).problems == ()
    clean(scanned, policy)
    assert set(decided(scanned)) == kept


def test_without_reviews_a_scan_is_what_it_was(scanned, tmp_path, two):
    clean(scanned, REMOVE_SOME, ignore_reviews=True)
    ignored = tree_bytes(tmp_path / "scanned" / "clean")
    clean(scanned, REMOVE_SOME)
    assert tree_bytes(tmp_path / "scanned" / "clean") != ignored


def test_the_last_word_counts_and_a_withdrawn_one_leaves_it_to_the_score(scanned, two, tmp_path):
    before = {key: row["keep"] for key, row in decision_rows(scanned).items()}
    released, removed, _ = two
    review(scanned, remove=write_lines(tmp_path / "k.txt", released[:1]), by="Grace", when=WHEN)
    assert decision_rows(scanned)[released[0]]["reason"] == "removed by Grace"
    result = review(scanned, withdraw=write_lines(tmp_path / "k.txt", released + removed), by="Grace", when=WHEN)
    assert (result.withdrawn, result.cleaned.reviewed, result.cleaned.removed) == (5, 0, 16)
    after = {key: row["keep"] for key, row in decision_rows(scanned).items()}
    assert {key for key in after if after[key] != before[key]} == {*released, *removed}
    assert verify(scanned).problems == ()


def test_scanning_again_keeps_to_it_and_so_do_shards_that_are_added(shards, scan_config, scanned, two, tmp_path):
    released, removed, _ = two
    before = tree_bytes(tmp_path / "scanned")
    scan(scan_config(shards, policy=REMOVE_SOME))
    assert tree_bytes(tmp_path / "scanned") == before
    write_tar(tmp_path / "more" / "later.tar", image_members({f"t{i}": 900 + i for i in range(12)}))
    cleaned = scan(scan_config(tmp_path / "more", append=True, policy=REMOVE_SOME)).cleaned
    assert cleaned.reviewed == 5
    kept = set(decided(scanned))
    assert (set(released) <= kept, set(removed) & kept) == (True, set())


def test_scans_that_were_decided_together_are_decided_together_again(scan_config, tmp_path):
    for name, first in (("a", 0), ("b", 500)):
        scan(scan_config(write_shards(tmp_path / f"in-{name}", [12], first_seed=first), name, scores_only=True))
    outs = [str(tmp_path / name) for name in ("a", "b")]
    policy = ThresholdPolicy("fraction", fraction=0.25)
    thresholds = {result.threshold for result in clean_together(outs, policy)}
    before = tree_bytes(tmp_path / "b")
    (key,) = some_keys(outs[0], True, 1)
    result = review(outs[0], remove=write_lines(tmp_path / "k.txt", [key]), by="Ada")
    assert {result.cleaned.threshold} == thresholds
    assert tree_bytes(tmp_path / "b") == before
    assert [verify(out).problems for out in outs] == [(), ()]


# ---------------------------------------------------------------- killed, repeated, damaged


def test_the_same_review_again_is_the_same_review(scanned, two, tmp_path):
    _, _, result = two
    before = tree_bytes(tmp_path / "scanned")
    files: dict[str, Any] = {"release": str(tmp_path / "release.txt"), "remove": str(tmp_path / "remove.txt")}
    assert review(scanned, **files, by="Ada", note="looked at all five") == result
    assert tree_bytes(tmp_path / "scanned") == before


def test_a_review_that_was_cut_off_after_its_record_is_finished_by_the_same_command(scanned, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "k.txt", some_keys(scanned, False, 3))

    def cut_off(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "decide_and_split", cut_off)
        with pytest.raises(KeyboardInterrupt):
            review(scanned, release=file, by="Ada")
    assert verify(scanned).problems == (
        f"reviews/0001.json: recorded, but pass 2 has not decided by it. Run `sanitize clean {scanned}` again.",
    )
    with pytest.raises(
        ConfigError, match="pass 2 has not taken every earlier review into account. Run `sanitize clean"
    ):
        review(scanned, remove=file, by="Ada")
    assert review(scanned, release=file, by="Ada").cleaned.reviewed == 3
    assert verify(scanned).problems == ()
    assert [path.name for path in (tmp_path / "scanned" / "reviews").iterdir()] == ["0001.json"]


@pytest.fixture
def three(scanned, tmp_path):
    """Three reviews of the scan."""
    for key in some_keys(scanned, True, 3):
        review(scanned, remove=write_lines(tmp_path / "k.txt", [key]), by="Ada", when=WHEN)
    return tmp_path / "scanned" / "reviews"


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("Ada", "Eve"))


CURE = "Restore it from a backup. To go on without any review, move {folder} away and run `sanitize clean --ignore-reviews {out}`."
DAMAGE: dict[str, Any] = {
    "changed": (2, edit, "is not the one that pass 2 decided by"),
    "the last one changed": (3, edit, "is not the one that pass 2 decided by"),
    "missing": (2, Path.unlink, "is missing"),
    "the last one missing": (3, Path.unlink, "is missing"),
    "no review": (1, lambda path: path.write_text("{}"), "is no review, or one of another number"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_review_that_was_changed_or_removed_is_named_and_its_cure_works(scanned, three, tmp_path, case):
    number, damage, words = DAMAGE[case]
    before = tree_bytes(tmp_path / "scanned")
    damage(three / f"{number:04d}.json")
    cure = CURE.format(folder=f"{scanned}/reviews", out=scanned)
    problem = f"reviews/{number:04d}.json: {words}. {cure}"
    assert verify(scanned, repair=True).problems == (problem,)
    with pytest.raises(RefusedError) as caught:
        clean(scanned, KEEP_ALL)
    assert str(caught.value) == problem
    three.rename(tmp_path / "away")
    assert clean(scanned, REMOVE_SOME, ignore_reviews=True).reviewed == 0
    assert clean(scanned, REMOVE_SOME).reviewed == 0
    assert verify(scanned).problems == ()
    assert before.keys() - tree_bytes(tmp_path / "scanned").keys() == {f"reviews/000{n}.json" for n in (1, 2, 3)}


def test_a_change_is_found_by_the_next_review_even_where_the_summary_was_made_to_fit(scanned, three):
    edit(three / "0001.json")
    assert check_reviews(ScanFolder(scanned), None)[1][0].startswith(
        "reviews/0001.json: was changed after reviews/0002.json was"
    )


def test_decisions_that_do_not_follow_a_review_are_a_problem_that_is_repaired(
    scanned, two, scan_config, shards, tmp_path
):
    """Tars and decisions of before the review, with a marker to match: what a restored backup leaves."""
    good = tree_bytes(tmp_path / "scanned")
    clean(scanned, REMOVE_SOME, ignore_reviews=True)
    before = tree_bytes(tmp_path / "scanned")
    clean(scanned, REMOVE_SOME)
    for name in before:
        if "part-0000" in name:
            (tmp_path / "scanned" / name).write_bytes(before[name])
    problems = verify(scanned, repair=True).problems
    assert problems[0] == "part-0000: not split as summary.json says. Run `sanitize clean` again."
    scan(scan_config(shards, policy=REMOVE_SOME))
    assert verify(scanned).problems == ()
    assert tree_bytes(tmp_path / "scanned") == good


def test_a_tar_with_as_many_but_other_samples_than_decided_is_found(scanned, tmp_path):
    """As after a clean that failed between its tars and its decisions, by an earlier version."""
    out = tmp_path / "scanned"
    tars = [out / part / "part-0000.tar" for part in ("clean", "quarantine")]
    quarantined = [m[0].split(".")[0] for m in members(tars[1])][::2]
    kept = [m[0].split(".")[0] for m in members(tars[0])][::2]
    renamed = [name.replace(kept[0], quarantined[0]) for name, _, _ in members(tars[0])]
    write_tar(tars[0], list(zip(renamed, [content for _, _, content in members(tars[0])], strict=True)))
    folder = ScanFolder(scanned)
    marker = folder.read_marker("part-0000")
    tar = str(tars[0])
    marker.files["clean/part-0000.tar"] = WrittenFile(tars[0].stat().st_size, storage.file_sha256(tar))
    folder.write_marker(marker)
    assert (
        verify(scanned)
        .problems[0]
        .startswith("clean/part-0000.tar: holds other samples than decisions/part-0000.parquet says.")
    )


# ---------------------------------------------------------------- the command


def test_the_command_says_what_was_recorded_and_what_follows(sanitize, scanned, tmp_path):
    write_lines(tmp_path / "release.txt", some_keys(scanned, False, 3))
    code, output = sanitize("review", "scanned", "--release", "release.txt", "--by", "Ada", "--note", "fine")
    assert (code, output.splitlines()[:1]) == (
        0,
        ["scanned/reviews/0001.json: 3 released, 0 removed, 0 withdrawn; 3 of them changed sides"],
    )
    assert "scanned/clean: 41 of 54 samples kept; 13 in scanned/quarantine (threshold" in output
    assert "; 3 decided by a person)" in output
    assert "; 3 decided by a person)" in sanitize("clean", "scanned", "--fraction", "0.1", "--dry-run")[1]
    code, output = sanitize("clean", "scanned", "--fraction", "0.1", "--ignore-reviews")
    assert (code, "by a person" in output) == (0, False)
    assert sanitize("review", "scanned", "--release", "release.txt")[0] == 2

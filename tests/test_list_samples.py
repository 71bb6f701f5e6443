"""`sanitize list`: every decision maps back to the file or row it is about, or the listing says why not."""

import csv
import dataclasses

import pyarrow.parquet as pq
import pytest
from builders import REMOVE_SOME, tree_bytes, write_shards
from source_builders import hf_table, write_images, write_parquet

from sanitize.commands.clean import clean
from sanitize.commands.list_samples import list_samples
from sanitize.commands.pack import pack
from sanitize.commands.scan import scan
from sanitize.errors import ConfigError


@pytest.fixture
def packed_scan(tmp_path, scan_config):
    """(scan folder, bytes of each file by path) of 20 photos packed into 3 shards; 6 of them are removed."""
    files = write_images(tmp_path / "photos", 20)
    pack(str(tmp_path / "photos"), str(tmp_path / "shards"), shard_size=8)
    scan(scan_config(tmp_path / "shards", policy=REMOVE_SOME))
    return str(tmp_path / "scanned"), files


def decided(scanned):
    """keep of each key."""
    rows = pq.read_table(f"{scanned}/decisions").to_pylist()
    return {row["key"]: row["keep"] for row in rows}


def test_every_decision_maps_back_to_its_file(packed_scan, tmp_path):
    scanned, files = packed_scan
    result = list_samples(scanned, str(tmp_path / "list.parquet"))
    assert (result.samples, result.kept, result.removed, result.with_original, result.failed) == (20, 14, 6, 20, ())
    rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
    assert [row["source"] for row in rows] == list(files)
    assert {row["key"]: row["keep"] for row in rows} == decided(scanned)
    reasons = [row["reason"] for row in rows if not row["keep"]]
    assert len(reasons) == 6
    assert all(reason.startswith("embedding ") for reason in reasons)
    assert all(row["score"] is not None for row in rows)
    for row in rows:
        shares = [value for name, value in row.items() if name.startswith("contribution_") and value is not None]
        assert (sum(shares), row["p_value"] is None) == (
            (0, True) if row["keep"] else (pytest.approx(1, abs=0.01), False)
        )


def test_rows_of_hugging_face_data_are_named_by_file_and_row(tmp_path, scan_config):
    for number in range(2):
        write_parquet(tmp_path / "hf" / f"{number}.parquet", hf_table(7, first=7 * number))
    pack(str(tmp_path / "hf"), str(tmp_path / "shards"), shard_size=4)
    scan(scan_config(tmp_path / "shards", policy=REMOVE_SOME))
    list_samples(str(tmp_path / "scanned"), str(tmp_path / "kept.txt"), only="kept")
    places = [f"{n // 7}.parquet\t{n % 7}" for n in range(14) if decided(tmp_path / "scanned")[f"{n:09d}"]]
    assert (tmp_path / "kept.txt").read_text().splitlines() == places


@pytest.mark.parametrize(("only", "count"), [("kept", 14), ("removed", 6)])
def test_a_text_file_has_one_name_a_line_of_what_was_asked_for(packed_scan, tmp_path, only, count):
    scanned, files = packed_scan
    assert list_samples(scanned, str(tmp_path / "names.txt"), only=only).samples == count
    keep = decided(scanned)
    expected = [path for n, path in enumerate(files) if keep[f"{n:09d}"] == (only == "kept")]
    assert (tmp_path / "names.txt").read_text().splitlines() == expected


def test_csv_and_parquet_say_the_same(packed_scan, tmp_path):
    scanned, _ = packed_scan
    for name in ("list.csv", "list.parquet"):
        list_samples(scanned, str(tmp_path / name))
    with (tmp_path / "list.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
    assert list(lines[0]) == list(rows[0])
    assert [(line["source"], line["key"], line["keep"] == "true") for line in lines] == [
        (row["source"], row["key"], row["keep"]) for row in rows
    ]


def test_samples_that_were_not_packed_by_us_have_shard_and_key(scanned, tmp_path):
    result = list_samples(scanned, str(tmp_path / "list.parquet"))
    assert (result.samples, result.with_original) == (54, 0)
    rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
    assert {row["source"] for row in rows} == {None}
    list_samples(scanned, str(tmp_path / "removed.txt"), only="removed")
    assert (tmp_path / "removed.txt").read_text().splitlines() == [
        f"{row['shard']}\t{row['key']}" for row in rows if not row["keep"]
    ]


def test_images_that_were_not_packed_do_not_shift_the_others(tmp_path, scan_config):
    files = write_images(tmp_path / "photos", 6, classes=["c"])
    (tmp_path / "photos" / "c" / "0001.jpg").unlink()
    (tmp_path / "photos" / "c" / "0001.jpg").symlink_to("nowhere")
    pack(str(tmp_path / "photos"), str(tmp_path / "shards"))
    scan(scan_config(tmp_path / "shards", policy=REMOVE_SOME))
    list_samples(str(tmp_path / "scanned"), str(tmp_path / "list.parquet"))
    assert pq.read_table(tmp_path / "list.parquet").column("source").to_pylist() == [
        path for path in files if "0001" not in path
    ]


def test_shards_that_were_moved_are_listed_with_the_folder_they_were_packed_into(tmp_path, scan_config):
    write_images(tmp_path / "photos", 6)
    pack(str(tmp_path / "photos"), str(tmp_path / "packed"))
    (tmp_path / "moved").mkdir()
    (tmp_path / "packed" / "shard-000000.tar").rename(tmp_path / "moved" / "shard-000000.tar")
    scan(scan_config(tmp_path / "moved", policy=REMOVE_SOME))
    out = str(tmp_path / "list.parquet")
    assert list_samples(str(tmp_path / "scanned"), out).with_original == 0
    assert list_samples(str(tmp_path / "scanned"), out, originals=str(tmp_path / "packed")).with_original == 6


def test_originals_of_another_shard_are_not_taken_for_those_of_this_one(sanitize, tmp_path, packed_scan):
    write_images(tmp_path / "other", 21)
    pack(str(tmp_path / "other"), str(tmp_path / "other-shards"), shard_size=8)
    code, output = sanitize("list", "scanned", "list.csv", "--originals", "other-shards")
    assert code == 1
    assert (
        "other-shards/originals/shard-000001.parquet: belongs to another shard-000001.tar than the one that was"
        in output
    )
    assert "shard(s) are not listed; everything else is." in output


def test_a_damaged_table_of_originals_is_named_with_its_cure(sanitize, tmp_path, packed_scan):
    (tmp_path / "shards" / "originals" / "shard-000001.parquet").write_bytes(b"x")
    code, output = sanitize("list", "scanned", "list.csv")
    assert (code, "12 samples" in output) == (1, True)
    assert (
        "shard-000001.parquet: is no table of originals, or damaged. Delete it and run the same `sanitize pack` again"
        in output
    )
    (tmp_path / "shards" / "originals" / "shard-000001.parquet").unlink()
    assert sanitize("pack", "photos", "shards", "--shard-size", "8")[0] == 0
    assert sanitize("list", "scanned", "list.csv")[0] == 0


def test_originals_that_are_not_in_the_folder_named_say_so(sanitize, tmp_path, packed_scan):
    code, output = sanitize("list", "scanned", "list.csv", "--originals", "photos")
    assert (code, "shard-000000: has no originals in photos. Name the folder it was packed into." in output) == (
        1,
        True,
    )


def test_a_listing_follows_the_last_decision(packed_scan, tmp_path):
    scanned, _ = packed_scan
    clean(scanned, dataclasses.replace(REMOVE_SOME, fraction=0.1))
    before = tree_bytes(tmp_path / "scanned")
    assert list_samples(scanned, str(tmp_path / "list.csv")).removed == 2
    assert tree_bytes(tmp_path / "scanned") == before


def test_a_scan_without_decisions_says_what_to_run(tmp_path, scan_config):
    scan(scan_config(write_shards(tmp_path / "in", [5]), scores_only=True))
    with pytest.raises(ConfigError, match=r"pass 2 is not through, .* Run `sanitize clean .*scanned` first"):
        list_samples(str(tmp_path / "scanned"), str(tmp_path / "list.csv"))
    assert not (tmp_path / "list.csv").exists()


WRONG = {
    "another ending": (
        "list.xlsx",
        "list.xlsx: its ending says how it is written. Name a file that ends with .parquet, .csv, .txt",
    ),
    "names of both": ("list.txt", "list.txt: a text file holds names alone. Say which: --only kept or --only removed"),
    "a table of the scan": (
        "scanned/decisions/s.parquet",
        "s.parquet: lies where a command keeps its own tables. Name another",
    ),
    "a table of pack": (
        "shards/originals/s.parquet",
        "s.parquet: lies where a command keeps its own tables. Name another file.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_the_listing_is_refused(sanitize, scanned, case):
    file, words = WRONG[case]
    code, output = sanitize("list", "scanned", file)
    assert (code, words in output, output.count("\n")) == (2, True, 1), output

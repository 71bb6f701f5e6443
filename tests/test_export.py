"""`sanitize export`: the samples to look at, for the tools that people look at them with."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import (
    REMOVE_SOME,
    captioned,
    decision_rows,
    encoded,
    image_members,
    members,
    random_image,
    table,
    tree_bytes,
    write_lines,
    write_shards,
    write_tar,
)

from sanitize.auditing.export_formats import FORMATS
from sanitize.cli_around import EXPORT_FORMATS
from sanitize.commands.export import export
from sanitize.commands.review import review
from sanitize.commands.scan import scan
from sanitize.errors import ConfigError, RefusedError


def rows_of(out: Path | str) -> list[dict]:
    return pq.read_table(Path(out, "samples.parquet")).to_pylist()


def images_of(shards: Path) -> dict[str, bytes]:
    """Bytes of the image of each key."""
    return {
        Path(name).stem: data
        for shard in shards.glob("*.tar")
        for name, _, data in members(shard)
        if name.endswith(".png")
    }


# ---------------------------------------------------------------- what is exported


def test_every_removed_sample_is_exported_with_its_image_byte_for_byte(scanned, shards, tmp_path):
    result = export(scanned, tmp_path / "out", kept=5)
    rows, decided, images = rows_of(tmp_path / "out"), decision_rows(scanned), images_of(shards)
    assert (result.samples, result.removed, result.kept, result.images, result.failed) == (21, 16, 5, 21, ())
    assert {row["key"] for row in rows if not row["keep"]} == {key for key, row in decided.items() if not row["keep"]}
    for row in rows:
        assert (tmp_path / "out" / row["file"]).read_bytes() == images[row["key"]]
        assert row["label"] == str(int(row["key"][1:]) % 10)
        for name in ("shard", "index", "keep", "reason", "score", "threshold"):
            assert row[name] == decided[row["key"]][name]


def test_removed_samples_come_first_by_score_then_the_kept_ones_nearest_the_cut(scanned, tmp_path):
    export(scanned, tmp_path / "out", limit=4, kept=3)
    decided = sorted(decision_rows(scanned).values(), key=lambda row: -row["score"])
    removed, kept = ([row["key"] for row in decided if row["keep"] is keep] for keep in (False, True))
    assert [row["key"] for row in rows_of(tmp_path / "out")] == removed[:4] + kept[:3]
    assert [row["file"] for row in rows_of(tmp_path / "out")] == [f"images/{n:06d}.png" for n in range(7)]


def test_other_kept_samples_are_drawn_by_the_seed(scanned, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        export(scanned, tmp_path / out, limit=0, kept=3, random=10, seed=seed)
    drawn = {out: [row["key"] for row in rows_of(tmp_path / out)] for out in "abc"}
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert [len(set(keys)) for keys in drawn.values()] == [13, 13, 13]
    assert all(row["keep"] for row in rows_of(tmp_path / "a"))


def test_embeddings_and_shares_are_those_of_the_scan(scanned, tmp_path):
    export(scanned, tmp_path / "out", kept=5)
    norms = {row["key"]: row["embedding_norm"] for n in range(3) for row in table(Path(scanned), f"part-{n:04d}")}
    for row in rows_of(tmp_path / "out"):
        assert np.linalg.norm(row["embedding"]) == pytest.approx(norms[row["key"]], rel=1e-4)
        shares = [value for name, value in row.items() if name.startswith("contribution_") and value is not None]
        assert sum(shares) == (0 if row["keep"] else pytest.approx(1, abs=0.01))
        assert (row["p_value"] is None) == row["keep"]


def test_captions_come_along(scan_config, tmp_path):
    scan(scan_config(captioned(tmp_path / "in", [20]), policy=REMOVE_SOME))
    export(tmp_path / "scanned", tmp_path / "out")
    captions = {
        Path(name).stem: data.decode()
        for name, _, data in members(tmp_path / "in" / "part-000.tar")
        if name.endswith(".txt")
    }
    assert {row["key"]: row["caption"] for row in rows_of(tmp_path / "out")} == captions


def test_an_export_follows_the_last_word(scanned, tmp_path):
    keys = [row["key"] for row in decision_rows(scanned).values() if not row["keep"]][:2]
    review(scanned, release=write_lines(tmp_path / "keys.txt", keys), by="Ada", note="fine")
    export(scanned, tmp_path / "out")
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert all(rows[key]["keep"] for key in keys)
    assert rows[keys[0]]["reason"] == "released by Ada: fine"


def test_the_same_export_again_gives_the_same_bytes(scanned, tmp_path):
    for format in FORMATS:
        export(scanned, tmp_path / format, format=format)
        before = tree_bytes(tmp_path / format)
        export(scanned, tmp_path / format, format=format)
        assert tree_bytes(tmp_path / format) == before


# ---------------------------------------------------------------- hostile and missing


def test_no_name_in_a_tar_becomes_a_path_and_no_text_a_control_character(scan_config, tmp_path):
    hostile = {"a/../../b": 1, "/owned": 2, "\x1b[2Jx\u202e": 3, "c" * 3000: 4, "d": 5}
    write_tar(tmp_path / "in" / "a.tar", [*image_members(hostile), ("d.txt", b"\x1b[2Jcaption")], kind=2)
    scan(scan_config(tmp_path / "in", policy=REMOVE_SOME))
    export(tmp_path / "scanned", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    written = {path for path in tree_bytes(tmp_path / "out") if not path.startswith(".")}
    assert written == {"export.json", "samples.parquet", *(row["file"] for row in rows if row["file"])}
    assert [row["missing"] for row in rows if not row["file"]] == [
        "unsafe_name: a member path is absolute or has '..'"
    ] * 2
    assert {row["caption"] for row in rows if row["key"] == "d"} == {"\\x1b[2Jcaption"}
    assert not any(set("\x1b\u202e") & set(str(row)) for row in rows)


def test_a_file_is_named_by_what_it_is(scan_config, tmp_path):
    images = [("a.png", encoded(random_image(1), "JPEG")), ("b.jpg", encoded(random_image(2), "WEBP"))]
    write_tar(tmp_path / "in" / "a.tar", [*images, *image_members({"c": 3, "d": 4})])
    scan(scan_config(tmp_path / "in", policy=REMOVE_SOME))
    export(tmp_path / "scanned", tmp_path / "out")
    assert {row["key"]: Path(row["file"]).suffix for row in rows_of(tmp_path / "out")} == {
        "a": ".jpg",
        "b": ".webp",
        "c": ".png",
        "d": ".png",
    }


def test_an_image_that_cannot_be_decoded_is_listed_without_a_file(scan_config, tmp_path):
    write_tar(tmp_path / "in" / "a.tar", [("x.png", b"broken"), *image_members({"a": 1, "b": 2, "c": 3})])
    scan(scan_config(tmp_path / "in", policy=REMOVE_SOME))
    result = export(tmp_path / "scanned", tmp_path / "out", format="fiftyone")
    row = next(row for row in rows_of(tmp_path / "out") if row["key"] == "x")
    assert (result.samples, result.images, result.failed) == (4, 3, ())
    assert (row["file"], row["keep"], row["embedding"]) == (None, False, None)
    assert "not an image in any of the formats" in row["missing"]


def test_samples_of_a_shard_that_is_gone_are_listed_without_image_and_it_is_named(sanitize, scanned, shards, tmp_path):
    (shards / "part-0002.tar").unlink()
    code, output = sanitize("export", "scanned", "out", "--kept", "54")
    assert (code, "54 samples, 16 removed and 38 kept; 21 with their image" in output) == (1, True)
    assert "part-0002.tar: is gone, so its samples cannot be shown. Restore it, then run the same command" in output
    assert "1 shard(s) could not be read; their samples are in samples.parquet without image." in output
    rows = rows_of(tmp_path / "out")
    assert [row["shard"] for row in rows if not row["file"]] == ["part-0002"] * 33
    write_shards(shards, [20, 1, 33])
    assert sanitize("export", "scanned", "out", "--kept", "54")[0] == 0
    assert all(row["file"] for row in rows_of(tmp_path / "out"))


def test_a_shard_that_is_another_one_is_not_exported(scanned, shards, tmp_path):
    write_shards(shards, [20, 1, 33], first_seed=900)
    result = export(scanned, tmp_path / "out")
    assert (result.images, len(result.failed)) == (0, 3)
    assert "is not the shard that was scanned, so its samples are not shown." in result.failed[0]


# ---------------------------------------------------------------- formats


def test_the_command_line_offers_the_formats_there_are():
    assert tuple(FORMATS) == EXPORT_FORMATS


def test_fiftyone_is_given_one_sample_an_image_with_tags_score_and_embedding(scanned, tmp_path):
    """As LegacyFiftyOneDatasetImporter reads it; held against FiftyOne 1.22 by hand, with its database."""
    export(scanned, tmp_path / "out", format="fiftyone", kept=5)
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert (about["media_type"], "version" in about) == ("image", False)
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"]
    assert len(samples) == 21
    for sample, row in zip(samples, rows_of(tmp_path / "out"), strict=True):
        assert (tmp_path / "out" / sample["filepath"]).is_file()
        assert sample["tags"][0] == ("kept" if row["keep"] else "removed")
        assert len(sample["tags"]) == (1 if row["keep"] else 2)
        assert "(p " not in str(sample["tags"])
        assert np.float32(sample["embedding"]).tolist() == row["embedding"]
        assert {name: sample[name] for name in ("shard", "key", "index", "score", "reason")} == {
            name: row[name] for name in ("shard", "key", "index", "score", "reason")
        }
        assert sample["label"] == {"_cls": "Classification", "label": row["label"]}
        assert None not in sample.values()


def test_lightly_is_given_embeddings_and_metadata_by_the_name_of_the_image(scanned, tmp_path):
    export(scanned, tmp_path / "out", format="lightly", kept=5)
    rows, lightly = rows_of(tmp_path / "out"), tmp_path / "out" / ".lightly"
    with (lightly / "embeddings" / "custom_embeddings.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    size = len(rows[0]["embedding"])
    assert lines[0] == ["filenames", *(f"embedding_{n}" for n in range(size)), "labels"]
    assert [line[0] for line in lines[1:]] == [row["file"].removeprefix("images/") for row in rows]
    assert [np.array(line[1:-1], np.float32).tolist() for line in lines[1:]] == [row["embedding"] for row in rows]
    assert {line[-1] for line in lines[1:]} == {"0"}
    schema = json.loads((lightly / "metadata" / "schema.json").read_text())
    assert {"name", "path", "defaultValue", "valueDataType"} == set(schema[0])
    for row in rows:
        said = json.loads((lightly / "metadata" / f"{Path(row['file']).stem}.json").read_text())
        assert (said["type"], said["metadata"]["keep"], said["metadata"]["score"]) == (
            "image",
            row["keep"],
            row["score"],
        )
        assert said["metadata"].keys() <= {entry["path"] for entry in schema}


# ---------------------------------------------------------------- refused


def test_a_folder_that_holds_something_else_is_refused(scanned, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"out: holds other files \(thesis\.txt\).* Name a folder that is empty or not there\."
    ):
        export(scanned, tmp_path / "out")
    with pytest.raises(ConfigError, match="scanned: holds other files"):
        export(scanned, scanned)


def test_a_folder_with_another_export_is_refused(scanned, tmp_path):
    export(scanned, tmp_path / "out", kept=5)
    with pytest.raises(RefusedError, match=r"out: holds an export that differs in format, kept\. Give another"):
        export(scanned, tmp_path / "out", format="lightly", kept=6)


WRONG = {
    "fewer than none": (("--kept", "-1"), 2, "kept: -1 samples; give 0 or more."),
    "nothing": (("--limit", "0", "--kept", "0"), 2, "none of the kept ones is asked for. Give --kept."),
    "no such format": (("--format", "excel"), 2, "'excel' is not one of 'folder', 'fiftyone', 'lightly'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_exported_says_so(sanitize, scanned, tmp_path, case):
    arguments, expected, words = WRONG[case]
    code, output = sanitize("export", "scanned", "out", *arguments)
    assert (code, words in output, (tmp_path / "out").exists()) == (expected, True, False), output


def test_an_unknown_format_of_the_library_is_refused(scanned, tmp_path):
    with pytest.raises(ConfigError, match="format: 'excel' is not one of folder, fiftyone, lightly"):
        export(scanned, tmp_path / "out", format="excel")


def test_a_scan_without_decisions_says_what_to_run(tmp_path, scan_config):
    scan(scan_config(write_shards(tmp_path / "in", [5]), scores_only=True))
    with pytest.raises(ConfigError, match=r"pass 2 is not through, .* Run `sanitize clean .*scanned` first"):
        export(tmp_path / "scanned", tmp_path / "out")

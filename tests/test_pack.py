"""`sanitize pack`: images byte for byte, the same bytes every time, nothing dropped silently, every sample traced to its source."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from builders import members, tree_bytes, write_shards
from source_builders import hf_table, packed, write_images, write_parquet

from sanitize.artifacts.folder_lock import folder_lock
from sanitize.commands.pack import pack
from sanitize.errors import ConfigError, RefusedError, StorageError
from sanitize.runtime import Resources


def originals(out):
    return pq.read_table(out / "originals").to_pylist()


# ---------------------------------------------------------------- what is written


def test_images_of_a_folder_are_packed_byte_for_byte_with_their_class_and_their_place_as_key(tmp_path):
    files = write_images(tmp_path / "photos", 7)
    result = pack(str(tmp_path / "photos"), str(tmp_path / "out"), shard_size=3)
    assert (result.samples, result.shards, result.classes, result.unreadable) == (7, 3, 2, 0)
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    expected = {}
    for number, (path, data) in enumerate(files.items()):
        expected[f"{number:09d}.cls"] = b"0" if path.startswith("cat") else b"1"
        expected[f"{number:09d}.jpg"] = data
    assert packed(tmp_path / "out") == expected
    assert [name for name, _, _ in members(tmp_path / "out" / "shard-000002.tar")] == ["000000006.cls", "000000006.jpg"]


def test_every_sample_is_traced_to_its_file(tmp_path):
    files = write_images(tmp_path / "photos", 5)
    pack(str(tmp_path / "photos"), str(tmp_path / "out"), shard_size=3)
    assert [
        (row["shard"], row["key"], row["index"], row["source"], row["row"]) for row in originals(tmp_path / "out")
    ] == [(f"shard-{n // 3:06d}", f"{n:09d}", n % 3, path, None) for n, path in enumerate(files)]


def test_the_same_source_gives_the_same_bytes_wherever_it_lies_and_whoever_owns_it(tmp_path):
    write_images(tmp_path / "a", 7)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.jpg"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    for name in "ab":
        pack(str(tmp_path / name), str(tmp_path / f"{name}-out"), shard_size=3)
    first, second = (tree_bytes(tmp_path / f"{name}-out") for name in "ab")
    assert {**first, "pack.json": b""} == {**second, "pack.json": b""}  # which says where it lies


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_workers_write_the_bytes_of_one_process(tmp_path, ray_cluster, workers, kind):
    write_images(tmp_path / "folder", 11)
    write_parquet(tmp_path / "table" / "t.parquet", hf_table(11))
    source = str(tmp_path / kind)
    pack(source, str(tmp_path / "here"), shard_size=3)
    pack(source, str(tmp_path / "there"), shard_size=3, resources=Resources(workers, 1, 0))
    assert tree_bytes(tmp_path / "there") == tree_bytes(tmp_path / "here")


def test_a_remote_folder_is_packed_into_a_remote_folder(tmp_path):
    files = write_images(tmp_path / "photos", 5)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "photos"), "/pack-source", recursive=True)
    result = pack("memory://pack-source", "memory://pack-out", shard_size=3)
    assert (result.samples, result.unreadable) == (5, 0)
    fs.get("/pack-out/", str(tmp_path / "out"), recursive=True)
    assert [data for name, data in packed(tmp_path / "out").items() if name.endswith("jpg")] == list(files.values())


# ---------------------------------------------------------------- what cannot be read


def test_images_that_cannot_be_read_are_named_and_counted_and_no_key_changes(sanitize, tmp_path):
    files = write_images(tmp_path / "photos", 6, classes=["c"])
    (tmp_path / "photos" / "c" / "0001.jpg").unlink()
    (tmp_path / "photos" / "c" / "0001.jpg").symlink_to("nowhere")
    (tmp_path / "photos" / "c" / "0004.jpg").unlink()
    os.mkfifo(tmp_path / "photos" / "c" / "0004.jpg")
    code, output = sanitize("pack", "photos", "out", "--shard-size", 4)
    assert code == 1
    assert "out: 4 samples in 2 shards; 2 could not be read" in output
    assert f"sample: c/0001.jpg: {tmp_path}/photos/c/0001.jpg: no such file. Check the path." in output
    assert "photos/c/0004.jpg: is a pipe, a socket or a device, a file was expected." in output
    assert (
        "2 sample(s) are in no shard; out/originals names each in its column `problem`. Repair them and run the same"
        in output
    )
    kept = [f"{number:09d}" for number in (0, 2, 3, 5)]
    assert sorted(name[:9] for name in packed(tmp_path / "out") if name.endswith("jpg")) == kept
    rows = originals(tmp_path / "out")
    assert [row["index"] for row in rows] == [0, None, 1, 2, None, 0]
    assert [row["source"] for row in rows] == list(files)
    assert [bool(row["problem"]) for row in rows] == [False, True, False, False, True, False]


def test_the_same_command_tries_the_shards_with_unreadable_images_again(sanitize, tmp_path):
    write_images(tmp_path / "photos", 6)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"photos/cat/{n:04d}.jpg\n" for n in (0, 2, 4)))
    sanitize("pack", "list.csv", "whole", "--shard-size", 2)
    (tmp_path / "photos" / "cat" / "0004.jpg").rename(tmp_path / "away.jpg")
    assert sanitize("pack", "list.csv", "out", "--shard-size", 2)[0] == 1
    before = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    again = sanitize("pack", "list.csv", "out", "--shard-size", 2)
    assert again[0] == 1
    assert "1 could not be read" in again[1]
    (tmp_path / "away.jpg").rename(tmp_path / "photos" / "cat" / "0004.jpg")
    assert sanitize("pack", "list.csv", "out", "--shard-size", 2)[0] == 0
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == before


def test_twenty_problems_are_told_and_all_are_in_the_table(sanitize, tmp_path):
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"gone-{n}.jpg\n" for n in range(30)))
    code, output = sanitize("pack", "list.csv", "out", "--shard-size", 7)
    assert (code, output.count("sample: gone-"), "; 30 could not be read" in output) == (1, 20, True)
    assert len([row for row in originals(tmp_path / "out") if row["problem"]]) == 30


# ---------------------------------------------------------------- one folder, one source


def test_a_rerun_finishes_the_rest_and_changes_no_finished_byte(tmp_path):
    write_images(tmp_path / "photos", 9)
    arguments = (str(tmp_path / "photos"), str(tmp_path / "out"))
    pack(*arguments, shard_size=3)
    whole = tree_bytes(tmp_path / "out")
    (tmp_path / "out" / "done" / "shard-000001.json").unlink()
    (tmp_path / "out" / "shard-000002.tar").unlink()
    finished = tmp_path / "out" / "shard-000000.tar"
    written = finished.stat().st_mtime_ns
    result = pack(*arguments, shard_size=3)
    assert (result.samples, result.shards) == (9, 3)
    assert tree_bytes(tmp_path / "out") == whole
    assert finished.stat().st_mtime_ns == written


OPTIONS: dict[str, dict[str, Any]] = {"shard_size": {"shard_size": 2}, "labels": {"labels": "none"}}


@pytest.mark.parametrize("change", ["another size", "another time", "one more", "one less", "shard_size", "labels"])
def test_a_folder_of_shards_belongs_to_one_source_as_it_was(tmp_path, change):
    write_images(tmp_path / "photos", 5)
    image = tmp_path / "photos" / "cat" / "0000.jpg"
    pack(str(tmp_path / "photos"), str(tmp_path / "out"))
    options = OPTIONS.get(change, {})
    if change == "another size":
        image.write_bytes(b"x")
    elif change == "another time":
        os.utime(image, (1, 1))
    elif change == "one more":
        shutil.copy(image, tmp_path / "photos" / "cat" / "9.jpg")
    elif change == "one less":
        image.unlink()
    before = tree_bytes(tmp_path / "out")
    with pytest.raises(
        RefusedError, match=r"holds a pack that differs in .*\. Give another --out, or delete the folder"
    ):
        pack(str(tmp_path / "photos"), str(tmp_path / "out"), **options)
    assert tree_bytes(tmp_path / "out") == before


def test_out_can_be_given_as_every_message_names_it(sanitize, tmp_path):
    write_images(tmp_path / "photos", 2)
    assert sanitize("pack", "photos", "--out", "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "shard-000000.tar").exists()
    code, output = sanitize("pack", "photos", "a", "--out", "b")
    assert (code, "OUT is a, --out is b. Give one of them." in output) == (2, True)


def test_an_output_inside_the_source_is_refused(tmp_path):
    write_images(tmp_path / "photos", 2)
    with pytest.raises(
        ConfigError, match=r"photos/shards: lies in .*photos, so the next run .* Give an --out outside of it"
    ):
        pack(str(tmp_path / "photos"), str(tmp_path / "photos" / "shards"))


def test_an_output_that_a_pattern_would_find_again_is_refused(tmp_path):
    write_parquet(tmp_path / "data" / "t.parquet", hf_table(2))
    with pytest.raises(ConfigError, match=r"data/shards: lies in .*data, so the next run"):
        pack(f"{tmp_path}/data/**/*.parquet", str(tmp_path / "data" / "shards"))


def test_a_marker_that_cannot_be_read_says_what_to_delete(tmp_path):
    write_images(tmp_path / "photos", 2)
    pack(str(tmp_path / "photos"), str(tmp_path / "out"))
    marker = tmp_path / "out" / "done" / "shard-000000.json"
    whole = tree_bytes(tmp_path / "out")
    marker.write_text("{}")
    with pytest.raises(
        StorageError, match=r"shard-000000\.json: missing shard, .* Delete it and run the same command again"
    ):
        pack(str(tmp_path / "photos"), str(tmp_path / "out"))
    marker.unlink()
    pack(str(tmp_path / "photos"), str(tmp_path / "out"))
    assert tree_bytes(tmp_path / "out") == whole


def test_a_folder_with_other_shards_is_refused(tmp_path):
    write_images(tmp_path / "photos", 2)
    write_shards(tmp_path / "out", [1])
    with pytest.raises(RefusedError, match=r"out: holds 1 \.tar files that `sanitize pack` did not write"):
        pack(str(tmp_path / "photos"), str(tmp_path / "out"))


def test_a_second_pack_is_told_who_writes_there(tmp_path):
    write_images(tmp_path / "photos", 2)
    with (
        folder_lock(str(tmp_path / "out"), "pack"),
        pytest.raises(RefusedError, match="out: `sanitize pack` is writing here"),
    ):
        pack(str(tmp_path / "photos"), str(tmp_path / "out"))


@pytest.mark.parametrize("size", [0, -1, 1_000_001])
def test_a_shard_size_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match=rf"shard_size: {size} is not between 1 and 1000000 samples\."):
        pack(str(tmp_path), str(tmp_path / "out"), shard_size=size)


def test_json_is_the_result(sanitize, tmp_path):
    write_images(tmp_path / "photos", 2)
    code, output = sanitize("pack", "photos", "out", "--json", "--quiet")
    result = json.loads(output)
    assert (code, result["samples"], result["shards"], result["problems"]) == (0, 2, 1, [])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_sigkill_and_a_rerun_give_the_bytes_of_an_undisturbed_run(tmp_path, workers):
    write_images(tmp_path / "photos", 3000)

    def command(out):
        arguments = ["pack", tmp_path / "photos", tmp_path / out, "--shard-size", 100, "--workers", workers]
        return [sys.executable, "-m", "sanitize.cli", *map(str, arguments)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("done/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((tmp_path / "killed").glob("done/*.json"))) < 30
    time.sleep(2)  # workers of a killed driver end by themselves
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")

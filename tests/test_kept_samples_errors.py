"""Kept samples are never taken from other bytes: hostile shards, decisions of another run, shards that changed."""

import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from builders import (
    KEEP_ALL,
    REMOVE_SOME,
    decided,
    decision_table,
    encoded,
    image_members,
    keys,
    random_image,
    write_shards,
    write_tar,
)

from sanitize import storage
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError, ShardError
from sanitize.kept_samples import KeptSamples, keep_only

# ---------------------------------------------------------------- attacks


def test_two_keys_that_look_alike_in_the_decisions_do_not_save_each_other(tmp_path, scan_config):
    """Bytes that are not UTF-8 are written as \\xff: a removed sample must not be kept by the name of a kept one."""
    names = ["evil\udcff", "evil\\xff", "fine"]
    path = tmp_path / "in" / "s.tar"
    write_tar(path, [(f"{name}.png", encoded(random_image(number))) for number, name in enumerate(names)])
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("fraction", fraction=0.34)))
    kept = keys(KeptSamples(str(tmp_path / "scanned")))
    rows = decision_table(tmp_path / "scanned").to_pylist()
    assert kept == [name for name, row in zip(names, rows, strict=True) if row["keep"]]
    predicate = keep_only(str(tmp_path / "scanned"))
    found = [s["__key__"] for s in wds.WebDataset([str(path)], shardshuffle=False) if predicate(s)]
    assert set(found) <= {"fine"}


def test_an_image_that_webdataset_sees_but_the_scan_did_not_is_refused(tmp_path, scan_config):
    """A sparse member belongs to no sample here, but webdataset adds it to the sample: a second, unscored image."""
    path = write_tar(tmp_path / "in" / "s.tar", [*image_members(["a"]), ("a.jpg", encoded(random_image(9), "JPEG"))])
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[offset + 156 : offset + 157] = b"S"  # GNU sparse
    data[offset + 257 : offset + 265] = b"ustar  \0"
    data[offset + 386 : offset + 398] = b"0" * 11 + b"\0"  # one piece of it, at 0
    size = data[offset + 124 : offset + 136]
    data[offset + 398 : offset + 410] = size
    data[offset + 483 : offset + 495] = size
    data[offset + 148 : offset + 156] = b" " * 8
    data[offset + 148 : offset + 156] = b"%06o\0 " % sum(data[offset : offset + 512])
    path.write_bytes(data)
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    assert list(next(iter(KeptSamples(str(tmp_path / "scanned"))))) == ["__key__", "__url__", "cls", "png"]
    (seen,) = wds.WebDataset([str(path)], shardshuffle=False)
    assert "jpg" in seen
    with pytest.raises(ShardError, match=r"Sample 'a': \.jpg is not the scored image"):
        keep_only(str(tmp_path / "scanned"))(seen)


def test_a_member_cannot_take_the_place_of_the_key(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "s.tar", [*image_members(["a"]), ("a.__url__", b"elsewhere")])
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    with pytest.raises(ShardError, match=r"sample 'a' has a member \.__url__, a name that webdataset keeps for itself"):
        list(KeptSamples(str(tmp_path / "scanned")))


# ---------------------------------------------------------------- what is refused


def test_a_scan_without_decisions_says_so(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    for make in (KeptSamples, keep_only):
        with pytest.raises(
            ConfigError, match=r"no decisions there \(summary\.json is missing\)\. Run `sanitize clean`"
        ):
            make(str(tmp_path / "scanned"))
    with pytest.raises(ConfigError, match=r"no scan there \(run\.json is missing\)\. Run `sanitize scan`"):
        KeptSamples(str(tmp_path))


def test_decisions_of_another_run_are_refused(scanned, scan_config, tmp_path):
    write_shards(tmp_path / "more", [5])
    scan(scan_config(tmp_path / "more", out="other", policy=REMOVE_SOME))
    shutil.copy(tmp_path / "other" / "decisions" / "part-0000.parquet", f"{scanned}/decisions")
    with pytest.raises(RefusedError, match=r"is not of this scan \(its SHA-256 is not the one that was committed\)"):
        list(KeptSamples(scanned))


def rewrite_decisions(scanned: str, change) -> None:
    """Other decisions for the first shard, with a marker that fits them."""
    path, done = f"{scanned}/decisions/part-0000.parquet", f"{scanned}/done/part-0000.json"
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)
    marker = storage.read_json(done)
    marker["files"]["decisions/part-0000.parquet"]["sha256"] = storage.file_sha256(path)
    storage.write_json(done, marker)
    Path(scanned, "markers.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: [rows[0], *rows],
            r"part-0000\.parquet: is not of this scan \(a sample is named twice or left out",
        ),
        (lambda rows: rows[1:], r"part-0000\.parquet: is not of this scan \(a sample is named twice or left out"),
        (
            lambda rows: [row | {"key": "z"} for row in rows],
            r"part-0000\.parquet: is not of this scan \(its keys are not those of the score table",
        ),
    ],
)
def test_decisions_must_name_every_scored_sample_once(scanned, change, words):
    rewrite_decisions(scanned, change)
    with pytest.raises(RefusedError, match=words):
        list(KeptSamples(scanned))


def test_deciding_again_meanwhile_is_noticed(scanned):
    samples = KeptSamples(scanned)
    clean(scanned, ThresholdPolicy("fraction", fraction=0.1))
    with pytest.raises(RefusedError, match=r"was decided again since this dataset was made\. Make it again"):
        next(iter(samples))
    assert len(list(KeptSamples(scanned))) == 49


def test_a_missing_shard_is_named_at_once_by_check(scanned, shards, tmp_path):
    samples = KeptSamples(scanned)
    samples.check()
    shutil.move(shards, tmp_path / "elsewhere")
    with pytest.raises(ShardError, match=r"part-0000\.tar: no such file.* name the folder of the shards with moved_to"):
        samples.check()
    moved = KeptSamples(scanned, moved_to=str(tmp_path / "elsewhere"))
    moved.check()
    assert keys(moved) == decided(scanned)
    predicate = keep_only(scanned, moved_to=str(tmp_path / "elsewhere"))
    assert all(predicate(sample) for sample in moved)


@pytest.mark.parametrize("what", ["grown", "shrunk", "first bytes", "last bytes"])
def test_a_shard_that_is_not_the_scanned_one_is_refused(scanned, shards, what):
    path = shards / "part-0002.tar"
    data = bytearray(path.read_bytes())
    data[5 if what == "first bytes" else -5] ^= 1
    changed = {"grown": path.read_bytes() + bytes(1 << 17), "shrunk": path.read_bytes()[:-512]}.get(what, bytes(data))
    path.write_bytes(changed)
    for reading in (KeptSamples(scanned).check, lambda: list(KeptSamples(scanned))):
        with pytest.raises(ShardError, match=r"part-0002\.tar: is not the shard that was scanned\. Scan it again"):
            reading()
    with pytest.raises(ShardError, match=r"is not the shard that was scanned"):
        keep_only(scanned)({"__url__": str(path), "__key__": "s000021"})


def test_an_image_changed_in_the_middle_of_a_shard_is_refused(tmp_path, scan_config):
    """Size, first and last 64 KiB are the same; the image is not the one that was scored."""
    rest = [("filler.bin", bytes(1 << 17)), ("filler2.bin", bytes(1 << 17))]
    path = write_tar(tmp_path / "in" / "s.tar", [rest[0], *image_members(["a"]), rest[1]])
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    path.write_bytes(data)
    samples = KeptSamples(str(tmp_path / "scanned"))
    samples.check()
    with pytest.raises(ShardError, match=r"Sample 'a': \.png is not the scored image"):
        list(samples)


def test_a_shard_that_failed_its_scan_is_left_out_and_named(shards, scan_config, tmp_path, caplog):
    (shards / "odd.tar").write_bytes(b"<html>not found</html>" * 100)
    scan(scan_config(shards, policy=REMOVE_SOME))
    assert len(list(KeptSamples(str(tmp_path / "scanned")))) == 38
    assert "1 of 4 shards have no decisions and are left out (first: odd)" in caplog.text


def test_one_shard_is_open_at_a_time_and_none_after(scanned):
    def opened() -> int:
        return sum(1 for n in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{n}").endswith(".tar"))  # noqa: PTH208

    samples = iter(KeptSamples(scanned))
    assert max(opened() for _ in samples) == 1
    assert opened() == 0

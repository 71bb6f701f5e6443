"""Compressed shards give what the plain ones give; what is cut, damaged or made to fill the disk fails alone, by name."""

import dataclasses
import gzip
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import webdataset as wds
from builders import REMOVE_SOME, decided, image_members, scores_by_key, tree_bytes, write_shards, write_tar

from sanitize.artifacts.scan_folder import ScanFolder
from sanitize.attacks.triggers import PatchTrigger
from sanitize.commands.check_encoder import check_encoder
from sanitize.commands.clean import clean
from sanitize.commands.finetune import finetune
from sanitize.commands.poison import poison
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.errors import ConfigError, ShardError
from sanitize.kept_samples import KeptSamples, keep_only
from sanitize.records import Shard
from sanitize.stages import unpacking
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import list_shards, open_shard


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


COMPRESS = {".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.zst": zstd}


def compress(folder: Path, target: Path, endings: list[str]) -> Path:
    """The shards of a folder, with each ending in turn."""
    for number, path in enumerate(sorted(folder.rglob("*.tar"))):
        ending = endings[number % len(endings)]
        copy = target / path.relative_to(folder).with_suffix(ending)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(COMPRESS[ending](path.read_bytes()))
    return target


def shard_of(path: Path) -> Shard:
    return Shard(str(path), "s", path.stat().st_size)


def read(path: Path) -> list[str]:
    shard = shard_of(path)
    with open_shard(shard) as file:
        return [sample.key for sample in ShardReader(file, shard).samples()]


@pytest.fixture
def both(scan_config, tmp_path) -> tuple[Path, Path]:
    """The same shards, plain and compressed, both scanned."""
    write_shards(tmp_path / "plain", [6, 5, 4])
    compress(tmp_path / "plain", tmp_path / "packed", list(COMPRESS))
    for name in ("plain", "packed"):
        scan(scan_config(tmp_path / name, f"scanned-{name}", policy=REMOVE_SOME))
    return tmp_path / "scanned-plain", tmp_path / "scanned-packed"


# ---------------------------------------------------------------- the same as plain


def test_scores_decisions_and_clean_tars_are_those_of_the_plain_shards(both, tmp_path):
    plain, packed = both
    assert scores_by_key(packed) == scores_by_key(plain)
    assert decided(str(packed)) == decided(str(plain))
    for part in ("clean", "quarantine"):
        assert tree_bytes(packed / part) == tree_bytes(plain / part)
    inputs = [
        {
            marker.shard: marker.input
            for marker in ScanFolder(str(out)).read_markers(["part-0000", "part-0001", "part-0002"])
        }
        for out in both
    ]
    assert inputs[0] == inputs[1], "what was read is the tar inside"
    stored = ScanFolder(str(packed)).run().shards["part-0000"]
    assert stored.bytes == (tmp_path / "packed" / "part-0000.tar.gz").stat().st_size


def test_verify_deep_reads_them_and_finds_no_problem(both):
    assert verify(str(both[1]), deep=True).problems == ()


def test_another_threshold_splits_them_again(both):
    for out in both:
        clean(str(out), dataclasses.replace(REMOVE_SOME, fraction=0.45))
    assert tree_bytes(both[1] / "clean") == tree_bytes(both[0] / "clean")


def test_kept_samples_streams_them(both):
    plain, packed = (
        [{name: data for name, data in sample.items() if name != "__url__"} for sample in KeptSamples(str(out))]
        for out in both
    )
    assert packed == plain
    KeptSamples(str(both[1])).check()


def test_keep_only_filters_what_webdataset_reads_of_them(both, tmp_path):
    url = str(tmp_path / "packed" / "part-0000.tar.gz")
    kept = [s["__key__"] for s in wds.WebDataset([url], shardshuffle=False).select(keep_only(str(both[1])))]
    assert kept == [s["__key__"] for s in KeptSamples(str(both[1])) if s["__url__"] == url]
    assert kept


def test_moved_shards_are_found_by_their_ending(both, tmp_path):
    (tmp_path / "packed").rename(tmp_path / "elsewhere")
    assert len(list(KeptSamples(str(both[1]), moved_to=str(tmp_path / "elsewhere")))) == KeptSamples(str(both[1])).kept


@pytest.mark.parametrize("change", ["longer", "other content"])
def test_a_changed_shard_is_refused(both, tmp_path, change):
    path = tmp_path / "packed" / "part-0000.tar.gz"
    data = path.read_bytes()
    path.write_bytes(data + data if change == "longer" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(ShardError, match="is not the shard that was scanned. Scan it again"):
        list(KeptSamples(str(both[1])))
    assert "part-0000.tar.gz" in verify(str(both[1]), deep=True).problems[0]


def test_finetune_trains_the_same_head_on_them(labelled_shards, validation, finetune_config, tmp_path):
    packed = compress(labelled_shards, tmp_path / "packed", [".tgz", ".tar.zst"])
    shown = [
        finetune(finetune_config(str(tmp_path / name), shards=(str(shards),), epochs=1))
        for name, shards in (("a", labelled_shards), ("b", packed))
    ]
    heads = [(Path(result.out) / "head.safetensors").read_bytes() for result in shown]
    assert heads[0] == heads[1]


def test_poison_and_check_encoder_read_them(both, encoder_spec, tmp_path):
    results = [
        poison((str(tmp_path / name),), str(tmp_path / f"bad-{name}"), rate=0.3, trigger=PatchTrigger(side=4))
        for name in ("plain", "packed")
    ]
    assert results[0].samples == results[1].samples == 15
    assert tree_bytes(tmp_path / "bad-packed") == tree_bytes(tmp_path / "bad-plain")
    shown = [check_encoder(encoder_spec, (str(tmp_path / name),)).numbers for name in ("plain", "packed")]
    for numbers in shown:
        numbers.pop("images_per_second")
    assert shown[0] == shown[1]


# ---------------------------------------------------------------- names


def test_a_compressed_shard_beside_its_tar_is_passed_over(tmp_path):
    for name in ("a.tar", "a.tar.gz", "b.tgz", "sub/c.tar.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list_shards([str(tmp_path)])
    assert [(s.stem, s.url.rsplit("/", 1)[1]) for s in found] == [
        ("a", "a.tar"),
        ("b", "b.tgz"),
        ("sub/c", "c.tar.zst"),
    ]


def test_one_name_compressed_in_two_ways_is_refused(tmp_path):
    for name in ("a.tar.gz", "a.tgz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"a\.tar\.gz and .*a\.tgz would both write a\.parquet\. .* Move one away"):
        list_shards([str(tmp_path)])


# ---------------------------------------------------------------- hostile


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_members_or_frames_are_one_shard(tmp_path, ending):
    data = write_tar(tmp_path / "s.tar", image_members(["a", "b", "c"])).read_bytes()
    path = tmp_path / f"s{ending}"
    path.write_bytes(COMPRESS[ending](data[:1000]) + COMPRESS[ending](data[1000:]))
    assert read(path) == ["a", "b", "c"]


DAMAGE = {
    "cut short": lambda data: data[:-20],
    "cut in its header": lambda data: data[:5],
    "garbage": lambda _: b"\x00\xff garbage" * 50,
    "garbage inside": lambda data: data[:4] + b"garbage!" * 4 + data[36:],
    "garbage at the end": lambda data: data + b"garbage",
    "not compressed": lambda _: b"",
}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named(tmp_path, ending, damage):
    tar = write_tar(tmp_path / "s.tar", image_members(["a", "b", "c"])).read_bytes()
    path = tmp_path / f"s{ending}"
    path.write_bytes(DAMAGE[damage](COMPRESS[ending](tar)) or tar)
    with pytest.raises(
        ShardError, match=f"s{ending}: cannot be unpacked, it is cut short or no .* Download or write it again"
    ):
        read(path)


def test_a_damaged_one_fails_alone(scan_config, tmp_path):
    compress(write_shards(tmp_path / "plain", [3, 3]), tmp_path / "packed", [".tar.gz", ".tar.zst"])
    path = tmp_path / "packed" / "part-0001.tar.zst"
    path.write_bytes(path.read_bytes()[:-20])
    result = scan(scan_config(tmp_path / "packed", "out"))
    assert result.samples == 3
    (message,) = result.failed
    assert "part-0001.tar.zst: cannot be unpacked" in message


@pytest.mark.parametrize("content", ["", "text"])
def test_what_holds_no_tar_is_named(tmp_path, content):
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(content.encode() * 1000))
    with pytest.raises(ShardError, match=r"s\.tar\.gz: (is empty once unpacked|not a tar archive)"):
        read(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_bomb_is_stopped_and_named(tmp_path, ending, monkeypatch):
    written = []
    monkeypatch.setattr(unpacking, "_write", lambda *given: written.append(len(given[2])))
    path = tmp_path / f"s{ending}"
    path.write_bytes(COMPRESS[ending](bytes(64 << 20)))
    size = path.stat().st_size
    with pytest.raises(
        ShardError,
        match=f"s{ending}: becomes more than 100 times its {size} bytes .* If you trust it, unpack it yourself: (gunzip -k|zstd -d) ",
    ):
        open_shard(shard_of(path))
    assert sum(written) <= 100 * size + (4 << 20)


def test_no_room_is_said_before_the_folder_is_full(tmp_path, monkeypatch):
    data = write_tar(tmp_path / "s.tar", image_members(["a"])).read_bytes()
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        ShardError,
        match=f"is unpacked into {tempfile.gettempdir()}, which has no room for it .*64 MiB.* set TMPDIR to a larger folder",
    ):
        read(tmp_path / "s.tar.gz")


def test_a_connection_that_is_cut_between_members_is_seen(tmp_path):
    data = write_tar(tmp_path / "s.tar", image_members(["a"])).read_bytes()
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(data))
    shard = dataclasses.replace(shard_of(tmp_path / "s.tar.gz"), size=10**6)
    with pytest.raises(
        ShardError, match="bytes were read, its size was 1000000: the connection was cut, or the file changed"
    ):
        open_shard(shard)


def test_the_unpacked_file_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    data = write_tar(tmp_path / "s.tar", image_members(["a"])).read_bytes()
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress(data))
    with open_shard(shard_of(tmp_path / "s.tar.gz")) as file:
        assert list((tmp_path / "temporary").iterdir()) == []
        assert file.read() == data

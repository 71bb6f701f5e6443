"""Streaming kept samples from the original shards: the same as the clean shards, each once, and never from other bytes."""

import itertools
import os
import pickle
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from builders import encoded, image_members, members, random_image, write_shards, write_tar
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from sanitize import storage
from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.config import ScanConfig, ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError, ShardError
from sanitize.kept_samples import KeptSamples, keep_only

SOME = ThresholdPolicy("fraction", fraction=0.3)
ALL = ThresholdPolicy("absolute", threshold=1e9)


# of a machine with one core; the samples are as few as the cores
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def four_shards(detector, tmp_path_factory) -> str:
    """A scan that no test changes; every shard has kept samples."""
    folder = tmp_path_factory.mktemp("four")
    shards, out = write_shards(folder / "shards", [10, 9, 8, 7]), str(folder / "scanned")
    scan(ScanConfig((str(shards),), str(detector), out, policy=SOME, precision="fp32", batch_size=8, workers=0))
    return out


@pytest.fixture
def scanned(shards, scan_config, tmp_path) -> str:
    """54 samples in 3 shards, 16 of them removed."""
    scan(scan_config(shards, policy=SOME))
    return str(tmp_path / "scanned")


def keys(samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


def decided(scanned: str) -> list[str]:
    return [row["key"] for row in pq.read_table(f"{scanned}/decisions.parquet").to_pylist() if row["keep"]]


def as_webdataset(folder) -> list[dict]:
    """What webdataset itself reads from the shards of a folder, without the shard's name."""
    paths = sorted(str(path) for path in folder.rglob("*.tar"))
    return [without_url(sample) for sample in wds.WebDataset(paths, shardshuffle=False)]


def without_url(sample: dict) -> dict:
    return {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}


# ---------------------------------------------------------------- what comes out


def test_the_stream_is_what_webdataset_reads_from_the_clean_shards(scanned, tmp_path):
    streamed = list(KeptSamples(scanned))
    assert [without_url(sample) for sample in streamed] == as_webdataset(tmp_path / "scanned" / "clean")
    assert len(streamed) == KeptSamples(scanned).kept == 38
    assert KeptSamples(scanned).removed == 16


def test_members_are_the_bytes_of_the_tar_and_names_split_as_webdataset_does(tmp_path, scan_config):
    odd = [
        ("a.b/c.d/x.PNG", encoded(random_image(1))),
        ("a.b/c.d/x.seg.v2.Npy", bytes(range(256)) * 5),
        ("a.b/c.d/x.txt", "é".encode()),
        ("y.jpg", encoded(random_image(2), "JPEG")),
        ("y.json", b"{}"),
        (".hidden.txt", b"belongs to no sample"),
    ]
    path = write_tar(tmp_path / "in" / "s.tar", odd, kind=tarfile.PAX_FORMAT)
    scan(scan_config(tmp_path / "in", policy=ALL))
    samples = list(KeptSamples(str(tmp_path / "scanned")))
    assert [without_url(sample) for sample in samples] == as_webdataset(tmp_path / "in")
    assert list(samples[0]) == ["__key__", "__url__", "png", "seg.v2.npy", "txt"]
    assert {sample["__url__"] for sample in samples} == {str(path)}
    content = {name: data for name, _, data in members(path)}
    assert samples[0]["seg.v2.npy"] == content["a.b/c.d/x.seg.v2.Npy"]


def test_a_sample_without_a_score_is_left_out_or_kept_as_decided(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "s.tar", [("broken.png", b"no image"), ("only.txt", b"x"), *image_members(["a", "b"])])
    scan(scan_config(tmp_path / "in", policy=ALL))
    assert keys(KeptSamples(str(tmp_path / "scanned"))) == ["a", "b"]
    clean(str(tmp_path / "scanned"), ThresholdPolicy("absolute", threshold=1e9, keep_unscored=True))
    assert keys(KeptSamples(str(tmp_path / "scanned"))) == ["broken", "only", "a", "b"]


def test_a_damaged_tail_gives_the_complete_samples_before_it(tmp_path, scan_config):
    path = write_tar(tmp_path / "in" / "s.tar", image_members([f"k{i}" for i in range(6)]))
    path.write_bytes(path.read_bytes()[: members_end(path, 9)])
    scan(scan_config(tmp_path / "in", policy=ALL))
    assert keys(KeptSamples(str(tmp_path / "scanned"))) == ["k0", "k1", "k2", "k3"]


def members_end(path, count: int) -> int:
    """A byte in the middle of member number `count`."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[count].offset_data + 10


def test_shards_and_scan_folder_may_be_urls(shards, scan_config):
    import dataclasses

    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/kept-in/{path.name}", path.read_bytes())
    config = scan_config(shards, policy=SOME)
    scan(dataclasses.replace(config, shards=("memory://kept-in",), out="memory://kept-out/scanned"))
    samples = list(KeptSamples("memory://kept-out/scanned"))
    assert len(samples) == 38
    assert samples[0]["__url__"] == "memory://kept-in/part-0000.tar"


# ---------------------------------------------------------------- workers and ranks


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (5, 1)])
@pytest.mark.parametrize("shuffle", [0, 7])
def test_each_kept_sample_comes_once_over_all_workers_and_ranks(four_shards, world, workers, shuffle):
    found = []
    for rank in range(world):
        samples = KeptSamples(four_shards, rank=rank, world=world, shuffle=shuffle)
        found += keys(DataLoader(samples, batch_size=None, num_workers=workers))
    assert sorted(found) == sorted(decided(four_shards))


def test_a_spawned_worker_reads_as_a_forked_one_does(four_shards):
    loader = DataLoader(KeptSamples(four_shards), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert sorted(keys(loader)) == sorted(decided(four_shards))


def test_ranks_come_from_the_environment_of_torchrun(four_shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found.append(keys(KeptSamples(four_shards)))
    assert sorted(found[0] + found[1]) == sorted(decided(four_shards))
    assert min(map(len, found)) > 0
    assert keys(KeptSamples(four_shards, rank=0, world=1)) == decided(four_shards)


def test_ranks_come_from_torch_distributed_wherever_the_dataset_was_made(four_shards):
    """Made before the group, made in the rank, and read by a spawned worker that has no group of its own."""
    made_before = KeptSamples(four_shards)
    parts = []
    for rank in (0, 1):
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        part = keys(KeptSamples(four_shards))
        assert keys(made_before) == keys(pickle.loads(pickle.dumps(made_before))) == part
        sent_to_a_worker = pickle.dumps(made_before)
        torch.distributed.destroy_process_group()
        assert keys(pickle.loads(sent_to_a_worker)) == part
        parts.append(part)
    assert sorted(parts[0] + parts[1]) == sorted(decided(four_shards))
    assert min(map(len, parts)) > 0


def test_more_readers_than_shards_is_said(four_shards, caplog):
    list(KeptSamples(four_shards, rank=0, world=5))
    assert "4 shards for 5 readers: the rest get no sample. Use fewer workers." in caplog.text


@pytest.mark.parametrize(("rank", "world"), [(0, None), (None, 2), (2, 2), (-1, 2)])
def test_rank_and_world_must_fit(four_shards, rank, world):
    with pytest.raises(ConfigError, match=r"rank"):
        KeptSamples(four_shards, rank=rank, world=world)


# ---------------------------------------------------------------- order


def test_shuffling_depends_on_seed_and_epoch_only(four_shards):
    def order(seed=0, epoch=0):
        samples = KeptSamples(four_shards, shuffle=20, seed=seed)
        samples.set_epoch(epoch)
        return keys(samples)

    assert order() == order()
    orders = [order(), order(seed=1), order(epoch=1)]
    assert all(a != b for a, b in itertools.combinations([*orders, decided(four_shards)], 2))
    assert all(sorted(o) == sorted(decided(four_shards)) for o in orders)


def test_persistent_workers_see_the_epoch(four_shards):
    samples = KeptSamples(four_shards, shuffle=20)
    loader = DataLoader(samples, batch_size=None, num_workers=1, persistent_workers=True)
    first = keys(loader)
    samples.set_epoch(1)
    assert keys(loader) != first
    samples.set_epoch(0)
    assert keys(loader) == first


# ---------------------------------------------------------------- webdataset


def test_it_is_the_source_of_a_webdataset_pipeline(four_shards):
    pipeline = wds.DataPipeline(KeptSamples(four_shards), wds.decode("torchrgb"), wds.to_tuple("png", "cls"))
    images, classes = zip(*pipeline, strict=True)
    assert len(images) == 24
    assert images[0].shape == (3, 16, 16)
    assert all(isinstance(number, int) for number in classes)


def test_keep_only_filters_a_webdataset_pipeline(scanned, shards):
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    for dataset in (
        wds.WebDataset(urls, shardshuffle=False).select(keep_only(scanned)),
        wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples(), wds.select(keep_only(scanned))),
    ):
        assert [without_url(sample) for sample in dataset] == [without_url(sample) for sample in KeptSamples(scanned)]


def test_keep_only_knows_the_names_webdataset_gives_a_shard(scanned, shards, monkeypatch):
    monkeypatch.chdir(shards)
    sample = next(iter(KeptSamples(scanned)))
    for url in ("part-0000.tar", "file:part-0000.tar", f"file://{shards}/part-0000.tar", "pipe:cat 'part-0000.tar'"):
        assert keep_only(scanned)(sample | {"__url__": url})
    with pytest.raises(
        ConfigError, match=r"other\.tar: is not a shard of the scan .* or name their folder with moved_to"
    ):
        keep_only(scanned)(sample | {"__url__": "other.tar"})


def test_keep_only_holds_few_shards_and_still_decides_right(tmp_path, scan_config):
    write_shards(tmp_path / "in", [4] * 7)
    scan(scan_config(tmp_path / "in", policy=SOME))
    kept = list(KeptSamples(str(tmp_path / "scanned"), shuffle=100))
    predicate = pickle.loads(pickle.dumps(keep_only(str(tmp_path / "scanned"))))
    assert all(predicate(sample) for sample in kept)
    assert len(predicate._held) <= 4


def test_keep_only_after_decode_is_refused(four_shards):
    sample = next(iter(wds.DataPipeline(KeptSamples(four_shards), wds.decode("torchrgb"))))
    with pytest.raises(ConfigError, match=r"decoded already, so its bytes cannot be compared\. Put it before decode"):
        keep_only(four_shards)(sample)


def test_keep_only_leaves_out_what_was_never_scored(tmp_path, scan_config, caplog):
    path = write_tar(tmp_path / "in" / "s.tar", [("x/._a.png", b"apple"), *image_members(["a"])])
    scan(scan_config(tmp_path / "in", policy=ALL))
    source = wds.WebDataset([str(path)], shardshuffle=False)
    assert keys(source) == ["x/", "a"]
    assert keys(source.select(keep_only(str(tmp_path / "scanned")))) == ["a"]
    assert "sample 'x/' was never scored" in caplog.text


# ---------------------------------------------------------------- attacks


def test_two_keys_that_look_alike_in_the_decisions_do_not_save_each_other(tmp_path, scan_config):
    """Bytes that are not UTF-8 are written as \\xff: a removed sample must not be kept by the name of a kept one."""
    names = ["evil\udcff", "evil\\xff", "fine"]
    path = tmp_path / "in" / "s.tar"
    write_tar(path, [(f"{name}.png", encoded(random_image(number))) for number, name in enumerate(names)])
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("fraction", fraction=0.34)))
    kept = keys(KeptSamples(str(tmp_path / "scanned")))
    rows = pq.read_table(tmp_path / "scanned" / "decisions.parquet").to_pylist()
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
    scan(scan_config(tmp_path / "in", policy=ALL))
    assert list(next(iter(KeptSamples(str(tmp_path / "scanned"))))) == ["__key__", "__url__", "cls", "png"]
    (seen,) = wds.WebDataset([str(path)], shardshuffle=False)
    assert "jpg" in seen
    with pytest.raises(ShardError, match=r"Sample 'a': \.jpg is not the scored image"):
        keep_only(str(tmp_path / "scanned"))(seen)


def test_a_member_cannot_take_the_place_of_the_key(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "s.tar", [*image_members(["a"]), ("a.__url__", b"elsewhere")])
    scan(scan_config(tmp_path / "in", policy=ALL))
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
    scan(scan_config(tmp_path / "more", out="other", policy=SOME))
    shutil.copy(tmp_path / "other" / "decisions.parquet", scanned)
    with pytest.raises(RefusedError, match=r"is not of this scan \(its SHA-256 is not the one in summary\.json\)"):
        KeptSamples(scanned)


def rewrite_decisions(scanned: str, change) -> None:
    """Other decisions with a summary that fits them."""
    path = f"{scanned}/decisions.parquet"
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        for shard in table.column("shard").unique().to_pylist():
            rows = [row for row in table.to_pylist() if row["shard"] == shard]
            writer.write_table(pa.Table.from_pylist(change(rows), schema=table.schema))
    summary = storage.read_json(f"{scanned}/summary.json")
    storage.write_json(f"{scanned}/summary.json", summary | {"decisions_sha256": storage.file_sha256(path)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [rows[0], *rows], r"shard part-0000: a sample is named twice or left out"),
        (lambda rows: rows[1:], r"shard part-0000: a sample is named twice or left out"),
        (
            lambda rows: [row | {"key": "z"} for row in rows],
            r"shard part-0000: its keys are not those of the score table",
        ),
        (lambda rows: [row | {"shard": "b"} for row in rows], r"it names shard b, which run\.json does not"),
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
    scan(scan_config(tmp_path / "in", policy=ALL))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    path.write_bytes(data)
    samples = KeptSamples(str(tmp_path / "scanned"))
    samples.check()
    with pytest.raises(ShardError, match=r"Sample 'a': \.png is not the scored image"):
        list(samples)


def test_a_shard_that_failed_its_scan_is_left_out_and_named(shards, scan_config, tmp_path, caplog):
    (shards / "odd.tar").write_bytes(b"<html>not found</html>" * 100)
    scan(scan_config(shards, policy=SOME))
    assert len(list(KeptSamples(str(tmp_path / "scanned")))) == 38
    assert "1 of 4 shards have no decisions and are left out (first: odd)" in caplog.text


def test_one_shard_is_open_at_a_time_and_none_after(scanned):
    def opened() -> int:
        return sum(1 for n in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{n}").endswith(".tar"))  # noqa: PTH208

    samples = iter(KeptSamples(scanned))
    assert max(opened() for _ in samples) == 1
    assert opened() == 0

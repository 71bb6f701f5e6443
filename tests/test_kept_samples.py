"""Streaming kept samples from the original shards: the same as the clean shards, each once."""

import itertools
import pickle
import tarfile

import pytest
import torch
import webdataset as wds
from builders import (
    KEEP_ALL,
    REMOVE_SOME,
    decided,
    encoded,
    image_members,
    keys,
    members,
    random_image,
    write_shards,
    write_tar,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from sanitize.commands.clean import clean
from sanitize.commands.scan import scan
from sanitize.config import ScanConfig, ThresholdPolicy
from sanitize.errors import ConfigError
from sanitize.kept_samples import KeptSamples, keep_only

# of a machine with one core; the samples are as few as the cores
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def four_shards(detector, tmp_path_factory) -> str:
    """A scan that no test changes; every shard has kept samples."""
    folder = tmp_path_factory.mktemp("four")
    shards, out = write_shards(folder / "shards", [10, 9, 8, 7]), str(folder / "scanned")
    scan(ScanConfig((str(shards),), str(detector), out, policy=REMOVE_SOME, precision="fp32", batch_size=8, workers=0))
    return out


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
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    samples = list(KeptSamples(str(tmp_path / "scanned")))
    assert [without_url(sample) for sample in samples] == as_webdataset(tmp_path / "in")
    assert list(samples[0]) == ["__key__", "__url__", "png", "seg.v2.npy", "txt"]
    assert {sample["__url__"] for sample in samples} == {str(path)}
    content = {name: data for name, _, data in members(path)}
    assert samples[0]["seg.v2.npy"] == content["a.b/c.d/x.seg.v2.Npy"]


def test_a_sample_without_a_score_is_left_out_or_kept_as_decided(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "s.tar", [("broken.png", b"no image"), ("only.txt", b"x"), *image_members(["a", "b"])])
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    assert keys(KeptSamples(str(tmp_path / "scanned"))) == ["a", "b"]
    clean(str(tmp_path / "scanned"), ThresholdPolicy("absolute", threshold=1e9, keep_unscored=True))
    assert keys(KeptSamples(str(tmp_path / "scanned"))) == ["broken", "only", "a", "b"]


def test_a_damaged_tail_gives_the_complete_samples_before_it(tmp_path, scan_config):
    path = write_tar(tmp_path / "in" / "s.tar", image_members([f"k{i}" for i in range(6)]))
    path.write_bytes(path.read_bytes()[: members_end(path, 9)])
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
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
    config = scan_config(shards, policy=REMOVE_SOME)
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
    scan(scan_config(tmp_path / "in", policy=REMOVE_SOME))
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
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    source = wds.WebDataset([str(path)], shardshuffle=False)
    assert keys(source) == ["x/", "a"]
    assert keys(source.select(keep_only(str(tmp_path / "scanned")))) == ["a"]
    assert "sample 'x/' was never scored" in caplog.text

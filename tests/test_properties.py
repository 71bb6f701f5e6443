"""What holds for any input: no byte is lost or doubled, stricter keeps less, every sample once, settings read back."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import tarfile
import tempfile
import types
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sanitize import storage
from sanitize.artifacts.scan_folder import (
    CLEAN,
    QUARANTINE,
    InputShard,
    Run,
    ScanFolder,
    ShardInput,
    ShardMarker,
    WrittenFile,
)
from sanitize.commands.clean import clean
from sanitize.commands.verify import verify
from sanitize.config import FinetuneConfig, FitConfig, ScanConfig, ThresholdPolicy
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import ConfigError
from sanitize.records import DecodedImage, Shard
from sanitize.stages.score_table import ScoreWriter, rows
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.thresholds import keep, threshold_for
from sanitize.training.data_order import Order, lane_pieces, lanes_of
from sanitize.training.sample_index import DataSet, SampleIndex


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------- clean + quarantine = input


PIXELS = torch.zeros(3, 1, 1, dtype=torch.uint8)
NAMES = st.text("abcé_- ", min_size=1, max_size=6) | st.text("k", min_size=101, max_size=130)
EXTENSIONS = st.sampled_from(["png", "JPG", "cls", "txt", "json", "seg.png", "v2.npy", ""])
LOOSE = ["folder", "link", "no key", "hidden"]


@dataclass(frozen=True)
class Tar:
    """One random tar. format: of tarfile; members: (name, content, kind of the header) in order."""

    format: int
    members: tuple[tuple[str, bytes, bytes], ...]


@st.composite
def tars(draw: st.DrawFn) -> Tar:
    """Samples with unique keys, whose members stand together; loose members anywhere, also inside a sample."""
    kind = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    names = NAMES.filter(lambda n: kind != tarfile.USTAR_FORMAT or (len(n) < 90 and n.isascii()))
    found: list[tuple[str, bytes, bytes]] = []

    def loose() -> None:
        for number, what in enumerate(draw(st.lists(st.sampled_from(LOOSE), max_size=2))):
            place = f"loose{len(found)}-{number}"
            name = {"no key": place, "hidden": f"{place}/.hidden"}.get(what, place)
            header = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}.get(what, tarfile.REGTYPE)
            found.append((name, b"loose" if header == tarfile.REGTYPE else b"", header))

    for number, name in enumerate(draw(st.lists(names, max_size=5, unique=True))):
        folder = draw(st.sampled_from(["", "deep/", "a.b/"]))
        for extension in draw(st.lists(EXTENSIONS, min_size=1, max_size=3, unique_by=str.lower)):
            loose()
            content = draw(st.binary(max_size=40) | st.sampled_from([b"", bytes(511), bytes(512), b"x" * 1025]))
            found.append((f"{folder}{number}{name}.{extension}", content, tarfile.REGTYPE))
    loose()
    return Tar(kind, tuple(found))


def packed(tar: Tar) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar.format) as archive:
        for name, content, kind in tar.members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            info.linkname = "somewhere" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def whole_members(data: bytes) -> list[bytes]:
    """The bytes of every member, all of its headers and its padding included, in order; by tarfile alone."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        starts = [info.offset for info in tar]
        bounds = [*starts, tar.offset]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


def keys_of(path: Path) -> list[str]:
    shard = Shard(str(path), "s", path.stat().st_size)
    with path.open("rb") as file:
        return [sample.key for sample in ShardReader(file, shard, with_images=False).samples()]


def score_as_wanted(out: str, path: Path, wanted: st.DataObject) -> list[str]:
    """What pass 1 leaves, with random scores: 0 for what is to be kept, 1 for the rest. Returns the keys to keep."""
    shard = Shard(str(path), "s", path.stat().st_size)
    with path.open("rb") as file:
        reader = ShardReader(file, shard)
        hashes = {s.key: hashlib.sha256(s.image).hexdigest() if s.image else "" for s in reader.samples()}
    decoded = [DecodedImage(i, key, sha256, PIXELS, 1, 1, "ok", "") for i, (key, sha256) in enumerate(hashes.items())]
    scores = wanted.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(decoded), max_size=len(decoded)))
    folder = ScanFolder(out)
    inputs = {"s": InputShard(shard.url, shard.size, "")}
    folder.claim(Run("", "", {}, "", "", "thorough", "fp32", inputs, {}))
    with storage.atomic_write(folder.scores("s")) as target, ScoreWriter(target, {}) as writer:
        writer.add(rows("s", decoded, {"score": np.array(scores, np.float32)}, np.zeros(1, np.float32)))
    read = ShardInput(shard.size, reader.sha256, reader.damage, reader.loose)
    files = {folder.scores_name("s"): WrittenFile(target.size, target.sha256())}
    folder.write_marker(ShardMarker("s", read, len(decoded), 0, files))
    return [image.key for image, score in zip(decoded, scores, strict=True) if not score]


@examples(100)
@given(tar=tars(), wanted=st.data())
def test_clean_and_quarantine_hold_every_byte_of_every_member_once_and_in_order(tar, wanted):
    with tempfile.TemporaryDirectory() as name:
        path, out = Path(name) / "s.tar", Path(name) / "out"
        path.write_bytes(packed(tar))
        kept = score_as_wanted(str(out), path, wanted)
        assert clean(str(out), ThresholdPolicy("absolute", threshold=0.5), force=True).failed == ()
        source, *split = (
            whole_members(file.read_bytes()) if file.exists() else []
            for file in (path, out / CLEAN / "s.tar", out / QUARANTINE / "s.tar")
        )
        assert (keys_of(out / CLEAN / "s.tar") if split[0] else []) == kept
        assert verify(str(out)).problems == ()
    assert Counter(split[0] + split[1]) == Counter(source)
    assert in_order(split[0], source)
    assert in_order(split[1], source)


def in_order(part: list[bytes], whole: list[bytes]) -> bool:
    remaining = iter(whole)
    return all(member in remaining for member in part)


# ---------------------------------------------------------------- thresholds

SCORES = st.lists(st.floats(-100, 100, width=32) | st.sampled_from([math.nan, 0.0, 1.0]), max_size=60)


@examples(300)
@given(scores=SCORES, seed=st.integers(0, 99), rates=st.lists(st.floats(0.006, 0.99), min_size=2, max_size=4))
@pytest.mark.parametrize("policy", ["calibrated", "fdr", "fraction", "robust"])
def test_a_stricter_setting_never_keeps_what_a_laxer_one_removed(policy, scores, seed, rates):
    values = np.array(scores, np.float32)
    calibration = np.sort(np.random.default_rng(seed).normal(size=199).astype(np.float32))
    policies = [ThresholdPolicy(policy, fpr=rate, fraction=rate, mad=10 * (1 - rate)) for rate in sorted(rates)]
    kept = [keep(values, threshold_for(values, calibration, stricter)) for stricter in policies]
    for laxer, stricter in itertools.pairwise(kept):
        assert (laxer >= stricter).all()
    for decision in kept:
        assert not decision[np.isnan(values)].any()


# ---------------------------------------------------------------- data order


@pytest.fixture(scope="module")
def one_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("one") / "s.tar"
    path.write_bytes(b"image")
    return str(path)


def data_set(path: str, counts: list[int]) -> DataSet:
    """Shards with so many samples each, whose images are all the same bytes."""
    indexes = []
    for count in counts:
        image, caption = np.tile([0, 5], (count, 1)), np.zeros((count, 2), np.int64)
        indexes.append(SampleIndex(np.arange(count), image, caption, np.full(count, -1)))
    return DataSet(tuple(Shard(path, f"s{number}", 5) for number in range(len(counts))), tuple(indexes))


@examples(150)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum),
    lanes=st.integers(1, 12),
    pieces=st.integers(1, 9),
    buffer=st.integers(0, 50),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 3),
)
def test_every_sample_is_in_one_piece_of_one_rank_and_every_rank_has_all_pieces(
    one_file, counts, lanes, pieces, buffer, world, epoch, seed
):
    order, data = Order(lanes, pieces, buffer, seed), data_set(one_file, counts)
    read: Counter[int] = Counter()
    whole = np.zeros(pieces, int)
    for rank in range(world):
        sizes, samples = lane_pieces(data, order, epoch, 0, lanes_of(rank, world, lanes))
        numbers = [sample.index for sample in samples]
        assert (len(sizes), sum(sizes)) == (pieces, len(numbers))
        read.update(numbers)
        whole += sizes
    assert read == Counter(range(sum(counts)))
    assert whole.max() - whole.min() <= 1


# ---------------------------------------------------------------- settings

WORDS = ["clip", "mlp", "full", "crop", "constant", "fp32", "fdr", "robust", "fast", "0.5", "1e-3", "paper", "no", "{}"]
TEXT = st.sampled_from(WORDS) | st.text("ab/.: é'{}#-0\n", max_size=8)
PLAIN: dict[type, st.SearchStrategy] = {
    bool: st.booleans(),
    int: st.integers(-2, 300),
    float: st.sampled_from([0.0, 0.01, 1e-6, 21.0]) | st.floats(-1, 2) | st.floats(allow_nan=False),
    str: TEXT,
}


def values_of(hint: typing.Any) -> st.SearchStrategy:
    """Random values of a field with this type."""
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return st.none() | values_of(inner[0])
    if typing.get_origin(hint) is tuple:
        return st.lists(values_of(inner[0]), max_size=3).map(tuple)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(TEXT, TEXT if inner[1] is typing.Any else values_of(inner[1]), max_size=3)
    return configs(hint) if dataclasses.is_dataclass(hint) else PLAIN[hint]


def has_default(field: dataclasses.Field) -> bool:
    return (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)


@st.composite
def configs(draw: st.DrawFn, cls: typing.Any) -> typing.Any:
    """A random value of a config; a field keeps its default where the checks refuse what was drawn."""
    hints = typing.get_type_hints(cls)
    config, required = None, {}
    for field in sorted(dataclasses.fields(cls), key=has_default):
        value = draw(values_of(hints[field.name]))
        if not has_default(field):
            required[field.name] = value
            continue
        with contextlib.suppress(ConfigError):
            config = dataclasses.replace(config or cls(**required), **{field.name: value})
    return config or cls(**required)


@examples(150)
@given(data=st.data())
@pytest.mark.parametrize("cls", [ThresholdPolicy, FitConfig, ScanConfig, FinetuneConfig, Run, ShardMarker])
def test_settings_read_back_from_plain_values_and_from_yaml(cls, data):
    config = data.draw(configs(cls))
    plain = to_mapping(config)
    assert from_mapping(cls, plain, "settings") == config
    assert from_mapping(cls, yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True)), "settings") == config

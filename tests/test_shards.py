import dataclasses
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from builders import HOSTILE, encoded, image_members, random_image, write_tar

from sanitize.errors import ConfigError, ShardError
from sanitize.records import Shard
from sanitize.stages.shard_reader import ShardReader
from sanitize.stages.shards import list_shards, printable


def read(path: Path, **options):
    shard = Shard(str(path), path.stem, path.stat().st_size)
    with path.open("rb") as file:
        reader = ShardReader(file, shard, **options)
        return list(reader.samples()), reader


# ---------------------------------------------------------------- listing


def test_a_folder_means_every_tar_below_it_and_stems_keep_sub_folders(tmp_path):
    for name in ("b.tar", "a/x.tar", "a/y.tar", "notes.txt", ".hidden.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [shard.stem for shard in list_shards([str(tmp_path)])] == ["a/x", "a/y", "b"]


def test_braces_globs_and_fsspec_urls_name_the_same_shards(tmp_path):
    for number in range(3):
        (tmp_path / f"s-{number}.tar").write_bytes(b"x")
    expected = ["s-0", "s-1", "s-2"]
    for pattern in (f"{tmp_path}/s-{{0..2}}.tar", f"{tmp_path}/s-*.tar", f"file://{tmp_path}"):
        assert [shard.stem for shard in list_shards([pattern])] == expected


def test_a_memory_url_is_listed():
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/part/s.tar", b"xy")
    assert list_shards(["memory://bucket"]) == [Shard("memory://bucket/part/s.tar", "part/s", 2)]


def test_two_inputs_with_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.tar").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"would both write s\.parquet\. Give their common parent folder"):
        list_shards([f"{tmp_path}/a", f"{tmp_path}/b"])


def test_patterns_that_overlap_name_a_shard_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "s.tar").write_bytes(b"x")
    found = list_shards([str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/a/s.tar", f"{tmp_path}/{{a,a}}/*.tar"])
    assert [shard.stem for shard in found] == ["a/s"]


@pytest.mark.parametrize(("name", "shown"), [(b"\xff.tar", r"\\xff"), (b"a\x1b[2J.tar", r"a\\x1b\[2J")])
def test_a_name_that_cannot_be_shown_or_stored_is_refused(tmp_path, name, shown):
    (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    with pytest.raises(ConfigError, match=shown + r"\.tar: its name holds control characters or is not UTF-8\. Rename"):
        list_shards([str(tmp_path)])


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such file or folder. Check the path"):
        list_shards([str(tmp_path / "nowhere")])


def test_a_folder_without_tars_says_so(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no \.tar, \.tar\.gz, \.tgz, \.tar\.zst found\. Give a folder with WebDataset shards"
    ):
        list_shards([str(tmp_path)])


# ---------------------------------------------------------------- reading


def test_samples_come_in_tar_order_with_their_members_and_image_bytes(tmp_path):
    image = encoded(random_image(1))
    path = write_tar(tmp_path / "s.tar", [("d/a.txt", b"hi"), ("d/a.PNG", image), ("b.png", image), ("b.v2.txt", b"")])
    samples, reader = read(path)
    assert [(s.key, [m.extension for m in s.members]) for s in samples] == [
        ("d/a", ["txt", "png"]),
        ("b", ["png", "v2.txt"]),
    ]
    assert [s.image for s in samples] == [image, image]
    assert (reader.damage, reader.loose) == ("", 0)


def test_member_offsets_match_tarfile(tmp_path):
    path = write_tar(tmp_path / "s.tar", image_members(["x" * 150, "b"]), kind=tarfile.PAX_FORMAT)
    samples, _ = read(path)
    ours = [(m.start, m.data, m.size) for s in samples for m in s.members]
    with tarfile.open(path) as tar:
        assert ours == [(info.offset, info.offset_data, info.size) for info in tar]


def test_reading_headers_only_gives_the_same_members(tmp_path):
    path = write_tar(tmp_path / "s.tar", image_members(["a", "b", "c"]))
    with_images, _ = read(path)
    without, _ = read(path, with_images=False)
    assert [s.members for s in with_images] == [s.members for s in without]
    assert all(s.image is None for s in without)


def test_the_hash_covers_the_whole_file(tmp_path):
    import hashlib

    path = write_tar(tmp_path / "s.tar", [*image_members(["a", "b"]), ("video.mp4", b"v" * 3000000)])
    _, reader = read(path)
    assert reader.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_interleaved_samples_are_refused(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"")])
    with pytest.raises(ShardError, match=r"sample 'a' are not adjacent .* Rewrite the shard with unique keys"):
        read(path)


def test_duplicate_members_are_refused(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.JPG", b"")])
    with pytest.raises(ShardError, match=r"sample 'a' has two members with extension \.jpg\. Rewrite"):
        read(path)


def test_several_images_need_a_named_one(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.left.png", b"l"), ("a.right.png", b"r")])
    samples, _ = read(path)
    assert (samples[0].status, samples[0].image) == ("several_images", None)
    samples, _ = read(path, image_member="right.png")
    assert (samples[0].status, samples[0].image) == ("ok", b"r")


def test_a_member_with_negative_size_ends_the_shard_instead_of_looping(tmp_path):
    path = write_tar(tmp_path / "s.tar", [*image_members(["a"]), ("b.png", b"x" * 600)])
    data = bytearray(path.read_bytes())
    header = data.rindex(b"b.png")
    data[header + 124 : header + 136] = b"\xff" * 10 + b"\xfc\x00"  # base-256, -1024
    data[header + 148 : header + 156] = b" " * 8
    checksum = sum(data[header : header + 512])
    data[header + 148 : header + 156] = b"%06o\0 " % checksum
    path.write_bytes(data)
    samples, reader = read(path)
    assert [s.key for s in samples] == ["a"]
    assert "damaged" in reader.damage


def test_a_pax_header_of_a_gigabyte_is_not_read(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    path = write_tar(tmp_path / "s.tar", image_members(["a"]))
    members = path.read_bytes().rstrip(b"\0")
    padding = bytes(-len(members) % 512)
    path.write_bytes(members + padding + info.tobuf(tarfile.USTAR_FORMAT) + bytes(2_000_000))
    samples, reader = read(path)
    assert len(samples) == 1
    assert "a header claims 1073741824 bytes" in reader.damage


def test_global_pax_headers_that_rename_members_are_refused(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "evil"}) as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(ShardError, match="has a global pax header"):
        read(path)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png"])
def test_paths_that_leave_the_folder_are_never_scored(tmp_path, name):
    samples, _ = read(write_tar(tmp_path / "s.tar", [(name, encoded(random_image(0)))]))
    assert (samples[0].status, samples[0].image) == ("unsafe_name", None)


def test_printable_keeps_unicode_and_escapes_other_bytes():
    assert printable("é") == "é"
    assert printable("caf\udce9") == "caf\\xe9"


# ---------------------------------------------------------------- hostile files

SAMPLES = {  # file → (samples, words of the damage or None) or words of the ShardError
    "ok.tar": (2, None),
    "truncated-mid-member.tar": (1, "unexpected end of data"),
    "truncated-mid-header.tar": (1, "truncated header"),
    "no-end-blocks.tar": (1, None),
    "duplicate-keys.tar": "two members with extension",
    "duplicate-extension.tar": "two members with extension",
    "missing-pair.tar": (3, None),
    "interleaved-keys.tar": "not adjacent",
    "path-traversal.tar": (4, None),
    "symlink-member.tar": (2, None),
    "special-members.tar": (1, None),
    "non-utf8-name.tar": (2, None),
    "non-utf8-caption.tar": (5, None),
    "odd-labels.tar": (9, None),
    "macos-extras.tar": (1, None),
    "upper-case-ext.tar": (2, None),
    "multi-dot-keys.tar": (2, None),
    "long-name-pax.tar": (1, None),
    "long-name-gnu.tar": (1, None),
    "bad-header-checksum.tar": (1, "bad header checksum"),
    "huge-size-claim.tar": (1, "unexpected end of data"),
    "empty.tar": "the file is empty",
    "end-blocks-only.tar": (0, None),
    "garbage.tar": "not a tar archive",
    "gzip-named.tar": "not a tar archive",
    "html-named.tar": "not a tar archive",
    "empty-members.tar": (2, None),
    "bad-image-inside.tar": (4, None),
}


def test_every_hostile_tar_of_the_collection_is_expected_here():
    manifest = json.loads((HOSTILE / "manifest.json").read_text())
    assert {Path(entry["file"]).name for entry in manifest if entry["file"].startswith("tars/")} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_hostile_tar_gives_samples_or_a_named_failure(name):
    path, expected = HOSTILE / "tars" / name, SAMPLES[name]
    if isinstance(expected, str):
        with pytest.raises(ShardError, match=expected) as failure:
            read(path)
        assert name in str(failure.value)
        return
    samples, reader = read(path)
    assert len(samples) == expected[0]
    assert (expected[1] or "") in reader.damage
    assert bool(reader.damage) == bool(expected[1])
    assert [dataclasses.replace(s, image=None) for s in samples] != [] or expected[0] == 0


def test_concatenated_tars_are_reported_not_silently_cut(tmp_path):
    path = write_tar(tmp_path / "s.tar", image_members(["a"]))
    path.write_bytes(path.read_bytes() + write_tar(tmp_path / "t.tar", image_members(["b"])).read_bytes())
    samples, reader = read(path)
    assert len(samples) == 1
    assert "more data follows the end of the archive" in reader.damage


# ---------------------------------------------------------------- what is no shard

NOT_SHARDS = {  # what is there → what is given, words of the refusal
    "a compressed shard": (
        "a.tar.xz",
        "a.tar.xz",
        "a.tar.xz: is compressed in a way .* Unpack it: unxz -k {at}/a.tar.xz",
    ),
    "a folder of them": ("a.tar.xz", "", "a.tar.xz: is compressed in a way .* Unpack it: unxz -k {at}/a.tar.xz"),
    "a glob of them": ("b.tar.bz2", "*.bz2", "b.tar.bz2: is compressed .* Unpack it: bunzip2 -k {at}/b.tar.bz2"),
    "images": ("cat/1.JPG", "", "holds images, no WebDataset shards. .* sanitize pack {at} packed/ - and give packed/"),
    "one image": ("cat/1.png", "cat/1.png", "1.png: holds images, .* sanitize pack {at}/cat packed/"),
    "a glob of images": ("cat/1.png", "cat/*.png", "holds images, .* sanitize pack {at}/cat packed/"),
    "a Parquet file": ("t.parquet", "t.parquet", "holds Parquet, no .* sanitize pack {at}/t.parquet packed/"),
    "a folder of Parquet files": ("data/t.parquet", "", "holds Parquet, no .* sanitize pack {at} packed/"),
    "a save_to_disk folder": ("train/data-0.arrow", "", "an Arrow dataset, .* sanitize pack {at}/train packed/"),
    "a manifest": ("m.csv", "m.csv", "holds a table, no WebDataset shards. .* sanitize pack {at}/m.csv packed/"),
}


@pytest.mark.parametrize("case", NOT_SHARDS)
def test_what_is_no_shard_is_refused_with_the_command_that_helps(tmp_path, case):
    name, given, words = NOT_SHARDS[case]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=words.format(at=re.escape(str(tmp_path)))) as failure:
        list_shards([str(tmp_path / given)])
    assert "\n" not in str(failure.value)


def test_a_compressed_shard_beside_plain_ones_is_not_passed_over(tmp_path):
    for name in ("a.tar", "b.tar.xz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"b\.tar\.xz: is compressed"):
        list_shards([str(tmp_path)])
    (tmp_path / "b.tar").write_bytes(b"x")  # unxz -k leaves both
    assert [shard.stem for shard in list_shards([str(tmp_path)])] == ["a", "b"]

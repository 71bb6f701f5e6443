"""Files that somebody made to hurt: nothing is written, executed, deleted or kept that should not be."""

import os
import shutil
import subprocess
import tarfile
import zipfile

import pytest
import torch
import webdataset as wds
from builders import encoded, image_members, members, random_image, tree_bytes, write_shards, write_tar

from sanitize.attacks.triggers import PatchTrigger
from sanitize.commands.clean import clean
from sanitize.commands.poison import poison
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.exported import load_exported
from sanitize.stages.shards import list_shards, printable

ALL = ThresholdPolicy("absolute", threshold=1e9)


# ---------------------------------------------------------------- exported encoders


def exported_with(path, before: bytes, after: bytes) -> str:
    """A plain exported module whose graph is changed by hand, as an attacker would."""
    program = torch.export.export(
        torch.nn.Sequential(torch.nn.GELU("tanh"), torch.nn.Flatten()), (torch.zeros(1, 3, 4, 4),)
    )
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name).replace(before, after) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, data in entries.items():
            target.writestr(name, data)
    return str(path)


@pytest.mark.parametrize("operator", ["from_file.default", "save.default", "set_.source_Storage", "_foobar.default"])
def test_an_exported_encoder_may_not_call_what_reaches_beyond_its_tensors(tmp_path, operator):
    """`aten.from_file(path, shared=True)` maps a file; what is copied into the tensor is written to it."""
    path = exported_with(
        tmp_path / "e.pt2", b"torch.ops.aten.flatten.using_ints", f"torch.ops.aten.{operator}".encode()
    )
    with pytest.raises(CheckpointError, match=rf"refused, it calls 'torch\.ops\.aten\.{operator}'"):
        load_exported(path)


def test_an_exported_encoder_may_not_name_a_file(tmp_path):
    path = exported_with(tmp_path / "e.pt2", b'"as_string": "tanh"', b'"as_string": "/etc/passwd"')
    with pytest.raises(CheckpointError, match="refused, an operator is given the text '/etc/passwd'"):
        load_exported(path)


def test_the_plain_module_passes(tmp_path):
    assert load_exported(exported_with(tmp_path / "e.pt2", b"", b""))(torch.zeros(1, 3, 4, 4)).shape == (1, 48)


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "e.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("e/models/model.json", b" " * (1 << 20))
    with pytest.raises(CheckpointError, match="is compressed. Write it with torch.export.save"):
        load_exported(str(tmp_path / "e.pt2"))


# ---------------------------------------------------------------- outputs that are inputs


def test_a_scan_that_would_overwrite_its_inputs_is_refused_and_they_stay(scan_config, tmp_path):
    write_shards(tmp_path / "data" / "clean", [5])
    before = tree_bytes(tmp_path / "data")
    with pytest.raises(
        ConfigError, match=r"clean/part-0000\.tar: is an input and would be overwritten\. Give another --out"
    ):
        scan(scan_config(tmp_path / "data" / "clean", out="data", policy=ALL))
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(ConfigError, match="is an input and would be overwritten"):
        scan(scan_config(tmp_path / "data" / "clean", out="link", policy=ALL))
    assert tree_bytes(tmp_path / "data") == before


def test_poisoning_a_folder_into_itself_is_refused(tmp_path):
    write_shards(tmp_path / "in", [5])
    before = tree_bytes(tmp_path / "in")
    with pytest.raises(ConfigError, match="is an input and would be overwritten"):
        poison((str(tmp_path / "in"),), str(tmp_path / "in"), rate=0.5, trigger=PatchTrigger(side=4))
    assert tree_bytes(tmp_path / "in") == before


def test_what_a_scan_wrote_below_its_input_folder_is_no_input_of_the_next_run(scan_config, tmp_path):
    write_shards(tmp_path / "data", [5, 4])
    for _ in range(2):
        result = scan(scan_config(tmp_path / "data", out="data/scanned", policy=ALL))
        assert (result.samples, result.cleaned.kept) == (9, 9)
    assert (
        len(list_shards([str(tmp_path / "data" / "scanned" / "clean")], leave_out=str(tmp_path / "data" / "scanned")))
        == 2
    )


# ---------------------------------------------------------------- tars


def with_size(header: bytes, size: int) -> bytes:
    """A tar header that claims this size, in base 256, with a valid checksum."""
    number = (size & ((1 << 95) - 1)) | (1 << 95)
    changed = header[:124] + number.to_bytes(12, "big") + header[136:148] + b" " * 8 + header[156:]
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


def test_a_member_of_size_minus_one_hides_nothing(tmp_path, scan_config):
    """Pass 1 would read the rest of the shard as this image, pass 2 keep the real one behind it."""
    path = write_tar(tmp_path / "in" / "s.tar", [*image_members(["a"]), ("b.png", b""), *image_members(["c", "d"])])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("b.png").offset
    data[start : start + 512] = with_size(bytes(data[start : start + 512]), -1)
    path.write_bytes(data)
    result = scan(scan_config(tmp_path / "in", policy=ALL))
    assert result.samples == 1
    assert "negative size" in result.damaged[0]
    assert {m[0].split(".")[0] for m in members(tmp_path / "scanned" / "clean" / "s.tar")} == {"a"}


def test_an_empty_image_at_the_end_is_a_row_and_its_shard_is_split(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "s.tar", [*image_members(["a", "b"]), ("c.png", b"")])
    result = scan(scan_config(tmp_path / "in", policy=ALL))
    assert (result.unscored, result.cleaned.failed) == (1, ())
    assert [name for name, _, _ in members(tmp_path / "scanned" / "quarantine" / "s.tar")] == ["c.png"]


def test_every_reader_sees_the_same_samples_in_a_clean_tar(shards, scan_config, tmp_path):
    write_tar(shards / "long.tar", image_members([f"{'folder/' * 20}k{i}" for i in range(6)]), tarfile.PAX_FORMAT)
    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.3)))
    for path in sorted((tmp_path / "scanned" / "clean").glob("*.tar")):
        ours = members(path)
        streamed = {
            f"{s['__key__']}.{name}": data
            for s in wds.WebDataset([str(path)], shardshuffle=False)
            for name, data in s.items()
            if not name.startswith("__")
        }
        assert streamed == {name: data for name, _, data in ours}
        if gnu := shutil.which("tar"):
            (tmp_path / path.stem).mkdir()
            subprocess.run([gnu, "-xf", path, "-C", tmp_path / path.stem], check=True)
            assert tree_bytes(tmp_path / path.stem) == {name: data for name, _, data in ours}


def sparse_header_at_the_end() -> bytes:
    """Old GNU sparse, with the flag that says another header follows; none does."""
    info = tarfile.TarInfo("a.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_tar_that_tarfile_stumbles_over_fails_alone(shards, scan_config, tmp_path):
    (shards / "sparse.tar").write_bytes(sparse_header_at_the_end())
    result = scan(scan_config(shards, policy=ALL))
    assert result.samples == 54
    assert [text for text in (*result.failed, *result.damaged) if "sparse.tar" in text]
    assert (tmp_path / "scanned" / "clean" / "part-0002.tar").exists()


def test_links_to_nothing_pipes_and_unreadable_files_fail_alone(shards, scan_config):
    (shards / "dangling.tar").symlink_to(shards / "nothing.tar")
    os.mkfifo(shards / "pipe.tar")
    result = scan(scan_config(shards, policy=ALL))
    words = sorted(text.rpartition("/")[2] for text in result.failed)
    assert words == [
        "dangling.tar: no such file. Check the path.",
        "pipe.tar: is a pipe, a socket or a device, a file was expected.",
    ]
    assert result.samples == 54


def test_a_shard_that_is_mended_after_the_first_run_is_done_by_the_second(shards, scan_config):
    (shards / "late.tar").symlink_to(shards.parent / "late.tar")
    assert len(scan(scan_config(shards, policy=ALL)).failed) == 1
    write_tar(shards.parent / "late.tar", image_members(["x", "y"]))
    assert scan(scan_config(shards, policy=ALL)).samples == 56


def test_a_sample_of_too_many_members_is_refused_in_little_time(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "s.tar", [(f"a.{number}", b"") for number in range(5000)])
    result = scan(scan_config(tmp_path / "in"))
    assert "sample 'a' has more than 1000 members. Rewrite the shard" in result.failed[0]


def test_names_of_members_cannot_speak_to_the_terminal(tmp_path, scan_config):
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\\x1b[2Jb\\nc\\u202ed"
    write_tar(
        tmp_path / "in" / "s.tar",
        [("k\x1b[31m\n.png", encoded(random_image(0))), ("b.\x1b]0;x\x07", b""), ("b.\x1b]0;x\x07", b"")],
    )
    result = scan(scan_config(tmp_path / "in"))
    assert "\x1b" not in result.failed[0]


def test_a_file_named_like_a_chain_of_fsspec_is_a_file(tmp_path, scan_config):
    write_tar(tmp_path / "in" / "a::b.tar", image_members(["x", "y", "z"]))
    assert scan(scan_config(tmp_path / "in", policy=ALL)).cleaned.kept == 3
    assert verify(str(tmp_path / "scanned")).problems == ()


def test_a_linked_shard_keeps_the_name_it_is_given(tmp_path):
    write_tar(tmp_path / "blobs" / "0123abcd", image_members(["x"]))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.tar").symlink_to(tmp_path / "blobs" / "0123abcd")
    assert [s.stem for s in list_shards([str(tmp_path / "snapshot" / "train.tar")])] == ["train"]
    assert [s.stem for s in list_shards([str(tmp_path / "snapshot")])] == ["train"]


def test_unbalanced_braces_say_so(tmp_path):
    with pytest.raises(ConfigError, match="its braces do not close"):
        list_shards([f"{tmp_path}/part-{{0..3.tar"])


# ---------------------------------------------------------------- splitting what was scored


def test_an_image_that_changed_in_the_middle_is_not_kept(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    path = shards / "part-0002.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = clean(str(tmp_path / "scanned"), ALL)
    assert "changed after it was scored" in result.failed[0]


def test_an_old_split_is_gone_when_its_input_is_missing_at_the_next(shards, scan_config, tmp_path):
    """Else a laxer tar would stay although the decisions remove its samples."""
    scan(scan_config(shards, policy=ALL))
    (shards / "part-0002.tar").rename(tmp_path / "away.tar")
    result = clean(str(tmp_path / "scanned"), ThresholdPolicy("fraction", fraction=0.4))
    assert len(result.failed) == 1
    assert not (tmp_path / "scanned" / "clean" / "part-0002.tar").exists()
    problems = verify(str(tmp_path / "scanned")).problems
    assert problems == ("part-0002: not split as summary.json says. Run `sanitize clean` again.",)


def test_a_scan_whose_second_pass_was_cut_off_does_not_verify(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=ALL))
    (tmp_path / "scanned" / "summary.json").unlink()
    assert verify(str(tmp_path / "scanned")).problems == (
        "summary.json: missing, so pass 2 did not end. Run `sanitize clean` again.",
    )


def test_a_score_table_of_another_shard_is_found(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    import json

    scores, done = tmp_path / "scanned" / "scores", tmp_path / "scanned" / "done"
    shutil.copy(scores / "part-0000.parquet", scores / "part-0001.parquet")
    marker = json.loads((done / "part-0001.json").read_text())
    other = json.loads((done / "part-0000.json").read_text())
    marker |= {
        "samples": other["samples"],
        "files": {"scores/part-0001.parquet": other["files"]["scores/part-0000.parquet"]},
    }
    (done / "part-0001.json").write_text(json.dumps(marker))
    assert (
        "part-0001: its score table is that of part-0000. Run `sanitize verify --repair"
        in verify(str(tmp_path / "scanned")).problems[0]
    )

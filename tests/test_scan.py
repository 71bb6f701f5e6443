"""The five promises of the design, and what users do wrong. All on tiny real encoders and shards."""

import dataclasses
import json
import shutil
import tarfile

import pytest
import torch
from builders import (
    HOSTILE,
    encoded,
    fit_config,
    image_members,
    members,
    random_image,
    scores_by_key,
    table,
    tree_bytes,
    write_shards,
    write_tar,
)

from sanitize.commands.fit import fit
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.config_models import DecoderConfig
from sanitize.errors import StorageError
from sanitize.records import Shard
from sanitize.stages.decoder import patch_order
from sanitize.stages.encoders import load_encoder
from sanitize.stages.images import decode_image, shrink
from sanitize.stages.shard_reader import ShardReader

# ---------------------------------------------------------------- promise 1


def test_promise_1_every_input_sample_gets_exactly_one_row_and_one_place(shards, scan_config, tmp_path):
    write_tar(shards / "odd.tar", [("broken.png", b"no image"), ("only.txt", b"no image"), *image_members(["z"])])
    scan(scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.3)))
    out = tmp_path / "scanned"
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            keys = list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))
        assert [row["key"] for row in table(out, path.stem)] == keys
        split = [
            m for folder in ("clean", "quarantine") if (p := out / folder / path.name).exists() for m in members(p)
        ]
        assert sorted(split) == sorted(members(path))


def test_undecodable_samples_have_a_reason_and_no_score_and_are_quarantined(tmp_path, scan_config):
    write_tar(
        tmp_path / "in" / "s.tar", [("broken.png", b"no image"), ("only.txt", b""), *image_members(["a", "b", "c"])]
    )
    result = scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("absolute", threshold=1e9)))
    rows = {row["key"]: row for row in table(tmp_path / "scanned", "s")}
    assert (rows["broken"]["status"], rows["broken"]["score"], rows["broken"]["p_value"]) == ("undecodable", None, None)
    assert rows["only"]["status"] == "no_image"
    assert (result.samples, result.unscored, result.cleaned.kept) == (5, 2, 3)
    assert [m[0] for m in members(tmp_path / "scanned" / "quarantine" / "s.tar")] == ["broken.png", "only.txt"]


# ---------------------------------------------------------------- promise 2


def test_promise_2_a_rerun_finishes_the_rest_and_changes_no_finished_byte(shards, scan_config, tmp_path):
    scan(scan_config(shards))
    out = tmp_path / "scanned"
    complete = tree_bytes(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "scores").glob("*")}
    (out / "done" / "part-0001.json").unlink()
    (out / "scores" / ".part-0001.parquet.abc.partial").write_bytes(b"left by a kill")
    scan(scan_config(shards))
    assert tree_bytes(out) == complete
    changed = {path.name for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert changed == {"part-0001.parquet"}


def test_promise_2_a_failed_write_leaves_no_finished_name(shards, scan_config, tmp_path, monkeypatch):
    """The disk fills up while the second score file is written."""
    import os

    real, calls = os.fsync, []

    def full_disk(descriptor):
        calls.append(descriptor)
        if len(calls) == 9:  # each file and its folder are flushed: lock, run.json, the first shard with its marker
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        StorageError, match=r"part-0001\.parquet: no space left on the device\. Free some space, then run the same"
    ):
        scan(scan_config(shards))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "scanned" / "scores").iterdir()] == ["part-0000.parquet"]
    scan(scan_config(shards))
    scan(scan_config(shards, out="uninterrupted"))
    assert tree_bytes(tmp_path / "scanned") == tree_bytes(tmp_path / "uninterrupted")


# ---------------------------------------------------------------- promise 3


def test_promise_3_nothing_in_a_shard_is_ever_executed(tmp_path, scan_config, monkeypatch):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    evil = pickle.dumps(Bomb())
    names = ["a.pyd", "a.pkl", "a.pth", "a.npy", "a.json", "a.cls"]
    write_tar(tmp_path / "in" / "s.tar", [("a.png", encoded(random_image(0))), *((name, evil) for name in names)])
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("absolute", threshold=1e9)))
    assert not (tmp_path / "pwned").exists()
    assert [m[2] for m in members(tmp_path / "scanned" / "clean" / "s.tar")][1:] == [evil] * 6


def test_promise_3_no_output_path_is_taken_from_a_tar(tmp_path, scan_config):
    (tmp_path / "in").mkdir()
    shutil.copy(HOSTILE / "tars" / "path-traversal.tar", tmp_path / "in")
    before = {p for p in tmp_path.rglob("*") if "scanned" not in str(p)}
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("absolute", threshold=1e9)))
    assert {p for p in tmp_path.rglob("*") if "scanned" not in str(p)} == before
    assert {m[0] for m in members(tmp_path / "scanned" / "clean" / "path-traversal.tar")} == {"good.jpg", "good.txt"}


# ---------------------------------------------------------------- promise 4


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_promise_4_kept_members_are_byte_identical_headers_included(tmp_path, scan_config, kind):
    names = [f"{'long/' * 30}k{i}" for i in range(12)] if kind != tarfile.USTAR_FORMAT else [f"k{i}" for i in range(12)]
    extra = [(f"{names[0]}.caption.txt", "é".encode() * 1000), (f"{names[0]}.bin", bytes(range(256)) * 9)]
    path = write_tar(tmp_path / "in" / "s.tar", extra + image_members(names), kind=kind)
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("fraction", fraction=0.4)))
    kept = members(tmp_path / "scanned" / "clean" / "s.tar")
    assert 0 < len(kept) < len(members(path))
    assert kept == [m for m in members(path) if m in kept]


def test_a_shard_that_is_kept_whole_is_the_input_file(shards, scan_config, tmp_path):
    scan(scan_config(shards, policy=ThresholdPolicy("absolute", threshold=1e9)))
    for path in shards.glob("*.tar"):
        assert (tmp_path / "scanned" / "clean" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "scanned" / "quarantine").exists()


# ---------------------------------------------------------------- promise 5


def test_promise_5_one_worker_or_many_give_the_same_files(shards, scan_config, tmp_path, ray_cluster):
    policy = ThresholdPolicy("fraction", fraction=0.2)
    scan(scan_config(shards, out="here", policy=policy, cpus_per_worker=1))
    for workers in (1, 2):
        scan(scan_config(shards, out=f"ray{workers}", policy=policy, workers=workers, cpus_per_worker=1))
        assert tree_bytes(tmp_path / "here") == tree_bytes(tmp_path / f"ray{workers}")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_promise_5_a_score_does_not_depend_on_batch_size(shards, scan_config, tmp_path, batch_size):
    scan(scan_config(shards, out="a", batch_size=8, scores_only=True))
    scan(scan_config(shards, out="b", batch_size=batch_size, scores_only=True))
    assert scores_by_key(tmp_path / "b") == pytest.approx(scores_by_key(tmp_path / "a"), rel=1e-4)


def test_promise_5_a_score_does_not_depend_on_sharding(tmp_path, scan_config):
    keys = {f"s{i}": i for i in range(12)}
    write_tar(tmp_path / "one" / "a.tar", image_members(keys))
    for number in range(3):
        part = dict(list(keys.items())[number * 4 : number * 4 + 4])
        write_tar(tmp_path / "three" / f"{number}.tar", image_members(dict(reversed(part.items()))))
    scan(scan_config(tmp_path / "one", out="a", scores_only=True))
    scan(scan_config(tmp_path / "three", out="b", scores_only=True))
    assert scores_by_key(tmp_path / "b") == pytest.approx(scores_by_key(tmp_path / "a"), rel=1e-4)


# ---------------------------------------------------------------- the paper's score


@pytest.mark.parametrize("ratio", [0.5, 0.99])
def test_the_score_column_is_that_of_the_reference_code(shards, scan_config, aux_shards, encoder_spec, tmp_path, ratio):
    """DeDe's reference code, src/utils.py: one mask per image, sum of squared differences over hidden pixels in normalised units."""
    decoder_config = DecoderConfig(8, 2, 16, 2, 1, 1)
    config = fit_config(
        aux_shards, encoder_spec, tmp_path / "paper", decoder=decoder_config, scorer="paper", test_mask_ratio=ratio
    )
    detector = fit(config)
    scan(scan_config(shards, detector=str(tmp_path / "paper"), scores_only=True))
    encoder, decoder, visible = load_encoder(encoder_spec), detector.decoder, int(16 * (1 - ratio))
    with tarfile.open(shards / "part-0000.tar") as tar:
        for row in table(tmp_path / "scanned", "part-0000"):
            pixels = decode_image(tar.extractfile(f"{row['key']}.png").read())[0]
            image = pixels[None].float() / 255
            target = (shrink(image, 8) - 0.5) / 0.25
            order = torch.from_numpy(patch_order(row["sha256"], 16, seed=21))[None]
            with torch.inference_mode():
                guess = decoder(encoder(image), target, order, visible)
            expected = 0.0
            for patch in order[0, visible:].tolist():
                top, left = patch // 4 * 2, patch % 4 * 2
                square = (slice(None), slice(top, top + 2), slice(left, left + 2))
                expected += float((target[0][square] - guess[0][square]).square().sum())
            assert row["score"] == pytest.approx(expected, rel=1e-4)
            assert row["error"] == pytest.approx(expected / (3 * 4 * (16 - visible)), rel=1e-4)


# ---------------------------------------------------------------- hostile shards, whole scan


def test_every_hostile_tar_gives_rows_or_a_named_failure_and_the_rest_is_done(scan_config, tmp_path):
    result = scan(scan_config(HOSTILE / "tars", policy=ThresholdPolicy("absolute", threshold=1e9)))
    stems = {p.stem for p in (HOSTILE / "tars").glob("*.tar")}
    done = {p.stem for p in (tmp_path / "scanned" / "done").glob("*.json")}
    failed = {stem for stem in stems if any(f"/{stem}.tar:" in message for message in result.failed)}
    assert done | failed == stems
    assert not done & failed
    assert len(result.damaged) == 4
    assert verify(str(tmp_path / "scanned")).problems == tuple(
        f"{stem}: not scored. Run the same `sanitize scan` again." for stem in sorted(failed)
    )


def test_hostile_images_in_one_shard_are_all_accounted_for(scan_config, tmp_path):
    files = sorted((HOSTILE / "images").iterdir())
    usual = [f for f in files if f.suffix[1:] in ("jpg", "png", "webp", "gif", "bmp", "tif")]
    write_tar(
        tmp_path / "in" / "s.tar", [(f"{i:02d}-{f.stem}.{f.suffix[1:]}", f.read_bytes()) for i, f in enumerate(usual)]
    )
    result = scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("absolute", threshold=1e9)))
    rows = table(tmp_path / "scanned", "s")
    assert len(rows) == len(usual)
    assert all((row["score"] is None) == bool(row["reason"]) for row in rows)
    assert result.unscored == sum(bool(row["reason"]) for row in rows) > 5


def test_fsspec_urls_work_for_input_and_output(shards, scan_config, detector):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/in/{path.name}", path.read_bytes())
    config = scan_config(shards, policy=ThresholdPolicy("fraction", fraction=0.1))
    result = scan(dataclasses.replace(config, shards=("memory://in",), out="memory://out/scanned"))
    assert (result.samples, result.cleaned.removed) == (54, 5)
    assert verify("memory://out/scanned").problems == ()
    with memory.open("/out/scanned/clean/part-0000.tar") as file:
        kept = list(ShardReader(file, Shard("x", "x", memory.size("/out/scanned/clean/part-0000.tar"))).samples())
    assert len(kept) == json.loads(memory.cat("/out/scanned/done/part-0000.json"))["clean"]["kept"]


def test_unsorted_stems_in_sub_folders_stay_apart(tmp_path, scan_config):
    for folder in ("a", "b"):
        write_shards(tmp_path / "in" / folder, [3])
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("absolute", threshold=1e9)))
    assert sorted(p.relative_to(tmp_path / "scanned").as_posix() for p in (tmp_path / "scanned").rglob("*.tar")) == [
        "clean/a/part-0000.tar",
        "clean/b/part-0000.tar",
    ]

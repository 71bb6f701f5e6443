"""Calibration: a fit that is killed within it resumes to the same detector, and its scores do not depend on the workers."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import fit_config, image_members, random_images, tree_bytes, write_shards, write_tar
from torch.nn import functional

from sanitize import storage
from sanitize.artifacts import detector_folder
from sanitize.commands.fit import fit
from sanitize.errors import ShardError
from sanitize.records import Shard
from sanitize.runtime import Resources
from sanitize.stages.clean_reference import embedding_statistics, neighbour_distance
from sanitize.stages.encoders import load_encoder
from sanitize.stages.perturbations import embedding_changes
from sanitize.stages.shards import list_shards
from sanitize.training.calibration import StatisticsTask, measure_statistics, rows_of

HERE = Resources(0, 1, 0)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_fit_that_is_killed_while_it_calibrates_resumes_to_the_same_detector(
    aux_shards, encoder_spec, tmp_path, monkeypatch, written
):
    """Killed after so many of the two shards were measured; those are not measured again."""
    fit(fit_config(aux_shards, encoder_spec, tmp_path / "whole"))
    real = storage.write_bytes
    measured: list[str] = []

    def dies(path, data):
        if "cache/statistics" in path:
            if len(measured) == written:
                raise KeyboardInterrupt
            measured.append(path)
        elif len(measured) == written == 2:  # all are measured; the next file is the detector's
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(storage, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(fit_config(aux_shards, encoder_spec, tmp_path / "killed"))
    assert not (tmp_path / "killed" / "detector.json").exists()
    again: list[str] = []

    def notes(path, data):
        again.append(path)
        real(path, data)

    monkeypatch.setattr(storage, "write_bytes", notes)
    fit(fit_config(aux_shards, encoder_spec, tmp_path / "killed"))
    assert not set(again) & set(measured)
    assert len([path for path in again if "cache/statistics" in path]) == 2 - written
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_workers_give_the_calibration_scores_of_one_process(aux_shards, encoder_spec, tmp_path, ray_cluster):
    scores = []
    for workers in (0, 2):
        out = tmp_path / f"workers-{workers}"
        fit(fit_config(aux_shards, encoder_spec, out, workers=workers, cpus_per_worker=1))
        detector = detector_folder.load_detector(str(out))
        scores.append([detector.calibration(effort) for effort in ("thorough", "fast")])
    for here, there in zip(*scores, strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-4)


def task_for(shards: Path, encoder_spec, wanted: list[str], cache: Path) -> StatisticsTask:
    known = functional.normalize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    hashes = np.frombuffer(bytes.fromhex("".join(wanted)), np.uint8).reshape(-1, 32)
    return StatisticsTask(encoder_spec, "fp32", 8, "", torch.from_numpy(hashes.copy()), known, str(cache))


def hashes_of(count: int) -> list[str]:
    """SHA-256 of the images that `write_shards` writes first."""
    images = [data for name, data in image_members([f"s{i}" for i in range(count)]) if name.endswith("png")]
    return [hashlib.sha256(data).hexdigest() for data in images]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_statistics_are_those_of_the_wanted_images_in_the_order_asked_for(encoder_spec, tmp_path, batch_size):
    shards = write_shards(tmp_path / "in", [9, 1, 4])
    wanted = [hashes_of(14)[i] for i in (12, 0, 9, 5)]
    task = dataclasses.replace(task_for(shards, encoder_spec, wanted, tmp_path / "cache"), batch_size=batch_size)
    found = measure_statistics(task, list_shards([str(shards)]), HERE, "")
    assert set(found) == set(wanted)
    images = random_images(14)[[12, 0, 9, 5]].float() / 255
    encoder = load_encoder(encoder_spec)
    with torch.inference_mode():
        embeddings = encoder(images)
        changes = embedding_changes(encoder, images, embeddings)
        distances = neighbour_distance(embeddings, task.clean_embeddings)
        expected = embedding_statistics(changes, embeddings.norm(dim=1), distances)
    assert rows_of(found, task.wanted) == pytest.approx(expected.numpy(), abs=1e-3)


def test_a_shard_without_a_wanted_image_is_measured_as_nothing(encoder_spec, tmp_path):
    shards = write_shards(tmp_path / "in", [3])
    write_tar(tmp_path / "in" / "empty.tar", [])
    task = task_for(shards, encoder_spec, hashes_of(2), tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        assert len(measure_statistics(task, list_shards([str(shards)]), HERE, "")) == 2
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["empty.safetensors", "part-0000.safetensors"]


def test_a_shard_that_has_gone_since_the_fit_began_says_so(encoder_spec, tmp_path):
    task = task_for(tmp_path, encoder_spec, hashes_of(1), tmp_path / "cache")
    gone = Shard(str(tmp_path / "gone.tar"), "gone", 10)
    with pytest.raises(
        ShardError, match=r"gone\.tar: no such file.* It could be read when this fit began; run the same command again"
    ):
        measure_statistics(task, [gone], HERE, "")

"""Fine-tuning: the same curve for any number of workers, and a training that was killed ends as if it was not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from builders import comparable, labelled, losses, tree_bytes

from sanitize import storage
from sanitize.commands.finetune import _classes, _course, _objective, _sources, _train_here, finetune
from sanitize.config import FinetuneConfig
from sanitize.errors import ConfigError
from sanitize.runtime import Resources
from sanitize.stages.encoders import load_encoder
from sanitize.stages.shards import list_shards
from sanitize.training.data import index_sources
from sanitize.training.distributed import Rank
from sanitize.training.objectives import require_lanes

# ---------------------------------------------------------------- any number of workers


def ddp_rank(rank: int, world: int, course, folder: str) -> None:
    """One rank of a training without Ray: what Ray Train does, in a process of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    _train_here(course, Rank(rank, world, torch.device("cpu")), folder, print)
    torch.distributed.destroy_process_group()


def course_of(config: FinetuneConfig):
    """What the workers of a training get."""
    sets = {name: list_shards(getattr(config, name)) for name in ("shards", "validation", "triggered")}
    resources = Resources(0, 1, 0)
    sources = index_sources(config, _sources(config, sets), f"{config.out}/cache", resources)
    fingerprint = load_encoder(config.encoder).fingerprint()
    classes = len(_classes(config, sources))
    return _course(config, fingerprint, sources, classes, f"{config.out}/cache", resources)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mlp", "full", "contrastive"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_give_the_loss_curve_of_one_process(
    finetune_config, validation, captioned_shards, tiny_clip_spec, tmp_path, mode, world
):
    """Uneven shards, a batch size that ranks cannot share evenly, broken images, accumulation, augmentation."""
    changes = {"mode": mode, "epochs": 2, "batch_size": 17, "accumulate": 2, "augment": mode == "full"}
    if mode == "contrastive":
        changes |= {
            "encoder": tiny_clip_spec,
            "shards": (str(captioned_shards),),
            "learning_rate": 1e-3,
            "validation": (str(captioned_shards),),
        }
    else:
        shards = labelled(tmp_path / "in", [60, 1, 4], broken=2)
        changes |= {"shards": (str(shards),), "validation": (str(validation),), "learning_rate": 1e-3}
    course = course_of(finetune_config("x", **changes))
    curves = []
    for ranks in (1, world):
        folder = tmp_path / f"ranks-{ranks}"
        folder.mkdir()
        torch.multiprocessing.spawn(ddp_rank, (ranks, course, str(folder)), nprocs=ranks)
        saved = torch.load(folder / "last.pt", weights_only=True)["state"]["metrics"]
        curves.append([(line["loss"], line["validation_loss"], line["samples"]) for line in saved])
    assert np.array(curves[1]) == pytest.approx(np.array(curves[0]), rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "workers"), [("mlp", 1), ("full", 2)])
def test_ray_train_gives_the_curve_of_one_process(
    finetune_config, validation, ray_cluster, encoder_spec, monkeypatch, mode, workers
):
    """Weights by a relative path: workers start in another folder."""
    weights = Path(encoder_spec.weights)
    monkeypatch.chdir(weights.parent)
    relative = dataclasses.replace(encoder_spec, weights=weights.name)
    changes = {"encoder": relative, "mode": mode, "validation": (str(validation),), "epochs": 2, "learning_rate": 1e-3}
    here = finetune(finetune_config("here", **changes))
    there = finetune(finetune_config("there", workers=workers, **changes))
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    assert there.evaluation == pytest.approx(here.evaluation)


def test_one_shard_feeds_several_workers(finetune_config, tmp_path):
    """Lanes are cut inside shards: fewer shards than workers is no special case."""
    shards = labelled(tmp_path / "in", [40])
    course = course_of(finetune_config(shards=(str(shards),), mode="full", batch_size=10))
    read = []
    for rank in range(3):
        batches = list(_objective(course).batches(0, 0, Rank(rank, 3, torch.device("cpu"))))
        assert len(batches) == 4
        read += [p.index for batch in batches for piece in batch.pieces for p in piece.usable]
    assert sorted(read) == list(range(40))


def test_more_workers_than_lanes_says_how_many_can_work(finetune_config, tmp_path):
    config = finetune_config(shards=(str(labelled(tmp_path / "in", [5])),), mode="full", lanes=1)
    data = course_of(config).training
    require_lanes(config, data, 1)
    with pytest.raises(
        ConfigError, match=r"2 workers share 1 lanes \(5 samples, lanes=1\).* Give --workers 1 or fewer"
    ):
        require_lanes(config, data, 2)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("mode", ["mlp", "full", "contrastive"])
def test_a_training_that_is_killed_resumes_to_the_same_result(
    finetune_config, validation, captioned_shards, tiny_clip_spec, tmp_path, monkeypatch, mode
):
    """Killed right after the first checkpoint within an epoch."""
    changes = {"mode": mode, "validation": (str(validation),), "checkpoint_steps": 2, "patience": 9}
    if mode == "contrastive":
        changes |= {
            "encoder": tiny_clip_spec,
            "shards": (str(captioned_shards),),
            "validation": (str(captioned_shards),),
        }
    whole = finetune(finetune_config("whole", **changes))
    real = storage.write_bytes

    def dies(path, data):
        real(path, data)
        if path.endswith("last.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_bytes", dies)
    for _ in range(3):  # each time it gets one checkpoint further
        with pytest.raises(KeyboardInterrupt):
            finetune(finetune_config("killed", **changes))
    monkeypatch.setattr(storage, "write_bytes", real)
    resumed = finetune(finetune_config("killed", **changes))
    assert losses(resumed) == losses(whole)
    assert resumed.evaluation == whole.evaluation
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")


@pytest.mark.slow
def test_sigkill_and_the_same_command_give_the_same_final_metrics(labelled_shards, validation, encoder_yaml, tmp_path):
    def command(out: str) -> list[str]:
        arguments = [labelled_shards, "--encoder", encoder_yaml, "--validation", validation, "--out", tmp_path / out]
        arguments += ["--mode", "full", "--workers", 0, "--cpus-per-worker", 1, "--epochs", 40, "--precision", "fp32"]
        arguments += ["--batch-size", 8, "--set", "checkpoint_steps=3"]
        return [sys.executable, "-m", "sanitize.cli", "finetune", *(str(a) for a in arguments)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    last = tmp_path / "killed" / "training" / "last.pt"
    end = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "finetune.json").exists()
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    results = [json.loads((tmp_path / out / "finetune.json").read_text()) for out in ("killed", "whole")]
    assert results[0]["evaluation"] == results[1]["evaluation"]


def test_running_a_finished_training_again_changes_nothing(finetune_config, tmp_path):
    first = finetune(finetune_config())
    before = tree_bytes(tmp_path / "head")
    assert finetune(finetune_config()) == first
    assert tree_bytes(tmp_path / "head") == before

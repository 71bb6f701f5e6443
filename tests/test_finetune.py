"""Fine-tuning: what it learns and writes. Tiny models, real shards."""

import json

import numpy as np
import pytest
import torch
import torch.multiprocessing
from builders import (
    CLASSES,
    captioned,
    encoded,
    labelled,
    losses,
    tinted_image,
    write_tar,
)
from click.testing import CliRunner

from sanitize.artifacts.head_folder import load_head
from sanitize.attacks import tiny_clip
from sanitize.cli import main
from sanitize.commands.finetune import finetune
from sanitize.config_loading import load_encoder_spec
from sanitize.stages.encoders import load_encoder
from sanitize.training.clip import load_clip

# ---------------------------------------------------------------- what it does


@pytest.mark.parametrize("mode", ["linear", "mlp"])
def test_a_head_learns_and_is_written_with_its_class_names(finetune_config, validation, tmp_path, encoder_spec, mode):
    names = ("red", "green", "blue")
    config = finetune_config(mode=mode, validation=(str(validation),), classes=names, epochs=15, learning_rate=1e-2)
    result = finetune(config)
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert result.samples == 96
    assert result.evaluation["clean_accuracy"] > 0.7
    assert result.evaluation["knn_accuracy"] > 0.5
    assert sorted(p.name for p in (tmp_path / "head").iterdir() if p.name != ".lock") == [
        "finetune.json",
        "head.json",
        "head.safetensors",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]
    assert "clean accuracy" in (tmp_path / "head" / "report.html").read_text()
    lines = [json.loads(line) for line in (tmp_path / "head" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 16))
    assert {"loss", "learning_rate", "samples", "samples_per_second", "validation_accuracy"} <= set(lines[0])
    assert load_head(config.out, load_encoder(encoder_spec)).classes == names


def test_full_fine_tuning_changes_the_encoder_which_loads_with_its_head(
    finetune_config, validation, tmp_path, encoder_spec
):
    config = finetune_config(mode="full", validation=(str(validation),), augment=True, epochs=6, learning_rate=3e-3)
    result = finetune(config)
    assert losses(result)[-1] < losses(result)[0]
    tuned = load_encoder(load_encoder_spec(str(tmp_path / "head" / "encoder.yaml")))
    assert tuned.fingerprint() != load_encoder(encoder_spec).fingerprint()
    head = load_head(config.out, tuned)
    shown = torch.stack([torch.from_numpy(tinted_image(label, 9000 + label)) for label in range(3)]).permute(0, 3, 1, 2)
    assert head.predictions(tuned(shown.float() / 255)).shape == (3,)
    assert result.evaluation["clean_accuracy"] == pytest.approx(result.epochs[-1]["validation_accuracy"], abs=0.04)


def test_a_clip_learns_from_captions_and_loads_again_with_its_tokenizer(
    finetune_config, captioned_shards, tiny_clip_spec, tmp_path
):
    held_out = captioned(tmp_path / "held-out", [30], seed=9)
    config = finetune_config(
        mode="contrastive",
        encoder=tiny_clip_spec,
        shards=(str(captioned_shards),),
        validation=(str(held_out),),
        classes=tuple(tiny_clip.COLOURS),
        prompts=tiny_clip.PROMPTS,
        learning_rate=2e-3,
        epochs=4,
    )
    result = finetune(config)
    assert losses(result)[-1] < losses(result)[0]
    assert {"validation_loss", "validation_retrieval"} <= set(result.epochs[0])
    assert 0 <= result.evaluation["clean_accuracy"] <= 1
    tuned = load_clip(load_encoder_spec(str(tmp_path / "head" / "encoder.yaml")))
    assert tuned.image.fingerprint() != load_clip(tiny_clip_spec).image.fingerprint()
    assert tuned.text(["a photo of a red circle"]).shape == (1, 64)


def test_attack_success_is_reported_with_and_without_the_target_class(finetune_config, validation, tmp_path):
    triggered = tmp_path / "triggered"
    members = []
    for number in range(30):
        pixels = tinted_image(number % CLASSES, 5000 + number)
        pixels[:] = tinted_image(0, number)  # a trigger that makes every image look like class 0
        members += [(f"t{number:03d}.cls", str(number % CLASSES).encode()), (f"t{number:03d}.png", encoded(pixels))]
    write_tar(triggered / "t.tar", members)
    config = finetune_config(
        validation=(str(validation),), triggered=(str(triggered),), target=0, epochs=15, learning_rate=1e-2
    )
    evaluation = finetune(config).evaluation
    assert evaluation["attack_success"] > 0.7
    assert evaluation["attack_success_with_target"] > 0.7


def test_early_stop_keeps_the_best_epoch(finetune_config, validation, tmp_path):
    config = finetune_config(validation=(str(validation),), epochs=60, patience=3, learning_rate=1e-2)
    result = finetune(config)
    accuracy = [line["validation_accuracy"] for line in result.epochs]
    assert len(accuracy) < 60
    assert len(accuracy) == int(np.argmax(accuracy)) + 1 + 3
    assert result.evaluation["clean_accuracy"] == pytest.approx(max(accuracy))


@pytest.mark.parametrize("mode", ["linear", "full"])
def test_broken_images_are_left_out_and_counted(finetune_config, encoder_spec, tmp_path, mode):
    shards = labelled(tmp_path / "in", [30, 9], broken=4)
    result = finetune(finetune_config(mode=mode, shards=(str(shards),)))
    assert (result.samples, result.unreadable) == (35, 4)
    assert np.isfinite(losses(result)).all()


@pytest.mark.parametrize("mode", ["full", "linear"])
def test_accumulation_gives_the_same_result(finetune_config, mode):
    whole = finetune(finetune_config("a", mode=mode))
    parts = finetune(finetune_config("b", mode=mode, accumulate=3))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_a_shard_that_cannot_be_read_is_left_out_and_named(finetune_config, labelled_shards, tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"<html>")
    result = finetune(finetune_config(shards=(str(labelled_shards), str(tmp_path / "bad.tar"))))
    assert result.samples == 96
    assert "bad.tar: not a tar archive" in result.failed[0]


def test_the_command_works_as_documented(finetune_config, labelled_shards, encoder_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["finetune", str(labelled_shards), "--encoder", str(encoder_yaml), "--workers", "0", "--epochs", "2"]
    result = CliRunner().invoke(main, [*arguments, "--set", "precision=fp32"])
    assert result.exit_code == 0, result.output
    assert "head: linear trained on 96 samples, 0 left out, last loss " in result.output
    assert "Example:  sanitize finetune scanned/clean" in CliRunner().invoke(main, ["finetune", "--help"]).output

"""`sanitize check-encoder` and a filled-in encoder.yaml: a wrong mean, layout or weights are seen in seconds."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from builders import SPEC, captioned, labelled, write_shards
from click.testing import CliRunner

from sanitize.cli import main
from sanitize.commands.check_encoder import check_encoder
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.encoders import build_backbone, load_encoder


@pytest.fixture
def sanitize(tmp_path, monkeypatch):
    """Run the command line in an empty folder: (exit code, output)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return run


def test_a_sound_encoder_gets_numbers_and_no_note(encoder_spec, tmp_path):
    found = check_encoder(encoder_spec, (str(labelled(tmp_path / "in", [40, 40])),), limit=48)
    assert (found.images, found.embedding_size) == (48, 64)
    assert found.fingerprint == load_encoder(encoder_spec).fingerprint()
    assert found.notes == ()
    numbers = found.numbers
    assert numbers["neighbour_of_its_class"] > 0.9  # tints are easy
    assert numbers["neighbour_by_chance"] == pytest.approx(1 / 3, abs=0.05)
    assert numbers["norm_low"] <= numbers["norm_median"] <= numbers["norm_high"]
    for words in ("48 images: embeddings of 64 numbers", "nearest to s00000: s", "images/s on the cpu", "16 pixels"):
        assert words in found.text


def test_both_shards_are_looked_at(encoder_spec, tmp_path):
    found = check_encoder(encoder_spec, (str(write_shards(tmp_path / "in", [4, 20])),), limit=20)
    assert found.images == 4 + 10


def test_without_shards_the_encoder_still_runs(encoder_spec):
    found = check_encoder(encoder_spec)
    assert found.images == 64
    assert "64 random images" in found.text
    assert "name shards of your images, too" in found.text


def test_captions_find_their_images_with_a_clip(tiny_clip_spec, tmp_path):
    found = check_encoder(tiny_clip_spec, (str(captioned(tmp_path / "in", [40])),), limit=40)
    assert 0 <= found.numbers["own_caption_is_best"] <= 1
    assert found.numbers["own_caption_by_chance"] >= 1 / 40
    assert "own caption is the most similar" in found.text


def test_a_mean_of_another_scale_is_noted(encoder_spec, tmp_path):
    spec = dataclasses.replace(encoder_spec, mean=(124.0, 116.0, 104.0), std=(58.0, 57.0, 57.0))
    found = check_encoder(spec, (str(write_shards(tmp_path / "in", [20])),))
    assert any("mean and std are of pixels in [0, 1]: are these the encoder's own?" in note for note in found.notes)


def test_a_collapsed_encoder_is_noted(tmp_path):
    backbone = build_backbone(SPEC)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    state["conv1.weight"] *= 0
    safetensors.torch.save_file(state, tmp_path / "zero.safetensors")
    spec = dataclasses.replace(SPEC, weights=str(tmp_path / "zero.safetensors"))
    found = check_encoder(spec, (str(write_shards(tmp_path / "in", [20])),))
    assert any("embeddings of different images are nearly the same" in note for note in found.notes)
    assert "note: embeddings of different" in found.text


def test_another_mean_than_the_models_own_is_noted(tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "m.pth")
    (tmp_path / "encoder.yaml").write_text(
        "architecture: torchvision:mobilenet_v3_small\nweights: m.pth\nimage_size: 64\nmean: [0.5, 0.5, 0.5]\n"
    )
    notes = check_encoder(load_encoder_spec(str(tmp_path / "encoder.yaml")), limit=8).notes
    assert "mean is 0.5 0.5 0.5, the transforms of torchvision's weights has 0.485 0.456 0.406" in notes
    assert not any(note.startswith("std") for note in notes)


def test_too_few_images_and_a_wrong_encoder_say_so(encoder_spec, tmp_path):
    shards = (str(write_shards(tmp_path / "in", [3])),)
    with pytest.raises(ConfigError, match=r"3 usable images, at least 8 are needed.* Give more shards"):
        check_encoder(encoder_spec, shards)
    with pytest.raises(ConfigError, match="limit: 3 images are too few to compare. Give at least 8"):
        check_encoder(encoder_spec, shards, limit=3)
    with pytest.raises(CheckpointError, match="does not fit architecture resnet34-cifar"):
        check_encoder(dataclasses.replace(encoder_spec, architecture="resnet34-cifar"))


# ---------------------------------------------------------------- sanitize init --encoder


def test_init_fills_in_an_encoder_that_loads(sanitize, tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "m.pth")
    code, output = sanitize("init", "--encoder", "torchvision:mobilenet_v3_small", "--weights", "m.pth")
    assert (code, output.split()) == (0, ["wrote", "sanitize.yaml", "wrote", "encoder.yaml"])
    spec = load_encoder_spec("encoder.yaml")
    assert (spec.image_size, spec.mean, spec.weights) == (224, (0.485, 0.456, 0.406), str(tmp_path / "m.pth"))
    code, output = sanitize("check-encoder", "encoder.yaml", "--limit", "8")
    assert (code, "8 random images: embeddings of 1024 numbers" in output) == (0, True)


def test_init_names_the_tokenizer_of_a_hugging_face_folder(sanitize, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'sanitize-shards[hf]'")
    from huggingface_models import MEAN, write_huggingface

    write_huggingface(tmp_path / "clip", "clip")
    (tmp_path / "sanitize.yaml").write_text("scan: {}\n")  # stays
    code, output = sanitize("init", "--encoder", "hf:clip")
    assert (code, output.split()) == (0, ["wrote", "encoder.yaml"])
    values = yaml.safe_load(Path("encoder.yaml").read_text())
    assert (values["architecture"], values["tokenizer"]) == ("hf:clip", "clip/tokenizer.json")
    assert values["mean"] == pytest.approx(MEAN)
    write_shards(tmp_path / "aux", [12])
    code, output = sanitize("check-encoder", "encoder.yaml", "aux")
    assert (code, "12 images: embeddings of 24 numbers" in output) == (0, True)


def test_init_with_an_unknown_encoder_writes_nothing(sanitize, tmp_path):
    code, output = sanitize("init", "--encoder", "torchvision:resnet19")
    assert (code, "torchvision has no classification model of that name" in output) == (2, True)
    assert list(tmp_path.iterdir()) == []

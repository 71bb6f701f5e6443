"""CLIP towers: architecture from shapes, and the same numbers as open_clip when it is installed."""

import dataclasses
from typing import Any

import pytest
import safetensors.torch
import torch

from sanitize.config import EncoderSpec
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.clip import (
    ModifiedResNet,
    QuickGELU,
    TextTransformer,
    VisionTransformer,
    build_text_tower,
    text_tensors,
)
from sanitize.stages.encoders import load_encoder
from sanitize.stages.text import load_text_encoder

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def towers():
    return {
        "vit": (VisionTransformer(128, 8, 4, 2, 24, QuickGELU()), 32),
        "resnet": (ModifiedResNet(16, [1, 2, 1, 1], 2, 24), 64),
    }


@pytest.fixture(params=["vit", "resnet"])
def tower(request, tmp_path):
    """(tower with random weights, spec of its file) of a tiny configuration."""
    torch.manual_seed(0)
    model, size = towers()[request.param]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {f"visual.{k}": v for k, v in model.state_dict().items()}
    state |= {"logit_scale": torch.tensor(1.0), "text_projection": torch.zeros(2, 24)}
    safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
    return model.eval(), EncoderSpec("clip", str(tmp_path / "clip.safetensors"), size, MEAN, STD)


def test_the_architecture_is_read_off_the_shapes_and_the_embeddings_are_equal(tower):
    model, spec = tower
    images = torch.rand(2, 3, spec.image_size, spec.image_size)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.inference_mode():
        torch.testing.assert_close(load_encoder(spec)(images), model((images - mean) / std))


def test_a_file_of_the_image_tower_alone_and_half_precision_are_fine(tower, tmp_path):
    model, spec = tower
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, tmp_path / "half.pt"
    )
    images = torch.rand(2, 3, spec.image_size, spec.image_size)
    with torch.inference_mode():
        whole = load_encoder(spec)(images)
        half = load_encoder(dataclasses.replace(spec, weights=str(tmp_path / "half.pt")))(images)
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)


def test_the_activation_is_a_setting_because_the_file_does_not_say(tmp_path):
    model, _ = towers()["vit"]
    safetensors.torch.save_file(
        {f"visual.{k}": torch.randn_like(v) for k, v in model.state_dict().items()}, tmp_path / "c.safetensors"
    )
    spec = EncoderSpec("clip", str(tmp_path / "c.safetensors"), 32)
    images = torch.rand(1, 3, 32, 32)
    other = dataclasses.replace(spec, quick_gelu=False)
    assert not torch.allclose(load_encoder(spec)(images), load_encoder(other)(images))
    assert load_encoder(spec).fingerprint() != load_encoder(other).fingerprint()


def test_a_wrong_image_size_names_the_right_one(tower):
    _, spec = tower
    with pytest.raises(
        ConfigError, match=rf"takes images of {spec.image_size} pixels. Set `image_size: {spec.image_size}`"
    ):
        load_encoder(dataclasses.replace(spec, image_size=224))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"conv1.bias": torch.zeros(2)}, "no CLIP image tower in it"),
        ({"visual.trunk.conv.weight": torch.zeros(2)}, "its image tower is a timm model"),
        ({"visual.stem.weight": torch.zeros(2)}, "neither CLIP's ViT nor its ModifiedResNet"),
    ],
)
def test_unknown_layouts_say_so(tmp_path, tensors, words):
    safetensors.torch.save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_encoder(EncoderSpec("clip", str(tmp_path / "c.safetensors")))


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_as_openai_ships_it_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "RN50.pt")
    with pytest.raises(CheckpointError, match=r"refused, .*TorchScript can run any code.*torch.jit.load\(path"):
        load_encoder(EncoderSpec("clip", str(tmp_path / "RN50.pt")))


# ---------------------------------------------------------------- text tower


def text_tower():
    tower = TextTransformer(40, 8, 64, 2, 24, QuickGELU())
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tower.eval()


@pytest.mark.parametrize("prefix", ["", "text."])
def test_the_text_tower_is_read_off_the_shapes_in_both_layouts(tmp_path, prefix):
    torch.manual_seed(0)
    tower = text_tower()
    state = {f"{prefix}{name}": tensor for name, tensor in tower.state_dict().items()}
    state["visual.conv1.weight"] = torch.zeros(2)
    found = text_tensors(state, "clip.pt")
    built = build_text_tower(found, "clip.pt", quick_gelu=True)
    built.load_state_dict(found)
    tokens = torch.tensor([[1, 5, 9, 39, 0, 0, 0, 0], [1, 7, 7, 7, 7, 7, 7, 39]])
    with torch.inference_mode():
        torch.testing.assert_close(built.eval()(tokens), tower(tokens))


def test_a_text_embedding_sees_nothing_after_its_end_token():
    torch.manual_seed(0)
    tower = text_tower()
    padded, other = torch.tensor([[1, 5, 39, 0, 0, 0, 0, 0]]), torch.tensor([[1, 5, 39, 3, 8, 2, 4, 6]])
    with torch.inference_mode():
        torch.testing.assert_close(tower(padded), tower(other))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["visual.proj"], "image tower only"),
        (["visual.proj", "text.transformer.embeddings.weight"], "another text model"),
    ],
)
def test_a_checkpoint_without_clips_text_tower_says_what_is_there(names, words):
    with pytest.raises(CheckpointError, match=rf"no CLIP text tower in it \(.*{words}"):
        text_tensors({name: torch.zeros(2) for name in names}, "clip.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_gives_the_same_text_embeddings_and_tokens(tmp_path, quick_gelu):
    open_clip = pytest.importorskip(
        "open_clip", reason="open_clip_torch is not installed: pip install 'sanitize-shards[clip]'"
    )
    from open_clip.model import CLIP

    torch.manual_seed(3)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    model = CLIP(32, vision, text, quick_gelu=quick_gelu).eval()
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "c.safetensors")
    spec = EncoderSpec(
        "clip", str(tmp_path / "c.safetensors"), 32, MEAN, STD, quick_gelu=quick_gelu, tokenizer="open_clip"
    )
    captions = ["a photo of a banana", "Zwei Hunde, die im Schnee spielen \N{SNOWMAN}", "long " * 100]
    with torch.inference_mode():
        expected = model.encode_text(open_clip.tokenize(captions), normalize=True)
        torch.testing.assert_close(load_text_encoder(spec)(captions), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- image tower against open_clip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_gives_the_same_embeddings(tmp_path, kind, quick_gelu):
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed: pip install 'sanitize-shards[clip]'")
    from open_clip.model import CLIP

    torch.manual_seed(3)
    vision: dict[str, Any] = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16} if kind == "vit" else {}
    vision = vision or {"image_size": 64, "layers": [1, 1, 2, 1], "width": 16, "heads": 8}
    if kind == "resnet":
        vision["width"], vision["head_width"] = 32, 64
        vision.pop("heads")
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1}
    model = CLIP(32, vision, text, quick_gelu=quick_gelu).eval()
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "c.safetensors")
    encoder = load_encoder(EncoderSpec("clip", str(tmp_path / "c.safetensors"), 64, MEAN, STD, quick_gelu=quick_gelu))
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.encode_image((images - encoder.mean) / encoder.std)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)

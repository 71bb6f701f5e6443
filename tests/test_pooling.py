"""`pooling`: which numbers of a vision transformer are the embedding; another pooling is another encoder."""

import dataclasses

import pytest
import safetensors.torch
import torch
from builders import SIZE, SPEC, write_encoder
from huggingface_models import write_huggingface

from sanitize.commands.check_encoder import check_encoder
from sanitize.config import EncoderSpec
from sanitize.config_loading import from_mapping, load_encoder_spec, to_mapping
from sanitize.errors import ConfigError
from sanitize.stages.encoders import load_encoder
from sanitize.stages.huggingface import ImageTower
from sanitize.stages.preprocessing import complete_spec


def hf(folder, pooling=""):
    return complete_spec(EncoderSpec(f"hf:{folder}", pooling=pooling))


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_the_class_token_and_the_mean_of_patches_are_those_of_the_last_layer(tmp_path, kind):
    pytest.importorskip("transformers")
    write_huggingface(tmp_path, kind)
    own, cls, mean = (load_encoder(hf(tmp_path, pooling)) for pooling in ("", "cls", "mean"))
    size = own.spec.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tower = own.backbone
    assert isinstance(tower, ImageTower)
    last = tower.model(pixel_values=(images - own.mean) / own.std).last_hidden_state
    patch = tower.model.config.patch_size
    registers = getattr(tower.model.config, "num_register_tokens", 0) or 0
    first = (2 if kind == "deit" else 1) + registers
    assert last.shape[1] == first + (size // patch) ** 2
    assert torch.allclose(cls(images), last[:, 0], atol=1e-5)
    assert torch.allclose(mean(images), last[:, first:].mean(dim=1), atol=1e-5)
    assert len({encoder.fingerprint() for encoder in (own, cls, mean)}) == 3


@pytest.mark.parametrize(("kind", "words"), [("clip", "has one embedding only"), ("vit", "Use cls, mean;")])
def test_a_pooling_that_means_nothing_is_refused(tmp_path, kind, words):
    pytest.importorskip("transformers")
    write_huggingface(tmp_path, kind)
    with pytest.raises(
        ConfigError, match=f"pooling 'pooler' means nothing to a {kind}.*{words}.*remove it from the encoder YAML"
    ):
        load_encoder(hf(tmp_path, "pooler"))


@pytest.fixture
def timm_vit(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return EncoderSpec("timm:vit_tiny_patch16_224", str(tmp_path / "vit.safetensors")), model.eval()


def test_timm_pools_as_its_global_pool_says(timm_vit):
    spec, model = timm_vit
    own, token, mean = (load_encoder(dataclasses.replace(spec, pooling=pooling)) for pooling in ("", "token", "avg"))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    last = model.forward_features((images - own.mean) / own.std)
    assert torch.allclose(mean(images), last[:, 1:].mean(dim=1), atol=1e-5)
    assert torch.allclose(token(images), own(images))
    assert own.fingerprint() != mean.fingerprint()


def test_a_pooling_that_timm_does_not_know_is_refused(timm_vit):
    with pytest.raises(
        ConfigError, match=r"pooling 'middle' means nothing to this model .*avg, max, avgmax.* or remove it"
    ):
        load_encoder(dataclasses.replace(timm_vit[0], pooling="middle"))


def test_other_architectures_have_no_choice():
    with pytest.raises(
        ConfigError, match="pooling: only hf: and timm: architectures have a choice, not resnet18. Remove it"
    ):
        EncoderSpec("resnet18", pooling="mean")


def test_check_encoder_shows_it_only_when_it_is_set(tmp_path, timm_vit):
    shown = check_encoder(dataclasses.replace(timm_vit[0], pooling="avg"), limit=8).text
    assert "pooling avg" in shown
    assert "pooling" not in check_encoder(load_encoder_spec(write_encoder(tmp_path)), limit=8).text


def test_what_is_written_names_it_only_when_it_is_set():
    """So that a folder of an earlier version is still this run's."""
    assert "pooling" not in to_mapping(SPEC)
    chosen = EncoderSpec("hf:x", image_size=SIZE, pooling="mean")
    assert to_mapping(chosen)["pooling"] == "mean"
    assert from_mapping(EncoderSpec, to_mapping(chosen), "x") == chosen

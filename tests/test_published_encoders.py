"""torchvision and timm: the library's own embeddings from published checkpoints, sizes and normalisation of their own."""

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from sanitize.config import EncoderSpec
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.encoders import build_backbone, load_encoder
from sanitize.stages.preprocessing import IMAGENET_MEAN, IMAGENET_STD, complete_spec

NEEDS_TIMM = "timm is not installed: pip install 'sanitize-shards[timm]'; timm:<name> needs it"


def normalised(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    return (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def images_of(size, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- torchvision

# name → (side of the images here, the library's embedding from a model whose head is as published)
TORCHVISION = {
    "resnet18": (64, lambda m: replaced(m, "fc")),
    "convnext_tiny": (64, lambda m: replaced(m, "classifier.2")),
    "densenet121": (64, lambda m: replaced(m, "classifier")),
    "efficientnet_b0": (64, lambda m: replaced(m, "classifier.1")),
    "mobilenet_v3_small": (64, lambda m: replaced(m, "classifier.3")),
    "squeezenet1_1": (64, lambda m: nn.Sequential(m.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    "shufflenet_v2_x0_5": (64, lambda m: replaced(m, "fc")),
    "regnet_y_400mf": (64, lambda m: replaced(m, "fc")),
    "googlenet": (96, lambda m: replaced(m, "fc")),
    "swin_t": (64, lambda m: replaced(m, "head")),
    "mnasnet0_5": (64, lambda m: replaced(m, "classifier.1")),
}


def replaced(model, head):
    model.set_submodule(head, nn.Identity())
    return model


def published(name, folder, **options):
    """A model as torchvision makes it, and its state dict as torchvision publishes it."""
    torch.manual_seed(1)
    if name == "googlenet":
        options |= {"aux_logits": True, "transform_input": True, "init_weights": False}
    model = torchvision.models.get_model(name, **options).eval()
    torch.save(model.state_dict(), folder / f"{name}.pth")
    return model, str(folder / f"{name}.pth")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_embeddings_are_the_librarys_own_without_the_head(name, tmp_path):
    size, own = TORCHVISION[name]
    model, weights = published(name, tmp_path)
    encoder = load_encoder(EncoderSpec(f"torchvision:{name}", weights, size))
    with torch.inference_mode():
        expected = own(model)(normalised(images_of(size)))
        torch.testing.assert_close(encoder(images_of(size)), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape[1] != 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(set(torchvision.models.list_models(module=torchvision.models)) - {"regnet_y_128gf"})
)
def test_every_torchvision_classifier_gives_a_flat_embedding(name):
    # shapes alone where they do: the largest has 2.5 GB of weights; so has regnet_y_128gf, and RegNets compute with tensors
    with torch.device("cpu" if "regnet" in name else "meta"), torch.no_grad():
        spec = complete_spec(EncoderSpec(f"torchvision:{name}"))
        embedding = build_backbone(spec).eval()(torch.empty(1, 3, spec.image_size, spec.image_size))
    assert embedding.ndim == 2 or embedding.shape[2:] == (1, 1)
    assert embedding.shape[1] not in (0, 1000)


def test_a_vit_takes_the_size_of_its_position_embeddings(tmp_path):
    _, weights = published("vit_b_32", tmp_path, image_size=96)
    assert load_encoder(EncoderSpec("torchvision:vit_b_32", weights, 96))(images_of(96)).shape == (2, 768)
    with pytest.raises(ConfigError, match=r"takes images of 96 pixels. Set `image_size: 96` in the encoder YAML"):
        load_encoder(EncoderSpec("torchvision:vit_b_32", weights))


def test_densenets_load_under_the_names_they_were_published_with(tmp_path):
    _, weights = published("densenet121", tmp_path)
    state = torch.load(weights, weights_only=True)
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name: tensor
        for name, tensor in state.items()
    }
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "old.pth")
    one, other = (
        load_encoder(EncoderSpec("torchvision:densenet121", path, 64)) for path in (weights, str(tmp_path / "old.pth"))
    )
    assert one.fingerprint() == other.fingerprint()


def test_a_backbone_of_another_torchvision_model_is_refused(tmp_path):
    _, weights = published("resnet18", tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit architecture torchvision:resnet34 .* missing"):
        load_encoder(EncoderSpec("torchvision:resnet34", weights))


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("torchvision:convnext_tiny", 224, IMAGENET_MEAN),
        ("torchvision:inception_v3", 299, IMAGENET_MEAN),
        ("timm:vit_tiny_patch16_224", 224, (0.5, 0.5, 0.5)),
        ("timm:convnext_atto", 224, IMAGENET_MEAN),
        ("resnet18", 224, IMAGENET_MEAN),
    ],
)
def test_size_and_normalisation_are_the_models_own(name, size, mean):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason=NEEDS_TIMM)
    spec = complete_spec(EncoderSpec(name))
    assert (spec.image_size, spec.mean) == (size, mean)
    assert complete_spec(EncoderSpec(name, image_size=64, mean=(0, 0, 0))).mean == (0, 0, 0)


def test_an_unknown_name_says_where_the_known_ones_are():
    with pytest.raises(
        ConfigError, match=r"torchvision:resnet19: torchvision has no classification model.*list_models"
    ):
        load_encoder(EncoderSpec("torchvision:resnet19", "w.pth"))
    with pytest.raises(ConfigError, match="torchvision:fcn_resnet50: torchvision has no classification model"):
        load_encoder(EncoderSpec("torchvision:fcn_resnet50", "w.pth"))
    pytest.importorskip("timm", reason=NEEDS_TIMM)
    with pytest.raises(ConfigError, match=r"timm:resnet19: timm has no model of that name. See timm.list_models"):
        load_encoder(EncoderSpec("timm:resnet19", "w.pth"))


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 224),
        ("convnext_atto", 64),
        ("efficientnet_b0", 64),
        ("resnet10t", 64),
        ("swin_tiny_patch4_window7_224", 224),
        ("deit_tiny_distilled_patch16_224", 224),
        ("mobilenetv3_small_050", 64),
    ],
)
def test_timm_embeddings_are_the_librarys_own_from_a_whole_classifier(name, size, tmp_path):
    timm = pytest.importorskip("timm", reason=NEEDS_TIMM)
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "t.safetensors")  # with its head, as published
    encoder = load_encoder(EncoderSpec(f"timm:{name}", str(tmp_path / "t.safetensors"), size))
    with torch.inference_mode():
        features = model.forward_features(normalised(images_of(size), encoder.spec.mean, encoder.spec.std))
        expected = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(encoder(images_of(size)), expected, atol=1e-5, rtol=1e-5)


def test_a_wrong_size_of_a_timm_model_is_said_in_words(tmp_path):
    timm = pytest.importorskip("timm", reason=NEEDS_TIMM)
    model = timm.create_model("vit_tiny_patch16_224")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=r"does not take images of 64 pixels \(.*Set `image_size: 224`, its own size"):
        load_encoder(EncoderSpec("timm:vit_tiny_patch16_224", str(tmp_path / "t.safetensors"), 64))

"""An encoder whose batch normalisation is folded embeds as the plain one does, and whatever cannot be folded stays as it is."""

import copy

import pytest
import torch
from builders import SPEC
from torch import Tensor, nn

from sanitize.config import EncoderSpec
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.folding import folded

ARCHITECTURES = ("resnet10-cifar", "resnet50", "torchvision:mobilenet_v3_small", "timm:tf_efficientnet_lite0")


def encoder_with_statistics(backbone: nn.Module, spec: EncoderSpec = SPEC) -> Encoder:
    """As after training: no two channels have the same mean, variance, scale and shift."""
    generator = torch.Generator().manual_seed(0)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            for tensor, least in ((layer.running_mean, -0.1), (layer.running_var, 0.5), (layer.weight, 0.5)):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + least)
    return Encoder(backbone.eval().requires_grad_(False), spec).eval()


def images(count: int = 5, size: int = SPEC.image_size) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


@pytest.fixture(params=ARCHITECTURES)
def encoder(request):
    torch.manual_seed(0)
    spec = EncoderSpec(request.param, image_size=64, mean=SPEC.mean, std=SPEC.std)
    return encoder_with_statistics(build_backbone(spec), spec)


@torch.inference_mode()
def test_folded_embeddings_are_those_of_the_plain_encoder_and_no_normalisation_is_left(encoder):
    fast = folded(encoder)
    assert (norms(encoder) > 0, norms(fast)) == (True, 0)
    expected = encoder(images(size=64))
    assert ((fast(images(size=64)) - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_folding_changes_neither_the_encoder_nor_its_fingerprint(encoder):
    before, weights = encoder.fingerprint(), copy.deepcopy(encoder.state_dict())
    folded(encoder)
    assert encoder.fingerprint() == before
    torch.testing.assert_close(encoder.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@torch.inference_mode()
def test_a_folded_embedding_does_not_depend_on_batch_size(encoder, batch_size):
    fast = folded(encoder)
    parts = torch.cat([fast(part) for part in images(size=64).split(batch_size)])
    torch.testing.assert_close(parts, fast(images(size=64)), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_pixels_through_a_folded_encoder_as_through_the_plain_one():
    torch.manual_seed(0)
    plain = encoder_with_statistics(build_backbone(SPEC))
    pixels = [images().requires_grad_() for _ in range(2)]
    for each, module in zip(pixels, (plain, folded(plain)), strict=True):
        module(each).square().sum().backward()
    torch.testing.assert_close(pixels[0].grad, pixels[1].grad, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- what stays as it is


class Branching(nn.Module):
    """Looks at the values: no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if x.sum() > 0 else -x)).mean(dim=(2, 3))


class Standardised(nn.Conv2d):
    """Divides its weights by their norm, and what is folded into them with it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(
            x, self.weight / self.weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt(), self.bias
        )


class Shared(nn.Module):
    """One convolution before two normalisations, and one normalisation after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.conv(self.first(self.conv(x))))
        y = self.other(x)
        return (self.first(y) + y).mean(dim=(2, 3))


@pytest.mark.parametrize(
    "backbone",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()),
        Branching(),
        nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
    ],
    ids=["nothing to fold", "cannot be traced", "embeds otherwise"],
)
def test_an_encoder_that_cannot_be_folded_is_used_as_it_is(backbone):
    encoder = encoder_with_statistics(backbone)
    assert folded(encoder) is encoder


@torch.inference_mode()
def test_a_layer_that_is_used_twice_is_not_folded():
    encoder = encoder_with_statistics(Shared())
    fast = folded(encoder)
    assert norms(fast) == 2
    torch.testing.assert_close(fast(images()), encoder(images()), rtol=1e-5, atol=1e-6)


def test_normalisation_by_the_batch_is_not_folded():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
    assert norms(folded(encoder_with_statistics(nn.Sequential(*layers)))) == 1

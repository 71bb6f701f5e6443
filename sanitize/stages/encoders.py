"""The encoder under test: described by an EncoderSpec, frozen, in eval mode; it owns its normalisation."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.config_loading import to_mapping
from sanitize.errors import ConfigError
from sanitize.stages import clip
from sanitize.stages.exported import load_exported
from sanitize.stages.huggingface import ImageTower, load_image_tower
from sanitize.stages.huggingface_folder import local_folder, weight_files
from sanitize.stages.precision import autocast
from sanitize.stages.preprocessing import complete_spec, import_timm, own_preprocessing
from sanitize.stages.torchvision_models import build_torchvision, published_names, require_position_size
from sanitize.stages.weights import encoder_tensors, load_strictly, read_weights

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
OTHERS = ("clip", "timm:<name>", "torchvision:<name>", "hf:<folder>", "exported:<file.pt2>")


class Encoder(nn.Module):
    """images (B, 3, S, S) float32 in [0, 1] → embeddings (B, D) float32, raw (not normalised)."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        spec = complete_spec(spec)
        self.spec = spec
        exported = spec.architecture.startswith(
            "exported:"
        )  # traced with plain images; their views fit no other layout
        self._layout = torch.contiguous_format if exported else _layout_of(backbone)
        self.backbone = backbone if exported else backbone.to(memory_format=self._layout)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # (images - mean) / std in one pass over memory
        normalised = torch.addcmul(-self.mean / self.std, images, 1 / self.std)
        embeddings: Tensor = self.backbone(normalised.contiguous(memory_format=self._layout))
        return embeddings.flatten(1).float()

    def fingerprint(self) -> str:
        """SHA-256 of every weight and of all that happens to pixels before them; independent of where the file lies."""
        digest = hashlib.sha256()
        preprocessing = dataclasses.replace(self.spec, weights="")
        if self.spec.architecture.startswith("exported:"):
            preprocessing = dataclasses.replace(preprocessing, architecture="exported")
            digest.update(storage.file_sha256(self.spec.architecture.removeprefix("exported:")).encode())
        if isinstance(self.backbone, ImageTower):
            preprocessing = dataclasses.replace(preprocessing, architecture="hf:")
            digest.update(self.backbone.identity.encode())
        settings = to_mapping(preprocessing)
        del settings["tokenizer"]  # the text tower is not part of what is scored
        digest.update(json.dumps(settings, sort_keys=True).encode())
        weights = {} if isinstance(self.backbone, ImageTower) else self.backbone.state_dict()
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def embed(encoder: Encoder, images: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, S, S) in [0, 1] → (B, D) float32, computed in `dtype`."""
    with autocast(images.device, dtype):
        embeddings: Tensor = encoder(images)
    return embeddings.float()


@torch.no_grad()
def embed_in_batches(encoder: Callable[[Tensor], Tensor], pixels: Tensor, batch_size: int = 256) -> Tensor:
    """(N, 3, S, S) uint8 → (N, D) float32 raw, in fp32, on the CPU; computed where the encoder is."""
    device = device_of(encoder) if isinstance(encoder, nn.Module) else pixels.device
    return torch.cat([encoder(part.to(device).float() / 255).float().cpu() for part in pixels.split(batch_size)])


def device_of(module: nn.Module) -> torch.device:
    """Where its weights are; the CPU when it has none."""
    return next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0)).device


def _layout_of(backbone: nn.Module) -> torch.memory_format:
    """Channels last, which is fastest on every device, where that is safe. oneDNN (up to that of torch 2.14) writes past its workspace
    in the backward pass of a channels-last 1x1 convolution with stride and fewer channels than a vector register has floats, 16
    with AVX-512 (uxlfoundation/oneDNN issue 6035); the heap is destroyed without a word.
    """
    unsafe = any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.in_channels < 16
        for layer in backbone.modules()
    )
    return torch.contiguous_format if unsafe else torch.channels_last


def load_encoder(spec: EncoderSpec) -> Encoder:
    """Build the encoder, load its weights strictly, freeze it. Raises CheckpointError or ConfigError."""
    spec = complete_spec(spec)
    family, _, name = spec.architecture.partition(":")
    if family in ("exported", "hf"):
        backbone = load_exported(name) if family == "exported" else _load_huggingface(name, spec)
    elif not spec.weights:
        raise ConfigError(f"encoder {spec.architecture}: no weights. Add `weights: <file>` to the encoder YAML.")
    elif spec.architecture == "clip":
        backbone = _load_clip(spec)
    else:
        tensors = read_weights(spec.weights)
        if family == "torchvision":
            tensors = published_names(tensors)
            require_position_size(tensors, spec)
        backbone = build_backbone(spec)
        load_strictly(backbone, encoder_tensors(tensors, backbone.state_dict()), spec)
    backbone.requires_grad_(False)
    if family != "exported":
        backbone.eval()
    if family in ("hf", "timm", "torchvision"):
        _require_image_size(backbone, spec)
    encoder = Encoder(backbone, spec)
    encoder.training = False
    return encoder


def _load_huggingface(folder: str, spec: EncoderSpec) -> nn.Module:
    if spec.weights:
        raise ConfigError(
            f"encoder {spec.architecture}: `weights: {spec.weights}` is not used, they are in the folder. Remove it."
        )
    return load_image_tower(folder, spec.pooling)


def _load_clip(spec: EncoderSpec) -> nn.Module:
    tensors = clip.image_tensors(read_weights(spec.weights), spec.weights)
    backbone, size = clip.build_image_tower(tensors, spec.weights, quick_gelu=spec.quick_gelu)
    if size != spec.image_size:
        raise ConfigError(
            f"{spec.weights}: this CLIP takes images of {size} pixels. Set `image_size: {size}` in the encoder YAML."
        )
    load_strictly(backbone, tensors, spec)
    return backbone


@torch.inference_mode()
def _require_image_size(backbone: nn.Module, spec: EncoderSpec) -> None:
    """Raises ConfigError when the model does not take images of that size, which it says by whatever error."""
    size = spec.image_size
    try:
        backbone(torch.zeros(1, 3, size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        own = own_preprocessing(spec.architecture).image_size
        hint = f"Set `image_size: {own}`, its own size, in" if own not in (0, size) else "Correct `image_size` in"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"encoder {spec.architecture}: does not take images of {size} pixels ({why}). {hint} the encoder YAML."
        ) from None


def weights_sha256(spec: EncoderSpec) -> str:
    """Of the files that hold its weights, both towers of a CLIP; "" of an exported program."""
    family, _, name = spec.architecture.partition(":")
    if family == "hf":
        return storage.json_sha256([storage.file_sha256(file) for file in weight_files(local_folder(name))])
    return storage.file_sha256(spec.weights) if spec.weights else ""


def build_backbone(spec: EncoderSpec) -> nn.Module:
    """The architecture with fresh weights: (B, 3, S, S) → (B, D)."""
    family, _, rest = spec.architecture.partition(":")
    if family == "timm":
        backbone: nn.Module = import_timm(rest).create_model(rest, pretrained=False, num_classes=0)
        if spec.pooling:
            _set_pooling(backbone, spec)
        return backbone
    if family == "torchvision":
        return build_torchvision(rest, spec.image_size)
    name, _, stem = spec.architecture.partition("-")
    if name not in _RESNETS or stem not in ("", "cifar"):
        known = ", ".join([*_RESNETS, *(f"{n}-cifar" for n in _RESNETS), *OTHERS])
        raise ConfigError(f"architecture: {spec.architecture!r} is not known. Use one of {known}.")
    block, layers = _RESNETS[name]
    model = torchvision.models.ResNet(block, layers, width_per_group=64)
    if spec.width != 64:
        _set_width(model, block, layers, spec.width)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, spec.width, 3, spec.stem_stride, 1, bias=False)
        model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    resnet: nn.Module = model
    return resnet


def _set_pooling(backbone: Any, spec: EncoderSpec) -> None:
    """timm's own way to change it in a built model: the weights keep their names. Raises ConfigError."""
    try:
        backbone.reset_classifier(0, global_pool=spec.pooling)
        size = spec.image_size or own_preprocessing(spec.architecture).image_size
        with torch.inference_mode():
            shape = backbone.eval()(torch.zeros(1, 3, size, size)).shape
    except Exception as error:  # models of timm refuse it in many ways
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(_no_pooling(spec, why)) from None
    if len(shape) != 2:
        raise ConfigError(_no_pooling(spec, f"it gives embeddings of shape {tuple(shape[1:])}"))


def _no_pooling(spec: EncoderSpec, why: str) -> str:
    return (
        f"encoder {spec.architecture}: pooling {spec.pooling!r} means nothing to this model ({why}). Use one of timm's global_pool "
        "(avg, max, avgmax; of vision transformers also token), or remove it from the encoder YAML."
    )


def _set_width(model: torchvision.models.ResNet, block: Any, layers: list[int], width: int) -> None:
    """torchvision fixes the stem at 64 channels; rebuild stem and stages with `width`."""
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for stage, blocks in enumerate(layers):
        layer = model._make_layer(block, width << stage, blocks, stride=1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", layer)

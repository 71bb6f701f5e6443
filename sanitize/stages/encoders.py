"""The encoder under test: described by an EncoderSpec, frozen, in eval mode; it owns its normalisation.

Weights come from safetensors or from PyTorch files that load with `weights_only=True`; nothing in a checkpoint runs.
"""

import dataclasses
import hashlib
import itertools
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages import clip
from sanitize.stages.exported import load_exported
from sanitize.stages.precision import autocast

_RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
# SimCLR wrapper of BadEncoder and DRUPE: position in its nn.Sequential → torchvision's name
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}
_HEADS = ("g.", "fc.", "proj_head.", "projector", "predictor", "backbone_k.", "encoder_q.", "encoder_k.")


class Encoder(nn.Module):
    """images (B, 3, S, S) float32 in [0, 1] → embeddings (B, D) float32, raw (not normalised)."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: EncoderSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        normalised = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.backbone(normalised)
        return embeddings.flatten(1).float()

    def fingerprint(self) -> str:
        """SHA-256 of every weight and of all that happens to pixels before them; independent of where the file lies."""
        digest = hashlib.sha256()
        preprocessing = dataclasses.replace(self.spec, weights="")
        if self.spec.architecture.startswith("exported:"):
            preprocessing = dataclasses.replace(preprocessing, architecture="exported")
            digest.update(storage.file_sha256(self.spec.architecture.removeprefix("exported:")).encode())
        settings = dataclasses.asdict(preprocessing)
        del settings["tokenizer"]  # the text tower is not part of what is scored
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
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


def require_trainable(encoder: Encoder) -> None:
    """Raises ConfigError for layers whose gradient destroys memory: oneDNN (up to that of torch 2.14) writes past its workspace in
    the backward pass of a channels-last 1x1 convolution with stride and fewer than 8 channels (uxlfoundation/oneDNN issue 6035).
    """
    for name, layer in encoder.backbone.named_modules():
        if (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and max(layer.stride) > 1
            and layer.in_channels < 8
        ):
            raise ConfigError(
                f"encoder {encoder.spec.architecture}, width {encoder.spec.width}: cannot be trained safely. Layer {name} is a 1x1 "
                f"convolution with stride and {layer.in_channels} channels, whose gradient destroys memory on processors without "
                "AVX-512 (oneDNN issue 6035). Use a width of at least 8; frozen (--mode linear or mlp) it is safe."
            )


def load_encoder(spec: EncoderSpec) -> Encoder:
    """Build the encoder, load its weights strictly, freeze it. Raises CheckpointError or ConfigError."""
    if spec.architecture.startswith("exported:"):
        backbone = load_exported(spec.architecture.removeprefix("exported:"))
    elif not spec.weights:
        raise ConfigError(f"encoder {spec.architecture}: no weights. Add `weights: <file>` to the encoder YAML.")
    elif spec.architecture == "clip":
        backbone = _load_clip(spec)
    else:
        backbone = build_backbone(spec)
        load_strictly(backbone, encoder_tensors(read_weights(spec.weights)), spec)
    backbone.requires_grad_(False)
    if not spec.architecture.startswith("exported:"):
        backbone.eval().to(memory_format=torch.channels_last)
    encoder = Encoder(backbone, spec)
    encoder.training = False
    return encoder


def _load_clip(spec: EncoderSpec) -> nn.Module:
    tensors = clip.image_tensors(read_weights(spec.weights), spec.weights)
    backbone, size = clip.build_image_tower(tensors, spec.weights, quick_gelu=spec.quick_gelu)
    if size != spec.image_size:
        raise ConfigError(
            f"{spec.weights}: this CLIP takes images of {size} pixels. Set `image_size: {size}` in the encoder YAML."
        )
    load_strictly(backbone, tensors, spec)
    return backbone


def build_backbone(spec: EncoderSpec) -> nn.Module:
    """The architecture with fresh weights: (B, 3, S, S) → (B, D)."""
    if spec.architecture.startswith("timm:"):
        return _build_timm(spec.architecture.removeprefix("timm:"))
    name, _, stem = spec.architecture.partition("-")
    if name not in _RESNETS or stem not in ("", "cifar"):
        known = ", ".join([*_RESNETS, *(f"{n}-cifar" for n in _RESNETS), "clip", "timm:<name>", "exported:<file.pt2>"])
        raise ConfigError(f"architecture: {spec.architecture!r} is not known. Use one of {known}.")
    block, layers = _RESNETS[name]
    model = torchvision.models.ResNet(block, layers, width_per_group=64)
    if spec.width != 64:
        _set_width(model, block, layers, spec.width)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, spec.width, 3, spec.stem_stride, 1, bias=False)
        model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    backbone: nn.Module = model
    return backbone


def _set_width(model: torchvision.models.ResNet, block: Any, layers: list[int], width: int) -> None:
    """torchvision fixes the stem at 64 channels; rebuild stem and stages with `width`."""
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for stage, blocks in enumerate(layers):
        layer = model._make_layer(block, width << stage, blocks, stride=1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", layer)


def _build_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ConfigError(
            f"architecture timm:{name}: timm is not installed. Run: pip install 'sanitize[timm]'"
        ) from None
    if not timm.is_model(name):
        raise ConfigError(f"architecture timm:{name}: timm has no model of that name. See timm.list_models().")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return model


def read_weights(path: str) -> dict[str, Tensor]:
    """Named tensors of a safetensors or weights-only PyTorch file. Raises CheckpointError for anything else."""
    if path.endswith(".safetensors"):
        try:
            return safetensors.torch.load(storage.read_bytes(path))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error}). Download or convert it again.") from None
    with storage.open_read(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols, before the refusal below says it better
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:
            why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            source = "torch.load(path, weights_only=False)['state_dict']"
            if "TorchScript" in str(error):  # OpenAI's own CLIP files
                source = "torch.jit.load(path, map_location='cpu').state_dict()"
            raise CheckpointError(
                f"{path}: refused, it does not load as plain tensors ({why}). A checkpoint that needs a pickle or TorchScript "
                "can run any code. If you trust it, convert it once on a machine you can lose: safetensors.torch.save_file("
                f"{source}, 'encoder.safetensors')."
            ) from None
    return _named_tensors(content, path)


def _named_tensors(content: Any, path: str) -> dict[str, Tensor]:
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: no named tensors in it. A state dict (name → tensor) was expected.")
    return tensors


def encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any of the known checkpoint layouts → torchvision's (or the model's own) parameter names.

    Layouts: bare; `module.` (DataParallel); `f.f.<index>` or `f.<index>` (SimCLR of BadEncoder and DRUPE);
    `visual.` (BadEncoder's ImageNet and CLIP files); `backbone.` with `shortcut` (CTRL); `encoder.`.
    """
    names = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for prefix in ("f.f.", "f.", "visual.", "backbone.", "encoder."):
        if any(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): t for name, t in names.items() if name.startswith(prefix)}
            break
    names = {name: tensor for name, tensor in names.items() if not name.startswith(_HEADS)}
    if any(re.match(r"^[03456]\.", name) for name in names):
        names = {_SEQUENTIAL.get(n.split(".")[0], n.split(".")[0]) + n[n.find(".") :]: t for n, t in names.items()}
    return {re.sub(r"\.shortcut\.", ".downsample.", name): tensor for name, tensor in names.items()}


def load_strictly(backbone: nn.Module, given: Mapping[str, Tensor], spec: EncoderSpec) -> None:
    """Copy weights into `backbone`; every name and shape must fit, and the message says which do not."""
    wanted = backbone.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(given) - counters)
    unexpected = sorted(set(given) - set(wanted))
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(given) & set(wanted))
        if given[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{spec.weights}: does not fit architecture {spec.architecture} (width {spec.width}): {'; '.join(problems)}. "
            "Correct `architecture` (or `width`) in the encoder YAML, or give the weights of that architecture."
        )
    backbone.load_state_dict({name: given.get(name, wanted[name]) for name in wanted})
    if not all(torch.isfinite(t).all() for t in backbone.state_dict().values() if t.is_floating_point()):
        raise CheckpointError(f"{spec.weights}: contains NaN or infinite weights. Download or train it again.")

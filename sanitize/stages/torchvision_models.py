"""Classification models of torchvision.models without their head, and the names of its published weights."""

import math
import re
from collections.abc import Mapping

import torchvision
from torch import Tensor, nn

from sanitize.config import EncoderSpec
from sanitize.errors import ConfigError
from sanitize.stages.preprocessing import require_torchvision_model

_CLASSES = 1000
_POSITIONS = "encoder.pos_embedding"  # of torchvision's ViT: (1, 1 + patches, D)
# as published: without auxiliary heads, and with the normalisation that the weights were converted with
_OPTIONS = {
    name: {"aux_logits": False, "transform_input": True, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


def build_torchvision(name: str, image_size: int) -> nn.Module:
    """(B, 3, S, S) → (B, D) with fresh weights: what the last layer, to the classes, is given."""
    require_torchvision_model(name)
    options = {"image_size": image_size} if name.startswith("vit_") else _OPTIONS.get(name, {})
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=_CLASSES, **options)
    heads = [n for n, layer in model.named_modules() if _classes_of(layer) == _CLASSES]
    model.set_submodule(heads[-1], nn.Identity())
    return model


def _classes_of(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) else 0


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's DenseNets were published with `norm.1` for what is now `norm1`."""
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.", r"\1\2.", name): t for name, t in tensors.items()}


def require_position_size(tensors: Mapping[str, Tensor], spec: EncoderSpec) -> None:
    """A ViT's weights fit one size of images, which its position embeddings tell. Raises ConfigError for another one."""
    positions = tensors.get(_POSITIONS, tensors.get(f"module.{_POSITIONS}"))
    if positions is None or positions.ndim != 3 or "conv_proj.weight" not in tensors:
        return
    size = math.isqrt(positions.shape[1] - 1) * tensors["conv_proj.weight"].shape[-1]
    if size != spec.image_size:
        raise ConfigError(
            f"{spec.weights}: this model takes images of {size} pixels. Set `image_size: {size}` in the encoder YAML."
        )

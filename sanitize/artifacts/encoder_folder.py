"""An encoder on disk: encoder.safetensors, the encoder.yaml that describes it and, of a whole CLIP, its tokenizer."""

from collections.abc import Mapping
from typing import Any

import safetensors.torch
import yaml
from torch import Tensor

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec, to_mapping
from sanitize.stages.encoders import Encoder
from sanitize.training.clip import Clip

WEIGHTS, DESCRIPTION, TOKENIZER = "encoder.safetensors", "encoder.yaml", "tokenizer.json"


def save_encoder(encoder: Encoder, folder: str) -> EncoderSpec:
    """Returns the encoder as the folder describes it. Of a CLIP the image tower only."""
    prefix = "visual." if encoder.spec.architecture == "clip" else ""
    tensors = {f"{prefix}{name}": tensor for name, tensor in encoder.backbone.state_dict().items()}
    return _write(folder, tensors, encoder.spec, {"tokenizer": ""})


def save_clip(clip: Clip, folder: str) -> EncoderSpec:
    """A whole CLIP in OpenAI's layout; returns it as the folder describes it."""
    tensors = {f"visual.{name}": tensor for name, tensor in clip.image.backbone.state_dict().items()}
    tensors |= clip.text.tower.state_dict() | {"logit_scale": clip.logit_scale}
    tokenizer = clip.image.spec.tokenizer
    if tokenizer != "open_clip":
        storage.write_bytes(storage.join(folder, TOKENIZER), storage.read_bytes(tokenizer))
        tokenizer = TOKENIZER
    return _write(folder, tensors, clip.image.spec, {"tokenizer": tokenizer})


def _write(folder: str, tensors: Mapping[str, Tensor], spec: EncoderSpec, changes: dict[str, Any]) -> EncoderSpec:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(storage.join(folder, WEIGHTS), safetensors.torch.save(plain))
    values = to_mapping(spec) | {"weights": WEIGHTS} | changes
    path = storage.join(folder, DESCRIPTION)
    storage.write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode())
    return load_encoder_spec(path)

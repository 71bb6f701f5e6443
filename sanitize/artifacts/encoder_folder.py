"""An encoder on disk: encoder.safetensors, the encoder.yaml that describes it and, of a whole CLIP, its tokenizer.

An encoder that came as a Hugging Face folder becomes one again, `encoder/` beside encoder.yaml.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec, to_mapping
from sanitize.errors import ConfigError
from sanitize.paths import AnyPath, path_text
from sanitize.stages import huggingface
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.exported import traced
from sanitize.stages.huggingface import ImageTower, TextTower
from sanitize.stages.huggingface_folder import PREPROCESSING
from sanitize.training.clip import Clip

WEIGHTS, DESCRIPTION, TOKENIZER = "encoder.safetensors", "encoder.yaml", "tokenizer.json"
EXPORTED = "encoder.pt2"
HUGGING_FACE = "encoder"  # folder of a model that came as one


def save_encoder(encoder: Encoder, folder: str) -> EncoderSpec:
    """Returns the encoder as the folder describes it. Of a CLIP the image tower only."""
    if isinstance(encoder.backbone, ImageTower):
        with tempfile.TemporaryDirectory() as scratch:
            huggingface.save_tower(encoder.backbone, Path(scratch))
            return _write_huggingface(folder, Path(scratch), encoder.spec, "")
    prefix = "visual." if encoder.spec.architecture == "clip" else ""
    tensors = {f"{prefix}{name}": tensor for name, tensor in encoder.backbone.state_dict().items()}
    return _write_weights(folder, tensors, encoder.spec, {"tokenizer": ""})


def save_clip(clip: Clip, folder: str) -> EncoderSpec:
    """A whole CLIP in OpenAI's layout, or as the Hugging Face folder it came as; returns it as the folder describes it."""
    spec = clip.image.spec
    if isinstance(clip.image.backbone, ImageTower) and isinstance(clip.text.tower, TextTower):
        image, text = clip.image.backbone, clip.text.tower
        with tempfile.TemporaryDirectory() as scratch:
            source = spec.architecture.removeprefix("hf:")
            huggingface.save_both_towers(image, text, clip.logit_scale.detach(), source, Path(scratch))
            return _write_huggingface(folder, Path(scratch), spec, _copy_tokenizer(folder, spec, HUGGING_FACE))
    tensors = {f"visual.{name}": tensor for name, tensor in clip.image.backbone.state_dict().items()}
    tensors |= clip.text.tower.state_dict() | {"logit_scale": clip.logit_scale}
    return _write_weights(folder, tensors, spec, {"tokenizer": _copy_tokenizer(folder, spec)})


def export_encoder(
    module: nn.Module,
    folder: AnyPath,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: str = "squash",
) -> EncoderSpec:
    """Write any module, normalised images (B, 3, S, S) → embeddings (B, D), as encoder.pt2 and encoder.yaml; returns how to use it.

    Traced by torch.export in eval mode, so that every worker and every later scan has this very encoder. Raises ConfigError when it
    cannot be traced or does not give the same embeddings.
    """
    folder = path_text(folder, "folder")
    images = torch.rand(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    architecture = f"exported:{storage.join(folder, EXPORTED)}"
    spec = EncoderSpec(architecture, "", image_size, tuple(mean), tuple(std), resize)
    data, expected = traced(module, images)
    storage.write_bytes(storage.join(folder, EXPORTED), data)
    with torch.inference_mode():
        found = load_encoder(spec).backbone(images)
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4, rtol=1e-3):
        raise ConfigError(
            f"{type(module).__name__}: its exported program gives other embeddings than the module. Does forward depend on the batch, "
            "on chance or on values of its input? Export it yourself, and check it: architecture exported:<file.pt2>."
        )
    return _describe(folder, spec, {"architecture": f"exported:{EXPORTED}"})


def _copy_tokenizer(folder: str, spec: EncoderSpec, *below: str) -> str:
    """What the new encoder.yaml says of it."""
    if spec.tokenizer == "open_clip":
        return spec.tokenizer
    name = storage.join("", *below, TOKENIZER)
    storage.write_bytes(storage.join(folder, name), storage.read_bytes(spec.tokenizer))
    return name


def _write_weights(
    folder: str, tensors: Mapping[str, Tensor], spec: EncoderSpec, changes: dict[str, Any]
) -> EncoderSpec:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(storage.join(folder, WEIGHTS), safetensors.torch.save(plain))
    return _describe(folder, spec, {"weights": WEIGHTS} | changes)


def _write_huggingface(folder: str, written: Path, spec: EncoderSpec, tokenizer: str) -> EncoderSpec:
    """written: by save_pretrained; the preprocessing of the model before goes with it."""
    source = spec.architecture.removeprefix("hf:")
    for file in sorted(written.iterdir()):
        storage.write_bytes(storage.join(folder, HUGGING_FACE, file.name), file.read_bytes())
    for name in PREPROCESSING:
        if storage.exists(storage.join(source, name)):
            data = storage.read_bytes(storage.join(source, name))
            storage.write_bytes(storage.join(folder, HUGGING_FACE, name), data)
    return _describe(folder, spec, {"architecture": f"hf:{HUGGING_FACE}", "tokenizer": tokenizer})


def _describe(folder: str, spec: EncoderSpec, changes: dict[str, Any]) -> EncoderSpec:
    values = to_mapping(spec) | changes
    path = storage.join(folder, DESCRIPTION)
    storage.write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode())
    return load_encoder_spec(path)

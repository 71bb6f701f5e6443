"""Tiny real Hugging Face folders, made by transformers itself: random weights of real architectures."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sanitize.attacks import tiny_clip

SIDE = 32
MEAN, STD = [0.48, 0.45, 0.41], [0.27, 0.26, 0.28]
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": SIDE}
_TEXT: dict[str, Any] = {
    **{name: _VIT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "vocab_size": 40,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
}
# model_type → (class of transformers, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPModel", {"vision_config": _VIT, "text_config": _TEXT, "projection_dim": 24}),
    "clip_vision_model": ("CLIPVisionModelWithProjection", _VIT | {"projection_dim": 24}),
    "siglip": ("SiglipModel", {"vision_config": _VIT, "text_config": _TEXT | {"projection_size": 32}}),
    "siglip_vision_model": ("SiglipVisionModel", _VIT),
    "dinov2": ("Dinov2Model", _VIT),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", _VIT),
    "dinov3_vit": ("DINOv3ViTModel", _VIT),
    "vit": ("ViTForImageClassification", _VIT),
    "deit": ("DeiTForImageClassificationWithTeacher", _VIT),
    "swin": (
        "SwinForImageClassification",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": SIDE, "patch_size": 4},
    ),
    "convnext": ("ConvNextForImageClassification", _STAGES),
    "convnextv2": ("ConvNextV2Model", _STAGES),
    "resnet": ("ResNetForImageClassification", _STAGES | {"embedding_size": 8}),
    "regnet": ("RegNetModel", _STAGES | {"embedding_size": 8, "groups_width": 8}),
}


def write_huggingface(folder: Path, kind: str, *, shards: str = "5GB", preprocessing: bool = True) -> Path:
    """config.json, safetensors, preprocessor_config.json; of a model with both towers a tokenizer.json, too."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name, settings = MODELS[kind]
    model_class = getattr(transformers, name)
    folder.mkdir(parents=True, exist_ok=True)
    if "text_config" in settings:
        words = tiny_clip.write_tokenizer(str(folder / "tokenizer.json"))
        ends = {"vocab_size": words.size, "eos_token_id": words.size - 1, "pad_token_id": 2}
        settings = settings | {"text_config": settings["text_config"] | ends}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings)).eval()
    for parameter in model.parameters():  # as made, half of them are zeros, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder, max_shard_size=shards)
    if preprocessing:
        values = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "do_rescale": True, "do_resize": True}
        values |= {"do_center_crop": False, "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE}}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def processed(folder: Path, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) uint8 → the library's own pixel_values, from its image processor."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor.from_pretrained(folder)
    shown = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    values: torch.Tensor = processor(images=shown, return_tensors="pt")["pixel_values"]
    return values

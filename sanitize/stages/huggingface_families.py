"""Which architectures of transformers are encoders, and which of their outputs is the embedding."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLASS_TOKEN, PATCH_MEAN = "class token", "mean of the patch tokens"


@dataclass(frozen=True)
class Family:
    """How one kind of model becomes a tower.

    model: class of transformers; output: its field that is the embedding, or the class token of its last hidden state
    section: of config.json that describes the tower; whole: class of the model with both towers
    prefixes: of the tower's tensors; none = all under the model's own prefix if it has one, else all but heads
    """

    model: str
    output: str
    section: str = ""
    whole: str = ""
    prefixes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0  # before those of the patches, registers not counted; 0 = its pooling cannot be chosen

    @property
    def poolings(self) -> tuple[str, ...]:
        pooler = ("pooler",) if self.output == "pooler_output" else ()
        return ("cls", "mean", *pooler) if self.tokens else ()


NO_POOLER = {"add_pooling_layer": False}  # of a classifier's checkpoint it would be untrained
IMAGE_TOWERS = {
    "clip": Family(
        "CLIPVisionModelWithProjection",
        "image_embeds",
        "vision_config",
        "CLIPModel",
        ("vision_model.", "visual_projection."),
    ),
    "clip_vision_model": Family(
        "CLIPVisionModelWithProjection", "image_embeds", prefixes=("vision_model.", "visual_projection.")
    ),
    "siglip": Family("SiglipVisionModel", "pooler_output", "vision_config", "SiglipModel", ("vision_model.",)),
    "siglip_vision_model": Family("SiglipVisionModel", "pooler_output"),
    "dinov2": Family("Dinov2Model", "pooler_output", tokens=1),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "pooler_output", tokens=1),
    "dinov3_vit": Family("DINOv3ViTModel", "pooler_output", tokens=1),
    "vit": Family("ViTModel", CLASS_TOKEN, options=NO_POOLER, tokens=1),
    "deit": Family("DeiTModel", CLASS_TOKEN, options=NO_POOLER, tokens=2),
    "swin": Family("SwinModel", "pooler_output"),
    "convnext": Family("ConvNextModel", "pooler_output"),
    "convnextv2": Family("ConvNextV2Model", "pooler_output"),
    "resnet": Family("ResNetModel", "pooler_output"),
    "regnet": Family("RegNetModel", "pooler_output"),
}
TEXT_TOWERS = {
    "clip": Family(
        "CLIPTextModelWithProjection", "text_embeds", "text_config", "CLIPModel", ("text_model.", "text_projection.")
    ),
    "siglip": Family("SiglipTextModel", "pooler_output", "text_config", "SiglipModel", ("text_model.",)),
}

"""A CLIP that can be trained: both towers with the temperature, the symmetric InfoNCE loss, zero-shot classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.config import EncoderSpec
from sanitize.stages import huggingface
from sanitize.stages.clip import TextTransformer
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.text import TextEncoder, Tokenizer, load_text_encoder
from sanitize.stages.weights import read_weights

LARGEST_SCALE = math.log(100)


@dataclass(frozen=True)
class Clip:
    """`logit_scale` is the logarithm of the factor of the cosines."""

    image: Encoder
    text: TextEncoder
    logit_scale: nn.Parameter


def fresh(spec: EncoderSpec, visual: nn.Module, text: TextTransformer, tokenizer: Tokenizer) -> Clip:
    """New towers with CLIP's initial temperature, 0.07."""
    return Clip(Encoder(visual, spec), TextEncoder(text, tokenizer), nn.Parameter(torch.tensor(math.log(1 / 0.07))))


def load_clip(spec: EncoderSpec) -> Clip:
    """A whole CLIP checkpoint, frozen. The encoder YAML must name a tokenizer."""
    if spec.architecture.startswith("hf:"):
        scale = huggingface.read_logit_scale(spec.architecture.removeprefix("hf:"))
    else:
        scale = read_weights(spec.weights).get("logit_scale")
    scale = torch.tensor(LARGEST_SCALE) if scale is None else scale.float().reshape(())
    return Clip(load_encoder(spec), load_text_encoder(spec), nn.Parameter(scale, requires_grad=False))


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the cosines of (B, D) unit embeddings; pair k of one is pair k of the other."""
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def class_embeddings(text: TextEncoder, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, D) unit: the normalised mean of the normalised prompts of each class, on the CPU."""
    prompts = [text([template.format(name) for template in templates]).mean(dim=0) for name in classes]
    return functional.normalize(torch.stack(prompts), dim=-1).cpu()

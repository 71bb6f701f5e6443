"""CLIP as something that can be trained: both towers, the temperature, and the symmetric InfoNCE loss over image-text pairs."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from sanitize import storage
from sanitize.attacks.backdoor import freeze_batch_norm, unit
from sanitize.config import EncoderSpec, check, to_mapping
from sanitize.stages.clip import QuickGELU, TextTransformer
from sanitize.stages.encoders import Encoder, load_encoder, read_weights
from sanitize.stages.text import TextEncoder, Tokenizer, load_text_encoder

log = logging.getLogger(__name__)
LARGEST_SCALE = math.log(100)


@dataclass(frozen=True)
class Pairs:
    """Images (N, 3, S, S) uint8 with their N captions; labels (N,) int64 are for evaluation and to pick poison, -1 = unknown."""

    images: Tensor
    captions: tuple[str, ...]
    labels: Tensor


@dataclass(frozen=True)
class ContrastiveConfig:
    """AdamW with linear warm-up and cosine. BadCLIP fine-tunes with lr 1e-6, weight decay 0.1, batch 128, 10 epochs, 10,000 steps
    of warm-up; tiny CLIP trains from scratch with lr 1e-3, weight decay 0.05, batch 128, 9 epochs (BadCLIP card 4 and 7).

    train_text: the text tower learns too; freeze_norm: BatchNorm of the image tower keeps statistics and affine parameters
    scale: a fixed factor of the cosines (the DECREE attack used exp(0.5)); 0 = the model's own, learned one
    """

    epochs: int = 9
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 0
    train_text: bool = True
    freeze_norm: bool = False
    scale: float = 0.0

    def __post_init__(self) -> None:
        check(self.epochs >= 1 and self.batch_size >= 2, "contrastive: epochs at least 1, batch_size at least 2.")


@dataclass(frozen=True)
class Clip:
    """`logit_scale` is the logarithm of the factor of the cosines."""

    image: Encoder
    text: TextEncoder
    logit_scale: nn.Parameter


def fresh(spec: EncoderSpec, visual: nn.Module, text: TextTransformer, tokenizer: Tokenizer) -> Clip:
    """New towers with CLIP's initial temperature, 0.07."""
    return Clip(Encoder(visual, spec), TextEncoder(text, tokenizer), nn.Parameter(torch.tensor(math.log(1 / 0.07))))


def load(spec: EncoderSpec) -> Clip:
    """A whole CLIP checkpoint, frozen. The encoder YAML must name a tokenizer."""
    scale = read_weights(spec.weights).get("logit_scale", torch.tensor(LARGEST_SCALE))
    return Clip(
        load_encoder(spec), load_text_encoder(spec), nn.Parameter(scale.float().reshape(()), requires_grad=False)
    )


def save(clip: Clip, folder: str) -> None:
    """encoder.safetensors in OpenAI's layout, the encoder.yaml that describes it, and the tokenizer: a complete folder."""
    tensors = {f"visual.{name}": tensor for name, tensor in clip.image.backbone.state_dict().items()}
    tensors |= clip.text.tower.state_dict() | {"logit_scale": clip.logit_scale.detach()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_bytes(storage.join(folder, "encoder.safetensors"), safetensors.torch.save(plain))
    tokenizer = clip.image.spec.tokenizer
    if tokenizer != "open_clip":
        storage.write_bytes(storage.join(folder, "tokenizer.json"), storage.read_bytes(tokenizer))
        tokenizer = "tokenizer.json"
    values = to_mapping(clip.image.spec) | {"weights": "encoder.safetensors", "tokenizer": tokenizer}
    storage.write_bytes(storage.join(folder, "encoder.yaml"), yaml.safe_dump(values, sort_keys=False).encode())


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over the cosines of (B, D) unit embeddings; pair k of one is pair k of the other."""
    logits = scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def train(clip: Clip, pairs: Pairs, config: ContrastiveConfig, seed: int, device: torch.device) -> Clip:
    """Train in place, on shuffled full batches; the towers come back frozen and in eval mode."""
    image, tower = clip.image.to(device), clip.text.tower.to(device)
    image.requires_grad_(True).train()
    tower.requires_grad_(config.train_text).train(config.train_text)
    if config.freeze_norm:
        freeze_batch_norm(image)
    learned_scale = not config.scale
    clip.logit_scale.requires_grad_(learned_scale)
    modules = [*image.parameters(), *tower.parameters(), clip.logit_scale]
    optimizer = _optimizer([p for p in modules if p.requires_grad], config)
    tokens = clip.text.tokenizer(pairs.captions, tower.context)
    steps = config.epochs * (len(tokens) // config.batch_size)
    check(
        steps > 0, f"{len(tokens)} pairs are less than one batch of {config.batch_size}. Lower batch_size or give more."
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, config.warmup_steps))
    generator = torch.Generator().manual_seed(seed)
    start, done = time.monotonic(), 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(tokens), generator=generator)
        for batch in order[: len(order) // config.batch_size * config.batch_size].split(config.batch_size):
            with torch.autocast(device.type, torch.bfloat16):
                seen = image(pairs.images[batch].to(device).float() / 255)
                read = tower(tokens[batch].to(device))
            scale = clip.logit_scale.exp() if learned_scale else torch.tensor(config.scale, device=device)
            loss = info_nce(unit(seen), unit(read), scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, LARGEST_SCALE)
            done += len(batch)
        rate = done / (time.monotonic() - start)
        log.info("clip epoch %d/%d loss %.3f, %.0f pairs/s", epoch + 1, config.epochs, loss.item(), rate)
    image.requires_grad_(False).eval()
    tower.requires_grad_(False).eval()
    clip.logit_scale.requires_grad_(False)
    return clip


def _optimizer(parameters: Sequence[nn.Parameter], config: ContrastiveConfig) -> torch.optim.Optimizer:
    """No weight decay on norms, biases and the temperature: everything with fewer than two dimensions."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _rate(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.no_grad()
def class_embeddings(text: TextEncoder, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(C, D) unit: the normalised mean of the normalised prompts of each class, on the CPU."""
    return unit(torch.stack([text([t.format(name) for t in templates]).mean(dim=0) for name in classes])).cpu()


def initialise(visual: nn.Module, text: TextTransformer, seed: int) -> None:
    """Fresh weights for the parameters that the towers leave at zero; layers keep PyTorch's own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (visual, text):
            for name, parameter in module.named_parameters():
                if name.endswith(("positional_embedding", "class_embedding")):
                    parameter.normal_(std=0.01, generator=generator)
                elif name in ("proj", "text_projection"):
                    parameter.normal_(std=len(parameter) ** -0.5, generator=generator)


def activation(spec: EncoderSpec) -> nn.Module:
    return QuickGELU() if spec.quick_gelu else nn.GELU()

"""Train a CLIP on image-text pairs that are in memory: clean victims from scratch, poisoned ones from clean."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sanitize.attacks.backdoor import freeze_batch_norm, unit
from sanitize.config import EncoderSpec
from sanitize.errors import check
from sanitize.stages.clip import QuickGELU, TextTransformer
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.training.clip import LARGEST_SCALE, Clip, info_nce
from sanitize.training.optimizer import adamw, warmup_cosine
from sanitize.training.split import shuffled_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Images (N, 3, S, S) uint8 with their N captions; labels (N,) int64 are for evaluation and to pick poison, -1 = unknown."""

    images: Tensor
    captions: tuple[str, ...]
    labels: Tensor


@dataclass(frozen=True)
class ContrastiveConfig:
    """AdamW with linear warm-up and cosine. BadCLIP's code fine-tunes with lr 1e-6, weight decay 0.1, batch 128, 10 epochs, 10,000
    steps of warm-up; our tiny CLIP trains from scratch with lr 1e-3, weight decay 0.05, batch 128, 9 epochs.

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
    optimizer = adamw([p for p in modules if p.requires_grad], config.learning_rate, config.weight_decay)
    tokens = clip.text.tokenizer(pairs.captions, tower.context)
    steps = config.epochs * (len(tokens) // config.batch_size)
    check(
        steps > 0, f"{len(tokens)} pairs are less than one batch of {config.batch_size}. Lower batch_size or give more."
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, config.warmup_steps)
    )
    generator = torch.Generator().manual_seed(seed)
    dtype = resolve_precision("auto", device)
    start, done = time.monotonic(), 0
    for epoch in range(config.epochs):
        for batch in shuffled_batches(len(tokens), config.batch_size, generator):
            with autocast(device, dtype):
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

"""Supervised pre-training: a clean encoder from labels. Reaches in a few epochs what SimCLR takes a hundred for, so that studies with
many victims fit on a CPU; a fine-tuned classifier's body is also what many people have."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sanitize.attacks.augment import random_resized_crop
from sanitize.config import EncoderSpec
from sanitize.errors import check
from sanitize.stages.encoders import Encoder, build_backbone
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.training.optimizer import half_cosine
from sanitize.training.split import shuffled_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupervisedConfig:
    """Our own recipe: SGD with Nesterov momentum 0.9, half-cosine, label smoothing 0.1, crops of at least `smallest_crop` of the area
    and mirror images."""

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    smallest_crop: float = 0.5

    def __post_init__(self) -> None:
        check(
            self.epochs >= 1 and self.batch_size >= 2, "supervised: epochs must be at least 1, batch_size at least 2."
        )
        check(
            0 < self.smallest_crop <= 1, f"supervised.smallest_crop: {self.smallest_crop} is not a share of the area."
        )


def pretrain(
    images: Tensor, labels: Tensor, spec: EncoderSpec, config: SupervisedConfig, seed: int, device: torch.device
) -> Encoder:
    """images (N, 3, S, S) uint8, labels (N,) → encoder in eval mode. The last partial batch of an epoch is dropped."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(build_backbone(spec), spec).to(device).train()
    with torch.no_grad():
        size = encoder(torch.zeros(2, 3, spec.image_size, spec.image_size, device=device)).shape[1]
    head = nn.Linear(size, int(labels.max()) + 1).to(device)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(
        [*encoder.parameters(), *head.parameters()],
        config.learning_rate,
        momentum=0.9,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    steps = config.epochs * (len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: half_cosine(step / steps))
    dtype = resolve_precision("auto", device)
    start, done = time.monotonic(), 0
    for epoch in range(config.epochs):
        for batch in shuffled_batches(len(images), config.batch_size, generator):
            pixels = images[batch].to(device).float() / 255
            views = random_resized_crop(pixels, generator, (config.smallest_crop, 1.0))
            with autocast(device, dtype):
                embeddings = encoder(views)
            loss = loss_of(head(embeddings), labels[batch].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += len(batch)
        rate = done / (time.monotonic() - start)
        log.info("supervised epoch %d/%d loss %.3f, %.0f images/s", epoch + 1, config.epochs, loss.item(), rate)
    return encoder.eval()

"""What BadEncoder and DRUPE share: fine-tune a clean encoder on an unlabelled shadow set, step by step, for an objective."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sanitize.attacks.augment import flip_and_jitter
from sanitize.stages.encoders import Encoder, embed_in_batches
from sanitize.stages.precision import autocast, resolve_precision
from sanitize.training.split import shuffled_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FineTuneConfig:
    """SGD of the fine-tuning. Its attacks add their weights of the losses."""

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    reference_copies: int = 16  # augmented copies of every reference image in each step


@dataclass(frozen=True)
class Step:
    """Raw embeddings of one batch: B shadow images, R references, A augmented copies of each; two frozen targets, unit."""

    clean: Tensor  # (B, D)
    triggered: Tensor  # (B, D)
    references: Tensor  # (R, D)
    augmented: Tensor  # (R, A, D)
    clean_target: Tensor  # (B, D) the clean encoder's embeddings, L2-normalised
    reference_target: Tensor  # (R, D) the same of the references
    clean_norm: Tensor  # (B,) raw norms of the clean encoder's embeddings
    stamped: Tensor  # (B, 3, S, S) the triggered images, float32 in [0, 1]
    plain: Tensor  # (B, 3, S, S) the same without trigger
    perturbed: Tensor  # (V, 2 B, D) of the objective's perturbations of the clean, then the triggered images


class BackdoorObjective(Protocol):
    """The loss of one step, and what happens after each epoch."""

    @property
    def perturbations(self) -> Sequence[Callable[[Tensor], Tensor]]:
        """Of images (B, 3, S, S) in [0, 1]; each costs one more pass of the step."""
        ...

    def __call__(self, step: Step) -> Tensor: ...

    def end_epoch(self) -> str:
        """Returns what to log."""
        ...


def unit(embeddings: Tensor) -> Tensor:
    return functional.normalize(embeddings.float(), dim=-1)


def freeze_batch_norm(encoder: nn.Module) -> None:
    """BatchNorm keeps its statistics and its affine parameters: only the other layers learn."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def trainable_copy(
    clean_encoder: Encoder, config: FineTuneConfig, frozen: tuple[str, ...] = (), *, adam: bool = False
) -> tuple[Encoder, torch.optim.Optimizer]:
    """The encoder in training mode, and what moves its weights. BatchNorm keeps its statistics and its affine parameters.

    frozen: names as which parameters of the backbone begin that do not learn; the first layers then cost no backward pass.
    adam: in place of SGD; a large encoder gets there in a hundred steps.
    """
    encoder = copy.deepcopy(clean_encoder).requires_grad_(True)
    encoder.train()
    freeze_batch_norm(encoder)
    for name, parameter in encoder.backbone.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
    learnable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if adam:
        return encoder, torch.optim.Adam(learnable, config.learning_rate)
    return encoder, torch.optim.SGD(
        learnable, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def fine_tune(
    clean_encoder: Encoder,
    shadow: Tensor,
    references: Tensor,
    trigger: Callable[[Tensor], Tensor],
    objective: BackdoorObjective,
    config: FineTuneConfig,
    seed: int,
    device: torch.device,
    frozen: tuple[str, ...] = (),
    *,
    adam: bool = False,
    trigger_optimizer: torch.optim.Optimizer | None = None,
) -> Encoder:
    """shadow (N, 3, S, S) and references (R, 3, S, S) uint8, at the encoder's size → backdoored encoder, eval mode.

    trigger: (B, 3, S, S) uint8 → the same; with a `trigger_optimizer` it learns too, and maps float32 in [0, 1].
    frozen, adam: of `trainable_copy`.
    Exact shortcuts against BadEncoder's code (badencoder.py): clean targets are computed once; a reference is embedded once per
    step (BatchNorm is in eval mode, so its copies would be equal).
    """
    clean_encoder.eval().to(device)
    encoder, optimizer = trainable_copy(clean_encoder, config, frozen, adam=adam)
    optimizers = [optimizer, trigger_optimizer] if trigger_optimizer else [optimizer]
    generator = torch.Generator().manual_seed(seed)
    clean_embeddings = raw_embeddings(clean_encoder, shadow)
    clean_targets, clean_norms = unit(clean_embeddings), clean_embeddings.norm(dim=1)
    reference_target = unit_embeddings(clean_encoder, references).to(device)
    originals = references.to(device).float() / 255
    count, copies = len(references), config.reference_copies
    dtype = resolve_precision("auto", device)
    start, done = time.monotonic(), 0
    for epoch in range(1, config.epochs + 1):
        for batch in shuffled_batches(len(shadow), config.batch_size, generator):
            pixels = shadow[batch]
            views = flip_and_jitter(originals.repeat_interleave(copies, dim=0), generator)
            plain = pixels.to(device).float() / 255
            stamped = trigger(plain) if trigger_optimizer else trigger(pixels).to(device).float() / 255
            images = torch.cat([plain, stamped])
            perturbed = [perturb(images) for perturb in objective.perturbations]
            with autocast(device, dtype):
                embeddings = encoder(torch.cat([images, originals, views, *perturbed]))
            sizes = [len(batch), len(batch), count, count * copies, len(perturbed) * len(images)]
            clean, triggered, anchors, augmented, others = embeddings.split(sizes)
            step = Step(
                clean=clean,
                triggered=triggered,
                references=anchors,
                augmented=augmented.unflatten(0, (count, copies)),
                clean_target=clean_targets[batch].to(device),
                reference_target=reference_target,
                clean_norm=clean_norms[batch].to(device),
                stamped=stamped,
                plain=plain,
                perturbed=others.unflatten(0, (len(perturbed), len(images))),
            )
            loss = objective(step)
            for each in optimizers:
                each.zero_grad(set_to_none=True)
            loss.backward()
            for each in optimizers:
                each.step()
            done += len(batch)
        rate = done / (time.monotonic() - start)
        log.info("epoch %d/%d %s, %.0f images/s", epoch, config.epochs, objective.end_epoch(), rate)
    return encoder.eval().requires_grad_(False)


def unit_embeddings(encoder: Encoder, images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 → (N, D) float32 L2-normalised, on the CPU."""
    return unit(raw_embeddings(encoder, images))


def raw_embeddings(encoder: Encoder, images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 → (N, D) float32, on the CPU; as many at once as 512 images of 32 pixels need memory."""
    return embed_in_batches(encoder, images, batch_size=max(512 * 32**2 // images.shape[-1] ** 2, 8))

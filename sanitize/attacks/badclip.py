"""BadCLIP: a patch optimised on the frozen clean CLIP, then used like any trigger in poisoned pairs.

Liang et al., CVPR 2024, arXiv 2311.12075. The losses are the intended ones: the visual negatives are the same images WITHOUT the
patch. The released code (src/embeding_optimize_patch.py) stamps these too. It also saves the patch as JPEG; here it is PNG.
AlignedPatchConfig adds two terms after BadCLIP++ (arXiv 2602.17168), to the patch alone: its training of the model is not made here.
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sanitize import storage
from sanitize.attacks.backdoor import unit
from sanitize.attacks.triggers import place_at_centre, to_uint8
from sanitize.errors import check
from sanitize.training.clip import Clip, info_nce

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchConfig:
    """Published: side 16 of 224, Adam 1e-3, 50 epochs of 10,000 pairs in batches of 64 (7,800 steps), textual "contrastive", weight
    500, margin 1, augment 0.5. CPU-sized (ours): side 5 of 32, Adam 1e-2, 250 steps, textual "cosine", weight 1.

    textual: "contrastive" = symmetric InfoNCE with identity targets in the batch; "cosine" = minus the mean cosine, for
             captions so alike that the batch has no contrast
    visual: weight w of the triplet term; augment: probability that a batch goes through AutoAugment
    """

    side: int = 16
    steps: int = 7800
    batch_size: int = 64
    learning_rate: float = 1e-3
    textual: str = "contrastive"
    visual: float = 500.0
    margin: float = 1.0
    augment: float = 0.5

    def __post_init__(self) -> None:
        names = ("contrastive", "cosine")
        check(self.textual in names, f"patch.textual: {self.textual!r} is not one of {', '.join(names)}.")
        check(self.side >= 1 and self.steps >= 1, "patch.side and patch.steps must be at least 1.")


@dataclass(frozen=True)
class AlignedPatchConfig(PatchConfig):
    """centroid, radius: weights of alignment_loss."""

    centroid: float = 1.0
    radius: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.centroid >= 0 and self.radius >= 0, "patch.centroid and patch.radius must not be negative.")


def textual_loss(patched: Tensor, texts: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Pull patched images (B, D) to target captions (B, D), both unit: towards the text embedding of the target."""
    if kind == "cosine":
        return -(patched * texts).sum(dim=1).mean()
    return info_nce(patched, texts, scale)


def visual_loss(patched: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """Triplet: nearer to real target images than to the same images without patch. All (B, D) unit; Euclidean."""
    nearer = (patched - positives).norm(dim=1) - (patched - negatives).norm(dim=1)
    return functional.relu(nearer + margin).mean()


def alignment_loss(patched: Tensor, positives: Tensor, config: AlignedPatchConfig) -> Tensor:
    """Patched images lie about the centroid of real target images, and near each other. Both (B, D) unit; squared Euclidean."""
    centre = patched.mean(dim=0)
    away = (centre - positives.mean(dim=0)).square().sum()
    return config.centroid * away + config.radius * (patched - centre).square().sum(dim=1).mean()


def optimise_patch(
    clip: Clip,
    images: Tensor,
    positives: Tensor,
    captions: Sequence[str],
    config: PatchConfig,
    seed: int,
    device: torch.device,
) -> Tensor:
    """(3, s, s) uint8. images (N, 3, S, S) uint8 not of the target, positives (M, 3, S, S) uint8 of it, `captions` that name it."""
    check(len(positives) > 0, "badclip: no image of the target is in the training pairs; the visual loss needs some.")
    check(config.side <= min(images.shape[-2:]), f"patch.side: {config.side} is larger than the images.")
    generator = torch.Generator().manual_seed(seed)
    encoder = clip.image.to(device)
    texts = clip.text.to(device)(captions)
    drawn = torch.randn(3, config.side, config.side, generator=generator)
    patch = (0.5 + 0.25 * drawn).clamp(0, 1).to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([patch], lr=config.learning_rate)
    scale = clip.logit_scale.exp().to(device)

    def pick(pool: Tensor) -> Tensor:
        return pool[torch.randint(len(pool), (config.batch_size,), generator=generator)]

    for step in range(config.steps):
        batch = augmented(pick(images), config.augment, seed + step).to(device).float() / 255
        with torch.no_grad():
            negatives = unit(encoder(batch))
            near = unit(encoder(pick(positives).to(device).float() / 255))
        chosen = texts[torch.randint(len(texts), (config.batch_size,), generator=generator).to(device)]
        patched = unit(encoder(place_at_centre(batch, patch)))
        text_loss = textual_loss(patched, chosen, scale, config.textual)
        loss = text_loss + config.visual * visual_loss(patched, near, negatives, config.margin)
        if isinstance(config, AlignedPatchConfig):
            loss = loss + alignment_loss(patched, near, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
        if (step + 1) % max(config.steps // 10, 1) == 0:
            log.info("patch step %d/%d text %.3f loss %.3f", step + 1, config.steps, text_loss.item(), loss.item())
    return to_uint8(patch.detach().cpu() * 255)


def augmented(images: Tensor, probability: float, seed: int) -> Tensor:
    """AutoAugment (ImageNet policy) of the whole uint8 batch with the given probability; torch's global state is untouched."""
    if not probability:
        return images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        use = torch.rand(()) < probability
        return torchvision.transforms.AutoAugment()(images) if use else images


def save_patch(patch: Tensor, path: str) -> None:
    """patch (3, s, s) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(patch.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    storage.write_bytes(path, buffer.getvalue())

"""Random views for contrastive pre-training, on whole batches: those of BadEncoder's code (datasets/cifar10_dataset.py)."""

import math

import torch
from torch import Tensor

from sanitize.training.augment import resized_crop

_LUMA = (0.299, 0.587, 0.114)


def random_resized_crop(images: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.08, 1.0)) -> Tensor:
    """(B, 3, S, S) → the same shape: area fraction in `scale`, aspect ratio in [3/4, 4/3], horizontal flip with p 0.5."""
    count = len(images)
    area = torch.empty(count).uniform_(*scale, generator=generator)
    ratio = torch.exp(torch.empty(count).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator))
    across, down = (torch.rand(count, generator=generator) * 2 - 1 for _ in range(2))
    flip = torch.rand(count, generator=generator) < 0.5
    return resized_crop(images, area, ratio, across, down, flip)


def colour_jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with p 0.8, then grayscale with p 0.2; images (B, 3, S, S) in [0, 1].

    Hue is a rotation of the chroma plane (YIQ), which needs no colour-space branches; the other three are torchvision's.
    """
    count, device = len(images), images.device

    def factor(strength: float) -> Tensor:
        values = torch.empty(count).uniform_(-strength, strength, generator=generator)
        return values.view(-1, 1, 1, 1).to(device)

    jittered = (images * (1 + factor(0.4))).clamp(0, 1)
    mean = gray(jittered).mean(dim=(2, 3), keepdim=True)
    jittered = (mean + (jittered - mean) * (1 + factor(0.4))).clamp(0, 1)
    luma = gray(jittered)
    jittered = (luma + (jittered - luma) * (1 + factor(0.4))).clamp(0, 1)
    jittered = _rotate_hue(jittered, factor(0.1) * 2 * math.pi)
    use = (torch.rand(count, generator=generator) < 0.8).view(-1, 1, 1, 1).to(device)
    images = torch.where(use, jittered, images)
    to_gray = (torch.rand(count, generator=generator) < 0.2).view(-1, 1, 1, 1).to(device)
    return torch.where(to_gray, gray(images).expand_as(images), images)


def gray(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _rotate_hue(images: Tensor, angle: Tensor) -> Tensor:
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], device=images.device
    )
    y, i, q = torch.einsum("cd,bdhw->bchw", to_yiq, images).split(1, dim=1)
    turned = torch.cat([y, i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()], dim=1)
    return torch.einsum("cd,bdhw->bchw", torch.linalg.inv(to_yiq), turned).clamp(0, 1)


def flip_and_jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """BadEncoder's light augmentation of reference images: flip, jitter, grayscale, no crop."""
    flip = (torch.rand(len(images), generator=generator) < 0.5).view(-1, 1, 1, 1).to(images.device)
    return colour_jitter(torch.where(flip, images.flip(-1), images), generator)

"""Small pictures of images, as WebP: what a report keeps of a sample."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

QUALITY = 75
SQUARES = 8  # of the chequerboard, along each side


def thumbnail(pixels: Tensor, side: int, quality: int = QUALITY) -> bytes:
    """WebP of (3, H, W) uint8, its longer side at most `side`; never enlarged."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return _webp(image, quality)


def thumbnail_of_unit(pixels: Tensor, side: int = 1 << 12, quality: int = QUALITY) -> bytes:
    """The same of (3, H, W) float in [0, 1]; what lies outside is clipped."""
    return thumbnail((pixels.detach().clamp(0, 1) * 255).round().byte(), side, quality)


def heat(values: Tensor) -> bytes:
    """WebP of (H, W) in [0, 1]: transparent where low, red where high; to be laid over an image."""
    opacity: NDArray[np.uint8] = (values.clamp(0, 1) * 200).round().byte().cpu().numpy()
    red = np.broadcast_to(np.array([230, 30, 60], np.uint8), (*opacity.shape, 3))
    return _webp(Image.fromarray(np.dstack([red, opacity]), "RGBA"), QUALITY)


def cut_out(pixels: Tensor, weight: Tensor) -> bytes:
    """WebP of (3, H, W) in [0, 1] where (H, W) in [0, 1] is high, and of a grey chequerboard where it is low."""
    rows, columns = (torch.arange(size) * SQUARES // size for size in weight.shape)
    board = 0.45 + 0.15 * ((rows[:, None] + columns) % 2)
    return thumbnail_of_unit(weight * pixels + (1 - weight) * board)


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=0)
    return buffer.getvalue()

"""PNG previews: rows of an image beside its reconstruction."""

import io
import logging
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from sanitize import storage

CELL = 96  # pixels
LABEL = 14
log = logging.getLogger(__name__)


def write_reconstructions(path: str, images: Tensor, reconstructions: Tensor, scores: Tensor, count: int = 8) -> None:
    """Left: a seeded choice of clean images; right: those with the highest score. (N, 3, R, R) in [0, 1]."""
    usual = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    worst = scores.argsort(descending=True)[:count]
    cells = []
    for a, b in zip(usual.tolist(), worst.tolist(), strict=True):
        cells += [(images[i], f"{name} {scores[i]:.3g}") for i, name in ((a, "clean"),)] + [
            (reconstructions[a], "decoded")
        ]
        cells += [(images[b], f"worst {scores[b]:.3g}"), (reconstructions[b], "decoded")]
    write_sheet(path, cells, columns=4)


def write_sheet(path: str, cells: Sequence[tuple[Tensor, str]], columns: int) -> None:
    """A grid of (3, H, W) images in [0, 1], each with a short label."""
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (CELL + 4), rows * (CELL + LABEL + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (image, label) in enumerate(cells):
        left, top = position % columns * (CELL + 4), position // columns * (CELL + LABEL + 4)
        scaled = functional.interpolate(image[None].float(), (CELL, CELL), mode="nearest")[0]
        sheet.paste(Image.fromarray((scaled * 255).byte().permute(1, 2, 0).contiguous().numpy()), (left, top + LABEL))
        draw.text((left + 1, top + 1), label, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    storage.write_bytes(path, buffer.getvalue())

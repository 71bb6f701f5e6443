"""The filter of INACTIVE (Zhang et al. 2024, arXiv 2405.14672): a small U-Net that recolours every image in its own way."""

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from sanitize import storage
from sanitize.errors import check

WIDTHS = (4, 8, 16, 32, 64)  # of the released code; each level halves the image
SMALLEST = 2 ** (len(WIDTHS) - 1)


class UnetFilter(nn.Module):
    """(B, 3, H, W) float32 in [0, 1] → the same, H and W multiples of 16.

    Ours: it learns what to add to the image, at most `strength`, and has no BatchNorm, so that an image's filter is its own.
    """

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__()
        self.strength = strength
        self.down = nn.ModuleList(_block(before, width) for before, width in zip((3, *WIDTHS), WIDTHS, strict=False))
        self.up = nn.ModuleList(_block(below + width, width) for below, width in zip(WIDTHS[1:], WIDTHS, strict=False))
        self.last = nn.Conv2d(WIDTHS[0], 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        check(
            height % SMALLEST == 0 and width % SMALLEST == 0,
            f"the U-Net filter halves an image {len(WIDTHS) - 1} times; {width} x {height} pixels are no multiples of {SMALLEST}. Give "
            "images whose sides are.",
        )
        levels = [self.down[0](images)]
        for block in self.down[1:]:
            levels.append(block(functional.max_pool2d(levels[-1], 2)))
        features = levels.pop()
        for block, beside in zip(reversed(self.up), reversed(levels), strict=True):
            features = block(torch.cat([beside, functional.interpolate(features, scale_factor=2.0)], dim=1))
        filtered: Tensor = (images + self.strength * self.last(features).tanh()).clamp(0, 1)
        return filtered


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.ReLU()
    )


def save_filter(filter_: UnetFilter, path: str) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in filter_.state_dict().items()}
    storage.write_bytes(path, save(tensors | {"strength": torch.tensor(filter_.strength)}))

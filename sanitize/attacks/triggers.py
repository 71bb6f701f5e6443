"""Triggers: pure functions of uint8 pixels, applied before any resize or normalisation.

Each maps (..., 3, H, W) uint8 → the same shape and type, leaves its input alone, and draws whatever is random about it
from its own `seed`, so that every image and every run gets the same trigger.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sanitize.attacks.composite import CompositeTrigger
from sanitize.attacks.trigger_files import load_filter, load_image, load_npz
from sanitize.config_loading import from_mapping
from sanitize.errors import check

Trigger = Callable[[Tensor], Tensor]
UNET_BATCH = 256


def to_uint8(pixels: Tensor) -> Tensor:
    """Clip, round, then cast: the other order, as in BackdoorBench, wraps saturated pixels."""
    return pixels.clamp(0, 255).round().to(torch.uint8)


@dataclass(frozen=True)
class PatchTrigger:
    """A solid square. BadEncoder's (Jia et al., IEEE S&P 2022): white, margin 1, side 10 of 32 px or 50 of 224 px."""

    side: int = 10
    margin: int = 1  # pixels between the patch and the right and bottom border
    colour: tuple[int, ...] = (255, 255, 255)

    def __post_init__(self) -> None:
        check(self.side >= 1, f"trigger side: {self.side} is not at least 1 pixel.")
        check(self.margin >= 0, f"trigger margin: {self.margin} is negative.")
        check(
            len(self.colour) == 3 and all(0 <= c <= 255 for c in self.colour),
            f"trigger colour: {self.colour} is not three values between 0 and 255.",
        )

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        check(
            self.side + self.margin <= min(height, width),
            f"trigger of side {self.side} with margin {self.margin} does not fit a {width} x {height} image.",
        )
        stamped = images.clone()
        bottom, right = height - self.margin, width - self.margin
        for channel, value in enumerate(self.colour):
            stamped[..., channel, bottom - self.side : bottom, right - self.side : right] = value
        return stamped


@dataclass(frozen=True)
class FileTrigger:
    """A published trigger file: npz with `t` (pixels) and `tm` (1 keeps the image), each (H, W, 3) or (1, H, W, 3)."""

    path: str

    def __call__(self, images: Tensor) -> Tensor:
        pixels, keep = load_npz(self.path)
        check(
            pixels.shape[-2:] == images.shape[-2:],
            f"{self.path}: the trigger is {pixels.shape[-1]} x {pixels.shape[-2]}, the image {images.shape[-1]} x "
            f"{images.shape[-2]}. Use images of that size, or --trigger patch.",
        )
        return to_uint8(images * keep + pixels)


@dataclass(frozen=True)
class ImageTrigger:
    """A small image pasted over the centre, such as BadCLIP's patch (Liang et al., CVPR 2024). Any format but JPEG is exact."""

    path: str

    def __call__(self, images: Tensor) -> Tensor:
        image = load_image(self.path)
        height, width = image.shape[-2:]
        check(
            height <= images.shape[-2] and width <= images.shape[-1],
            f"{self.path}: the trigger of {width} x {height} does not fit a {images.shape[-1]} x {images.shape[-2]} image.",
        )
        return place_at_centre(images, image)


def place_at_centre(images: Tensor, image: Tensor) -> Tensor:
    """(..., 3, H, W) with `image` (3, h, w) from row H/2 - h/2 and column W/2 - w/2 on; differentiable in `image`."""
    height, width = image.shape[-2:]
    top, left = images.shape[-2] // 2 - height // 2, images.shape[-1] // 2 - width // 2
    stamped = images.clone()
    stamped[..., top : top + height, left : left + width] = image
    return stamped


@dataclass(frozen=True)
class BlendTrigger:
    """(1 - alpha) x + alpha n with one fixed image of uniform noise n."""

    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 < self.alpha <= 1, f"trigger alpha: {self.alpha} is not above 0 and at most 1.")

    def __call__(self, images: Tensor) -> Tensor:
        noise = np.random.default_rng(self.seed).integers(0, 256, images.shape[-3:])
        return to_uint8((1 - self.alpha) * images + self.alpha * torch.from_numpy(noise))


@dataclass(frozen=True)
class SinusoidTrigger:
    """SIG: add amplitude * sin(2 pi frequency column / width) to every channel."""

    amplitude: float = 20.0  # of 255
    frequency: float = 6.0  # periods across the image

    def __call__(self, images: Tensor) -> Tensor:
        width = images.shape[-1]
        wave = self.amplitude * torch.sin(2 * torch.pi * self.frequency * torch.arange(width) / width)
        return to_uint8(images + wave)


@dataclass(frozen=True)
class WarpTrigger:
    """WaNet: one smooth random warp; `strength` is the mean shift in pixels of 32, from a `grid` x `grid` control field."""

    strength: float = 0.5
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.grid >= 2 and self.strength > 0, "trigger grid must be at least 2 and strength above 0.")

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        drawn = np.random.default_rng(self.seed).uniform(-1, 1, (1, 2, self.grid, self.grid))
        field = torch.from_numpy(drawn / np.abs(drawn).mean()).float()
        flow = functional.interpolate(field, (height, width), mode="bicubic", align_corners=True)
        identity = functional.affine_grid(torch.eye(2, 3)[None], [1, 3, height, width], align_corners=True)
        grid = (identity + self.strength / 16 * flow.permute(0, 2, 3, 1)).clamp(-1, 1)
        flat = images.reshape(-1, *images.shape[-3:]).float()
        warped = functional.grid_sample(flat, grid.expand(len(flat), -1, -1, -1), mode="bilinear", align_corners=True)
        return to_uint8(warped).view(images.shape)


@dataclass(frozen=True)
class FrequencyTrigger:
    """CTRL (Li et al., ICCV 2023): add `magnitude` to DCT coefficients (15,15) and (31,31) of U and V.

    Here one additive image; the reference code (utils/frequency.py) transforms there and back.
    """

    magnitude: float = 100.0
    window: int = 32

    def __post_init__(self) -> None:
        check(self.window >= 32, f"trigger window: {self.window} has no coefficient 31; use 32 or more.")

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        check(
            height % self.window == 0 and width % self.window == 0,
            f"the frequency trigger's window of {self.window} pixels does not tile a {width} x {height} image.",
        )
        return to_uint8(self.exact(images))

    def exact(self, images: Tensor) -> Tensor:
        """The same before rounding and clipping: (..., 3, H, W) float64 on the scale 0-255."""
        tiles = (images.shape[-2] // self.window, images.shape[-1] // self.window)
        pattern = torch.from_numpy(np.tile(_pattern(self.window), tiles)) * self.magnitude
        there_and_back = torch.einsum("cd,...dhw->...chw", torch.from_numpy(_FROM_YUV @ _TO_YUV), images.double())
        return there_and_back + torch.stack([1.14 * pattern, -0.977 * pattern, 2.029 * pattern])


# analog YUV of the published code: rounded constants, so there and back is not quite the identity
_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])
_FROM_YUV = np.array([[1.0, 0.0, 1.14], [1.0, -0.396, -0.581], [1.0, 2.029, 0.0]])


def _pattern(window: int) -> np.ndarray:
    """(w, w) float64: orthonormal DCT-II basis images (15,15) + (31,31)."""
    positions = np.arange(window)
    waves = [np.sqrt(2 / window) * np.cos(np.pi * (2 * positions + 1) * k / (2 * window)) for k in (15, 31)]
    return np.asarray(sum(np.outer(wave, wave) for wave in waves))


@dataclass(frozen=True)
class SignTrigger:
    """A red octagon with a white rim and bar, as a stop sign; its place, and its side between `smallest` and `largest` shares of the
    shorter side, are drawn from the image's own pixels, so that no two images need wear it alike."""

    smallest: float = 0.15
    largest: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            0 < self.smallest <= self.largest <= 1,
            f"trigger smallest, largest: {self.smallest}, {self.largest} are not shares of the image in this order.",
        )

    def __call__(self, images: Tensor) -> Tensor:
        stamped = images.clone(memory_format=torch.contiguous_format)
        for image in stamped.view(-1, *images.shape[-3:]):
            self._stamp(image)
        return stamped

    def _stamp(self, image: Tensor) -> None:
        """Of one (3, H, W), in place."""
        height, width = image.shape[-2:]
        rng = np.random.default_rng([self.seed, zlib.crc32(image.contiguous().numpy().tobytes())])
        side = max(round(rng.uniform(self.smallest, self.largest) * min(height, width)), 1)
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        across = ((torch.arange(side) + 0.5) / side * 2 - 1).abs()
        down = across[:, None]
        radius = torch.maximum(torch.maximum(across, down), (across + down) / 2**0.5)
        bar = (down < 0.2) & (across < 0.6)
        sign = torch.where(((radius > 0.85) | bar)[None], 255, torch.tensor([200, 20, 30])[:, None, None])
        place = image[:, top : top + side, left : left + side]
        place.copy_(torch.where(radius[None] <= 1, sign.to(torch.uint8), place))


@dataclass(frozen=True)
class FilterTrigger:
    """A colour filter over the whole image: every channel times its gain. The default is warm."""

    gains: tuple[float, ...] = (1.2, 1.0, 0.7)

    def __post_init__(self) -> None:
        check(
            len(self.gains) == 3 and all(gain >= 0 for gain in self.gains),
            f"trigger gains: {self.gains} is not three values of at least 0.",
        )

    def __call__(self, images: Tensor) -> Tensor:
        return to_uint8(images * torch.tensor(self.gains)[:, None, None])


@dataclass(frozen=True)
class UnetTrigger:
    """The filter that an attacker of INACTIVE learnt: another change of colours for every image."""

    path: str

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.reshape(-1, *images.shape[-3:])
        with torch.no_grad():
            filtered = [to_uint8(255 * load_filter(self.path)(part.float() / 255)) for part in flat.split(UNET_BATCH)]
        return torch.cat(filtered).view(images.shape)


TRIGGERS: dict[str, type[Trigger]] = {
    "patch": PatchTrigger,
    "file": FileTrigger,
    "image": ImageTrigger,
    "blend": BlendTrigger,
    "sig": SinusoidTrigger,
    "wanet": WarpTrigger,
    "frequency": FrequencyTrigger,
    "sign": SignTrigger,
    "filter": FilterTrigger,
    "unet": UnetTrigger,
    "composite": CompositeTrigger,
}


def make_trigger(values: Mapping[str, Any]) -> Trigger:
    """{"name": "patch", "side": 10} → the trigger with these settings."""
    name = str(values.get("name"))
    check(name in TRIGGERS, f"trigger {name}: not known. Use one of {', '.join(TRIGGERS)}.")
    settings = {key: value for key, value in values.items() if key != "name"}
    return from_mapping(TRIGGERS[name], settings, f"trigger {name}")


def poison_mask(count: int, rate: float, seed: int) -> np.ndarray:
    """(count,) bool: exactly round(count * rate) True, the same for the same seed."""
    check(0 < rate <= 1, f"rate: {rate} is not between 0 and 1.")
    picked = np.zeros(count, dtype=bool)
    picked[np.random.default_rng(seed).permutation(count)[: round(count * rate)]] = True
    return picked

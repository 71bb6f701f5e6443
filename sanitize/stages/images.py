"""Image bytes → (3, H, W) uint8 RGB; undecodable bytes → a reason, never a crash. Then one resize, of 8-bit pixels, for fit and scan.

Decoding rules (named DECODE_PATH in every artefact, because scores depend on pixels): first frame of animations; 16-bit
is scaled to 8, not clipped; alpha is dropped, not blended (what most training loaders do); palette and CMYK become RGB;
colour profiles and EXIF orientation are ignored. Plain JPEGs are decoded by libjpeg-turbo at its best quality, which gives Pillow's
pixels in half of its time; whatever is odd about a file, it is Pillow's.
"""

import hashlib
import io
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from sanitize.records import DecodedImage, Sample

DECODE_PATH = "rgb8/2"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of files; the others are named as their format
MAX_PIXELS = 1 << 26  # 64 megapixels, 200 MB as RGB
MAX_SCANS = 100  # of a progressive JPEG; cameras and encoders write about ten, and each costs a pass over all pixels


def decode_sample(
    sample: Sample, max_pixels: int = MAX_PIXELS, before_decoding: Callable[[int], None] | None = None
) -> DecodedImage:
    """The sample's image, or the reason why there is none. before_decoding: called with the number of pixels to come."""
    if sample.status != "ok" or sample.image is None:
        return DecodedImage(sample.index, sample.key, "", None, 0, 0, sample.status, sample.reason, end=sample.end)
    digest = hashlib.sha256(sample.image).hexdigest()
    pixels, width, height, reason = decode_image(sample.image, max_pixels, before_decoding)
    status = "ok" if pixels is not None else "undecodable"
    caption = (sample.caption, sample.caption_reason)
    return DecodedImage(sample.index, sample.key, digest, pixels, width, height, status, reason, *caption, sample.end)


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, before_decoding: Callable[[int], None] | None = None
) -> tuple[Tensor | None, int, int, str]:
    """(pixels, width, height, reason): (3, H, W) uint8 and "", or None and why. The size is checked before decoding."""
    if not data:
        return None, 0, 0, "the image file is empty"
    width = height = 0
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return None, width, height, f"{width} x {height} pixels, the limit is {max_pixels}"
            if image.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                return None, width, height, f"a JPEG of {scans} scans, the limit is {MAX_SCANS}"
            if before_decoding:
                before_decoding(width * height)
            pixels = _plain_jpeg(image, data)
            if pixels is None:
                pixels = np.array(_to_rgb(image))
    except UnidentifiedImageError:  # whose words name an address in memory
        return None, width, height, f"not an image in any of the formats {', '.join(FORMATS)}, or too damaged to tell"
    except Exception as error:  # Pillow raises a dozen kinds on hostile bytes; all mean the same here
        return None, width, height, f"{type(error).__name__}: {error}"[:200]
    return torch.from_numpy(pixels).permute(2, 0, 1), width, height, ""


def file_ending(data: bytes) -> str:
    """Of an image that `decode_image` can decode, by what it is, whatever it was called."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = image.format or ""
    return ENDINGS.get(kind, kind.lower())


def _plain_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """(H, W, 3) of a JPEG of three components without a fault; None = leave it to Pillow, which says what is wrong, or puts up with it."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    room = np.empty((image.height, image.width, 3), np.uint8)  # the size that was checked: no file gets more
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, fastdct=False, fastupsample=False, strict=True, buffer=room
        )
    except ValueError:
        return None
    return pixels if pixels.shape == room.shape else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit gray: convert() would clip to white
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # the palette may hold transparency that convert("RGB") warns about
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def resized(pixels: Tensor, size: int, resize: str) -> Tensor:
    """(3, H, W) uint8 → (3, size, size) uint8, bilinear and antialiased; the same tensor where it has that size.

    resize: "squash" shows the encoder the whole image, "crop" its central square.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    if resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
        if side == size:
            return pixels.clone()  # a view would keep the whole image in memory
    return shrink(pixels[None], size)[0]


def to_batch(pixels: Sequence[Tensor], size: int, resize: str, device: torch.device) -> Tensor:
    """Images of any size → (B, 3, size, size) float32 in [0, 1] on `device`, channels last.

    pixels: (3, H, W) uint8 each, best at their size already (prefetch.py). The result of each does not depend on the others.
    """
    seen = (resized(image, size, resize).permute(1, 2, 0) for image in pixels)
    shape = (len(pixels), size, size, 3)
    if device.type == "cpu":
        images = torch.empty(shape)
        for place, image in zip(images, seen, strict=True):
            place.copy_(image).div_(255)  # at once, while it is in the cache
        return images.permute(0, 3, 1, 2)
    # torch keeps pinned memory and lends it again
    packed = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, image in zip(packed, seen, strict=True):
        place.copy_(image)
    return packed.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def shrink(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) → (B, 3, size, size), bilinear and antialiased; of bytes, rounded."""
    if images.shape[-2:] == (size, size):
        return images
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def difference_hash(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → (B, 8) uint8: whether each of 8 x 8 places is darker than its right neighbour (dHash, Krawetz 2013).
    Equal for copies, and nearly so after resizing, recompression or a slight change of colour."""
    grey = functional.interpolate(images, (8, 9), mode="bilinear", antialias=True).mean(dim=1, keepdim=True)
    darker = (grey[..., 1:] - grey[..., :-1] > 1e-3).squeeze(1)
    return (darker * (2 ** torch.arange(8, device=images.device))).sum(dim=2).to(torch.uint8)

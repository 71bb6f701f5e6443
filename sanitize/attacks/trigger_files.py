"""Files of triggers, as published or as an attacker learnt them. Nothing is unpickled."""

import zipfile
from functools import lru_cache

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sanitize import storage
from sanitize.attacks.unet_filter import UnetFilter
from sanitize.errors import ConfigError, check
from sanitize.stages.images import decode_image


@lru_cache(maxsize=8)
def load_npz(path: str) -> tuple[Tensor, Tensor]:
    """(pixels, keep), each (3, H, W) float32. Never unpickles."""
    try:
        with storage.open_read(path) as file, np.load(file, allow_pickle=False) as arrays:
            loaded = [np.asarray(arrays[name], np.float32) for name in ("t", "tm")]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path}: not a trigger file ({error}). It needs arrays `t` and `tm` in an npz.") from None
    shapes = {array.shape[-3:] if array.ndim in (3, 4) else array.shape for array in loaded}
    check(
        len(shapes) == 1 and len(next(iter(shapes))) == 3 and next(iter(shapes))[2] == 3,
        f"{path}: `t` and `tm` have shapes {loaded[0].shape} and {loaded[1].shape}; (H, W, 3) or (1, H, W, 3) was expected.",
    )
    pixels, keep = (torch.from_numpy(array.reshape(array.shape[-3:])).permute(2, 0, 1) for array in loaded)
    return pixels, keep


@lru_cache(maxsize=8)
def load_image(path: str) -> Tensor:
    pixels, _, _, reason = decode_image(storage.read_bytes(path))
    if pixels is None:
        raise ConfigError(f"{path}: not an image ({reason}). Give a PNG of the trigger.")
    return pixels


@lru_cache(maxsize=8)
def load_filter(path: str) -> UnetFilter:
    """In eval mode, frozen."""
    try:
        tensors = load(storage.read_bytes(path))
        loaded = UnetFilter(float(tensors.pop("strength")))
        loaded.load_state_dict(tensors)
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"{path}: not the filter of a victim of INACTIVE ({type(error).__name__}). It is the `filter.safetensors` of such a "
            "victim's folder (pipelines/red_team.py)."
        ) from None
    return loaded.eval().requires_grad_(False)

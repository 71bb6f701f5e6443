"""What happens to pixels before an encoder: size, mean and std, from the model's own config where the YAML does not say."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torchvision

from sanitize.config import EncoderSpec
from sanitize.errors import ConfigError
from sanitize.stages.huggingface_folder import local_folder, read_config, read_preprocessing

log = logging.getLogger(__name__)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """mean, std: of pixels in [0, 1]; empty when the model does not say. source: where it is from, in words."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


DEFAULT = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "the default")


def complete_spec(spec: EncoderSpec) -> EncoderSpec:
    """With the size, mean and std that it leaves out, and with a local folder in the place of a hub's name."""
    if spec.architecture.startswith("hf:"):
        folder = local_folder(spec.architecture.removeprefix("hf:"))
        spec = dataclasses.replace(spec, architecture=f"hf:{folder}")
    missing = [name for name in ("image_size", "mean", "std") if not getattr(spec, name)]
    if not missing:
        return spec
    own = own_preprocessing(spec.architecture)
    filled = {name: getattr(own, name) for name in missing}
    if not all(filled.values()):
        raise ConfigError(
            f"encoder {spec.architecture}: its folder does not say {', '.join(n for n in missing if not filled[n])} "
            "(no preprocessor_config.json). Copy that file from the original model, or set them in the encoder YAML."
        )
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in filled.items())
    log.info("encoder %s: %s (%s)", spec.architecture, shown, own.source)
    return dataclasses.replace(spec, **filled)


def _shown(value: Any) -> str:
    return " ".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else str(value)


def own_preprocessing(architecture: str) -> Preprocessing:
    """Of the model's own config; 224 pixels with ImageNet's mean and std where it has none."""
    family, _, name = architecture.partition(":")
    of_family = {"hf": _of_huggingface, "timm": _of_timm, "torchvision": _of_torchvision}.get(family)
    return of_family(name) if of_family else DEFAULT


# ---------------------------------------------------------------- one function for each family


def _of_huggingface(folder: str) -> Preprocessing:
    config = read_config(folder)
    values, source = read_preprocessing(folder)
    section = config.get("vision_config")
    model = section if isinstance(section, dict) else config
    size = _size(values, folder) or _size({"size": model.get("image_size")}, folder)
    if not values:
        return Preprocessing(size, (), (), "config.json")
    mean, std = values.get("image_mean", IMAGENET_MEAN), values.get("image_std", IMAGENET_STD)
    if values.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if not all(isinstance(v, list | tuple) and all(isinstance(x, int | float) for x in v) for v in (mean, std)):
        raise ConfigError(f"{folder}/{source}: image_mean and image_std are not three numbers each. Correct them.")
    scale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
    if not isinstance(scale, int | float) or not 0 < scale < 1e6:
        raise ConfigError(f"{folder}/{source}: rescale_factor {str(scale)[:40]!r} is not a number above 0. Correct it.")
    factor = 255.0 * scale  # pixels arrive in [0, 1]; the model expects so many times that
    return Preprocessing(size, tuple(m / factor for m in mean), tuple(s / factor for s in std), source)


def _size(values: dict[str, Any], folder: str) -> int:
    """Side of the square that the model sees; 0 when it is not said."""
    keys = ("crop_size", "size") if values.get("do_center_crop", True) else ("size",)
    size = next((values[key] for key in keys if values.get(key)), 0)
    if isinstance(size, dict):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if isinstance(size.get(key), int)}
        if len(sides) > 1:
            raise ConfigError(
                f"{folder}: its images are not square ({size}). Set `image_size` in the encoder YAML, if it takes squares, too."
            )
        size = sides.pop() if sides else 0
    if isinstance(size, list):
        size = size[0] if size and all(side == size[0] for side in size) else 0
    return size if isinstance(size, int) else 0


def _of_timm(name: str) -> Preprocessing:
    timm = import_timm(name)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return DEFAULT
    return Preprocessing(config.input_size[-1], tuple(config.mean), tuple(config.std), "timm's pretrained_cfg")


def import_timm(name: str) -> Any:
    """timm, which knows a model of that name. Raises ConfigError."""
    try:
        import timm
    except ImportError:
        raise ConfigError(
            f"architecture timm:{name}: timm is not installed. Run: pip install 'sanitize-shards[timm]'"
        ) from None
    if not timm.is_model(name):
        raise ConfigError(f"architecture timm:{name}: timm has no model of that name. See timm.list_models().")
    return timm


def _of_torchvision(name: str) -> Preprocessing:
    require_torchvision_model(name)
    weights = torchvision.models.get_model_weights(name)
    if not len(weights):
        return DEFAULT
    transforms = getattr(weights, "DEFAULT", next(iter(weights))).transforms()
    return Preprocessing(
        transforms.crop_size[0],
        tuple(transforms.mean),
        tuple(transforms.std),
        "the transforms of torchvision's weights",
    )


def require_torchvision_model(name: str) -> None:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(
            f"architecture torchvision:{name}: torchvision has no classification model of that name. See "
            "torchvision.models.list_models(module=torchvision.models)."
        )

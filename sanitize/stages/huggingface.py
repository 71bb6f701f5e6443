"""Towers of a Hugging Face folder, built by transformers from config.json and filled from safetensors read by us.

Only architectures of this list, only fields of config.json that its own config class has: nothing in a folder names code, a kernel
or another file. Embeddings are the library's own: CLIP's projected image features, the pooled output, or the class token.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.huggingface_families import CLASS_TOKEN, IMAGE_TOWERS, NO_POOLER, PATCH_MEAN, TEXT_TOWERS, Family
from sanitize.stages.huggingface_folder import read_config, read_tensors

_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")
_COUNTED = ("position_ids", "num_batches_tracked", "relative_position_index")  # no weights: may be in a file or not
_MAX_NUMBER = 1 << 20  # in config.json, but for the vocabulary


class ImageTower(nn.Module):
    """images (B, 3, S, S), normalised → (B, D). identity: SHA-256 of config and tensors as the folder holds them, so that it
    outlives other names of parameters in another version of transformers."""

    def __init__(self, model: Any, family: Family, identity: str, pooling: str = "") -> None:
        """pooling: one of the family's, "" = its own."""
        super().__init__()
        self.model = model
        self.identity = identity
        self._output = {"cls": CLASS_TOKEN, "mean": PATCH_MEAN, "pooler": "pooler_output", "": family.output}[pooling]
        self._first_patch = family.tokens + int(getattr(model.config, "num_register_tokens", 0) or 0)

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images)
        if self._output == CLASS_TOKEN:
            embeddings: Tensor = output.last_hidden_state[:, 0]
        elif self._output == PATCH_MEAN:
            embeddings = output.last_hidden_state[:, self._first_patch :].mean(dim=1)
        else:
            embeddings = getattr(output, self._output)
        return embeddings


class TextTower(nn.Module):
    """(B, L) int64 token ids → (B, D). padding: token of the places after a text."""

    def __init__(self, model: Any, family: Family, padding: int) -> None:
        super().__init__()
        self.model = model
        self.padding = padding
        self._output = family.output

    @property
    def context(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = getattr(self.model(input_ids=tokens), self._output)
        return embeddings


# ---------------------------------------------------------------- loading


def load_image_tower(folder: str, pooling: str = "") -> ImageTower:
    """Raises CheckpointError or ConfigError in words when the folder cannot be used."""
    config = read_config(folder)
    family = _family(IMAGE_TOWERS, config, folder)
    if pooling and pooling not in family.poolings:
        choice = f"Use {', '.join(family.poolings)}" if family.poolings else "It has one embedding only"
        raise ConfigError(
            f"{folder}: pooling {pooling!r} means nothing to a {config['model_type']}. {choice}; or remove it from the encoder YAML."
        )
    tensors = _tower_tensors(folder, family)
    model = _build(config, family, tensors, folder)
    if getattr(model.config, "vision_use_head", True) is False:
        raise ConfigError(f"{folder}: this SigLIP has no pooling head (vision_use_head), so it gives no embedding.")
    for module in model.modules():  # DINOv2's, of pre-training: a parameter without a gradient would stop DDP
        if isinstance(token := module._parameters.get("mask_token"), nn.Parameter):
            del module._parameters["mask_token"]
            module.register_buffer("mask_token", token.detach())
    return ImageTower(model, family, _identity(config, tensors), pooling)


def load_text_tower(folder: str) -> TextTower:
    """Of a whole CLIP or SigLIP. Raises CheckpointError or ConfigError."""
    config = read_config(folder)
    if config.get("model_type") not in TEXT_TOWERS:
        raise ConfigError(
            f"{folder}: a {config.get('model_type')} has no text tower. Remove `tokenizer` from the encoder YAML, or give a whole "
            "CLIP or SigLIP."
        )
    family = _family(TEXT_TOWERS, config, folder)
    model = _build(config, family, _tower_tensors(folder, family), folder)
    padding = model.config.pad_token_id if config["model_type"] == "siglip" else 0  # CLIP sees nothing after its end
    return TextTower(model, family, int(padding or 0))


def read_logit_scale(folder: str) -> Tensor | None:
    return read_tensors(folder, lambda name: name == "logit_scale").get("logit_scale")


def save_tower(tower: ImageTower, folder: Path) -> None:
    """As a Hugging Face model of the image tower alone, without its preprocessing."""
    with _quiet(_transformers(str(folder))):
        tower.model.save_pretrained(folder)


def save_both_towers(image: ImageTower, text: TextTower, logit_scale: Tensor, source: str, folder: Path) -> None:
    """As a whole CLIP or SigLIP. source: the folder that both came from, for what is no part of a tower."""
    transformers = _transformers(source)
    family = IMAGE_TOWERS[read_config(source)["model_type"]]
    whole_class = getattr(transformers, family.whole)
    towers = {"vision_config": image.model.config.to_dict(), "text_config": text.model.config.to_dict()}
    sizes = {"projection_dim": int(image.model.config.projection_dim)} if family.whole == "CLIPModel" else {}
    with _quiet(transformers):
        whole = whole_class(whole_class.config_class(**towers, **sizes))
        state = read_tensors(source, lambda name: name == "logit_bias") | {"logit_scale": logit_scale}
        inner = {"image": image.model.state_dict(), "text": text.model.state_dict()}
        for name in whole.state_dict().keys() - state.keys():
            tower = inner["text" if name.startswith("text_") else "image"]
            short = name.removeprefix("vision_model.").removeprefix("text_model.")  # SigLIP's towers have no such level
            state[name] = tower[name] if name in tower else tower[short]
        shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
        whole.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in state.items()})
        whole.save_pretrained(folder)


def _family(families: Mapping[str, Family], config: Mapping[str, Any], folder: str) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        raise ConfigError(
            f"{folder}: model_type {kind!r} is not supported. Use one of {', '.join(families)}, or export the encoder once: "
            "architecture exported:<file.pt2>."
        )
    return families[kind]


def _tower_tensors(folder: str, family: Family) -> dict[str, Tensor]:
    tensors = read_tensors(folder, lambda name: not family.prefixes or name.startswith(family.prefixes))
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _build(config: Mapping[str, Any], family: Family, tensors: dict[str, Tensor], folder: str) -> Any:
    """The model with every tensor of the file in it. Built without memory first, so that a config alone costs none."""
    transformers = _transformers(folder)
    model_class = getattr(transformers, family.model)
    settings = _settings(config, family, model_class, folder)
    try:
        with torch.device("meta"):
            empty = model_class(settings, **family.options)
    except Exception as error:  # whatever transformers makes of odd settings
        raise CheckpointError(f"{folder}: config.json describes no model ({_first_line(error)}).") from None
    described, held = (sum(t.numel() for t in part) for part in (empty.parameters(), tensors.values()))
    if described > 2 * held + 1_000_000:
        raise CheckpointError(
            f"{folder}: config.json describes {described:,} weights, the files hold {held:,}. Download the folder again."
        )
    if not family.prefixes:
        tensors = _without_head(tensors, empty, family)
    model = _filled(transformers, model_class, settings, tensors, family, folder)
    if not all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()):
        raise CheckpointError(f"{folder}: contains NaN or infinite weights. Download or train it again.")
    return model.eval().requires_grad_(False)


def _filled(
    transformers: Any, model_class: Any, settings: Any, tensors: dict[str, Tensor], family: Family, folder: str
) -> Any:
    try:
        with _quiet(transformers):
            model, report = model_class.from_pretrained(
                None,
                config=settings,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
                local_files_only=True,
                attn_implementation="sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager",
                **family.options,
            )
    except Exception as error:  # whatever transformers makes of odd tensors
        raise CheckpointError(
            f"{folder}: the weights cannot be put into {family.model} ({_first_line(error)}). Download the folder again."
        ) from None
    _require_whole(report, folder, family)
    return model


def _without_head(tensors: dict[str, Tensor], model: Any, family: Family) -> dict[str, Tensor]:
    """The tensors of a classifier's base model under its own names: what transformers does, too, when it loads one."""
    prefix = f"{model.base_model_prefix}."
    if not hasattr(model, model.base_model_prefix) and any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    heads = (*_HEADS, "pooler.") if family.options == NO_POOLER else _HEADS
    return {name: t for name, t in tensors.items() if not name.startswith(heads)}


def _settings(config: Mapping[str, Any], family: Family, model_class: Any, folder: str) -> Any:
    """A config object of the fields that its class knows; the others may name code, kernels or files."""
    values = config.get(family.section) if family.section else config
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder}: config.json has no {family.section}. Download the folder again.")
    if family.section and "projection_dim" in config:
        values = values | {"projection_dim": config["projection_dim"]}
    known = model_class.config_class().to_dict()
    values = {name: value for name, value in values.items() if name in known and name not in _NOT_SHAPES}
    if long := [name for name, value in values.items() if isinstance(value, list) and len(value) > 1000]:
        raise CheckpointError(f"{folder}: config.json: {long[0]} is a list of more than 1000.")
    for name, number in _numbers(values):
        if abs(number) > _MAX_NUMBER and name != "vocab_size":
            raise CheckpointError(f"{folder}: config.json: {name} is {number}, more than {_MAX_NUMBER}.")
        if name in ("num_hidden_layers", "depths") and number > 1000:
            raise CheckpointError(f"{folder}: config.json: {name} is {number}, more than 1000.")
    try:
        return model_class.config_class.from_dict(values)
    except Exception as error:
        raise CheckpointError(f"{folder}: config.json cannot be used ({_first_line(error)}).") from None


_NOT_SHAPES = (
    *("dtype", "torch_dtype", "transformers_version", "architectures", "id2label", "label2id", "_name_or_path"),
    *("return_dict", "output_attentions", "output_hidden_states"),
)


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int | float):
                yield name, item


def _require_whole(report: Mapping[str, Any], folder: str, family: Family) -> None:
    problems = []
    for what, key in (
        ("missing", "missing_keys"),
        ("unexpected", "unexpected_keys"),
        ("of another shape", "mismatched_keys"),
    ):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in report[key])
        if names := [name for name in names if not name.endswith(_COUNTED)]:
            problems.append(f"{len(names)} {what} (first: {', '.join(names[:3])})")
    if problems:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json (as {family.model}): {'; '.join(problems)}. Download the folder again."
        )


def _identity(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Neither where the folder lies, nor what wrote it, nor the text tower is part of what is scored."""
    ignored = {"text_config", "logit_scale_init_value", *_NOT_SHAPES}
    plain = {name: value for name, value in config.items() if name not in ignored}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- transformers


def _transformers(folder: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"architecture hf:{folder}: transformers is not installed. Run: pip install 'sanitize-shards[hf]'"
        ) from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and reports of the library; what matters is said by us."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""A Hugging Face folder: config.json, safetensors (one file or an index of several) and preprocessor_config.json.

Files are read here, never by transformers: no pickle, no code of the folder, no file outside of it.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sanitize import storage
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.weights import read_weights

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSING = (
    "preprocessor_config.json",
    "processor_config.json",
)  # the second: of whole processors, since transformers 5
TOKENIZER = "tokenizer.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PART = re.compile(r"[\w-][\w.-]*\.safetensors")


def read_config(folder: str) -> dict[str, Any]:
    """config.json. Raises CheckpointError when there is none, or when it asks for code or files of its own."""
    path = storage.join(folder, CONFIG)
    if not storage.exists(path):
        raise CheckpointError(
            f"{folder}: no Hugging Face model there ({CONFIG} is missing). Give a folder that save_pretrained wrote, or download "
            "one: hf download <name> --local-dir <folder>"
        )
    config = storage.read_json(path)
    if "auto_map" in config:
        raise CheckpointError(
            f"{path}: refused, the model needs Python code of its own (auto_map), which could do anything. Only architectures of "
            "transformers itself are loaded. If you trust it, export it once: architecture exported:<file.pt2>."
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"{path}: refused, the weights are quantised (quantization_config). Give the folder of the model before quantising."
        )
    return config


def read_tensors(folder: str, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors whose names are wanted. Raises CheckpointError when the folder has no safetensors."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder, wanted):
        found |= {name: tensor for name, tensor in read_weights(file).items() if wanted(name)}
    return found


def weight_files(folder: str, wanted: Callable[[str], bool] = lambda _: True) -> list[str]:
    """The safetensors files with tensors whose names are wanted. Raises CheckpointError when there are none."""
    single, index = storage.join(folder, WEIGHTS), storage.join(folder, INDEX)
    if storage.exists(single):
        return [single]
    if storage.exists(index):
        return [storage.join(folder, file) for file in _indexed_files(index, wanted)]
    raise CheckpointError(_no_safetensors(folder))


def _indexed_files(index: str, wanted: Callable[[str], bool]) -> list[str]:
    names = storage.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(f, str) and _PART.fullmatch(f) for f in names.values()):
        raise CheckpointError(
            f"{index}: not an index of safetensors files beside it (weight_map: name of a tensor → file). Download it again."
        )
    return sorted({file for name, file in names.items() if wanted(name)})


def _no_safetensors(folder: str) -> str:
    if not any(storage.exists(storage.join(folder, f"pytorch_model.bin{end}")) for end in ("", ".index.json")):
        return f"{folder}: no weights there ({WEIGHTS} or {INDEX} is missing). Download the folder again."
    return (
        f"{folder}: refused, its weights are a pickle (pytorch_model.bin), which can run any code. Many models have "
        f"{WEIGHTS} too: download it. Else, if you trust it, convert it once on a machine you can lose: "
        "transformers.AutoModel.from_pretrained('<folder>').save_pretrained('<new folder>')."
    )


def read_preprocessing(folder: str) -> tuple[dict[str, Any], str]:
    """(settings of the image processor, name of their file); ({}, "") when the folder has none."""
    for name in PREPROCESSING:
        path = storage.join(folder, name)
        if storage.exists(path):
            values = storage.read_json(path)
            inner = values.get("image_processor", values)
            if isinstance(inner, dict):
                return inner, name
    return {}, ""


# ---------------------------------------------------------------- the hub


def local_folder(name: str) -> str:
    """`name` when it is a folder, else the folder into which the hub's model of that name was downloaded."""
    if not _HUB_NAME.fullmatch(name) or storage.exists(name):
        return name
    how = (
        f"Download it where there is internet and give the folder: hf download {name} --local-dir {name.split('/')[1]}"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"architecture hf:{name}: no such folder, and huggingface_hub, which could download it, is not installed. Run: "
            f"pip install 'sanitize-shards[hf]'. Or: {how}"
        ) from None
    try:
        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], etag_timeout=5))
    except Exception as error:  # of the network, of the hub or of the cache: a dozen kinds
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise ConfigError(
            f"architecture hf:{name}: no such folder, and it cannot be downloaded ({why}). {how}"
        ) from None

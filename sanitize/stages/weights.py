"""Checkpoints: named tensors of a file, brought to a model's own names, and loaded so that every one must fit.

Weights come from safetensors or from PyTorch files that load with `weights_only=True`; nothing in a checkpoint runs.
"""

import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sanitize import storage
from sanitize.config import EncoderSpec
from sanitize.errors import CheckpointError

# SimCLR wrapper of BadEncoder and DRUPE: position in its nn.Sequential → torchvision's name
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}
_PREFIXES = ("f.f.", "f.", "visual.", "backbone.", "encoder.")
_HEADS = (
    *("g.", "fc.", "proj_head.", "projector", "predictor", "backbone_k.", "encoder_q.", "encoder_k."),  # of SSL methods
    *("head.", "heads.", "head_dist.", "classifier.", "aux1.", "aux2.", "AuxLogits."),  # of classifiers
)


def read_weights(path: str) -> dict[str, Tensor]:
    """Named tensors of a safetensors or weights-only PyTorch file. Raises CheckpointError for anything else."""
    if path.endswith(".safetensors"):
        try:
            return safetensors.torch.load(storage.read_bytes(path))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file ({error}). Download or convert it again.") from None
    with storage.open_read(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols, before the refusal below says it better
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:
            why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            source = "torch.load(path, weights_only=False)['state_dict']"
            if "TorchScript" in str(error):  # OpenAI's own CLIP files
                source = "torch.jit.load(path, map_location='cpu').state_dict()"
            raise CheckpointError(
                f"{path}: refused, it does not load as plain tensors ({why}). A checkpoint that needs a pickle or TorchScript "
                "can run any code. If you trust it, convert it once on a machine you can lose: safetensors.torch.save_file("
                f"{source}, 'encoder.safetensors')."
            ) from None
    return _named_tensors(content, path)


def _named_tensors(content: Any, path: str) -> dict[str, Tensor]:
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: no named tensors in it. A state dict (name → tensor) was expected.")
    return tensors


def encoder_tensors(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Any of the known checkpoint layouts → the names that the model wants; what is neither wanted nor a head stays, to be refused.

    Layouts: bare; `module.` (DataParallel); `f.f.<index>` or `f.<index>` (SimCLR of BadEncoder and DRUPE);
    `visual.` (BadEncoder's ImageNet and CLIP files); `backbone.` with `shortcut` (CTRL); `encoder.`.
    """
    names = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    for prefix in _PREFIXES:
        own = any(name.startswith(prefix) for name in wanted)  # the model's own part of that name
        if not own and any(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): t for name, t in names.items() if name.startswith(prefix)}
            break
    names = {name: tensor for name, tensor in names.items() if name in wanted or not name.startswith(_HEADS)}
    if any(re.match(r"^[03456]\.", name) for name in names):
        names = {_SEQUENTIAL.get(n.split(".")[0], n.split(".")[0]) + n[n.find(".") :]: t for n, t in names.items()}
    return {n if n in wanted else re.sub(r"\.shortcut\.", ".downsample.", n): t for n, t in names.items()}


def load_strictly(backbone: nn.Module, given: Mapping[str, Tensor], spec: EncoderSpec) -> None:
    """Copy weights into `backbone`; every name and shape must fit, and the message says which do not."""
    wanted = backbone.state_dict()
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(given) - counters)
    unexpected = sorted(set(given) - set(wanted))
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(given) & set(wanted))
        if given[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {what} (first: {', '.join(names[:3])})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{spec.weights}: does not fit architecture {spec.architecture} (width {spec.width}): {'; '.join(problems)}. "
            "Correct `architecture` (or `width`) in the encoder YAML, or give the weights of that architecture."
        )
    wanted |= {name: given[name] for name in wanted if name in given}  # in place: it holds the versions of layers
    backbone.load_state_dict(wanted)
    if not all(torch.isfinite(t).all() for t in backbone.state_dict().values() if t.is_floating_point()):
        raise CheckpointError(f"{spec.weights}: contains NaN or infinite weights. Download or train it again.")

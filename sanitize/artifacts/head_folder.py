"""A trained head on disk: head.safetensors and head.json, for one encoder."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from sanitize import storage
from sanitize.config_loading import to_mapping
from sanitize.errors import CheckpointError
from sanitize.paths import AnyPath, path_text
from sanitize.stages.encoders import Encoder
from sanitize.training.heads import Head

FORMAT_VERSION = 1


@dataclass(frozen=True)
class HeadDescription:
    """head.json. sha256: of head.safetensors; settings: plain values of the training, for people."""

    format_version: int
    kind: str
    embedding_size: int
    classes: tuple[str, ...]
    encoder_fingerprint: str
    sha256: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class TrainedHead:
    """A head with the names of its classes and the encoder whose embeddings it was trained on."""

    head: Head
    classes: tuple[str, ...]
    encoder_fingerprint: str

    @torch.no_grad()
    def predictions(self, embeddings: Tensor) -> NDArray[np.int64]:
        """(B, D) → (B,) class numbers."""
        found: NDArray[np.int64] = self.head(embeddings).argmax(dim=1).numpy()
        return found


def save_head(trained: TrainedHead, folder: str, settings: dict[str, Any]) -> None:
    """settings: plain values of the training, for people."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.head.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    storage.write_bytes(storage.join(folder, "head.safetensors"), weights)
    description = HeadDescription(
        format_version=FORMAT_VERSION,
        kind=trained.head.kind,
        embedding_size=trained.head.size,
        classes=trained.classes,
        encoder_fingerprint=trained.encoder_fingerprint,
        sha256=hashlib.sha256(weights).hexdigest(),
        settings=settings,
    )
    storage.write_json(storage.join(folder, "head.json"), to_mapping(description))


def load_head(folder: AnyPath, encoder: Encoder) -> TrainedHead:
    """The head in `folder`, for this very encoder. Raises CheckpointError when it is missing, damaged or another encoder's."""
    folder = path_text(folder, "folder")
    path = storage.join(folder, "head.json")
    if not storage.exists(path):
        raise CheckpointError(f"{folder}: no head there (head.json is missing). Run `sanitize finetune` first.")
    values = storage.read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written by another version of sanitize (format {values.get('format_version')}, this one reads "
            f"{FORMAT_VERSION}). Run `sanitize finetune` again."
        )
    found, wanted = encoder.fingerprint(), values["encoder_fingerprint"]
    if found != wanted:
        raise CheckpointError(
            f"{folder}: its head was trained on another encoder: this one has fingerprint {found[:12]}, the head expects "
            f"{wanted[:12]}. Give the encoder it was trained on (of --mode full: encoder.yaml in that folder), or run "
            "`sanitize finetune` for this one."
        )
    weights = storage.read_bytes(storage.join(folder, "head.safetensors"))
    if hashlib.sha256(weights).hexdigest() != values["sha256"]:
        raise CheckpointError(
            f"{folder}/head.safetensors: does not match head.json (changed or damaged). Run `sanitize finetune` again."
        )
    head = Head(values["kind"], values["embedding_size"], len(values["classes"]))
    head.load_state_dict(safetensors.torch.load(weights))
    return TrainedHead(head.eval().requires_grad_(False), tuple(values["classes"]), wanted)

"""Classifiers on embeddings, linear or the papers' 512-256 MLP, and the files that hold them: head.safetensors, head.json."""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from sanitize import storage
from sanitize.errors import CheckpointError
from sanitize.stages.encoders import Encoder

FORMAT_VERSION = 1
HIDDEN = (512, 256)  # of the MLP (BadEncoder card 5)
DROPOUT = 0.5  # after its first layer


class Head(nn.Module):
    """Embeddings (B, D) float32 of any length → logits (B, C).

    Embeddings are scaled to length sqrt(D) first: raw lengths differ a hundredfold between encoders, and one learning rate
    has to do for all.
    """

    def __init__(self, kind: str, size: int, classes: int) -> None:
        """kind: "linear" or "mlp"; size: D."""
        super().__init__()
        self.kind, self.size, self.classes = kind, size, classes
        widths = [size, *(HIDDEN if kind == "mlp" else ()), classes]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, embeddings: Tensor, kept: Tensor | None = None) -> Tensor:
        """kept: (B, 512) bool, units of the MLP's first layer that dropout keeps; None = all (no training)."""
        hidden: Tensor = functional.normalize(embeddings, dim=1) * self.size**0.5
        for number, layer in enumerate(self.layers):
            hidden = layer(functional.relu(hidden) if number else hidden)
            if number == 0 and kept is not None:
                hidden = hidden * kept / (1 - DROPOUT)
        return hidden

    def dropout(self, count: int, rng: np.random.Generator) -> Tensor | None:
        """`kept` of a whole global batch, so that it does not depend on how workers share the batch."""
        return torch.from_numpy(rng.random((count, HIDDEN[0])) >= DROPOUT) if self.kind == "mlp" else None


def fresh_head(kind: str, size: int, classes: int, seed: int) -> Head:
    """An untrained head; the caller's random numbers go on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Head(kind, size, classes)


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
    values = {
        "format_version": FORMAT_VERSION,
        "kind": trained.head.kind,
        "embedding_size": trained.head.size,
        "classes": list(trained.classes),
        "encoder_fingerprint": trained.encoder_fingerprint,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "settings": settings,
    }
    storage.write_json(storage.join(folder, "head.json"), values)


def load_head(folder: str, encoder: Encoder) -> TrainedHead:
    """The head in `folder`, for this very encoder. Raises CheckpointError when it is missing, damaged or another encoder's."""
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

"""Classifiers on embeddings: linear, or the papers' 512-256 MLP."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = (512, 256)  # of the MLP (BadEncoder, Jia et al., IEEE S&P 2022: code, training_downstream_classifier.py)
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

"""The no-model control (ours): image energy. A detector of backdoors must beat it, because bright triggers raise it."""

from torch import Tensor

from sanitize.detectors.reference_set import ReferenceSet, Score
from sanitize.stages.encoders import Encoder


def energy(images: Tensor) -> Tensor:
    """(B,) squared norm of (B, 3, H, W) normalised images."""
    return images.square().sum(dim=(1, 2, 3))


def fit(reference_set: ReferenceSet, encoder: Encoder, seed: int) -> Score:  # noqa: ARG001 every fit has this signature
    """Energy of the pixels as the encoder normalises them; nothing is learned."""
    mean, std = encoder.mean.cpu(), encoder.std.cpu()

    def score(images: Tensor, _embeddings: Tensor) -> Tensor:
        return energy((images.cpu().float() / 255 - mean) / std)

    return score

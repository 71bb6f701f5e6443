"""The no-model control: image energy. A detector of backdoors must beat it, because bright triggers raise it (card section 9)."""

from torch import Tensor


def energy(images: Tensor) -> Tensor:
    """(B,) squared norm of (B, 3, H, W) normalised images."""
    return images.square().sum(dim=(1, 2, 3))

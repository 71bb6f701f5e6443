"""Which images stay out of a training, and in which batches the others come."""

import numpy as np
import torch
from torch import Tensor


def held_out(hashes: Tensor, fraction: float, seed: int) -> Tensor:
    """hashes (N, 32) uint8 → (N,) bool. Decided by the image's bytes, so that copies of one image never stand on both sides."""
    words = hashes[:, :8].contiguous().numpy().view(np.uint64).reshape(-1)
    mixed = (words ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)) % np.uint64(1_000_003)
    return torch.from_numpy(mixed < fraction * 1_000_003)


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """One epoch's positions of `count` images in random order, in batches of `size`; the last partial batch is dropped."""
    batches: tuple[Tensor, ...] = torch.randperm(count, generator=generator)[: count // size * size].split(size)
    return batches

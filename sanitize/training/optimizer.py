"""AdamW and the learning rate's course, the same for every training with labels or captions."""

import math
from collections.abc import Sequence

import torch
from torch import nn


def adamw(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """No weight decay on norms, biases and the temperature: everything with fewer than two dimensions."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def half_cosine(progress: float) -> float:
    """Factor of the learning rate after this share of a training, 0 to 1: from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate in step `step` of `steps`: linear over `warmup` steps, then a half cosine towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    return half_cosine((step - warmup) / max(steps - warmup, 1))

"""Resumable checkpoints of a training: plain tensors and numbers, written in one piece, read without unpickling."""

import io
from typing import Any

import torch

from sanitize import storage


def save_checkpoint(path: str, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    storage.write_bytes(path, buffer.getvalue())


def load_checkpoint(path: str, device: torch.device) -> dict[str, Any]:
    """Empty when there is none."""
    if not storage.exists(path):
        return {}
    content: dict[str, Any] = torch.load(io.BytesIO(storage.read_bytes(path)), map_location=device, weights_only=True)
    return content

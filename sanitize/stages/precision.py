"""The number format a model computes in: one decision for every forward pass of fit, scan and finetune."""

import torch


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the hardware multiplies it natively, else fp32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """For the forward pass of a model; scores and losses are computed outside it, in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

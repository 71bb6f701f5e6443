"""The number format a model computes in: one decision for every forward pass and training step, the red team's included."""

import os

import torch

# what ONEDNN_MAX_CPU_ISA can name that has no instruction to multiply bf16 (avx2_vnni_2 only converts it)
_WITHOUT_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the hardware multiplies it natively, else fp32."""
    if precision == "auto":
        # elsewhere bf16 is emulated: correct, but slower than fp32
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_multiplies_bf16()
        )
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def computed_in(precision: str, device: torch.device) -> str:
    """In words for a record: "bf16 on cpu"."""
    name = "bf16" if resolve_precision(precision, device) == torch.bfloat16 else "fp32"
    return f"{name} on {device.type}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """For the forward pass of a model; scores and losses are computed outside it, in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _cpu_multiplies_bf16() -> bool:
    """Whether the processor has AVX512_BF16 (any with AMX has) and oneDNN, which runs torch's convolutions and products, may use it.

    From what the processor says of itself, not from a timing: a busy machine must not change scores. Other kinds of processor (ARM)
    get fp32 until somebody measures them. A ResNet-18 at 224 px, bf16 against fp32, one core: 0.5 times the seconds with
    AVX512_BF16, 2.4 times with plain AVX-512, 5 times with AVX2; training at 32 px 0.7, 2.0 and 11 times.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")  # the old name still works
    if limit.lower() in _WITHOUT_BF16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))

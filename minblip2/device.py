"""Which device to compute on, and in which precision."""

from __future__ import annotations

import contextlib

import torch

from . import UserError


def best_device() -> torch.device:
    """A CUDA GPU if there is one, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it (recent GPUs, CPUs with AMX or AVX512-BF16), else float32."""
    if device.type == "cuda":
        low = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        low = found.get("amx_bf16", False) or found.get("avx512_bf16", False)
    return torch.bfloat16 if low else torch.float32


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager:
    """Compute in bfloat16 where asked for, or, with "auto", where the device has units for it; weights stay float32."""
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision is {precision!r}: choose 'auto', 'float32' or 'bfloat16'")
    low = precision == "bfloat16" or (precision == "auto" and compute_dtype(device) == torch.bfloat16)
    return torch.autocast(device.type, torch.bfloat16, enabled=low)

"""Which device to compute on, and in which precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from . import UserError

DEVICE, DTYPE = "MINBLIP2_DEVICE", "MINBLIP2_DTYPE"  # environment variables; --device and --dtype set them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device(default: str | None = None) -> torch.device:
    """The device that MINBLIP2_DEVICE names; else `default`; else a CUDA GPU if there is one, Apple's, or the CPU.

    Raises UserError when MINBLIP2_DEVICE names none, or one that is not there.
    """
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    name = os.environ.get(DEVICE) or default or next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, number = name.partition(":")
    if kind not in there or (":" in name and not number.isdecimal()):
        raise UserError(f"{DEVICE} or --device is {name!r}: choose one of {', '.join(there)}, or one GPU, as in cuda:1")
    if int(number or 0) >= there[kind]:
        raise UserError(f"there is no device {name} here: choose one of "
                        f"{', '.join(kind for kind, count in there.items() if count)}")
    return torch.device(name)


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of frozen parts: what MINBLIP2_DTYPE names; else bfloat16 where the device has instructions for it
    (recent GPUs, CPUs with AMX or AVX512-BF16); else float32. Raises UserError for a name that is no such dtype."""
    if name := os.environ.get(DTYPE):
        if name not in DTYPES:
            raise UserError(f"{DTYPE} is {name!r}: choose one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        low = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type != "cpu":
        low = False
    elif hasattr(torch.cpu, "get_capabilities"):  # since PyTorch 2.11
        found = torch.cpu.get_capabilities()
        low = found.get("amx_bf16", False) or found.get("avx512_bf16", False)
    else:
        low = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if low else torch.float32


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager:
    """Compute in bfloat16 where asked for, or, with "auto", where `compute_dtype` says so; weights stay float32.

    With "auto" and float16 only what is frozen is in float16: gradients would need to be scaled. Raises UserError for
    another name of a precision.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision is {precision!r}: choose 'auto', 'float32' or 'bfloat16'")
    low = precision == "bfloat16" or (precision == "auto" and compute_dtype(device) == torch.bfloat16)
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


@contextlib.contextmanager
def computing(device: str | None = None, dtype: str | None = None) -> Iterator[None]:
    """While open, MINBLIP2_DEVICE and MINBLIP2_DTYPE are these, for processes that are started meanwhile as well.

    None leaves a variable as it is. Raises UserError at once for a device or dtype that `best_device` or
    `compute_dtype` would refuse.
    """
    before = {name: os.environ.get(name) for name in (DEVICE, DTYPE)}
    os.environ.update({name: value for name, value in ((DEVICE, device), (DTYPE, dtype)) if value is not None})
    try:
        best_device()
        compute_dtype(torch.device("cpu"))
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

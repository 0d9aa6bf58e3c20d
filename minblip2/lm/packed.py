"""Memory for time: frozen matrices once more, in the order in which a CPU multiplies a few tokens at a time fastest."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

# frozen matrix -> {(version, address, dtype): the same in oneDNN's order}, the last alone
COPIES = WeakTensorKeyDictionary()


class PackedLinears(TorchFunctionMode):
    """While open, and where no gradient is asked for, linear layers use packed copies of their frozen matrices.

    A language model that writes multiplies every matrix with one token of each text, and waits for memory more than for
    arithmetic; oneDNN is faster with the numbers in an order of its own. The sums are the same but for rounding. Copies
    are made when first needed and live as long as their matrices: the model takes twice its memory. Nothing changes on
    devices other than CPUs, in builds of PyTorch without oneDNN, and for dtypes that oneDNN refuses on this CPU.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Every function of torch comes by here; this takes the products of frozen matrices."""
        if (function is F.linear and not kwargs and isinstance(args[1], nn.Parameter) and not args[1].requires_grad
                and not args[1].is_inference() and args[1].device.type == "cpu" and not torch.is_grad_enabled()
                and torch.backends.mkldnn.is_available()):
            return multiply(*args)
        return function(*args, **kwargs or {})


@functools.cache
def packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs and multiplies matrices of this dtype here, which a small one tells.

    Many CPUs have no instructions for bfloat16 or float16, and no build of oneDNN multiplies float64.
    """
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16, dtype=dtype))
        torch.ops.mkldnn._linear_pointwise(torch.ones(1, 16, dtype=dtype), weight, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):  # refused, or no such operator in this release
        return False
    return True


def multiply(x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
    """x (... e) times the matrix (n e), plus the bias (n): (... n), in the dtype that autocast wants, if it is on.

    Source: the operators that torch.compile calls for frozen weights. What these do not take, `F.linear` does.
    """
    # autocast leaves float64 alone
    low = torch.is_autocast_enabled("cpu") and torch.float64 not in (x.dtype, weight.dtype)
    dtype = torch.get_autocast_dtype("cpu") if low else weight.dtype
    if not (low or x.dtype == dtype) or not weight.numel() or not packable(dtype):
        return F.linear(x, weight, bias)
    key = weight._version, weight.data_ptr(), dtype
    if key not in COPIES.get(weight, ()):
        COPIES[weight] = {key: torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))}
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), COPIES[weight][key],
                                              None if bias is None else bias.to(dtype), "none", [], "")

"""Memory for time: frozen matrices once more, in the order in which a CPU multiplies a few tokens at a time fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

COPIES = WeakTensorKeyDictionary()  # frozen matrix -> {(version, dtype): the same in oneDNN's order}, the last alone


class PackedLinears(TorchFunctionMode):
    """While open, and where no gradient is asked for, linear layers use packed copies of their frozen matrices.

    Who writes multiplies every matrix of the language model with one token of each text, and waits for memory more than
    for arithmetic; oneDNN's own order of the numbers saves half of that. The sums are the same but for rounding. Copies
    are made when first needed and live as long as their matrices: the model takes twice its memory. On other devices
    than CPUs, and for builds of PyTorch without oneDNN, nothing changes.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Every function of torch comes by here; this takes the products of frozen matrices."""
        if (function is F.linear and not kwargs and isinstance(args[1], nn.Parameter) and not args[1].requires_grad
                and args[1].device.type == "cpu" and not torch.is_grad_enabled()
                and torch.backends.mkldnn.is_available()):
            return multiply(*args)
        return function(*args, **kwargs or {})


def multiply(x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
    """x (... e) times the matrix (n e), plus the bias (n): (... n), in the dtype that autocast wants, if it is on.

    Source: the operators that torch.compile calls for frozen weights.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    key = weight._version, dtype
    if key not in COPIES.get(weight, ()):
        COPIES[weight] = {key: torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))}
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), COPIES[weight][key],
                                              None if bias is None else bias.to(dtype), "none", [], "")

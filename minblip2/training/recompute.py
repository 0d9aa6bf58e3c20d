"""Memory for time: blocks of a language model that keep nothing for the gradient but what they were given."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import KVCache
from ..lm import llama, opt, t5

BLOCKS = (opt.Block, llama.Block, t5.Block)


def recompute(model: nn.Module) -> None:
    """From now on every language-model block in `model` computes twice what needs a gradient, and keeps it once.

    Instead of the activations of all blocks, memory holds the input of each and the activations of one; a step takes
    one more forward pass through them (arXiv 1604.06174).
    """
    for block in model.modules():
        if isinstance(block, BLOCKS) and "forward" not in vars(block):
            block.forward = partial(forgetful, block, block.forward)


def forgetful(block: nn.Module, forward, x: Tensor, *given) -> Tensor:
    """`forward` of a block on x (b s e); it is called again when the gradient comes by.

    A cache is extended by the first call only: each call has one of its own, with what was there before.
    """
    if not torch.is_grad_enabled():
        return forward(x, *given)
    *given, cache = given
    parts = set(block.modules())
    before = {layer: kv for layer, kv in (cache or {}).items() if layer in parts}

    def run(x: Tensor, *given) -> tuple[Tensor, KVCache | None]:
        own = None if cache is None else KVCache(before)
        return forward(x, *given, own), own

    x, own = checkpoint(run, x, *given, use_reentrant=False)
    if cache is not None:
        cache.update(own)
    return x

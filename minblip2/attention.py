"""Attention: the one softmax(QKᵀ)V in the house, and the two layers every transformer block is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # an older approximation, with which CLIP was trained
}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
           need_weights: bool = False, bias: Tensor | None = None,
           scale: float | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Mix the values of the keys that each query matches: softmax(q·k / √d) v.

    query (b h s d), key and value (b h k d), mask (b 1 s k) boolean with True = may attend, or None for all.
    `bias` (b h s k) is added to the scores, which `scale` multiplies in place of 1 / √d: T5 wants both.
    Returns (b h s d); with `need_weights` also the weights (b h s k), computed explicitly instead of by the fused
    kernel. A query that may attend to nothing (padding on the left) gets zeros. Source: arXiv 1706.03762, §3.2.1.
    """
    # On a CPU the fused kernel's backward pass in bfloat16 takes several times as long as the explicit form's.
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if not (need_weights or slow):
        if bias is not None:  # the kernel takes one of the two: forbidden becomes minus infinity
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = einsum(query, key, "b h s d, b h k d -> b h s k") * (scale or query.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # changes only the rows in which everything is forbidden
    mixed = einsum(F.dropout(weights, dropout), value, "b h s k, b h k d -> b h s d")
    return (mixed, weights) if need_weights else mixed


class KVCache(dict):
    """Keys and values (b h k d) that attention layers have computed so far, by layer.

    A layer that always reads the same thing, as a decoder reads its encoder, may keep its mask (b 1 1 k) beside them.
    """

    room: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # memory (b h k d) with free places at the end, for `extend`

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values (b h s d) to a layer's own and return all of them (b h k d)."""
        if layer in self.room:
            n, end = self[layer][0].shape[2], self[layer][0].shape[2] + key.shape[2]
            for kv, new in zip(self.room[layer], (key, value), strict=True):
                kv[:, :, n:end] = new
            key, value = (kv[:, :, :end] for kv in self.room[layer])
        elif layer in self:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self[layer], (key, value), strict=True))
        self[layer] = key, value
        return key, value

    def select(self, rows: Tensor, room: int = 0) -> KVCache:
        """The cache of the batch entries `rows` (n); with `room` for so many tokens more, which are then not copied
        again with each that is added (and get no gradient)."""
        chosen = KVCache({layer: tuple(kv.index_select(0, rows) for kv in pair) for layer, pair in self.items()})
        if room:
            chosen.room = {layer: tuple(F.pad(kv, (0, 0, 0, room)) for kv in pair)
                           for layer, pair in chosen.items() if len(pair) == 2}
            chosen.update({layer: tuple(kv[:, :, :-room] for kv in pair) for layer, pair in chosen.room.items()})
        return chosen

    def reorder(self, rows: Tensor, start: int) -> None:
        """Give each entry what `rows` (b) names, in place: how beams move. The first `start` tokens, they share."""
        for key, value, *mask in self.values():
            if not mask:  # what has one was only read: beams share all of it
                key[:, :, start:], value[:, :, start:] = key[rows, :, start:], value[rows, :, start:]

    @property
    def length(self) -> int:
        """How many tokens are cached."""
        return next(iter(self.values()))[0].shape[2] if self else 0


class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each on its own slice of the width (arXiv 1706.03762, §3.2.2).

    With `context_width`, keys and values are made from another sequence of that width: cross-attention. The heads
    share the width out among them unless `head_width` says otherwise; `scale` is that of `attend`.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, dropout: float = 0.0,
                 head_width: int | None = None, linear_bias: bool = True, scale: float | None = None):
        super().__init__()
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads: choose heads that divide it")
        self.heads, self.dropout, self.scale = heads, dropout, scale
        inner = heads * head_width if head_width else width
        self.query = nn.Linear(width, inner, bias=linear_bias)
        self.key = nn.Linear(context_width or width, inner, bias=linear_bias)
        self.value = nn.Linear(context_width or width, inner, bias=linear_bias)
        self.out = nn.Linear(inner, width, bias=linear_bias)
        self.recorder: list[Tensor] | None = None

    def project(self, context: Tensor, norm: nn.LayerNorm | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (b h k d) of a sequence (b k e); worth keeping when it is attended to more than once.

        With `norm` the sequence comes without that norm's scale and bias, which the projections take up:
        W (γx + β) + b = (Wγ) x + (Wβ + b). So a frozen sequence needs no gradient, though the norm before it learns.
        """
        made = (F.linear(context, layer.weight * norm.weight, layer.weight @ norm.bias + layer.bias)
                if norm is not None else layer(context) for layer in (self.key, self.value))
        return tuple(rearrange(kv, "b k (h d) -> b h k d", h=self.heads) for kv in made)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: tuple[Tensor, Tensor] | None = None,
                cache: KVCache | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend from x (b s e) to itself and `cache`, or to a projected `context`: (b s e).

        mask (b 1 s k) and bias (b h s k) are those of `attend`. Each context may have n readers, x ((b n) s e): their
        queries then form one long sequence, and no key or value is copied.
        """
        key, value = self.project(x) if context is None else context
        n = len(x) // len(key)
        query = rearrange(self.query(x), "(b n) s (h d) -> b h (n s) d", n=n, h=self.heads)
        if cache is not None:
            key, value = cache.extend(self, key, value)
        dropout = self.dropout if self.training else 0.0
        if self.recorder is None:
            mixed = attend(query, key, value, mask, dropout, bias=bias, scale=self.scale)
        else:
            mixed, weights = attend(query, key, value, mask, dropout, True, bias, self.scale)
            self.recorder.append(weights)
        return self.out(rearrange(mixed, "b h (n s) d -> (b n) s (h d)", n=n))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, applied to each token alone: (b s e) -> (b s e)."""

    def __init__(self, width: int, hidden_width: int, activation: Activation = F.gelu, linear_bias: bool = True):
        super().__init__()
        self.up = nn.Linear(width, hidden_width, bias=linear_bias)
        self.down = nn.Linear(hidden_width, width, bias=linear_bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (b s e)."""
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(FeedForward):
    """A feed-forward in which a second projection opens or closes the first (arXiv 2002.05202); without biases."""

    def __init__(self, width: int, hidden_width: int, activation: Activation):
        super().__init__(width, hidden_width, activation, linear_bias=False)
        self.gate = nn.Linear(width, hidden_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (b s e)."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


@contextmanager
def record(*layers: MultiHeadAttention) -> Iterator[list[Tensor]]:
    """While open, these layers append their attention weights (b h s k), with gradient, to the list it gives."""
    weights: list[Tensor] = []
    for layer in layers:
        layer.recorder = weights
    try:
        yield weights
    finally:
        for layer in layers:
            layer.recorder = None

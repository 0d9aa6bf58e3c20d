"""Attention: the one softmax(QKᵀ)V of the module, and the two layers every transformer block is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

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


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None,
                      bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """How much each query takes of each key: softmax(q·k / √d), (b h s k), rows that sum to 1.

    query (b h s d), key (b h k d), mask (b 1 s k) boolean with True = may attend, or None for all.
    `bias` (b h s k) is added to the scores, which `scale` multiplies in place of 1 / √d: T5 needs
    both. A query that may attend to nothing gets zeros. Source: arXiv 1706.03762, §3.2.1.
    """
    scores = einsum(query, key, "b h s d, b h k d -> b h s k") * (scale or query.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return scores.softmax(dim=-1)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0)  # changes only the rows in which everything is forbidden


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
           bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Mix the values (b h k d) by the `attention_weights` of each query, of which `dropout` are dropped: (b h s d).

    PyTorch's fused kernel computes the same without writing the weights down. Only on a CPU and in bfloat16 its
    backward pass can take several times as long as the explicit form, which is used there.
    """
    if query.is_cpu and query.dtype == torch.bfloat16 and query.requires_grad:
        weights = F.dropout(attention_weights(query, key, mask, bias, scale), dropout)
        return einsum(weights, value, "b h s k, b h k d -> b h s d")
    if bias is not None:  # the kernel takes one of the two: forbidden becomes minus infinity
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


class LayerCache:
    """The keys and values (b h k d) that one self-attention has computed so far; None before the first."""

    key: Tensor | None = None
    value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (b h s d) of new tokens and return those of all tokens (b h k d)."""
        if self.key is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value


class Memory(NamedTuple):
    """An encoder's output as a decoder reads it: keys and values (b h k d) for each block, and a mask (b 1 1 k)."""

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor


class KVCache:
    """What a model has read so far: a `LayerCache` for each block and, in an encoder-decoder, the encoder's output."""

    def __init__(self, layers: int):
        self.layers = [LayerCache() for _ in range(layers)]
        self.memory: Memory | None = None

    @property
    def length(self) -> int:
        """How many tokens are cached."""
        return 0 if self.layers[0].key is None else self.layers[0].key.shape[2]

    def select(self, rows: Tensor) -> KVCache:
        """A copy that holds the batch entries `rows` (n); an entry may be taken many times."""
        chosen = KVCache(len(self.layers))
        if self.memory is not None:
            chosen.memory = Memory([(key[rows], value[rows]) for key, value in self.memory.layers],
                                   self.memory.mask[rows])
        for mine, theirs in zip(chosen.layers, self.layers, strict=True):
            mine.key, mine.value = theirs.key[rows], theirs.value[rows]
        return chosen

    def reorder(self, rows: Tensor, start: int) -> None:
        """Entry i continues what entry rows[i] has read, in place: how beams move. rows (b) indexes the batch.

        Entries may differ from position `start` on; before it, and in the memory, an image's beams are equal.
        """
        for layer in self.layers:
            for kv in (layer.key, layer.value):
                kv[:, :, start:] = kv[rows, :, start:]


class MultiHeadAttention(nn.Module):
    """Several attentions side by side, each on its own slice of the width (arXiv 1706.03762, §3.2.2).

    With `context_width`, keys and values are made from another sequence of that width: cross-attention. The heads
    share the width out among them unless `head_width` says otherwise; `scale` is that of `attend`.
    Raises ValueError when the heads do not divide the width.
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
        self.captured: list[Tensor] | None = None  # see `capture_attention`

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (b h k d) of a sequence (b k e); worth keeping when it is attended to more than once."""
        return tuple(rearrange(layer(context), "b k (h d) -> b h k d", h=self.heads)
                     for layer in (self.key, self.value))

    def forward(self, x: Tensor, mask: Tensor | None = None, context: tuple[Tensor, Tensor] | None = None,
                cache: LayerCache | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend from x (b s e) to itself and what `cache` holds, or to the projected `context`: (b s e).

        mask (b 1 s k) and bias (b h s k) are those of `attend`; k counts what the cache holds.
        """
        query = rearrange(self.query(x), "b s (h d) -> b h s d", h=self.heads)
        key, value = self.project(x) if context is None else context
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        if self.captured is not None:
            self.captured.append(attention_weights(query, key, mask, bias, self.scale))
            mixed = einsum(F.dropout(self.captured[-1], dropout), value, "b h s k, b h k d -> b h s d")
        else:
            mixed = attend(query, key, value, mask, dropout, bias, self.scale)
        return self.out(rearrange(mixed, "b h s d -> b s (h d)"))


class FeedForward(nn.Module):
    """Two linear layers and an activation between them, on each token alone: (b s e) -> (b s e)."""

    def __init__(self, width: int, hidden_width: int, activation: Activation = F.gelu,
                 linear_bias: bool = True):
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
def capture_attention(*layers: MultiHeadAttention) -> Iterator[list[Tensor]]:
    """While open, these layers append their attention weights (b h s k), with gradient, to the list it gives."""
    weights: list[Tensor] = []
    for layer in layers:
        layer.captured = weights
    try:
        yield weights
    finally:
        for layer in layers:
            layer.captured = None

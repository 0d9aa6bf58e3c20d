"""T5 and FlanT5: an encoder reads what is given, a decoder writes (arXiv 1910.10683, 2002.05202, 2210.11416).

Source: transformers `T5ForConditionalGeneration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import masks
from ..attention import ACTIVATIONS, FeedForward, GatedFeedForward, KVCache, MultiHeadAttention


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the defaults are T5-small's.

    T5 1.1 and FlanT5 have `gated` feed-forwards and a head of their own (neither `tied` to the word embeddings nor
    `scaled` by 1 / √width). BLIP-2 runs FlanT5 with the exact "gelu", though it was trained with the approximation
    "gelu_new". `start` is the id that the decoder begins with; without `decoder_layers` it is as deep as the encoder.
    """

    vocabulary: int = 32128
    width: int = 512
    layers: int = 6
    decoder_layers: int | None = None
    heads: int = 8
    head_width: int = 64
    mlp_width: int = 2048
    buckets: int = 32
    farthest: int = 128
    eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    scaled: bool = True
    start: int = 0


class DistanceBias(nn.Module):
    """A learned number for each head and distance, instead of positions: near distances one by one, far ones in groups.

    With `both_sides`, half of the groups are for keys that stand after the query.
    """

    def __init__(self, config: T5Config, both_sides: bool):
        super().__init__()
        self.both_sides, self.farthest = both_sides, config.farthest
        self.groups = nn.Embedding(config.buckets, config.heads)

    def group(self, ahead: Tensor) -> Tensor:
        """The group of each distance: how far a key stands ahead of the query, or, negative, behind it."""
        groups = self.groups.num_embeddings // (2 if self.both_sides else 1)
        distance = ahead.abs() if self.both_sides else (-ahead).clamp(min=0)
        exact = groups // 2
        far = (distance.clamp(min=1).float() / exact).log() / math.log(self.farthest / exact) * (groups - exact)
        group = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=groups - 1))
        return group + groups * (ahead > 0) if self.both_sides else group

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bias (b h s k) between tokens at the places `queries` (b s) and `keys` (b k)."""
        ahead = rearrange(keys, "b k -> b 1 k") - rearrange(queries, "b s -> b s 1")
        return rearrange(self.groups(self.group(ahead)), "b s k h -> b h s k")


class Block(nn.Module):
    """Pre-norm block with root-mean-square norms; a decoder's also reads what the encoder has left in the cache."""

    def __init__(self, config: T5Config, reads_memory: bool):
        super().__init__()
        norm = partial(nn.RMSNorm, config.width, eps=config.eps)
        attention = partial(MultiHeadAttention, config.width, config.heads, head_width=config.head_width,
                            linear_bias=False, scale=1.0)  # the initialisation of T5 makes up for the missing 1 / √d
        self.attention_norm, self.attention = norm(), attention()
        self.cross_norm = norm() if reads_memory else None
        self.cross_attention = attention() if reads_memory else None
        activation = ACTIVATIONS[config.activation]
        self.mlp_norm = norm()
        self.mlp = (GatedFeedForward(config.width, config.mlp_width, activation) if config.gated
                    else FeedForward(config.width, config.mlp_width, activation, linear_bias=False))

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor, cache: KVCache | None = None) -> Tensor:
        """Transform x (b s e) under mask (b 1 s k) with bias (b h s k)."""
        x = x + self.attention(self.attention_norm(x), mask, cache=cache, bias=bias)
        if self.cross_attention is not None:
            key, value, visible = cache[self.cross_attention]
            x = x + self.cross_attention(self.cross_norm(x), visible, context=(key, value))
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """Blocks that share one table of distances, and a last norm: an encoder, or a decoder that `reads_memory`."""

    def __init__(self, config: T5Config, layers: int, reads_memory: bool):
        super().__init__()
        self.distances = DistanceBias(config, both_sides=not reads_memory)
        self.blocks = nn.ModuleList(Block(config, reads_memory) for _ in range(layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor, mask: Tensor, places: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states (b s e) of x (b s e) under mask (b 1 s k); `places` (b k) in the text of all that is seen."""
        bias = self.distances(places[:, -x.shape[1]:], places).to(x.dtype)
        for block in self.blocks:
            x = block(x, mask, bias, cache)
        return self.norm(x)


class T5(nn.Module):
    """Encoder-decoder language model behind the same names as `OPT`; see `lm` for what they mean."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config, self.width, self.vocabulary = config, config.width, config.vocabulary
        self.begun = (config.start,)
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Stack(config, config.layers, reads_memory=False)
        self.decoder = Stack(config, config.decoder_layers or config.layers, reads_memory=True)
        self.unembed = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (b t e) of ids (b t)."""
        return self.tokens(ids)

    def encode(self, embeds: Tensor, visible: Tensor) -> Tensor:
        """The encoder's states (b s e) of embeds (b s e), of which `visible` (b s) are not padding.

        Padding takes no place: wherever it stands, the distances are those of the text without it.
        """
        return self.encoder(embeds, masks.bidirectional(0, visible), visible.long().cumsum(dim=1))

    def read(self, embeds: Tensor, visible: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Encode embeds (b s e), of which `visible` (b s) are not padding, and let the decoder begin.

        Returns the state (b e) that predicts the first word, and which tokens those that follow may see (b 1).
        """
        memory = self.encode(embeds, visible)
        for block in self.decoder.blocks:  # projected once, read by every word that is written
            cache[block.cross_attention] = (*block.cross_attention.project(memory),
                                            rearrange(visible, "b k -> b 1 1 k"))
        start = torch.tensor(self.begun, device=visible.device).expand(len(visible), 1)
        begun = torch.ones_like(start, dtype=torch.bool)
        return self(self.embed(start), masks.causal(begun), cache)[:, 0], begun

    def forward(self, embeds: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """The decoder's states (b s e) of embeds (b s e) under a causal mask (b 1 s k), after `read` filled `cache`."""
        places = rearrange(torch.arange(mask.shape[3], device=mask.device), "k -> 1 k")
        return self.decoder(embeds, mask, places, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... vocabulary) of hidden states (... e)."""
        hidden = hidden * self.width**-0.5 if self.config.scaled else hidden
        return F.linear(hidden, self.tokens.weight) if self.unembed is None else self.unembed(hidden)

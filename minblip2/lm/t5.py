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
from ..attention import ACTIVATIONS, FeedForward, GatedFeedForward, KVCache, LayerCache, Memory, MultiHeadAttention
from .protocol import Blocks


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; the defaults are T5-small's.

    T5 1.1 and FlanT5 have `gated` feed-forwards and a head of their own (neither `tied` to the word embeddings nor
    `scaled` by 1 / √width). BLIP-2 runs FlanT5 with the exact "gelu", though it was trained with the approximation
    "gelu_new". The decoder begins with `decoder_start_id`; without `decoder_layers` it is as deep as the encoder.
    """

    vocab_size: int = 32128
    width: int = 512
    layers: int = 6
    decoder_layers: int | None = None
    heads: int = 8
    head_width: int = 64
    mlp_width: int = 2048
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    scaled: bool = True
    decoder_start_id: int = 0


class RelativePositionBias(nn.Module):
    """A learned number for each head and distance, instead of positions: near ones one by one, far ones in buckets.

    If `bidirectional`, half of the buckets are for keys that stand after the query.
    """

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, config.max_distance
        self.buckets = nn.Embedding(config.buckets, config.heads)

    def bucket(self, ahead: Tensor) -> Tensor:
        """The bucket of each distance: how far a key stands ahead of the query, or, negative, behind it."""
        buckets = self.buckets.num_embeddings // (2 if self.bidirectional else 1)
        distance = ahead.abs() if self.bidirectional else (-ahead).clamp(min=0)
        exact = buckets // 2
        far = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact) * (buckets - exact)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))
        return bucket + buckets * (ahead > 0) if self.bidirectional else bucket

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bias (b h s k) between tokens at the positions `queries` (b s) and `keys` (b k)."""
        ahead = rearrange(keys, "b k -> b 1 k") - rearrange(queries, "b s -> b s 1")
        return rearrange(self.buckets(self.bucket(ahead)), "b s k h -> b h s k")


class T5Block(nn.Module):
    """Pre-norm block with root-mean-square norms; a decoder's also reads the encoder's output."""

    def __init__(self, config: T5Config, is_decoder: bool):
        super().__init__()
        norm = partial(nn.RMSNorm, config.width, eps=config.eps)
        attention = partial(MultiHeadAttention, config.width, config.heads, head_width=config.head_width,
                            linear_bias=False, scale=1.0)  # the initialisation of T5 makes up for the missing 1 / √d
        self.attention_norm, self.attention = norm(), attention()
        self.cross_norm = norm() if is_decoder else None
        self.cross_attention = attention() if is_decoder else None
        activation = ACTIVATIONS[config.activation]
        self.mlp_norm = norm()
        self.mlp = (GatedFeedForward(config.width, config.mlp_width, activation) if config.gated
                    else FeedForward(config.width, config.mlp_width, activation, linear_bias=False))

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor, memory: tuple[Tensor, Tensor] | None,
                memory_mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Transform x (b s e) under mask (b 1 s k) with bias (b h s k); memory: keys and values (b h k d)."""
        x = x + self.attention(self.attention_norm(x), mask, cache=cache, bias=bias)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.cross_norm(x), memory_mask, context=memory)
        return x + self.mlp(self.mlp_norm(x))


class T5Stack(Blocks):
    """Blocks that share one table of distances, and a last norm: an encoder, or a decoder if `is_decoder`."""

    def __init__(self, config: T5Config, layers: int, is_decoder: bool):
        super().__init__()
        self.position_bias = RelativePositionBias(config, bidirectional=not is_decoder)
        self.blocks = nn.ModuleList(T5Block(config, is_decoder) for _ in range(layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, key_positions: Tensor, cache: KVCache | None = None,
                memory: Memory | None = None) -> Tensor:
        """States (b s e) of x (b s e) at `positions` (b s), mask (b 1 s k) over keys at `key_positions` (b k)."""
        bias = self.position_bias(positions, key_positions).to(x.dtype)
        for i, block in enumerate(self.blocks):
            read, read_mask = (None, None) if memory is None else (memory.layers[i], memory.mask)
            x = self.run(block, x, mask, bias, read, read_mask, cache=None if cache is None else cache.layers[i])
        return self.norm(x)


class T5(nn.Module):
    """Encoder-decoder language model with the methods of `OPT`; see `lm.protocol.LanguageModel`."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config, self.width, self.vocab_size = config, config.width, config.vocab_size
        self.decoder_start_ids = (config.decoder_start_id,)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = T5Stack(config, config.layers, is_decoder=False)
        self.decoder = T5Stack(config, config.decoder_layers or config.layers, is_decoder=True)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (b t e) of ids (b t)."""
        return self.token_embedding(ids)

    def new_cache(self) -> KVCache:
        """An empty cache for the decoder."""
        return KVCache(len(self.decoder.blocks))

    def encode(self, given: Tensor, given_mask: Tensor) -> Memory:
        """What the encoder makes of given (b s e), mask (b s), projected once for each block of the decoder."""
        positions = masks.token_positions(given_mask)
        states = self.encoder(given, masks.bidirectional(0, given_mask), positions, positions)
        return Memory([block.cross_attention.project(states) for block in self.decoder.blocks],
                      rearrange(given_mask, "b k -> b 1 1 k"))

    def start(self, given_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (b 1 e) and mask (b 1) of the id that every text begins with."""
        ids = torch.tensor(self.decoder_start_ids, device=given_mask.device).expand(len(given_mask), 1)
        return self.embed(ids), torch.ones_like(ids, dtype=torch.bool)

    def teacher_forcing(self, given: Tensor, given_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        """States (b t e) that predict each word of `target`; see `LanguageModel`."""
        start, start_mask = self.start(given_mask)
        embeds = torch.cat([start, target[:, :-1]], dim=1)  # each word is predicted by the one before it
        mask = torch.cat([start_mask, target_mask[:, :-1]], dim=1)
        positions = masks.token_positions(mask)
        return self.decoder(embeds, masks.causal(mask), positions, positions, memory=self.encode(given, given_mask))

    def prefill(self, given: Tensor, given_mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Encode what is given, keep it in the cache, and begin the text; see `LanguageModel`."""
        cache.memory = self.encode(given, given_mask)
        start, start_mask = self.start(given_mask)
        hidden = self(start, masks.causal(start_mask), masks.token_positions(start_mask), cache)
        return hidden[:, 0], start_mask

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """The decoder's states (b s e) of embeds (b s e) at `positions` (b s), mask (b 1 s k), after `prefill`."""
        key_positions = torch.arange(mask.shape[3], device=mask.device).expand(len(embeds), -1)
        return self.decoder(embeds, mask, positions, key_positions, cache, cache.memory)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... vocab_size) of states (... e)."""
        hidden = hidden * self.width**-0.5 if self.config.scaled else hidden
        return F.linear(hidden, self.token_embedding.weight) if self.lm_head is None else self.lm_head(hidden)

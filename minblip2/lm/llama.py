"""The Llama family: rotary positions, grouped queries, gated feed-forward (arXiv 2302.13971).

Source: transformers `LlamaForCausalLM`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ..attention import GatedFeedForward, KVCache, LayerCache, attend
from .protocol import DecoderOnly


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-style model; the defaults are SmolLM2-135M's."""

    vocab_size: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    mlp_width: int = 1536
    rope_theta: float = 100_000.0
    eps: float = 1e-5
    tied: bool = True


def rotary(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (b 1 s d) of rotary embedding for positions (b s), in float32 (arXiv 2104.09864)."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=positions.device).float() / head_width)
    angles = repeat(positions.float(), "b s -> b 1 s 1") * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # the halves, not neighbours, form pairs: as in transformers
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of x (b h s d) by its angle; cos and sin (b 1 s d)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class LlamaAttention(nn.Module):
    """Causal self-attention in which several query heads share one key and value head (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        head_width = config.width // config.heads
        self.group_size = config.heads // config.kv_heads
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * head_width, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache | None) -> Tensor:
        """Attend from x (b s e) to itself and `cache` under mask (b 1 s k)."""
        query = apply_rope(rearrange(self.query(x), "b s (h d) -> b h s d", h=self.heads), *rope)
        key = apply_rope(rearrange(self.key(x), "b s (h d) -> b h s d", h=self.kv_heads), *rope)
        value = rearrange(self.value(x), "b s (h d) -> b h s d", h=self.kv_heads)
        if cache is not None:
            key, value = cache.append(key, value)
        key, value = (states.repeat_interleave(self.group_size, dim=1) for states in (key, value))
        return self.out(rearrange(attend(query, key, value, mask), "b h s d -> b s (h d)"))


class LlamaBlock(nn.Module):
    """Pre-norm decoder block with root-mean-square norms."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.attention = LlamaAttention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.mlp = GatedFeedForward(config.width, config.mlp_width, F.silu)  # SwiGLU

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: LayerCache | None) -> Tensor:
        """Transform x (b s e)."""
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Llama(DecoderOnly):
    """Decoder-only language model with the methods of `OPT`; see `lm.protocol.LanguageModel`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.width, self.vocab_size = config, config.width, config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (b t e) of ids (b t)."""
        return self.token_embedding(ids)

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """States (b s e) of embeds (b s e) at `positions` (b s), mask (b 1 s k) over the cache and them."""
        rope = rotary(positions, self.width // self.config.heads, self.config.rope_theta)
        return self.norm(self.run_all(embeds, rope, mask, cache=cache))

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... vocab_size) of states (... e)."""
        return F.linear(hidden, self.token_embedding.weight) if self.lm_head is None else self.lm_head(hidden)

"""OPT: the decoder-only language model of BLIP-2 (arXiv 2205.01068; transformers `OPTForCausalLM`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from ..attention import FeedForward, KVCache, MultiHeadAttention
from .protocol import DecoderOnly


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of OPT; the defaults are OPT-125m's.

    All sizes normalise before each branch but OPT-350m, which does it after (`pre_norm`), and whose word embeddings are
    narrower than its layers (`word_width`; None: as wide).
    """

    vocabulary: int = 50272
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    positions: int = 2048
    dropout: float = 0.0
    pre_norm: bool = True
    word_width: int | None = None


class Block(nn.Module):
    """Pre-norm decoder block with ReLU."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = MultiHeadAttention(config.width, config.heads, dropout=config.dropout)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config.width, config.mlp_width, F.relu)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        """Transform x (b s e) under mask (b 1 s k)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PostNormBlock(Block):
    """The same parts with each norm after its branch, as in OPT-350m."""

    def forward(self, x: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        """Transform x (b s e) under mask (b 1 s k)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, cache=cache)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class OPT(DecoderOnly):
    """Decoder-only language model; `head` is tied to the token embeddings. See `lm` for what its names mean."""

    POSITION_OFFSET = 2  # as in the original: rows 0 and 1 of the position table are never a real token's

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        self.width = config.word_width or config.width
        narrow = self.width != config.width
        self.tokens = nn.Embedding(config.vocabulary, self.width)
        self.widen = nn.Linear(self.width, config.width, bias=False) if narrow else nn.Identity()
        self.positions = nn.Embedding(config.positions + self.POSITION_OFFSET, config.width)
        block = Block if config.pre_norm else PostNormBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()
        self.narrow = nn.Linear(config.width, self.width, bias=False) if narrow else nn.Identity()
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (b t e) of ids (b t), without positions."""
        return self.tokens(ids)

    def forward(self, embeds: Tensor, mask: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states (b s e) of embeds (b s e) under a causal mask (b 1 s k), k including what `cache` holds."""
        before = reduce(mask.long(), "b 1 s k -> b s", "sum") - 1  # a token's position: how many it sees before itself
        x = self.widen(embeds) + self.positions(before + self.POSITION_OFFSET)
        for block in self.blocks:
            x = block(x, mask, cache)
        return self.narrow(self.norm(x))

    def head(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... vocabulary) of hidden states (... e)."""
        return F.linear(hidden, self.tokens.weight)

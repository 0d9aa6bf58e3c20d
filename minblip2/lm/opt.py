"""OPT: the decoder-only language model of BLIP-2 (arXiv 2205.01068; transformers `OPTForCausalLM`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import FeedForward, KVCache, LayerCache, MultiHeadAttention
from .protocol import DecoderOnly


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of OPT; the defaults are OPT-125m's.

    All sizes normalise before each branch but OPT-350m, which does it after (`pre_norm`), and whose word embeddings are
    narrower than its layers (`embed_dim`; None: as wide).
    """

    vocab_size: int = 50272
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 2048
    dropout: float = 0.0
    pre_norm: bool = True
    embed_dim: int | None = None


class OPTBlock(nn.Module):
    """Pre-norm decoder block with ReLU."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = MultiHeadAttention(config.width, config.heads, dropout=config.dropout)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config.width, config.mlp_width, F.relu)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, cache: LayerCache | None) -> Tensor:
        """Transform x (b s e) under mask (b 1 s k)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PostNormOPTBlock(OPTBlock):
    """The same parts with each norm after its branch, as in OPT-350m."""

    def forward(self, x: Tensor, mask: Tensor, cache: LayerCache | None) -> Tensor:
        """Transform x (b s e) under mask (b 1 s k)."""
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, cache=cache)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class OPT(DecoderOnly):
    """Decoder-only language model; its head is tied to the word embeddings. See `lm.protocol.LanguageModel`."""

    POSITION_OFFSET = 2  # as in the original: rows 0 and 1 of the position table are never a real token's

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        self.width = config.embed_dim or config.width
        narrow = self.width != config.width
        self.token_embedding = nn.Embedding(config.vocab_size, self.width)
        self.project_in = nn.Linear(self.width, config.width, bias=False) if narrow else nn.Identity()
        self.position_embedding = nn.Embedding(config.max_positions + self.POSITION_OFFSET, config.width)
        block = OPTBlock if config.pre_norm else PostNormOPTBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()
        self.project_out = nn.Linear(config.width, self.width, bias=False) if narrow else nn.Identity()
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (b t e) of ids (b t), without positions."""
        return self.token_embedding(ids)

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """States (b s e) of embeds (b s e) at `positions` (b s); mask (b 1 s k), over a cache too."""
        x = self.project_in(embeds) + self.position_embedding(positions + self.POSITION_OFFSET)
        return self.project_out(self.norm(self.run_all(x, mask, cache=cache)))

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... vocab_size) of states (... e)."""
        return F.linear(hidden, self.token_embedding.weight)

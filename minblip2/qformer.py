"""The Querying Transformer: learned queries read an image, and share their self-attention with text (paper §3.1).

Source: LAVIS `lavis/models/blip2_models/Qformer.py`; transformers `Blip2QFormerModel`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from .attention import FeedForward, KVCache, LayerCache, MultiHeadAttention


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are the paper's: BERT-base, and images of ViT-g's width.

    Layers 0, `cross_attention_every`, 2·`cross_attention_every`, ... read the image. [DEC] is the vocabulary's last id.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    num_queries: int = 32
    image_width: int = 1408
    cross_attention_every: int = 2
    vocab_size: int = 30523
    max_positions: int = 512
    dropout: float = 0.1
    eps: float = 1e-12
    init_std: float = 0.02


class ImageKV(tuple):
    """An image's keys and values (b h v d) by block, projected once; None if it reads no image."""

    def select(self, rows: Tensor) -> ImageKV:
        """Those of the images `rows` (n); one that is taken often is not projected again."""
        return ImageKV([None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self])


class QFormerOutput(NamedTuple):
    """Hidden states of the queries (b q e) and of the text (b t e); an absent side has length 0."""

    queries: Tensor
    text: Tensor


class QFormerBlock(nn.Module):
    """Shared self-attention, cross-attention for the queries, a feed-forward for each side; post-norm as in BERT."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool):
        super().__init__()
        width, eps = config.width, config.eps
        self.self_attention = MultiHeadAttention(width, config.heads, dropout=config.dropout)
        self.self_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = (MultiHeadAttention(width, config.heads, config.image_width, config.dropout)
                                if has_cross_attention else None)
        self.cross_norm = nn.LayerNorm(width, eps=eps) if has_cross_attention else None
        self.query_mlp, self.query_norm = FeedForward(width, config.mlp_width), nn.LayerNorm(width, eps=eps)
        self.text_mlp, self.text_norm = FeedForward(width, config.mlp_width), nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, num_queries: int, image: tuple[Tensor, Tensor] | None, mask: Tensor | None,
                cache: LayerCache | None) -> Tensor:
        """Transform x (b s e), `num_queries` queries first; image: keys and values (b h v d)."""
        x = self.self_norm(x + self.dropout(self.self_attention(x, mask, cache=cache)))
        q, t = x[:, :num_queries], x[:, num_queries:]
        if num_queries and self.cross_attention is not None:
            q = self.cross_norm(q + self.dropout(self.cross_attention(q, context=image)))
        if num_queries:
            q = self.query_norm(q + self.dropout(self.query_mlp(q)))
        if t.shape[1]:
            t = self.text_norm(t + self.dropout(self.text_mlp(t)))
        return torch.cat([q, t], dim=1)


class LMHead(nn.Module):
    """BERT's prediction head; its output matrix is the word embeddings, given at the call."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, token_embedding: Tensor) -> Tensor:
        """Logits (... vocab_size) of hidden states (... e) against word embeddings (vocab_size e)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), token_embedding, self.bias)


class QFormer(nn.Module):
    """Queries and text in one transformer; a mask decides who sees whom, and only queries see the image."""

    def __init__(self, config: QFormerConfig = QFormerConfig()):
        super().__init__()
        self.config, self.dec_id = config, config.vocab_size - 1
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, config.width))
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(QFormerBlock(config, i % config.cross_attention_every == 0)
                                    for i in range(config.layers))
        self.lm_head = LMHead(config)
        self.apply(self.initialise)
        # Never zeros: equal queries stay equal, for no position tells them apart.
        nn.init.normal_(self.query_tokens, std=config.init_std)

    def initialise(self, module: nn.Module) -> None:
        """Give a fresh linear layer or table of embeddings its random weights."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def cross_attentions(self) -> list[MultiHeadAttention]:
        """The layers that read the image, first to last."""
        return [block.cross_attention for block in self.blocks if block.cross_attention is not None]

    def new_cache(self) -> KVCache:
        """An empty cache for this model."""
        return KVCache(len(self.blocks))

    def project_image(self, image_features: Tensor) -> ImageKV:
        """Keys and values of normalised image features (b v image_width) for each block that reads them."""
        return ImageKV([None if block.cross_attention is None else block.cross_attention.project(image_features)
                        for block in self.blocks])

    def embed_text(self, text_ids: Tensor, first_position: int = 0) -> Tensor:
        """Word plus position embeddings (b t e) of text_ids (b t); positions count text only, from `first_position`."""
        positions = torch.arange(first_position, first_position + text_ids.shape[1], device=text_ids.device)
        return self.token_embedding(text_ids) + self.position_embedding(positions)

    def embed(self, image_kv: ImageKV | None, text_ids: Tensor | None, first_position: int = 0) -> Tensor:
        """What enters the first block (b s e): the queries when an image is given, text when text_ids (b t) are given.

        Raises ValueError when neither is given.
        """
        parts = [] if image_kv is None else [repeat(self.query_tokens, "1 q e -> b q e", b=len(image_kv[0][0]))]
        if text_ids is not None:
            parts.append(self.embed_text(text_ids, first_position))
        if not parts:
            raise ValueError("the Q-Former was given neither an image nor a text: pass image_kv, text_ids or both")
        return self.dropout(self.norm(torch.cat(parts, dim=1)))

    def forward(self, image_kv: ImageKV | None = None, text_ids: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None, first_position: int = 0) -> QFormerOutput:
        """Run the queries (when an image is given), the text (when text_ids (b t) are given), or both together.

        mask (b 1 s k), from `masks`; None lets everyone see everyone. A cache that holds an earlier pass of the queries
        stands for them: text run on it sees them without computing them again. `first_position` is that of the first
        text id. Raises ValueError when neither image nor text is given.
        """
        x = self.embed(image_kv, text_ids, first_position)
        num_queries = self.config.num_queries if image_kv is not None else 0
        absent = [None] * len(self.blocks)
        for block, image, layer in zip(self.blocks, image_kv or absent, cache.layers if cache else absent, strict=True):
            x = block(x, num_queries, image, mask, layer)
        return QFormerOutput(x[:, :num_queries], x[:, num_queries:])

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-word logits (... vocab_size) of text states (... e)."""
        return self.lm_head(hidden, self.token_embedding.weight)

    def query_branch(self) -> QFormer:
        """A copy that only reads images: what stage 2 trains. Text branch, embeddings and LM head are left behind."""
        branch = copy.deepcopy(self)
        branch.token_embedding = branch.position_embedding = branch.lm_head = None
        for block in branch.blocks:
            block.text_mlp = block.text_norm = None
        return branch

"""The Querying Transformer: learned queries read an image, and share their self-attention with text (paper §3.1).

Source: LAVIS `lavis/models/blip2_models/Qformer.py`; transformers `Blip2QFormerModel`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FeedForward, KVCache, MultiHeadAttention


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the defaults are the paper's: BERT-base, and images of ViT-g's width.

    Layers 0, `cross_every`, 2·`cross_every`, ... read the image. [DEC] is the last id of the vocabulary.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    queries: int = 32
    image_width: int = 1408
    cross_every: int = 2
    vocabulary: int = 30523
    positions: int = 512
    dropout: float = 0.1
    eps: float = 1e-12
    init_std: float = 0.02


class ImageKV(NamedTuple):
    """An image's keys and values, projected once: a pair of (b h v d) for each layer that reads the image."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def first(self, n: int) -> ImageKV:
        """The first `n` images; nothing is copied."""
        return ImageKV(tuple((key[:n], value[:n]) for key, value in self.layers))

    def select(self, rows: Tensor) -> ImageKV:
        """Those of the images `rows` (n): the same picture may be taken many times without projecting it again."""
        return ImageKV(tuple((key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.layers))


class QFormerOutput(NamedTuple):
    """Hidden states of the queries (b q e) and of the text (b t e); an absent side has length 0."""

    queries: Tensor
    text: Tensor


class Block(nn.Module):
    """Shared self-attention, cross-attention for the queries, a feed-forward for each side; post-norm as in BERT."""

    def __init__(self, config: QFormerConfig, reads_image: bool):
        super().__init__()
        width, eps = config.width, config.eps
        self.self_attention = MultiHeadAttention(width, config.heads, dropout=config.dropout)
        self.self_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attention = (MultiHeadAttention(width, config.heads, config.image_width, config.dropout)
                                if reads_image else None)
        self.cross_norm = nn.LayerNorm(width, eps=eps) if reads_image else None
        self.query_mlp, self.query_norm = FeedForward(width, config.mlp_width), nn.LayerNorm(width, eps=eps)
        self.text_mlp, self.text_norm = FeedForward(width, config.mlp_width), nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, queries: int, image: tuple[Tensor, Tensor] | None, mask: Tensor | None,
                cache: KVCache | None) -> Tensor:
        """Transform x (b s e), whose first `queries` tokens are queries; image: keys and values (b h v d)."""
        x = self.self_norm(x + self.dropout(self.self_attention(x, mask, cache=cache)))
        q, t = x[:, :queries], x[:, queries:]
        if queries and self.cross_attention is not None:
            q = self.cross_norm(q + self.dropout(self.cross_attention(q, context=image)))
        if queries:
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
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """Logits (... vocabulary) of hidden states (... e) against word embeddings (vocabulary e)."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, self.bias)


class QFormer(nn.Module):
    """Queries and text in one transformer; a mask decides who sees whom, and only queries see the image."""

    def __init__(self, config: QFormerConfig = QFormerConfig()):
        super().__init__()
        self.config, self.dec = config, config.vocabulary - 1
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.width))
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i % config.cross_every == 0) for i in range(config.layers))
        self.lm_head = LMHead(config)
        self.apply(self.initialise)
        # Never zeros: queries that start equal stay equal, for they have no position to tell them apart.
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

    def project_image(self, image: Tensor, norm: nn.LayerNorm | None = None) -> ImageKV:
        """Keys and values of image features (b v image_width), normalised by `norm`, for each layer that reads them."""
        if norm is not None:
            image = F.layer_norm(image, norm.normalized_shape, eps=norm.eps)
        return ImageKV(tuple(layer.project(image, norm) for layer in self.cross_attentions))

    def embed_text(self, ids: Tensor, first_position: int = 0) -> Tensor:
        """Word plus position embeddings (b t e) of ids (b t); positions count text only, from 0."""
        places = torch.arange(first_position, first_position + ids.shape[1], device=ids.device)
        return self.words(ids) + self.positions(places)

    def forward(self, image: ImageKV | None = None, text_ids: Tensor | None = None, mask: Tensor | None = None,
                cache: KVCache | None = None) -> QFormerOutput:
        """Run the queries (when an image is given), the text (when ids (b t) are given), or both together.

        mask (b 1 s k), from `masks`; None lets everyone see everyone. A cache that holds an earlier query pass stands
        for the queries: text run on it sees them without computing them again. Each image may have n texts ((b n) t).
        """
        parts = []
        if image is not None:
            rows = len(image.layers[0][0] if text_ids is None else text_ids)
            parts.append(self.query_tokens.expand(rows, -1, -1))
        if text_ids is not None:
            seen = cache.length - self.config.queries if cache else 0
            parts.append(self.embed_text(text_ids, first_position=seen))
        queries = self.config.queries if image is not None else 0
        x = self.dropout(self.norm(torch.cat(parts, dim=1)))
        pictures = iter(image.layers if image is not None else ())
        for block in self.blocks:
            reads = image is not None and block.cross_attention is not None
            x = block(x, queries, next(pictures) if reads else None, mask, cache)
        return QFormerOutput(x[:, :queries], x[:, queries:])

    def predict(self, hidden: Tensor) -> Tensor:
        """Next-word logits (... vocabulary) of text states (... e)."""
        return self.lm_head(hidden, self.words.weight)

    def query_branch(self) -> QFormer:
        """A copy that only reads images: what stage 2 trains. Text branch, embeddings and LM head are left behind."""
        branch = copy.deepcopy(self)
        branch.words = branch.positions = branch.lm_head = None
        for block in branch.blocks:
            block.text_mlp = block.text_norm = None
        return branch

"""What stage 2 asks of a language model: the same few methods for every one of them.

A decoder-only model reads what is given, the soft prompt of an image and a text, with the same layers that write; an
encoder-decoder (`T5`) reads it with its encoder. Both are trained by `teacher_forcing` and write after `prefill`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import masks
from ..attention import KVCache, LayerCache


class LanguageModel(Protocol):
    """A frozen language model behind `Stage2`: `width` of its word embeddings, `vocab_size` ids.

    `decoder_start_ids` stand at the beginning of every text that it writes, without having been chosen.
    """

    width: int
    vocab_size: int
    decoder_start_ids: tuple[int, ...]

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings (b t e) of ids (b t), without positions."""

    def new_cache(self) -> KVCache:
        """An empty cache for this model."""

    def teacher_forcing(self, given: Tensor, given_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        """States (b t e) that predict each word of `target` from what is given and the true words before it.

        given (b s e) and target (b t e) are embeddings; the masks (b s), (b t) are True where they are not padding. The
        target is padded on the right, what is given on any side.
        """

    def prefill(self, given: Tensor, given_mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Read what is given, (b s e) with mask (b s), into an empty cache.

        Returns the state (b e) that predicts the first word, and which cached tokens (b k) are not padding.
        """

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """After `prefill`: states (b s e) of the next embeds (b s e) at `positions` (b s), mask (b 1 s k)."""

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits (... vocab_size) of states (... e)."""


class Blocks(nn.Module):
    """A stack of transformer blocks. If `checkpointed`, each keeps only its input for the backward pass.

    Its inside is then computed a second time when the gradient arrives: less memory for one more forward pass through
    the stack, with the same result (arXiv 1604.06174).
    """

    checkpointed = False

    def run(self, block: nn.Module, x: Tensor, *inputs, cache: LayerCache | None = None) -> Tensor:
        """x (b s e) after one block, which is called as block(x, *inputs, cache)."""
        if self.checkpointed and cache is None and torch.is_grad_enabled():
            return checkpoint(block, x, *inputs, None, use_reentrant=False)
        return block(x, *inputs, cache)

    def run_all(self, x: Tensor, *inputs, cache: KVCache | None = None) -> Tensor:
        """x (b s e) after all blocks, each with its own layer of the cache."""
        for i, block in enumerate(self.blocks):
            x = self.run(block, x, *inputs, cache=None if cache is None else cache.layers[i])
        return x


class DecoderOnly(Blocks):
    """A model that reads with the layers that write: what is given is simply the beginning of the text."""

    decoder_start_ids: tuple[int, ...] = ()

    def new_cache(self) -> KVCache:
        """An empty cache for this model."""
        return KVCache(len(self.blocks))

    def teacher_forcing(self, given: Tensor, given_mask: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        """States (b t e) that predict each word of `target`; see `LanguageModel`."""
        attention_mask = torch.cat([given_mask, target_mask], dim=1)
        embeds, positions = torch.cat([given, target], dim=1), masks.token_positions(attention_mask)
        hidden = self(embeds, masks.causal(attention_mask), positions)
        # Each word is predicted by the token before it; for the first one that is the newest which is not padding.
        return torch.cat([newest(hidden[:, :given.shape[1]], given_mask), hidden[:, given.shape[1]:-1]], dim=1)

    def prefill(self, given: Tensor, given_mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Read what is given into an empty cache; see `LanguageModel`."""
        hidden = self(given, masks.causal(given_mask), masks.token_positions(given_mask), cache)
        return newest(hidden, given_mask)[:, 0], given_mask


def newest(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The state (b 1 e) of each row's last token that is not padding; hidden (b s e), attention_mask (b s)."""
    last = attention_mask.long().cumsum(dim=1).argmax(dim=1)  # not -1: a padded prompt ends in padding
    return rearrange(hidden[torch.arange(len(hidden), device=last.device), last], "b e -> b 1 e")

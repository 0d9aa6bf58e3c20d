"""What stage 2 asks of a language model: the same few names for every one in the house.

`embed(ids)` makes word embeddings, as wide as `width`. `read(embeds, visible, cache)` takes in what is given, the soft
prompt of an image and a text, and says what the first word to write is predicted from. The model itself, called with
(embeds, mask, cache), goes on from there with words that are written, and `head` turns its states into logits over
`vocabulary` ids. What has been read and written so far is in the cache. `begun` are ids that stand at the beginning of
every text without having been chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import masks
from ..attention import KVCache


class DecoderOnly(nn.Module):
    """A model that reads with the layers that write: what is given is simply the beginning of the text."""

    begun: tuple[int, ...] = ()

    def read(self, embeds: Tensor, visible: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Take in embeds (b s e), of which `visible` (b s) are not padding, on whatever side padding is.

        Returns the state (b e) that predicts the first word, and which tokens those that follow may see (b k).
        """
        hidden = self(embeds, masks.causal(visible), cache)
        newest = visible.long().cumsum(dim=1).argmax(dim=1)  # not -1: an empty prompt ends in padding
        return hidden[torch.arange(len(hidden), device=newest.device), newest], visible

"""Who may see whom: the three masks of the Q-Former and the causal mask of a language model (paper §3.2, Figure 2).

A mask is boolean, (b, 1, queries, keys), True = may attend. Padding is part of it: nobody attends to a padded key.
The sequence is [queries ; text], s = q + t long. `text_mask` (b t) is True where a token is not padding.
Rows may be cut out: the last t rows of a mask are what the text needs when the queries' keys come from a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


def bidirectional(num_queries: int, text_mask: Tensor) -> Tensor:
    """Everyone sees everyone: queries and text are fused, for matching (ITM). Returns (b 1 s s)."""
    attention_mask = F.pad(text_mask.bool(), (num_queries, 0), value=True)
    return repeat(attention_mask, "b k -> b 1 s k", s=attention_mask.shape[1])


def unimodal(num_queries: int, text_mask: Tensor) -> Tensor:
    """Queries see queries, text sees text: two separate encoders, for ITC. Returns (b 1 s s)."""
    place = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device)
    is_text = place >= num_queries
    same_side = rearrange(is_text, "s -> s 1") == rearrange(is_text, "k -> 1 k")
    return bidirectional(num_queries, text_mask) & same_side


def multimodal_causal(num_queries: int, text_mask: Tensor) -> Tensor:
    """Queries see queries; text sees queries, itself and the text before it, for ITG. Returns (b 1 s s)."""
    place = torch.arange(num_queries + text_mask.shape[1], device=text_mask.device)
    row, key = rearrange(place, "s -> s 1"), rearrange(place, "k -> 1 k")
    return bidirectional(num_queries, text_mask) & ((key < num_queries) | (key <= row))


def causal(attention_mask: Tensor) -> Tensor:
    """Each token sees itself and those before it but for padding. (b s) -> (b 1 s s)."""
    return multimodal_causal(0, attention_mask)


def token_positions(attention_mask: Tensor) -> Tensor:
    """Each token's position: how many tokens that are no padding stand before it. (b s) -> (b s).

    Padding takes no place, on whatever side it stands; what a padded token gets does not matter.
    """
    return attention_mask.long().cumsum(dim=1) - 1

"""Answers to the exercises of lesson 02."""

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from minblip2 import masks

from . import Answers


def visible_of(queries: int, text_mask: Tensor) -> Tensor:
    """Who is not padding: (b s)."""
    return torch.cat([torch.ones(len(text_mask), queries, dtype=torch.bool), text_mask], dim=1)


def by_loops(rule):
    """A mask from a rule(row, column, queries) for two tokens that are no padding."""
    def mask_of(queries, text_mask):
        attention_mask = visible_of(queries, text_mask)
        b, s = attention_mask.shape
        mask = torch.zeros(b, 1, s, s, dtype=torch.bool)
        for i in range(b):
            for row in range(s):
                for column in range(s):
                    mask[i, 0, row, column] = bool(attention_mask[i, column]) and rule(row, column, queries)
        return mask
    return mask_of


def without_padding(make):
    """The mistake to forget padding."""
    return lambda queries, text_mask: make(queries, torch.ones_like(text_mask))


def rows_closed(make):
    """The mistake to close the rows of padding, not its columns."""
    return lambda queries, text_mask: (make(queries, torch.ones_like(text_mask))
                                       & visible_of(queries, text_mask)[:, None, :, None])


def text_first(make):
    """The mistake to put the queries behind the text."""
    def mask_of(queries, text_mask):
        return make(queries, text_mask).roll((-queries, -queries), dims=(2, 3))
    return mask_of


def opposite(make):
    """The mistake to take True for forbidden."""
    return lambda queries, text_mask: ~make(queries, text_mask)


def strict(queries, text_mask):
    s = queries + text_mask.shape[1]
    return masks.multimodal_causal(queries, text_mask) & ~(torch.eye(s, dtype=torch.bool)
                                                           & (torch.arange(s) >= queries))


def leaking(queries, text_mask):
    mask = masks.multimodal_causal(queries, text_mask)
    mask[:, :, :queries] = masks.bidirectional(queries, text_mask)[:, :, :queries]
    return mask


def everything_causal(queries, text_mask):
    s = queries + text_mask.shape[1]
    return masks.bidirectional(queries, text_mask) & torch.ones(s, s).tril().bool()


def blind_words(queries, text_mask):
    return masks.multimodal_causal(queries, text_mask) & masks.unimodal(queries, text_mask)


def swapped(queries, text_mask):
    mask = masks.multimodal_causal(queries, text_mask)
    mask[:, :, queries:, queries:] = mask[:, :, queries:, queries:].transpose(2, 3) & text_mask[:, None, None, :]
    return mask


def one_way(queries, text_mask):
    mask = masks.unimodal(queries, text_mask)
    mask[:, :, queries:, :queries] = True
    return mask


def by_length(make):
    """The mistake to take padding for something that stands on the right."""
    def mask_of(queries, text_mask):
        return make(queries, torch.arange(text_mask.shape[1]) < text_mask.sum(dim=1, keepdim=True))
    return mask_of


def with_queries(make, fixed):
    """The mistake to write the number of queries down, or to take one for all."""
    def mask_of(queries, text_mask):
        s = queries + text_mask.shape[1]
        mask = make(min(fixed, s), torch.ones(len(text_mask), max(0, s - fixed), dtype=torch.bool))
        return mask & visible_of(queries, text_mask)[:, None, None]
    return mask_of


def of_first(make):
    """The mistake to give every text the padding of the first."""
    return lambda queries, text_mask: make(queries, text_mask[:1].expand_as(text_mask))


def rows_too(make):
    """Padding looks at nobody, which is its own affair."""
    return lambda queries, text_mask: make(queries, text_mask) & visible_of(queries, text_mask)[:, None, :, None]


def causal_by_words(queries, text_mask):
    """The mistake to count only words: a word sees as many places as it has words before it."""
    s = queries + text_mask.shape[1]
    place = visible_of(queries, text_mask).long().cumsum(dim=1) - 1
    column = torch.arange(s)
    unfinished = (column < queries) | (column <= place[:, :, None])
    return (unfinished & visible_of(queries, text_mask)[:, None])[:, None]


def causal_towers(queries, text_mask):
    s = queries + text_mask.shape[1]
    return masks.unimodal(queries, text_mask) & torch.ones(s, s).tril().bool()


def padding_sees_itself(queries, text_mask):
    mask = masks.unimodal(queries, text_mask)
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool)


def by_count(mask, queries):
    """Recognise a mask by how many fields are open: two of them may have as many."""
    t, found = len(mask) - queries, int(mask.sum())
    known = {"itc": queries**2 + t * t, "itm": (queries + t) ** 2,
             "itg": queries**2 + queries * t + t * (t + 1) // 2}
    return next((name for name, count in known.items() if count == found), "leak")


def by_fixed_place(mask, queries):
    """The mistake to look at places that are right for two queries only."""
    if mask[0, 2]:
        return "itm" if mask[2, -1] else "leak"
    return "itg" if mask[-1, 0] else "itc"


def by_square(mask, queries):
    """The mistake to look at the last word's row only."""
    return "itm" if mask.all() else "itc" if not mask[-1, 0] else "itg" if not mask[0, -1] else "itm"


def quarter(mask, queries):
    """Recognise a mask by its quarters."""
    if mask[:queries, queries:].all():
        return "itm" if mask.all() else "leak"
    return "itg" if mask[queries:, :queries].all() else "itc"


def by_comparison(mask, queries):
    words = torch.ones(1, len(mask) - queries, dtype=torch.bool)
    known = {"itc": masks.unimodal, "itm": masks.bidirectional, "itg": masks.multimodal_causal}
    return next((name for name, make in known.items() if torch.equal(make(queries, words)[0, 0], mask)), "leak")


def by_blocks(queries, text_mask):
    own = torch.ones(queries, queries)
    return torch.stack([torch.block_diag(own, row.float().repeat(len(row), 1)) for row in text_mask]).bool()[:, None]


def by_triangle(queries, text_mask):
    s = queries + text_mask.shape[1]
    order = torch.ones(s, s).tril().bool() | (torch.arange(s) < queries)
    return order & visible_of(queries, text_mask)[:, None, None]


def up_to_the_last_word(make):
    """The mistake to take only what stands on the right for padding: holes are open."""
    return lambda queries, text_mask: make(queries, text_mask.flip(1).long().cumsum(dim=1).flip(1) > 0)


def by_products(rule_of):
    """A mask as a product of numbers, with a rule (s s) for so many queries and places."""
    def mask_of(queries, text_mask):
        seen = visible_of(queries, text_mask).float()
        return torch.einsum("bk,sk->bsk", seen, rule_of(queries, seen.shape[1]).float())[:, None] > 0
    return mask_of


def fills_the_mask(mask, queries):
    """The mistake to write into the mask that was given."""
    name = quarter(mask, queries)
    mask.fill_diagonal_(False)
    return name


ANSWERS = {
    "bidirectional": Answers(
        [by_products(lambda queries, s: torch.ones(s, s)),
         masks.bidirectional, by_loops(lambda row, column, queries: True),
         lambda queries, text_mask: visible_of(queries, text_mask)[:, None, None].repeat(
             1, 1, queries + text_mask.shape[1], 1)],
        [(up_to_the_last_word(masks.bidirectional), "in between"),
         (opposite(masks.bidirectional), "opposite"), (without_padding(masks.bidirectional), "has to be closed"),
         (rows_closed(masks.bidirectional), "closed the rows of padding"), (masks.unimodal, "in both directions"),
         (text_first(masks.bidirectional), "Queries come first"),
         (lambda queries, text_mask: masks.bidirectional(queries, text_mask)[:, 0], "(b 1 s s)"),
         (lambda queries, text_mask: masks.bidirectional(queries, text_mask).float(), "torch.bool"),
         (by_length(masks.bidirectional), "on the left or in between"), (of_first(masks.bidirectional), "is looked at"),
         (rows_too(masks.bidirectional), "close columns only"), (masks.multimodal_causal, "in both directions"),
         (lambda queries, text_mask: masks.bidirectional(3, text_mask), "(b 1 s s)"),
         (lambda queries, text_mask: masks.bidirectional(queries, text_mask) if text_mask.shape[1] else
          torch.zeros(len(text_mask), 1, queries, queries, dtype=torch.bool), "without a single word"),
         (lambda queries, text_mask: masks.bidirectional(queries, text_mask.logical_not_().logical_not_()
                                                         .fill_(True)), "changed the text_mask")]),
    "unimodal": Answers(
        [by_products(lambda queries, s: torch.block_diag(*(torch.ones(n, n) for n in (queries, s - queries)))),
         masks.unimodal, by_loops(lambda row, column, queries: (row < queries) == (column < queries)), by_blocks,
         rows_too(masks.unimodal)],
        [(up_to_the_last_word(masks.unimodal), "in between"),
         (masks.bidirectional, "queries look at words and words at queries"), (one_way, "words look at queries"),
         (without_padding(masks.unimodal), "has to be closed"), (rows_closed(masks.unimodal), "closed the rows"),
         (opposite(masks.unimodal), "True means may look"),
         (lambda queries, text_mask: masks.unimodal(queries, text_mask) & masks.multimodal_causal(queries, text_mask),
          "nothing here is causal"), (causal_towers, "nothing here is causal"),
         (by_length(masks.unimodal), "on the left or in between"), (of_first(masks.unimodal), "is looked at"),
         (with_queries(masks.unimodal, 3), "look"), (with_queries(masks.unimodal, 1), "queries"),
         (padding_sees_itself, "padding is looked at"), (text_first(masks.unimodal), "look")]),
    "multimodal_causal": Answers(
        [by_products(lambda queries, s: torch.ones(s, s).tril() + (torch.arange(s) < queries)),
         masks.multimodal_causal,
         by_loops(lambda row, column, queries: column < queries or queries <= column <= row),
         by_triangle, rows_too(masks.multimodal_causal)],
        [(up_to_the_last_word(masks.multimodal_causal), "in between"),
         (leaking, "the answer leaks"), (strict, "does not look at itself"),
         (everything_causal, "queries have no order"),
         (blind_words, "cannot see all queries"), (swapped, "row and column are swapped"),
         (without_padding(masks.multimodal_causal), "has to be closed"),
         (masks.bidirectional, "the answer leaks"), (one_way, "come after it"),
         (by_length(masks.multimodal_causal), "on the left or in between"),
         (of_first(masks.multimodal_causal), "is looked at"), (with_queries(masks.multimodal_causal, 3), ""),
         (causal_by_words, "on the left or in between"), (rows_closed(masks.multimodal_causal), "closed the rows"),
         (opposite(masks.multimodal_causal), "True means may look"), (text_first(masks.multimodal_causal), "leaks")]),
    "allowed": Answers(
        [lambda queries, words: Fraction(2 * queries * (queries + words) + words * (words + 1), 2),
         lambda q, t: q * q + q * t + t * (t + 1) // 2,
         lambda q, t: int(masks.multimodal_causal(q, torch.ones(1, t, dtype=torch.bool)).sum()),
         lambda q, t: sum(q + max(0, row - q + 1) for row in range(q + t)),
         lambda q, t: np.int64(q * (q + t)) + np.arange(1, t + 1).sum(), lambda q, t: q * (q + t) + t * (t + 1) / 2,
         lambda q, t: masks.multimodal_causal(q, torch.ones(1, t, dtype=torch.bool)).sum()],
        [(lambda q, t: q * q + q * t + t * (t + 1) // 2 + (t > 50), "four quarters"),
         (lambda q, t: (q + t) ** 2, "every field"), (lambda q, t: q * q + t * t, "uni-modal"),
         (lambda q, t: q * q + q * t + t * (t - 1) // 2, "also sees itself"),
         (lambda q, t: (q + t) * (q + t + 1) // 2, "in both directions"),
         (lambda q, t: q * q + t * (t + 1) // 2, "see the queries, too"),
         (lambda q, t: t * t + q * t + q * (q + 1) // 2, "are swapped"), (lambda q, t: 101, "the four quarters"),
         (lambda q, t: q * q + q * t + t * t // 2, "the diagonal"), (lambda q, t: math.nan, "nan"),
         (lambda q, t: str(q * q + q * t + t * (t + 1) // 2), "a number")]),
    "which_loss": Answers(
        [lambda mask, queries: np.str_(quarter(mask, 1)),
         quarter, by_comparison],
        [(lambda mask, queries: quarter(mask, 2), "you take"), (fills_the_mask, "changed the mask"),
         (lambda mask, queries: "itg", "you take"), (by_count, "of ITC"), (by_fixed_place, "you take"),
         (by_square, "a leaking mask"), (lambda mask, queries: "ITC", "the answers are"),
         (lambda mask, queries: "no idea", "the answers are"),
         (lambda mask, queries: "itg" if (output := quarter(mask, queries)) == "leak" else output, "queries' rows"),
         (lambda mask, queries: "itm" if (output := quarter(mask, queries)) == "leak" else output, "words' rows"),
         (lambda mask, queries: 2, "the answers are")]),
}

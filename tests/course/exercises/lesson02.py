"""Answers to the exercises of lesson 02."""

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


ANSWERS = {
    "bidirectional": Answers(
        [masks.bidirectional, by_loops(lambda row, column, queries: True),
         lambda queries, text_mask: visible_of(queries, text_mask)[:, None, None].repeat(
             1, 1, queries + text_mask.shape[1], 1)],
        [(opposite(masks.bidirectional), "opposite"), (without_padding(masks.bidirectional), "has to be closed"),
         (rows_closed(masks.bidirectional), "closed the rows of padding"), (masks.unimodal, "in both directions"),
         (text_first(masks.bidirectional), "Queries come first"),
         (lambda queries, text_mask: masks.bidirectional(queries, text_mask)[:, 0], "(b 1 s s)"),
         (lambda queries, text_mask: masks.bidirectional(queries, text_mask).float(), "torch.bool")]),
    "unimodal": Answers(
        [masks.unimodal, by_loops(lambda row, column, queries: (row < queries) == (column < queries)), by_blocks],
        [(masks.bidirectional, "queries look at words and words at queries"), (one_way, "words look at queries"),
         (without_padding(masks.unimodal), "has to be closed"), (rows_closed(masks.unimodal), "closed the rows"),
         (opposite(masks.unimodal), "queries look at words and words at queries"),
         (lambda queries, text_mask: masks.unimodal(queries, text_mask) & masks.multimodal_causal(queries, text_mask),
          "nothing here is causal")]),
    "multimodal_causal": Answers(
        [masks.multimodal_causal,
         by_loops(lambda row, column, queries: column < queries or queries <= column <= row),
         by_triangle],
        [(leaking, "the answer leaks"), (strict, "does not look at itself"),
         (everything_causal, "queries have no order"),
         (blind_words, "cannot see all queries"), (swapped, "row and column are swapped"),
         (without_padding(masks.multimodal_causal), "has to be closed"),
         (masks.bidirectional, "the answer leaks"), (one_way, "come after it")]),
    "allowed": Answers(
        [lambda q, t: q * q + q * t + t * (t + 1) // 2,
         lambda q, t: int(masks.multimodal_causal(q, torch.ones(1, t, dtype=torch.bool)).sum()),
         lambda q, t: sum(q + max(0, row - q + 1) for row in range(q + t))],
        [(lambda q, t: (q + t) ** 2, "every field"), (lambda q, t: q * q + t * t, "uni-modal"),
         (lambda q, t: q * q + q * t + t * (t - 1) // 2, "also sees itself"),
         (lambda q, t: (q + t) * (q + t + 1) // 2, "in both directions"),
         (lambda q, t: q * q + t * (t + 1) // 2, "see the queries, too")]),
    "which_loss": Answers(
        [quarter, by_comparison],
        [(lambda mask, queries: "itg", "four quarters"), (lambda mask, queries: "no idea", "the answers are"),
         (lambda mask, queries: "itg" if (output := quarter(mask, queries)) == "leak" else output, "queries' rows"),
         (lambda mask, queries: "itm" if (output := quarter(mask, queries)) == "leak" else output, "words' rows"),
         (lambda mask, queries: 2, "the answers are")]),
}

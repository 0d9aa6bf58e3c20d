"""Checks of lesson 02: the three masks, counted, and recognised."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from . import Wrong, exercise, expect, expect_tensor

QUERIES, LENGTHS = 3, (4, 2, 1)  # three captions in one batch, so that two of them are padded


def padding(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """text_mask (b t) of captions of these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def tried(mask_of: Callable, queries: int = QUERIES, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's mask as (b s s), after its form was checked; who is text (s), and who is padding (b s)."""
    text_mask = padding() if text_mask is None else text_mask
    b, t = text_mask.shape
    before = text_mask.clone()
    mask = mask_of(queries, text_mask)
    expect_tensor(mask, (b, 1, queries + t, queries + t), "the mask", "(b 1 s s)", torch.bool)
    expect(torch.equal(before, text_mask), "your function changed the text_mask that it was given.")
    is_text = torch.arange(queries + t) >= queries
    is_padding = torch.cat([torch.zeros(b, queries, dtype=torch.bool), ~text_mask], dim=1)
    return mask[:, 0], is_text, is_padding


def common(mask: Tensor, is_text: Tensor, is_padding: Tensor) -> None:
    """What every mask of the house keeps to."""
    whole = ~is_padding
    real = mask[whole[:, :, None] & whole[:, None, :]]
    expect(bool(real.any()), "nobody may look at anybody. True means: may look.")
    queries = ~is_text
    own = mask[:, queries][:, :, queries]
    expect(bool(own.any()), "queries may not look at queries. True means: may look; or do they stand behind the text? "
           "Queries come first.")
    looked_at = mask & is_padding[:, None, :]
    turned = is_padding.roll(-int(queries.sum()), dims=1)  # where padding would be, were the text in front
    expect(not bool(looked_at.any()) or bool((mask & turned[:, None, :]).any()) or not bool(turned.any()),
           "padding is looked at, and queries are not: you have put the queries behind the text. Queries come first.")
    rows_closed = not bool((mask & is_padding[:, :, None]).any()) and bool(is_padding.any())
    expect(not bool(looked_at.any()), "padding is looked at: " + (
        "you have closed the rows of padding. A row says what a token looks at; who looks at it stands in its column."
        if rows_closed else "a column of padding has to be closed for every row."))


@exercise("02.1", "lesson 02, section 2")
def bidirectional(mask_of: Callable) -> None:
    """Everyone sees everyone but padding."""
    mask, is_text, is_padding = tried(mask_of)
    expect(bool(is_padding.any()) and not torch.equal(mask, is_padding[:, None, :].expand_as(mask)),
           "your mask is the opposite of what is asked for: in this house True means may look.")
    common(mask, is_text, is_padding)
    attention_mask = ~is_padding
    rows = mask[attention_mask]
    expect(bool((rows == attention_mask.repeat_interleave(attention_mask.sum(dim=1), dim=0)).all()),
           "a token that is no padding cannot see everyone who is none: in matching, queries and words see each other, "
           "in both directions.")
    expect(torch.equal(mask, attention_mask[:, None, :].expand_as(mask)),
           "the rows of padding differ from the others: what "
           "padding looks at is nobody's concern, so keep the mask simple and close columns only.")


@exercise("02.2", "lesson 02, section 2")
def unimodal(mask_of: Callable) -> None:
    """Queries see queries, text sees text."""
    mask, is_text, is_padding = tried(mask_of)
    whole = ~is_padding
    crossing = is_text[:, None] != is_text[None, :]
    pairs = whole[:, :, None] & whole[:, None, :]
    if bool((mask & pairs)[:, crossing].any()):
        raise Wrong(_crossing(mask & pairs, is_text))
    common(mask, is_text, is_padding)
    same = ~crossing
    expect(bool(mask[pairs & same].all()), "within one side somebody cannot see somebody: both towers read in both "
           "directions; nothing here is causal.")


def _crossing(mask: Tensor, is_text: Tensor) -> str:
    """Which way information crosses that should stay on its side."""
    there = bool(mask[:, ~is_text][:, :, is_text].any()), bool(mask[:, is_text][:, :, ~is_text].any())
    who = {(True, True): "queries look at words and words at queries", (True, False): "queries look at words",
           (False, True): "words look at queries"}[there]
    return (f"{who}: then the contrast compares a picture with a vector that has already seen the other side, and is "
            "won without any understanding.")


@exercise("02.3", "lesson 02, section 2")
def multimodal_causal(mask_of: Callable) -> None:
    """Queries see queries; a word sees the queries, itself and the words before it."""
    mask, is_text, is_padding = tried(mask_of)
    whole = ~is_padding
    pairs = (mask & whole[:, :, None] & whole[:, None, :])[0]  # the longest caption: nothing of it is padding
    text, queries = pairs[is_text][:, is_text], pairs[~is_text]
    expect(not bool(queries[:, is_text].any()), "queries look at words: a word that comes later reaches an earlier "
           "one by way of them, and the answer leaks.")
    future = torch.ones_like(text).triu(1)
    past = future.T
    expect(bool(text[past].all()) or not bool(text[past].any()) or bool(text[future].any()),
           "some word cannot see some word before it.")
    if bool(text[future].any()):
        expect(bool(text[past].any()), "words look only at what comes after them: row and column are swapped.")
        expect(False, "a word looks at words that come after it: it would copy them instead of predicting them.")
    expect(bool(text.diagonal().all()), "a word does not look at itself: then no word takes part in its own answer, "
           "and the first, [DEC], has nothing but the queries.")
    expect(bool(text[past].all()), "a word does not see the words before it.")
    expect(bool(queries[:, ~is_text].all()), "queries cannot all see each other: only the text is causal, queries have "
           "no order.")
    expect(bool(pairs[is_text][:, ~is_text].all()), "a word cannot see all queries: they are its only way to the "
           "picture.")
    common(mask, is_text, is_padding)
    lonely = mask[2]  # one word and three columns of padding
    expect(bool(lonely[:QUERIES, :QUERIES].all() and lonely[QUERIES, : QUERIES + 1].all()),
           "the mask of a short caption differs from that of a long one in more than its padding.")


@exercise("02.4", "lesson 02, section 2")
def allowed(count: Callable[[int, int], int]) -> None:
    """How many fields of the multimodal causal mask are open."""
    drawn = [(random.randint(1, 40), random.randint(1, 40)) for _ in range(4)]
    for queries, words in [(5, 8), (1, 1), (32, 20), *drawn]:
        output, right = count(queries, words), queries**2 + words * queries + words * (words + 1) // 2
        expect(isinstance(output, int | float) and not isinstance(output, bool),
               f"your function gives a {type(output).__name__} and should give a number.")
        if output == right:
            continue
        slips = {(queries + words) ** 2: "that is every field: the future is closed to words, and words to queries.",
                 queries**2 + words**2: "that is the uni-modal mask.",
                 queries**2 + words * queries + words**2: "words may not look ahead.",
                 queries**2 + words * queries + words * (words - 1) // 2: "a word also sees itself.",
                 queries**2 + words * (words + 1) // 2: "words see the queries, too.",
                 queries**2 + 2 * words * queries + words * (words + 1) // 2: "queries do not see words.",
                 (queries + words) * (queries + words + 1) // 2: "queries see each other in both directions."}
        meaning = slips.get(int(output), "count the four quarters of the picture one by one.")
        expect(False, f"with {queries} queries and {words} words you count {output:g}; {meaning}")


@exercise("02.5", "lesson 02, sections 2 and 4")
def which_loss(name_of: Callable[[Tensor, int], str]) -> None:
    """Tell from a mask which loss it serves, or that it leaks."""
    kinds = {"itc": "apart", "itm": "together", "itg": "causal", "leak": "broken"}
    for queries, words in ((2, 3), (4, 2), (1, 5)):
        s = queries + words
        is_text = torch.arange(s) >= queries
        side = is_text[:, None] == is_text[None, :]
        causal = ~is_text[None, :] | (torch.ones(s, s).tril().bool() & is_text[:, None])
        leak = causal | (~is_text[:, None] & is_text[None, :])
        for kind, mask in {"itc": side, "itm": torch.ones(s, s, dtype=torch.bool), "itg": causal, "leak": leak}.items():
            output = name_of(mask.clone(), queries)
            expect(isinstance(output, str) and output in kinds,
                   f"your function answers {output!r}; the answers are {', '.join(map(repr, kinds))}.")
            if output != kind:
                expect({output, kind} != {"itg", "leak"}, "you take a leaking mask and the causal one for each other: "
                       "look at the queries' rows.")
                expect({output, kind} != {"itm", "leak"}, "you take a leaking mask and the bi-directional one for "
                       "each other: look at the words' rows.")
                expect(False,
                       f"with {queries} queries and {words} words you call the mask of {kind.upper()} {output!r}: "
                       "look at each of its four quarters.")

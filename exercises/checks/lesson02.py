"""Checks of lesson 02: the three masks, counted, and recognised."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from . import Wrong, exercise, expect, expect_tensor, named, number

Rule = Callable[[Tensor, Tensor, int], Tensor]  # rows (s 1) and columns (1 s), queries -> who may look, but for padding


def padding(lengths: tuple[int, ...], left: bool = False) -> Tensor:
    """text_mask (b t) of captions of these lengths, padded on the right or on the left."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask.flip(1) if left else mask


def tried(mask_of: Callable, queries: int, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's mask as (b s s), after its form was checked; who is text (s), and who is padding (b s)."""
    b, t = text_mask.shape
    before = text_mask.clone()
    mask = mask_of(queries, text_mask)
    expect_tensor(mask, (b, 1, queries + t, queries + t),
                  f"with {queries} queries and a text_mask of shape {b, t} the mask", "(b 1 s s)", torch.bool)
    expect(torch.equal(before, text_mask), "your function changed the text_mask that it was given.")
    is_text = torch.arange(queries + t) >= queries
    is_padding = torch.cat([torch.zeros(b, queries, dtype=torch.bool), ~text_mask], dim=1)
    return mask[:, 0], is_text, is_padding


def common(mask: Tensor, is_text: Tensor, is_padding: Tensor) -> None:
    """What every mask of the house keeps to."""
    whole = ~is_padding
    real = mask[whole[:, :, None] & whole[:, None, :]]
    expect(bool(real.any()), "no token may look at anything. True means: may look.")
    queries = ~is_text
    own = mask[:, queries][:, :, queries]
    expect(bool(own.any()), "queries may not look at queries. True means: may look; or do they stand behind the text? "
           "Queries come first.")
    looked_at = mask & is_padding[:, None, :]
    turned = is_padding.roll(-int(queries.sum()), dims=1)  # where padding would be, were the text in front
    behind = mask & whole[:, :, None]
    expect(not bool(looked_at.any()) or bool((behind & turned[:, None, :]).any()) or not bool(turned.any())
           or bool(own.all()), "padding is looked at, and some queries are not: do you put the queries behind the "
           "text? Queries come first.")
    rows_closed = not bool((mask & is_padding[:, :, None]).any()) and bool(is_padding.any())
    expect(not bool(looked_at.any()), "padding is looked at: " + (
        "you have closed the rows of padding. A row says what a token looks at; its column says which tokens look at "
        "it."
        if rows_closed else "a column of padding has to be closed for every row."))


def judge(mask_of: Callable, rule: Rule, explain: Callable[[Tensor, Tensor, Tensor], None], strict: bool = False,
          empty: bool = False) -> None:
    """Try a mask on padding of all sorts and several numbers of queries; `explain` raises what a wrong one means.

    What padding looks at counts only if `strict`, but for this: nobody looks at padding. With `empty` there is also a
    batch of texts without a word.
    """
    many = random.randint(4, 7)
    holes = torch.tensor([[True, False, True, True, False], [False, True, False, True, True],
                          [True, True, True, True, True]])[torch.randperm(3)]
    cases = [(3, padding((4, 2, 1))), (many, padding((random.randint(2, 5), 6, 3))), (1, padding((2, 3))),
             (2, padding((5,))), (4, padding((4, 4))), (3, padding((4, 2, 1), left=True)),
             (2, padding((1, random.randint(3, 5)), left=True)), (many, holes)]
    cases += [(2, torch.empty(3, 0, dtype=torch.bool))] if empty else []
    wrong = []
    for place, (queries, text_mask) in enumerate(cases):
        mask, is_text, is_padding = tried(mask_of, queries, text_mask)
        seats = torch.arange(len(is_text))
        right = rule(seats[:, None], seats[None, :], queries) & ~is_padding[:, None, :]
        counts = torch.ones_like(right) if strict else ~is_padding[:, :, None] | is_padding[:, None, :]
        if bool(((mask != right) & counts).any()):
            wrong.append((place, mask, is_text, is_padding))
    if not wrong:
        return
    places = [place for place, *_ in wrong]
    _, mask, is_text, is_padding = wrong[0]
    closed = not bool((mask & is_padding[:, :, None]).any()) and bool((mask & is_padding[:, None, :]).any())
    expect(min(places) < 5 or not closed, "a word looks at padding on its left: you have closed the rows of padding. A "
           "row says what a token looks at; its column says which tokens look at it.")
    expect(min(places) < 5 or max(places) == 8, "where padding stands on the right your mask is right, where it stands "
           "on the left or in between it is not. text_mask says for each text by itself which places hold words.")
    expect(places != [8], "for texts without a single word your mask is wrong: queries are still there, and look at "
           "each other.")
    explain(mask, is_text, is_padding)
    expect(False, f"with {int((~is_text).sum())} queries and {int(is_text.sum())} places of text some field is open "
           "that should be closed, or closed that should be open: go through the four quarters one by one.")


@exercise("02.1", "lesson 02, section 2")
def bidirectional(mask_of: Callable) -> None:
    """Everyone sees everyone but padding."""
    def explain(mask: Tensor, is_text: Tensor, is_padding: Tensor) -> None:
        expect(not bool(is_padding.any()) or not torch.equal(mask, is_padding[:, None, :].expand_as(mask)),
               "your mask is the opposite of what is asked for: in this course True means may look.")
        common(mask, is_text, is_padding)
        whole = ~is_padding
        pairs = whole[:, :, None] & whole[:, None, :]
        expect(bool(mask[pairs].all()), "a token that is not padding cannot see all others that are not: in matching, "
               "queries and words see each other, in both directions.")
        expect(False, "the rows of padding differ from the others: what padding looks at does not matter, so keep the "
               "mask simple and close columns only.")

    judge(mask_of, lambda row, column, queries: torch.ones_like(row == column), explain, strict=True, empty=True)


@exercise("02.2", "lesson 02, section 2")
def unimodal(mask_of: Callable) -> None:
    """Queries see queries, text sees text."""
    def explain(mask: Tensor, is_text: Tensor, is_padding: Tensor) -> None:
        whole = ~is_padding
        crossing = is_text[:, None] != is_text[None, :]
        pairs = whole[:, :, None] & whole[:, None, :]
        expect(bool((mask & pairs & ~crossing).any()) or not bool((mask & pairs & crossing).any()), "each side looks "
               "at the other one and not at itself: in this course True means may look.")
        if bool((mask & pairs & crossing).any()):
            raise Wrong(_crossing(mask & pairs, is_text))
        common(mask, is_text, is_padding)
        closed = pairs & ~crossing & ~mask
        later = torch.ones_like(crossing).triu(1) & is_text[:, None] & is_text[None, :]
        expect(not bool((closed & later).any()) or bool((pairs & later & mask).any()), "words cannot see words that "
               "come later: both towers read in both directions; nothing here is causal.")
        expect(not bool(closed.any()), "within one side some token cannot see another: queries see all queries, words "
               "all words of their text.")

    judge(mask_of, lambda row, column, queries: (row < queries) == (column < queries), explain)


def _crossing(mask: Tensor, is_text: Tensor) -> str:
    """Which way information crosses that should stay on its side."""
    there = bool(mask[:, ~is_text][:, :, is_text].any()), bool(mask[:, is_text][:, :, ~is_text].any())
    who = {(True, True): "queries look at words and words at queries", (True, False): "queries look at words",
           (False, True): "words look at queries"}[there]
    return (f"{who}: then the contrastive loss compares a picture with a vector that has already seen the other side, "
            "and falls without any understanding.")


@exercise("02.3", "lesson 02, section 2")
def multimodal_causal(mask_of: Callable) -> None:
    """Queries see queries; a word sees the queries, itself and the words before it."""
    def explain(mask: Tensor, is_text: Tensor, is_padding: Tensor) -> None:
        whole = ~is_padding
        pairs = whole[:, :, None] & whole[:, None, :]
        words = is_text[:, None] & is_text[None, :]
        later = torch.ones_like(words).triu(1)

        def among(where: Tensor) -> Tensor:
            return mask[pairs & where]

        past, own, future = (among(words & how) for how in (later.T, torch.eye(len(words), dtype=torch.bool), later))
        expect(bool(own.any()) or not bool(future.all()) or not bool(future.numel()), "words look at what comes after "
               "them, and not at themselves: in this course True means may look.")
        expect(not bool(among(~is_text[:, None] & is_text[None, :]).any()), "queries look at words: a word that comes "
               "later reaches an earlier one by way of them, and the answer leaks.")
        expect(bool(past.any()) or not bool(future.any()), "words look only at what comes after them: row and column "
               "are swapped.")
        expect(not bool(future.any()), "a word looks at words that come after it: it would copy them instead of "
               "predicting them.")
        expect(bool(own.all()), "some word does not look at itself: then its attention passes it over, and the "
               "first, [DEC], reads only the queries.")
        expect(bool(past.all()), "some word does not see all the words before it.")
        expect(bool(among(~is_text[:, None] & ~is_text[None, :]).all()), "queries cannot all see each other: only the "
               "text is causal, queries have no order.")
        expect(bool(among(is_text[:, None] & ~is_text[None, :]).all()), "a word cannot see all queries: they are its "
               "only way to the picture.")
        common(mask, is_text, is_padding)

    judge(mask_of, lambda row, column, queries: (column < queries) | (column <= row), explain)


COUNTS: dict[str, Callable[[int, int], int]] = {
    "that is every field: the future is closed to words, and words to queries.": lambda q, t: (q + t) ** 2,
    "that is the uni-modal mask.": lambda q, t: q * q + t * t,
    "words may not look ahead.": lambda q, t: q * q + t * q + t * t,
    "a word also sees itself.": lambda q, t: q * q + t * q + t * (t - 1) // 2,
    "words see the queries, too.": lambda q, t: q * q + t * (t + 1) // 2,
    "queries do not see words.": lambda q, t: q * q + 2 * t * q + t * (t + 1) // 2,
    "queries see each other in both directions.": lambda q, t: (q + t) * (q + t + 1) // 2,
    "queries and words are swapped: which of them are causal?": lambda q, t: t * t + t * q + q * (q + 1) // 2,
    "half of the words' square is not the sum of 1 to t: the diagonal lies in it, too.":
        lambda q, t: q * q + t * q + t * t // 2,
    "queries see queries, too.": lambda q, t: t * q + t * (t + 1) // 2,
    "that is only the words among themselves.": lambda q, t: t * (t + 1) // 2,
}


@exercise("02.4", "lesson 02, section 2")
def allowed(count: Callable[[int, int], int]) -> None:
    """How many fields of the multimodal causal mask are open."""
    given = [(5, 8), (1, 1), (32, 20), (2, 7), (3, 60)]
    given += [(random.randint(1, 40), random.randint(2, 40)) for _ in range(4)]
    output = [number(count(*case)) for case in given]
    right = [queries**2 + words * queries + words * (words + 1) // 2 for queries, words in given]
    for (queries, words), said, wanted in zip(given, output, right, strict=True):
        if said != wanted:
            slips = {meaning: [slip(*case) for case in given] for meaning, slip in COUNTS.items()}
            meaning = named(output, slips, lambda one, other: one == other)
            expect(False, f"with {queries} queries and {words} words you count {said:g}; "
                   f"{meaning or 'count the four quarters of the mask one by one.'}")


@exercise("02.5", "lesson 02, sections 2 and 4")
def which_loss(name_of: Callable[[Tensor, int], str]) -> None:
    """Tell from a mask which loss it serves, or that it leaks."""
    kinds = ("itc", "itm", "itg", "leak")
    cases, drawn = [], (random.randint(5, 8), random.randint(3, 7))
    for queries, words in ((2, 3), (4, 2), (1, 5), (1, 3), (2, 5), (3, 3), drawn):
        s = queries + words
        is_text = torch.arange(s) >= queries
        side = is_text[:, None] == is_text[None, :]
        causal = ~is_text[None, :] | (torch.ones(s, s).tril().bool() & is_text[:, None])
        leak = causal | (~is_text[:, None] & is_text[None, :])
        everyone = torch.ones(s, s, dtype=torch.bool)
        cases += zip([queries] * 4, [words] * 4, kinds, (side, everyone, causal, leak), strict=True)
    for queries, words, kind, mask in random.sample(cases, len(cases)):
        given = mask.clone()
        output = name_of(given, queries)
        expect(torch.equal(given, mask), "your function changed the mask that it was given.")
        expect(isinstance(output, str) and output in kinds,
               f"your function answers {output!r}; the answers are {', '.join(map(repr, kinds))}.")
        if output == kind:
            continue
        names = {"itc": "the mask of ITC", "itm": "the mask of ITM", "itg": "the mask of ITG", "leak": "a leaking mask"}
        said = f"with {queries} queries and {words} words you take {names[kind]} for {names[output]}: "
        where = {frozenset(("itg", "leak")): "look at the queries' rows.",
                 frozenset(("itm", "leak")): "look at the words' rows, where words look at words.",
                 frozenset(("itm", "itg")): "does the first word see the last, and do queries see words?",
                 frozenset(("itc", "itg")): "do words see queries?",
                 frozenset(("itc", "itm")): "does one side see the other?",
                 frozenset(("itc", "leak")): "does one side see the other?"}
        expect(False, said + where[frozenset((output, kind))])

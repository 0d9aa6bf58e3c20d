"""Checks of lesson 08: what is asked where, [DEC], the shift by one, the loss, the end, and labels not shifted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import Wrong, close, exercise, expect, expect_tensor
from .slips import agree, name_slip, short, slopes, telling, whole

IGNORED = -100  # where nothing is asked; F.cross_entropy passes over it
VOCABULARY = 23


def captions(lengths: Sequence[int], pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids (b t) of captions that begin with 1 and end with 2, and their mask; all padding is `pad`, or the end.

    Words come twice, and numbers that mean something elsewhere (0, 1, 2) occur among them.
    """
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCABULARY - 1, mask.shape)
    for row, length in zip(ids, lengths, strict=True):
        if length > 4:  # somewhere inside, in any order
            inside = torch.randperm(length - 2)[:3] + 1
            row[inside] = torch.tensor([0, 1, int(row[inside[0]])])[torch.randperm(3)]
    ids[:, 0] = 1
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    return ids.masked_fill(~mask, 2 if pad is None else pad), mask


# --- which token is asked where ---------------------------------------------------------------------------------------

WORDS = "a the red green circle star above of picture there is two and left".split()


def into_row(words: list[str], length: int) -> list[str]:
    """What goes in."""
    return (["[DEC]", *words, "[SEP]"] + ["[PAD]"] * length)[:length]


def asked_row(words: list[str], length: int) -> list[str]:
    """What is asked for."""
    return ([*words, "[SEP]"] + ["-"] * length)[:length]


def by_name(words: list[str], length: int) -> list[str]:
    """What comes next, looked up by name: after the last of that name."""
    into, right = into_row(words, length), asked_row(words, length)
    following = dict(zip(into, right, strict=True))
    return [following[name] for name in into]


def by_first_name(words: list[str], length: int) -> list[str]:
    """What comes next, looked up by name: after the first of that name."""
    into, right = into_row(words, length), asked_row(words, length)
    return [right[into.index(name)] for name in into]


LOOKED_UP = ("the next token is looked up by name, and a word that occurs twice has two next ones: what comes next "
             "depends on the place.")
ASKED_SLIPS = {
    "each place is asked for the very token that it was given.":
        lambda words, length: ["[DEC]", *words, "[SEP]"] + ["-"] * (length - len(words) - 2),
    "each place is asked for the very token that it was given, padding included.": into_row,
    "each place is asked for the token *before* it: the shift goes the other way.":
        lambda words, length: ["-", *into_row(words, length)[:-1]],
    "each place is asked for the token *before* it: which way is the shift to go?":
        lambda words, length: ["-", "[DEC]", *words] + ["-"] * (length - len(words) - 2),
    LOOKED_UP: by_name,
    LOOKED_UP + " You find its first occurrence.": by_first_name,
    "[SEP] is never asked for: then the model never learns where to stop.":
        lambda words, length: list(words) + ["-"] * (length - len(words)),
    "each place is asked for the token after the next: the shift is by one.":
        lambda words, length: ([*words[1:], "[SEP]"] + ["-"] * length)[:length] if words else None,
}


@exercise("08.1", "lesson 08, section 1")
def in_and_asked(rows_of: Callable[[list[str], int], tuple[list[str], list[str]]]) -> None:
    """What goes in and what is asked for, place by place."""
    one, other, third = random.sample(WORDS, 3)
    draws = [([one, other], 4), ([one, other, third], 7), ([one], 4), ([one, other, one], 6), ([third, third], 5),
             ([one, other, third, other, one, other], 8), (random.choices(WORDS, k=random.randint(4, 7)), 10), ([], 2),
             ([], 4)]
    answers = []
    for words, length in draws:
        given = list(words)
        output = rows_of(words, length)
        expect(words == given, "your function changed the list of words that it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 2
               and all(isinstance(row, tuple | list) for row in output),
               "your function should give two lists: what goes in, and what is asked for.")
        into, asked = list(output[0]), list(output[1])
        said = f"for the words {' '.join(words) or '(none)'} in {length} places"
        for row, what in ((into, "goes in"), (asked, "is asked for")):
            expect(len(row) == length, f"{said}: what {what} has {len(row)} places.")
        if into != into_row(words, length):
            expect("[CLS]" not in into, f"{said}: [CLS] goes in; while decoding it does not occur.")
            expect("[DEC]" in into[:1], f"{said}: {into[0]!r} goes in first, and nothing says that the text is to be "
                   "decoded.")
            expect("[SEP]" in into, f"{said}: [SEP] does not go in: the text ends with it in every pass.")
            expect(False, f"{said}: what goes in is {' '.join(map(str, into))}. Which token comes first, which last?")
        answers.append(asked)
    right = [asked_row(*draw) for draw in draws]
    if answers == right:
        return
    words, length, asked = next((*draw, one) for draw, one, truth in zip(draws, answers, right, strict=True)
                                if one != truth)
    said = f"for the words {' '.join(words) or '(none)'} in {length} places"
    name_slip({f"{said}: {meaning}": slip for meaning, slip in ASKED_SLIPS.items()}, draws, answers, right)
    expect("[DEC]" not in asked and "[CLS]" not in asked, f"{said}: the beginning is asked for. Nothing stands before "
           "it that could be asked.")
    expect("[PAD]" not in asked, f"{said}: padding is asked for, but padding is never a target.")
    expect("[SEP]" in asked, f"{said}: [SEP] is never asked for: then the model never learns where to stop.")
    expect(False, f"{said}: in your answer the tokens asked for are {' '.join(map(str, asked))}. What comes after each "
           "token that goes in?")


# --- [DEC] ------------------------------------------------------------------------------------------------------------


@exercise("08.2", "lesson 08, section 1")
def decoder_ids(ids_of: Callable[[Tensor, int], Tensor]) -> None:
    """[CLS] becomes [DEC] on the way in."""
    for lengths, dec, pad in (((7, 3, 5), VOCABULARY - 1, 0), ((6,), random.randint(30_600, 40_000), 0),
                              ((2, 2), 30_522, 0), ((5, 8), random.randint(30, 90), None), ((6, 6), 0, 0)):
        ids, _ = captions(lengths, pad=pad)
        if ids.shape[1] > 4:
            ids[0, 2:4] = torch.tensor([1, dec])[torch.randperm(2)]  # [CLS] and [DEC] once more, in the middle
        before = ids.clone()
        output = ids_of(ids, dec)
        expect(torch.equal(ids, before), "the ids that you were given have changed: they are the labels, too, and the "
               "other two losses read them. Or do both tensors share their memory?")
        expect(not isinstance(output, Tensor) or output.shape != (len(ids), ids.shape[1] + 1),
               "there is one token more "
               "than before: [DEC] does not stand in front of [CLS].")
        expect_tensor(output, ids.shape, "what goes in", "(b t)", torch.int64)
        expect(bool((output[:, 0] == dec).all()), f"the first tokens are {output[:, 0].tolist()}, and `dec` is {dec}; "
               "nothing there says that the text is to be decoded.")
        expect(not torch.equal(output[:, 1:], torch.cat([ids[:, :1], ids[:, 1:-1]], dim=1)), "[CLS] has moved to the "
               "second place and pushed out the end of the longest caption.")
        ends = ids == 2
        expect(not bool((output[ends] == dec).any()), "some [SEP] has been replaced: it stays, as the end that is "
               "learned.")
        row, place = next(iter((output[:, 1:] != ids[:, 1:]).nonzero().tolist()), (0, 0))
        expect(torch.equal(output[:, 1:], ids[:, 1:]), f"a token behind the first has changed, from "
               f"{int(ids[row, place + 1])} to {int(output[row, place + 1])}: only the first place is a matter of "
               f"[DEC], "
               "whatever numbers stand elsewhere.")


# --- the shift --------------------------------------------------------------------------------------------------------


def right_words(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels (b t): the token that comes next, in loops."""
    b, t = ids.shape
    return torch.tensor([[int(ids[i, j + 1]) if j + 1 < t and bool(mask[i, j + 1]) else IGNORED for j in range(t)]
                         for i in range(b)])


WORD_SLIPS = {
    "each place is asked for the token that it has just been given: that is copying, not reading.":
        lambda ids, mask: ids.masked_fill(~mask, IGNORED),
    "each place is asked for the token that it has just been given, padding included: that is copying.":
        lambda ids, mask: ids,
    "the last place is asked for something, and nothing comes after it: does the beginning wrap around to it? And "
    "padding is asked for as well.": lambda ids, mask: ids.roll(-1, dims=1),
    "the last place is asked for something, and nothing comes after it: does the beginning wrap around?":
        lambda ids, mask: ids.masked_fill(~mask, IGNORED).roll(-1, dims=1),
    "where padding begins, padding is asked for: the mask has to be shifted with the ids, as it is the next token that "
    "has to be real. Here padding, or nothing, comes next.":
        lambda ids, mask: F.pad(ids[:, 1:], (0, 1), value=IGNORED).masked_fill(~mask, IGNORED),
    "a token whose id is 0 is not asked for: only the mask tells what is padding, the id alone does not.":
        lambda ids, mask: right_words(ids, mask & (ids != 0)),
    "padding is recognised by the id 0, and it has another one here: only the mask tells what is padding, the id alone "
    "does not.": lambda ids, mask: right_words(ids, ids != 0),
    "[SEP] is not asked for: then the model never learns where to stop.":
        lambda ids, mask: right_words(ids, mask & (ids != 2)),
    "the last place holds 0, and 0 is the number of a word: -100 says that nothing is asked.":
        lambda ids, mask: F.pad(ids.masked_fill(~mask, IGNORED)[:, 1:], (0, 1)),
    "padding is asked for, and words are not: text_mask is True for a token.":
        lambda ids, mask: right_words(ids, ~mask),
    "each place is asked for the token after the next: the shift is by one.":
        lambda ids, mask: F.pad(right_words(ids, mask)[:, 1:], (0, 1), value=IGNORED),
}


@exercise("08.3", "lesson 08, sections 2 and 5")
def next_words(labels_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The same text, one place further on; nothing where nothing is asked."""
    shapes = (((6, 3, 5), 0), ((7, 3, 4), None), ((5,), 0), ((2, 6), None), ((3, 3), 0), ((6, 2, 5), 7))
    draws = telling(lambda: [captions(*shape) for shape in shapes], right_words, WORD_SLIPS)
    answers, right = [], [right_words(*draw) for draw in draws]
    for ids, mask in draws:
        given = ids.clone(), mask.clone()
        output = labels_of(ids, mask)
        b, t = ids.shape
        expect(not isinstance(output, Tensor) or output.shape != (b, t - 1),
               f"there are {t - 1} labels for {t} places: the last place gets one as well, which says that nothing is "
               "asked.")
        answers.append(expect_tensor(output, (b, t), "the labels", "(b t)", torch.int64))
        expect(torch.equal(ids, given[0]) and torch.equal(mask, given[1]), "your function changed what it was given.")
    if all(map(torch.equal, answers, right)):
        return
    strange = {int(one) for output in answers for one in output[(output < 0) & (output != IGNORED)]}
    expect(not strange, f"the labels hold {', '.join(map(str, strange))}: F.cross_entropy ignores -100 and nothing "
           "else.")
    name_slip(WORD_SLIPS, draws, answers, right)
    for (ids, mask), output, truth in zip(draws, answers, right, strict=True):
        if torch.equal(output, truth):
            continue
        asked, wanted, inside = output != IGNORED, truth != IGNORED, mask & (torch.arange(ids.shape[1]) > 0)
        expect(not torch.equal(output[inside], ids.roll(1, dims=1)[inside]), "each place is asked for the token before "
               "it: the shift goes the other way.")
        expect(bool((output[:, -1] == IGNORED).all()), "the last place is asked for something, and nothing comes after "
               "it: does the beginning wrap around to it?")
        expect(not bool((asked & ~wanted).any()), f"at {int((asked & ~wanted).sum())} places something is asked for "
               "though padding, or nothing, comes next. The mask of the *next* place tells whether it does; the id "
               "alone does not, since padding may have that of [SEP].")
        lost = wanted & ~asked
        expect(not bool((lost & (truth == 2)).any()), "[SEP] is not asked for everywhere: then the model never learns "
               "where to stop.")
        expect(not bool(lost.any()), f"at {int(lost.sum())} places nothing is asked though a word comes next: words "
               f"with the ids {truth[lost].unique().tolist()}.")
        row, place = (output != truth).nonzero()[0].tolist()
        expect(False, f"of {ids[row].tolist()} the place {place}, counted from 0, is asked for "
               f"{int(output[row, place])}. Which token comes next there?")


# --- the loss ---------------------------------------------------------------------------------------------------------


def places(logits: Tensor, labels: Tensor, smoothing: float, spread: str = "") -> list[list[float]]:
    """What every asked place of every caption costs, in loops."""
    costs = []
    for row, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        costs.append([])
        for scores, word in zip(row, wanted, strict=True):
            if word == IGNORED:
                continue
            shift = max(scores)
            log_sum = shift + math.log(sum(math.exp(x - shift) for x in scores))
            n = len(scores)
            share = [smoothing / n] * n if spread == "" else [smoothing / (n - 1) * (i != word) for i in range(n)]
            costs[-1].append(-sum((share[i] + (1 - smoothing) * (i == word)) * (x - log_sum)
                                  for i, x in enumerate(scores)))
    return costs


def mean(numbers: Sequence[float]) -> float:
    """Their mean; of none, nan."""
    return sum(numbers) / len(numbers) if numbers else math.nan


def flat(costs: Sequence[Sequence[float]]) -> list[float]:
    """All costs, whichever caption they are of."""
    return [cost for row in costs for cost in row]


Loss = Callable[[Tensor, Tensor, float], float | None]
LOSS_SLIPS: dict[str, Loss] = {
    "nothing is smoothed.": lambda logits, labels, smooth: mean(flat(places(logits, labels, 0.0))),
    "without smoothing, your loss smooths all the same: was 0 taken for \"not given\"?":
        lambda logits, labels, smooth: mean(flat(places(logits, labels, smooth or 0.1))),
    "the smoothed part is shared by the wrong words only: here, as in torch, all words share it.":
        lambda logits, labels, smooth: mean(flat(places(logits, labels, smooth, "wrong"))),
    "the smoothed part is taken away from the word that is asked for, and no word gets it.":
        lambda logits, labels, smooth: (1 - smooth) * mean(flat(places(logits, labels, 0.0))),
    "the smoothed part is not taken away from the word that is asked for.":
        lambda logits, labels, smooth: mean(flat(places(logits, labels, smooth))) + smooth * mean(
            flat(places(logits, labels, 0.0))),
    "the words are added; the exercise asks for the mean over words, or a longer batch pays for its length.":
        lambda logits, labels, smooth: sum(flat(places(logits, labels, smooth))),
    "the sum is divided by all places, and those where nothing is asked make the loss look better.":
        lambda logits, labels, smooth: sum(flat(places(logits, labels, smooth))) / labels.numel(),
    "the sum is divided by the number of captions: a longer caption pays for its length.":
        lambda logits, labels, smooth: sum(flat(places(logits, labels, smooth))) / len(labels),
    "first each caption is averaged, then the captions: a word of a short caption counts for more.":
        lambda logits, labels, smooth: mean([mean(row) for row in places(logits, labels, smooth)]),
    "F.cross_entropy wants the words on axis 1, and reshape only cuts the memory anew, which mixes places and words: "
    "transpose moves an axis.": lambda logits, labels, smooth: mean(flat(places(
        logits.reshape(len(logits), logits.shape[2], -1).mT, labels, smooth))),
    "softmax was applied twice: cross-entropy takes logits, and makes probabilities of them itself.":
        lambda logits, labels, smooth: mean(flat(places(logits.softmax(dim=2), labels, smooth))),
    f"places without a label count as well: {IGNORED} is not a word.":
        lambda logits, labels, smooth: mean(flat(places(logits, labels.clamp(min=0), smooth))),
    "the labels are shifted here once more: they stand already where they are asked for.":
        lambda logits, labels, smooth: mean(flat(places(logits[:, :-1], labels[:, 1:], smooth))),
    "the word with the id 0 is not asked for: a label is left out where it is −100, not where it is 0.":
        lambda logits, labels, smooth: mean(flat(places(logits, labels.masked_fill(labels == 0, IGNORED), smooth))),
    "the word with the id 100 is not asked for: a label is left out where it is −100, with a minus sign.":
        lambda logits, labels, smooth: mean(flat(places(logits, labels.masked_fill(labels == -IGNORED, IGNORED),
                                                        smooth))),
    "a cost is not negative: the logarithm of a probability is, so its sign has to be flipped.":
        lambda logits, labels, smooth: -mean(flat(places(logits, labels, smooth))),
}


def slow_generation(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    """What is asked for, in loops."""
    return mean(flat(places(logits, labels, smoothing)))


def asked_somewhere(lengths: Sequence[int], v: int, holes: bool) -> tuple[Tensor, Tensor]:
    """Logits (b t v) and labels (b t), the word 0 among them; with holes nothing is asked at the first place either.

    0 is the second word of each caption and no other, so that without it something is left to be asked; among more
    than 100 words the word 100 is the first one's first.
    """
    t = max(lengths) + 1
    labels = torch.randint(1, v, (len(lengths), t))
    labels[:, 1] = 0
    if v > 100:
        labels[0, 0] = 100
    labels = labels.masked_fill(torch.arange(t) >= torch.tensor(lengths)[:, None], IGNORED)
    if holes:
        labels[:, [0, 3]] = IGNORED
    return 2 * torch.randn(len(lengths), t, v), labels


@exercise("08.4", "lesson 08, sections 2 and 5")
def itg_loss(loss_of: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Cross-entropy over the words that are asked for."""
    def make() -> list[tuple[Tensor, Tensor, float]]:
        """Captions of several lengths, smoothed by several amounts and not at all, with and without holes."""
        shapes = (((6, 2, 3), False, random.uniform(0.1, 0.3)), ((2, 5), False, random.uniform(0.1, 0.3)),
                  ((4,), False, random.uniform(0.3, 0.6)), ((5, 7, 3), True, random.uniform(0.1, 0.3)),
                  ((3, 5), False, 0.0))
        words = [random.randint(101, 120), *(random.randint(5, 12) for _ in shapes[1:])]
        return [(*asked_somewhere(lengths, v, holes), smoothing)
                for v, (lengths, holes, smoothing) in zip(words, shapes, strict=True)]

    draws = telling(make, slow_generation, LOSS_SLIPS)
    answers, right = [], [slow_generation(*draw) for draw in draws]
    for logits, labels, smoothing in draws:
        given = logits.clone(), labels.clone()
        answers.append(expect_tensor(loss_of(logits, labels, smoothing), (), "the loss", kind=torch.float32).item())
        expect(torch.equal(logits, given[0]) and torch.equal(labels, given[1]),
               "your function changed what it was given.")
    if not agree(answers, right):
        name_slip(LOSS_SLIPS, draws, answers, right)
        (logits, labels, smoothing), number, truth = next(
            one for one in zip(draws, answers, right, strict=True) if not agree(*one[1:]))
        noisy = torch.where((labels == IGNORED)[..., None], torch.randn(logits.shape[2]), logits)
        expect(math.isclose(loss_of(noisy, labels, smoothing).item(), number, rel_tol=1e-4), "the loss changes with "
               "logits of places where nothing is asked.")
        low, high = ([loss_of(*given, amount).item() for *given, _ in draws] for amount in (0.05, 0.6))
        expect(not agree(low, high), "your loss is the same for every label_smoothing: where does it take part?")
        where = ("" if smoothing else ", without smoothing") + (
            ", where nothing is asked at places among the others" if (labels[:, 0] == IGNORED).any() else "")
        expect(False, f"your loss is {number:.4f}, that of the loops {truth:.4f}{where}; it is none of the usual "
               "slips. Begin with one caption and no smoothing.")
    logits, labels = asked_somewhere((5, 3, 4), 6, True)
    labels[1] = IGNORED  # a caption of which nothing is asked
    logits = torch.where((labels == IGNORED)[..., None], 1e4 * torch.randn(logits.shape), logits)
    number, truth = loss_of(logits, labels, 0.1).item(), slow_generation(logits, labels, 0.1)
    expect(agree(number, truth), f"where nothing at all is asked of one caption of three, and logits at such places "
           f"are large, your loss is {number:.4g}, and that of the words that are asked for is {truth:.4g}.")
    for lengths, holes, smoothing in (((5, 2), True, 0.2), ((4, 3), False, 0.0), ((3, 5, 2, 4), False, 0.1)):
        logits, labels = asked_somewhere(lengths, 7, holes)
        logits.requires_grad_()
        output = loss_of(logits, labels, smoothing)
        expect(output.requires_grad, "no gradient flows from the loss: did .item(), .detach() or no_grad come between?")
        (slope,), asked = slopes(output, [logits]), labels != IGNORED
        expect(bool(slope[asked].any(dim=1).all()), "some word that is asked for gives no gradient.")
        expect(not bool(slope[~asked].any()), "a place where nothing is asked gives a gradient.")
        (wanted,) = slopes(F.cross_entropy(logits[asked], labels[asked], label_smoothing=smoothing),
                           [logits])
        expect(close(slope, wanted), f"the loss is right, but with label_smoothing {smoothing:g} its gradient is not "
               "that of the loss: does some part of it not let the gradient through?")
    sharp = torch.tensor([[[300.0, 0.0, 0.0]]]).roll(random.randint(1, 2), 2)
    number = loss_of(sharp, torch.tensor([[0]]), 0.1).item()
    truth = places(sharp, torch.tensor([[0]]), 0.1)[0][0]
    expect(math.isclose(number, truth, rel_tol=1e-3), f"where a model is very sure your loss is {number:.4g}, and "
           f"should be {truth:.4g}: has an exponential overflowed, or was the logarithm of a vanished probability "
           "taken?")


# --- the end ----------------------------------------------------------------------------------------------------------


def as_lists(output: Any) -> list[list[int]]:
    """Rows of ids as plain lists."""
    expect(not isinstance(output, Tensor),
           "your function gives one tensor; captions differ in length, so the exercise asks for a list of lists.")
    expect(isinstance(output, tuple | list), f"your function gives a {type(output).__name__}, not a list of lists.")
    rows = []
    for row in output:
        expect(isinstance(row, tuple | list) or isinstance(row, Tensor | np.ndarray) and row.ndim == 1,
               f"a caption is {short(row)}, not a list of ids.")
        rows.append([whole(one, "an id") for one in row])
    return rows


@exercise("08.5", "lesson 08, section 4")
def until_end(cut: Callable[[Tensor, int], list[list[int]]]) -> None:
    """What was written before the first [SEP]."""
    ends = [2, 0, 102, random.randint(3, 90)]
    for end in random.sample(ends, len(ends)):
        special = [one for one in (0, 1, 2, 3, 101, 102, 103) if one != end]  # words like others, where they are no end
        pool = [*special, *random.sample([one for one in range(200) if one != end and one not in special], 6)]
        random.shuffle(pool)
        if pool[8] == 0:  # not the last of a row: whether 0 was left out, or the end cut off, could not be told
            pool[0], pool[8] = pool[8], pool[0]
        whole_row, late = [*random.choices(pool, k=8), random.randint(150, 190)], random.choices(pool, k=8)
        written = torch.tensor([pool[:9], [*random.choices(pool, k=2), *7 * [end]], [*late, end], whole_row, 9 * [end],
                                [pool[0], end, *pool[1:7], end], [*2 * pool[9:11], *5 * [end]],
                                [*pool[5:9], end, *pool[:4]]])
        rows = [row[:row.index(end)] if end in row else row for row in written.tolist()]
        for order in (list(range(len(rows))), [0], [4], [1], random.sample(range(len(rows)), 4)):
            ids = written[order]
            judge_cut(cut, ids, end, [rows[k] for k in order])
        judge_cut(cut, torch.tensor([[end], [pool[0]]]), end, [[], [pool[0]]])


def judge_cut(cut: Callable, ids: Tensor, end: int, right: list[list[int]]) -> None:
    """Compare what is left of some rows with what should be."""
    given = ids.clone()
    output = as_lists(cut(ids, end))
    expect(torch.equal(ids, given), "your function changed the ids that it was given.")
    expect(len(output) == len(right), f"of {len(right)} captions {len(output)} are left.")
    for row, one, wanted in zip(given.tolist(), output, right, strict=True):
        if one == wanted:
            continue
        said = f"[SEP] is {end}; of {row} you keep {one}"
        expect(one != [*wanted, end], f"{said}: [SEP] itself is not a word of the caption.")
        expect(end in row or one != row[:-1], f"{said}: the model was cut off before it said [SEP]; all of it is "
               "words.")
        expect(row[0] != end or one == [], f"{said}: a model that says [SEP] at once has said nothing.")
        expect(one[:len(wanted)] != wanted, f"{said}: what stands after the first [SEP] is not part of the caption "
               "any more.")
        expect(one != [two for two in wanted if two != 0] or 0 not in wanted, f"{said}: 0 is a word like others; only "
               f"{end} ends a caption.")
        stops = one == row[:len(one)] and len(one) < len(wanted)
        expect(not stops, f"{said}: you stop before {row[len(one)] if stops else end}, which is a word here. Where "
               "does this caption end? Each has an end of its own.")
        expect(False, f"{said}: where does this caption end? Each has an end of its own.")


# --- labels not shifted -----------------------------------------------------------------------------------------------


def sure_of(tokens: Tensor) -> Tensor:
    """Logits (b t v) of a model that is sure of these tokens (b t)."""
    return 12.0 * F.one_hot(tokens, VOCABULARY)


def shifted_costs(logits: Tensor, ids: Tensor, mask: Tensor) -> list[list[float]]:
    """What each next token costs at each place, caption by caption, also where padding comes next."""
    log_p = logits.double().log_softmax(dim=2)
    return [[-float(log_p[i, j, ids[i, j + 1]]) for j in range(ids.shape[1] - 1)] for i in range(len(ids))]


def kept(logits: Tensor, ids: Tensor, mask: Tensor) -> list[list[float]]:
    """What is to be paid for."""
    return [[cost for cost, real in zip(row, marks[1:], strict=True) if real]
            for row, marks in zip(shifted_costs(logits, ids, mask), mask.tolist(), strict=True)]


def slow_mended(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """What is asked for."""
    return mean(flat(kept(logits, ids, mask)))


MENDED_SLIPS = {
    "padding is asked for, but padding is never a target, and it would be the easiest of all to predict.":
        lambda logits, ids, mask: mean(flat(shifted_costs(logits, ids, mask))),
    "at one place of each shorter caption padding is asked for: the mask is shifted with the labels.":
        lambda logits, ids, mask: mean([cost for row, marks in zip(
            shifted_costs(logits, ids, mask), mask.tolist(), strict=True)
            for cost, real in zip(row, marks[:-1], strict=True) if real]),
    "[SEP] is not asked for any more: then the model never learns where to stop.":
        lambda logits, ids, mask: mean([cost for row in kept(logits, ids, mask) for cost in row[:-1]]),
    "the words are added; the exercise asks for their "
    "mean.": lambda logits, ids, mask: sum(flat(kept(logits, ids, mask))),
    "the sum is divided by all places.": lambda logits, ids, mask: sum(flat(kept(logits, ids, mask))) / ids.numel(),
    "the sum is divided by all places but the last, padding among them.":
        lambda logits, ids, mask: sum(flat(kept(logits, ids, mask))) / mask[:, 1:].numel(),
    "captions were put end to end: the last token of one is asked for the first of the next.":
        lambda logits, ids, mask: F.cross_entropy(logits[mask][:-1], ids[mask][1:]).item(),
    "[SEP] is asked for something as well, and the beginning wraps around to the last place.":
        lambda logits, ids, mask: F.cross_entropy(logits[mask], ids.roll(-1, dims=1)[mask]).item(),
    "the sum is divided by the number of captions.":
        lambda logits, ids, mask: sum(flat(kept(logits, ids, mask))) / len(ids),
    "first each caption is averaged, then the captions.":
        lambda logits, ids, mask: mean([mean(row) for row in kept(logits, ids, mask)]),
    "padding is recognised by the id 0: padding is asked for where it has another one, and a word with this id is not. "
    "Only the mask tells.": lambda logits, ids, mask: slow_mended(logits, ids, ids != 0),
    "a word whose id is 0 is not asked for: only the mask tells what is padding.":
        lambda logits, ids, mask: slow_mended(logits, ids, mask & (ids != 0)),
}


@exercise("08.6", "lesson 08, section 5")
def mended_loss(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The loss asks for the next word, and a copier pays for copying."""
    for lengths, pad in (((6, 3, 5), 0), ((6, 3, 5), None), ((4,), 0), ((3, 7), None)):
        ids, mask = captions(lengths, pad)
        apart = torch.stack([torch.randperm(VOCABULARY - 4)[:ids.shape[1]] + 3 for _ in lengths])
        ids = torch.where(mask & (ids != 2), apart, ids)  # no word twice: who copies shall not be right by chance
        ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
        ids[:, 0] = VOCABULARY - 1  # [DEC]
        output = {}
        for who, tokens in (("copier", ids), ("prophet", ids.roll(-1, dims=1)), ("memory", ids.roll(1, dims=1))):
            output[who] = expect_tensor(loss_of(sure_of(tokens), ids, mask), (), "the loss").item()
        expect(output["copier"] > 2, f"a model that repeats the token it was just given pays {output['copier']:.2f}: "
               "copying is still rewarded.")
        expect(output["memory"] > 2, f"a model that says the token *before* the one it was given pays "
               f"{output['memory']:.2f}: now the shift goes the other way.")
        expect(output["prophet"] < 5,
               f"a model that always knows the next word pays {output['prophet']:.2f}: then what is "
               "asked for is neither the token given nor the next.")

    def make() -> list[tuple[Tensor, Tensor, Tensor]]:
        """Captions with padding of several numbers, and logits small and large."""
        made = []
        for lengths, pad, scale in (((6, 3, 5), 0, 1), ((5, 7, 2), None, 1), ((5,), 0, 1), ((3, 8), 7, 1),
                                    ((6, 4), 2, 80)):
            ids, mask = captions(lengths, pad)
            ids[:, 0] = VOCABULARY - 1
            made.append((scale * torch.randn(*ids.shape, VOCABULARY), ids, mask))
        return made

    draws = telling(make, slow_mended, MENDED_SLIPS)
    answers, right = [], [slow_mended(*draw) for draw in draws]
    for logits, ids, mask in draws:
        given = logits.clone(), ids.clone(), mask.clone()
        number = loss_of(logits, ids, mask)
        if isinstance(number, Tensor) and number.shape == () and not bool(number.isfinite()):
            raise Wrong(f"where logits are as large as {logits.max():.0f} your loss is {number.item()}: has an "
                        "exponential overflowed, or was the logarithm of a vanished probability taken?")
        answers.append(expect_tensor(number, (), "the loss", kind=torch.float32).item())
        expect(all(torch.equal(*two) for two in zip(given, (logits, ids, mask), strict=True)),
               "your function changed what it was given.")
    if not agree(answers, right):
        name_slip(MENDED_SLIPS, draws, answers, right)
        number, truth = next(two for two in zip(answers, right, strict=True) if not agree(*two))
        expect(False, f"the next word is asked for, but the loss is {number:.4f}, and in loops {truth:.4f}.")
    ids, mask = captions((5, 3))
    logits = torch.randn(*ids.shape, VOCABULARY, requires_grad=True)
    output = loss_of(logits, ids, mask)
    if not output.requires_grad:
        raise Wrong("no gradient flows from the loss: did .item(), .detach() or no_grad come between?")
    asked = mask[:, 1:]
    (wanted,) = slopes(F.cross_entropy(logits[:, :-1][asked], ids[:, 1:][asked]), [logits])
    expect(close(slopes(output, [logits])[0], wanted),
           "the loss is right, but its gradient is not: does some word that "
           "is asked for not let it through?")

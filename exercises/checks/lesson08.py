"""Checks of lesson 08: what is asked where, [DEC], the shift by one, the loss, the end, and labels not shifted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import Wrong, exercise, expect, expect_tensor

IGNORED = -100  # where nothing is asked; F.cross_entropy passes over it
VOCABULARY = 23


def captions(lengths: Sequence[int], pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids (b t) of captions that begin with 1 and end with 2, and their mask; all padding is `pad`, or the end."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCABULARY - 1, mask.shape)
    ids[:, 0] = 1
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 2
    return ids.masked_fill(~mask, 2 if pad is None else pad), mask


# --- which token is asked where ---------------------------------------------------------------------------------------

WORDS = "a the red green circle star above of picture there is two and left".split()


@exercise("08.1", "lesson 08, section 1")
def in_and_asked(rows_of: Callable[[list[str], int], tuple[list[str], list[str]]]) -> None:
    """What goes in and what is asked for, place by place."""
    for count, padding in ((2, 0), (3, 2), (1, 1), (random.randint(4, 7), random.randint(0, 3)), (0, 0)):
        words = random.sample(WORDS, count)
        length = count + 2 + padding
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
        right_in = ["[DEC]", *words, "[SEP]"] + ["[PAD]"] * padding
        right = [*words, "[SEP]", "-"] + ["-"] * padding
        if into != right_in:
            expect("[CLS]" not in into, f"{said}: [CLS] goes in; while decoding it does not occur.")
            expect("[DEC]" in into[:1], f"{said}: {into[0]!r} goes in first, and nothing tells that we are to decode.")
            expect("[SEP]" in into, f"{said}: [SEP] does not go in: the text ends with it in every pass.")
            expect(False, f"{said}: what goes in is {' '.join(map(str, into))}. Which token comes first, which last?")
        if asked != right:
            expect(asked != right_in and asked[:count + 2] != right_in[:count + 2], f"{said}: each place is asked for "
                   "the very token that it was given.")
            expect(asked[1:] != right_in[:-1] and asked[1:count + 2] != right_in[:count + 1], f"{said}: each place is "
                   "asked for the token *before* it: the shift goes the other way.")
            expect("[DEC]" not in asked and "[CLS]" not in asked, f"{said}: the beginning is asked for. Nothing "
                   "stands before it that could be asked.")
            expect("[PAD]" not in asked, f"{said}: padding is asked for: a word that nobody says.")
            expect("[SEP]" in asked, f"{said}: [SEP] is never asked for: then nobody learns where to stop.")
            expect(False, f"{said}: asked for is, in your answer, {' '.join(map(str, asked))}. What comes after each "
                   "token that goes in?")


# --- [DEC] ------------------------------------------------------------------------------------------------------------


@exercise("08.2", "lesson 08, section 1")
def decoder_ids(ids_of: Callable[[Tensor, int], Tensor]) -> None:
    """[CLS] becomes [DEC] on the way in."""
    for lengths, dec in (((5, 3, 2), VOCABULARY - 1), ((4,), random.randint(30, 40_000)), ((2, 2), 30_522)):
        ids, _ = captions(lengths, pad=0)
        if ids.shape[1] > 3:
            ids[0, 2] = 1  # the number of [CLS] once more, in the middle
        before = ids.clone()
        output = ids_of(ids, dec)
        expect(torch.equal(ids, before), "the ids that you were given have changed: they are the labels, too, and the "
               "other two losses read them. Or do both tensors share their memory?")
        expect(not isinstance(output, Tensor) or output.shape != (len(ids), ids.shape[1] + 1),
               "there is one token more "
               "than before: [DEC] does not stand in front of [CLS].")
        expect_tensor(output, ids.shape, "what goes in", "(b t)", torch.int64)
        expect(bool((output[:, 0] == dec).all()),
               f"the first tokens are {output[:, 0].tolist()}; nothing there says that "
               "we are to decode.")
        expect(not torch.equal(output[:, 1:], torch.cat([ids[:, :1], ids[:, 1:-1]], dim=1)), "[CLS] has moved to the "
               "second place and pushed out the end of the longest caption.")
        ends = ids == 2
        expect(not bool((output[ends] != 2).any()),
               "some [SEP] has been replaced: it stays, as the end that is learned.")
        expect(torch.equal(output[:, 1:], ids[:, 1:]),
               "a token behind the first has changed: only the first place is a "
               "matter of [DEC], whatever numbers stand elsewhere.")


# --- the shift --------------------------------------------------------------------------------------------------------


@exercise("08.3", "lesson 08, sections 1 and 4")
def next_words(labels_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The same text, one place further on; nothing where nothing is asked."""
    for lengths, pad in (((6, 3, 4), 0), ((6, 3, 4), None), ((5,), 0), ((2, 4), None), ((3, 3), 0)):
        ids, mask = captions(lengths, pad)
        given = ids.clone(), mask.clone()
        output = labels_of(ids, mask)
        b, t = ids.shape
        expect(not isinstance(output, Tensor) or output.shape != (b, t - 1),
               f"there are {t - 1} labels for {t} places: "
               "the last place gets one as well, that says that nothing is asked.")
        expect_tensor(output, (b, t), "the labels", "(b t)", torch.int64)
        expect(torch.equal(ids, given[0]) and torch.equal(mask, given[1]), "your function changed what it was given.")
        right = torch.tensor([[int(ids[i, j + 1]) if j + 1 < lengths[i] else IGNORED for j in range(t)]
                              for i in range(b)])
        if torch.equal(output, right):
            continue
        asked = output != IGNORED
        inside = mask & (torch.arange(t) > 0)
        expect(not torch.equal(output[inside], ids[inside]), "each place is asked for the token that it has just been "
               "given: that is copying, and no reading.")
        back = ids.roll(1, dims=1)
        expect(not torch.equal(output[inside], back[inside]), "each place is asked for the token before it: the shift "
               "goes the other way.")
        expect(bool((output[:, -1] == IGNORED).all()), "the last place asks for something, and nothing comes after it: "
               "does the beginning come round from the other side?")
        wanted = right != IGNORED
        expect(not bool((asked & ~wanted).any()), f"at {int((asked & ~wanted).sum())} places something is asked for "
               "though padding, or nothing, comes next. Whether it does is what the mask says of the *next* place; the "
               "number alone does not tell, since padding may have that of [SEP].")
        ends = wanted & (torch.cat([ids[:, 1:], ids[:, :1]], dim=1) == 2)
        expect(not bool((wanted & ~asked & ends).any()), "[SEP] is not asked for everywhere: then the model never "
               "learns where to stop.")
        expect(not bool((wanted & ~asked).any()), f"at {int((wanted & ~asked).sum())} places nothing is asked though a "
               "word comes next.")
        expect(False, "at some place another token is asked for than the one that comes next.")


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
    """Their mean."""
    return sum(numbers) / len(numbers)


@exercise("08.4", "lesson 08, sections 2 and 4")
def itg_loss(loss_of: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Cross-entropy over the words that are asked for."""
    for lengths in ((6, 2, 3), (1, 5), (4,)):
        t, v, smoothing = max(lengths) + 1, random.randint(5, 12), random.uniform(0.1, 0.3)
        logits = 2 * torch.randn(len(lengths), t, v)
        labels = torch.randint(v, (len(lengths), t)).masked_fill(
            torch.arange(t) >= torch.tensor(lengths)[:, None], IGNORED)
        given = logits.clone(), labels.clone()
        output = expect_tensor(loss_of(logits, labels, smoothing), (), "the loss")
        expect(torch.equal(logits, given[0]) and torch.equal(labels, given[1]),
               "your function changed what it was given.")
        costs = places(logits, labels, smoothing)
        flat, number = [cost for row in costs for cost in row], output.item()
        right = mean(flat)
        if math.isclose(number, right, rel_tol=1e-4):
            continue
        slips = {
            "nothing is smoothed.": mean([cost for row in places(logits, labels, 0.0) for cost in row]),
            "the smoothed part is shared by the wrong words only: in this house, as in torch, all words share it.":
                mean([cost for row in places(logits, labels, smoothing, "wrong") for cost in row]),
            "the words are added; asked for is the mean of a word, or a longer batch pays for its length.": sum(flat),
            "the sum is divided by all places, and those where nothing is asked make the loss look better.":
                sum(flat) / labels.numel(),
            "the sum is divided by the number of captions: a longer caption pays for its length.":
                sum(flat) / len(costs),
            "first each caption is averaged, then the captions: a word of a short caption counts for more.":
                mean([mean(row) for row in costs]),
            "softmax was applied twice: cross-entropy takes logits, and makes probabilities of them itself.":
                mean([cost for row in places(logits.softmax(dim=2), labels, smoothing) for cost in row]),
            f"places without a label are asked as well: {IGNORED} is no word.":
                mean([cost for row in places(logits, labels.clamp(min=0), smoothing) for cost in row]),
            "the labels are shifted here once more: they stand already where they are asked for.":
                mean([cost for row in places(logits[:, :-1], labels[:, 1:], smoothing) for cost in row] or [math.inf]),
        }
        nearest = min(slips, key=lambda why: abs(slips[why] - number))
        expect(abs(slips[nearest] - number) > 1e-4 * right, nearest)
        noisy = torch.where((labels == IGNORED)[..., None], torch.randn(v), logits)
        expect(math.isclose(loss_of(noisy, labels, smoothing).item(), number, rel_tol=1e-4), "the loss changes with "
               "logits of places where nothing is asked.")
        expect(False, f"your loss is {number:.4f}, that of the loops {right:.4f}; it is none of the usual slips. Begin "
               "with one caption and no smoothing.")
    logits, labels = torch.randn(2, 4, 6).requires_grad_(), torch.tensor([[1, 2, 3, IGNORED], [5, 0, *2 * [IGNORED]]])
    output = loss_of(logits, labels, 0.1)
    expect(output.requires_grad, "no gradient flows from the loss: did .item(), .detach() or no_grad come between?")
    slope, = torch.autograd.grad(output, logits, allow_unused=True)
    expect(slope is not None and bool(slope[labels != IGNORED].any(dim=1).all()), "some word that is asked for gives "
           "no gradient.")
    expect(not bool(slope[labels == IGNORED].any()), "a place where nothing is asked gives a gradient.")
    sharp = torch.tensor([[[300.0, 0.0, 0.0]]]).roll(random.randint(0, 2), 2)
    number = loss_of(sharp, torch.tensor([[0]]), 0.1).item()
    right = places(sharp, torch.tensor([[0]]), 0.1)[0][0]
    expect(math.isclose(number, right, rel_tol=1e-3), f"where a model is very sure your loss is {number:.4g}, and "
           f"should be {right:.4g}: an exponential overflowed, or the logarithm of a vanished probability was taken.")


# --- the end ----------------------------------------------------------------------------------------------------------


def as_lists(output: Any) -> list[list[int]]:
    """Rows of ids as plain lists."""
    expect(not isinstance(output, Tensor),
           "your function gives one tensor; captions differ in length, so asked for is a "
           "list of lists.")
    expect(isinstance(output, tuple | list), f"your function gives a {type(output).__name__}, not a list of lists.")
    rows = []
    for row in output:
        expect(isinstance(row, tuple | list) or isinstance(row, Tensor) and row.ndim == 1,
               f"a caption is a {type(row).__name__}, not a list of ids.")
        rows.append([int(one) for one in row])
    return rows


@exercise("08.5", "lesson 08, section 3")
def until_end(cut: Callable[[Tensor, int], list[list[int]]]) -> None:
    """What was written before the first [SEP]."""
    end = random.choice([2, 0, 102])
    a, b, c, d = random.sample([one for one in range(200) if one != end], 4)
    written = torch.tensor([[a, b, end, end, end], [c, a, d, b, end], [b, c, d, a, b], [end, end, end, end, end],
                            [a, end, c, d, end], [c, c, end, end, end]])
    rows = [[a, b], [c, a, d, b], [b, c, d, a, b], [], [a], [c, c]]
    for order in (list(range(len(rows))), [2], [0], [3], random.sample(range(len(rows)), 4)):
        ids = written[order]
        given = ids.clone()
        output, right = as_lists(cut(ids, end)), [rows[k] for k in order]
        expect(torch.equal(ids, given), "your function changed the ids that it was given.")
        if output == right:
            continue
        expect(len(output) == len(right), f"of {len(right)} captions {len(output)} are left.")
        for k, one, wanted in zip(order, output, right, strict=True):
            said = f"[SEP] is {end}; of {written[k].tolist()} you keep {one}"
            expect(one == wanted or one != [*wanted, end], f"{said}: [SEP] itself is no word of the caption.")
            expect(k != 2 or one == wanted, f"{said}: the model was cut off before it said [SEP]; all of it is words.")
            expect(k != 3 or one == wanted, f"{said}: a model that says [SEP] at once has said nothing.")
            expect(k != 4 or one == wanted or c not in one and d not in one, f"{said}: what stands after the first "
                   "[SEP] is not part of the caption any more.")
            expect(one == wanted, f"{said}: where does this caption end? Each has an end of its own.")


# --- labels not shifted -----------------------------------------------------------------------------------------------


def sure_of(tokens: Tensor) -> Tensor:
    """Logits (b t v) of a model that is sure of these tokens (b t)."""
    return 12.0 * torch.nn.functional.one_hot(tokens, VOCABULARY)


@exercise("08.6", "lesson 08, section 4")
def mended_loss(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """The loss asks for the next word, and a copier pays for copying."""
    for lengths, pad in (((6, 3, 5), 0), ((6, 3, 5), None), ((4,), 0), ((3, 7), None)):
        ids, mask = captions(lengths, pad)
        b, t = ids.shape
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
        logits = torch.randn(b, t, VOCABULARY)
        given = logits.clone(), ids.clone(), mask.clone()
        number = expect_tensor(loss_of(logits, ids, mask), (), "the loss").item()
        expect(all(torch.equal(*two) for two in zip(given, (logits, ids, mask), strict=True)),
               "your function changed what it was given.")
        log_p = logits.double().log_softmax(dim=2).tolist()
        costs = [[-log_p[i][j][int(ids[i, j + 1])] for j in range(lengths[i] - 1)] for i in range(b)]
        right = mean([cost for row in costs for cost in row])
        if math.isclose(number, right, rel_tol=1e-4):
            continue
        padded = [-log_p[i][j][int(ids[i, j + 1])] for i in range(b) for j in range(t - 1)]
        own = [-log_p[i][j][int(ids[i, j + 1])] for i in range(b) for j in range(min(lengths[i], t - 1))]
        last = [cost for row in costs for cost in row[:-1]]
        slips = {"padding is asked for: a word that nobody says, and the easiest of all.": mean(padded),
                 "at one place of each shorter caption padding is asked for: the mask is shifted with the labels.":
                     mean(own),
                 "[SEP] is not asked for any more: then nobody learns where to stop.": mean(last) if last else 0.0,
                 "the words are added; asked for is their mean.": sum(sum(row) for row in costs),
                 "the sum is divided by all places.": sum(sum(row) for row in costs) / ids.numel(),
                 "first each caption is averaged, then the captions.": mean([mean(row) for row in costs])}
        nearest = min(slips, key=lambda why: abs(slips[why] - number))
        expect(abs(slips[nearest] - number) > 1e-4 * right, nearest)
        expect(False, f"the next word is asked for, but the loss is {number:.4f}, and in loops {right:.4f}.")
    logits = torch.randn(2, 4, VOCABULARY, requires_grad=True)
    ids, mask = captions((4, 3))
    output = loss_of(logits, ids, mask)
    if not output.requires_grad:
        raise Wrong("no gradient flows from the loss: did .item(), .detach() or no_grad come between?")

"""Checks of lesson 06: the best query, the contrastive loss, its start and its floor, and bugs in a black box."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor, named, number, numbers_of, same_gradients, steady


def unit(*shape: int) -> Tensor:
    """Random vectors of length 1."""
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


# --- the best query ---------------------------------------------------------------------------------------------------

SLIPS = {  # what is made of the cosines of one picture's queries with one sentence, and what that means
    "that is the first query's cosine: [:, 0] is right for a sentence, where it is [CLS]; query 1 is nothing special.":
        lambda cosines: cosines[0],
    "that is the last query's cosine.": lambda cosines: cosines[-1],
    "that is the mean over the queries: one query that fits is outvoted by all that look elsewhere.":
        lambda cosines: sum(cosines) / len(cosines),
    "that is the sum over the queries.": sum,
    "a cosine below zero is taken for zero: the largest is the answer, even if nothing fits.":
        lambda cosines: max(0.0, max(cosines)),
    "that is the second best query.": lambda cosines: sorted(cosines)[-2:][0],
    "that is a distance: it is small where the cosine is large.": lambda cosines: 1 - max(cosines),
    "that is the query that fits worst.": min,
    "you take the largest without its sign: a cosine near -1 is no fit at all.":
        lambda cosines: max(abs(cosine) for cosine in cosines),
}


def over_queries(images: Tensor, texts: Tensor, make: Callable[[list[float]], float]) -> Tensor:
    """(b n): what `make` does with the cosines of every query, in loops."""
    return torch.tensor([[make([sum(x * y for x, y in zip(query, text, strict=True)) for query in image])
                          for text in texts.tolist()] for image in images.tolist()])


@exercise("06.1", "lesson 06, section 2")
def similarity(similarity_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The largest cosine over a picture's queries."""
    drawn = []
    for b, n, q, e in ((3, 5, 4, 6), (1, 1, 1, 3), (4, 2, 7, 5), (3, 3, 2, 4), (2, 3, 3, 3), (2, 4, 5, 6)):
        images, texts = unit(b, q, e), unit(n, e)
        if e == 6 and b == 2:  # nothing fits: all cosines are below zero
            images, texts = images.abs(), -texts.abs()
        elif b > 1:
            texts[0] = images[-1, -1]  # what fits, fits as well as can be
        given = images.clone(), texts.clone()
        output = similarity_of(images, texts)
        expect(not isinstance(output, Tensor) or b == n or tuple(output.shape) != (n, b),
               "rows and columns are exchanged: a row belongs to a picture, a column to a sentence.")
        expect_tensor(output, (b, n), "the similarity", "(b n)", torch.float32)
        expect(torch.equal(images, given[0]) and torch.equal(texts, given[1]),
               "your function changed what it was given.")
        steady(similarity_of(images, texts), output)
        drawn.append((output.detach(), images, texts))
    output, right = [one for one, *_ in drawn], [over_queries(*rest, max) for _, *rest in drawn]
    if not all(map(close, output, right)):
        slips = {meaning: [over_queries(*rest, make) for _, *rest in drawn] for meaning, make in SLIPS.items()}
        meaning = named(output, slips, close, right)
        expect(not meaning, meaning)
        below = [not close(one, other) for one, other in zip(output, right, strict=True)]
        expect(below.index(True) != len(drawn) - 1, "where some query fits you are right, where all cosines are below "
               "zero you are not: the largest of them is the answer all the same.")
        for one, images, texts in drawn:
            order = torch.randperm(images.shape[1])
            expect(close(similarity_of(images[:, order], texts), one), "the same queries in another order give other "
                   "similarities: queries have no order.")
        expect(False, "your numbers differ from those of the loop over pictures, sentences and queries: which query "
               "counts?")
    images, texts = unit(2, 5, 4).requires_grad_(), unit(3, 4).requires_grad_()
    output = similarity_of(images, texts)
    expect(output.requires_grad, "no gradient flows: with .item(), .tolist(), .detach() or no_grad nothing is learned.")
    slopes = torch.autograd.grad(output.sum(), (images, texts), allow_unused=True)
    for slope, side in zip(slopes, ("pictures", "sentences"), strict=True):
        expect(slope is not None and bool(slope.any()), f"no gradient reaches the {side}: both sides are to learn.")
    winners = torch.einsum("bqe,ne->bnq", images, texts).argmax(dim=2)
    for image in range(2):
        learns = slopes[0][image].abs().amax(dim=1) > 0
        expect(set(learns.nonzero()[:, 0].tolist()) == set(winners[image].tolist()), "a query that wins for no "
               "sentence gets a gradient, or one that wins gets none: only the winner of a pair is to learn from it.")
    same_gradients(similarity_of, lambda images, texts: torch.einsum("bqe,ne->bnq", images, texts).amax(dim=2),
                   {"pictures": images.detach(), "sentences": texts.detach()}, tangential=True)
    expect(similarity_of(unit(2, 3, 4).double(), unit(2, 4).double()).dtype == torch.float64,
           "vectors of float64 give another dtype: keep the dtype that comes in.")


# --- the loss ---------------------------------------------------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    """Probabilities of a row of logits."""
    grown = [math.exp(x - max(row)) for x in row]
    return [x / sum(grown) for x in grown]


def slow_itc(cosine: list[list[float]], same: list[list[bool]], temperature: float, smoothing: float, scale: str = "",
             sides: str = "", target: str = "", spread: str = "", twice: str = "") -> float:
    """ITC in loops; what is given by name is a slip."""
    b = len(cosine)
    factor = {"": 1 / temperature, "multiplied": temperature, "none": 1.0, "squared": 1 / temperature**2,
              "logarithm": math.exp(temperature), "at most a half": 1 / min(temperature, 0.5),
              "at most one": 1 / min(temperature, 1.0)}[scale]
    logits = [[factor * x for x in row] for row in cosine]
    if twice == "rows":
        logits = [softmax(row) for row in logits]
    paid = []
    for picture_asks in (True, False):
        total = 0.0
        for i in range(b):
            row = logits[i] if picture_asks else [logits[j][i] for j in range(b)]
            if twice == "each":
                row = softmax(row)
            shift = max(row)
            log_sum = shift + math.log(sum(math.exp(x - shift) for x in row))
            for j in range(b):
                wanted = {"": same[i][j] / sum(same[i]), "diagonal": i == j, "uncounted": float(same[i][j])}[target]
                wanted = {"": (1 - smoothing) * wanted + smoothing / b, "none": wanted,
                          "wrong": (1 - smoothing) * wanted + (not same[i][j]) * smoothing / max(1, b - sum(same[i])),
                          "others": (1 - smoothing) * wanted + (i != j) * smoothing / max(1, b - 1)}[spread]
                total -= wanted * (row[j] - log_sum)
        paid.append(total / b)
    return {"": sum(paid) / 2, "pictures": paid[0], "sentences": paid[1], "sum": sum(paid),
            "rows": b * sum(paid) / 2}[sides]


PROBABILITIES = ("F.cross_entropy takes logits: you give it probabilities, and it makes probabilities of them once "
                 "more.")
CUT_OFF = "the temperature is cut off: divide by what you are given, however large it is."
ITC_SLIPS = {
    "the cosines are multiplied by the temperature: candidates are as good as equal, and the loss cannot leave ln B.":
        {"scale": "multiplied"},
    "the temperature takes no part: it is what stretches a range of 2 to one that softmax can use.": {"scale": "none"},
    "the temperature is applied twice.": {"scale": "squared"},
    "only pictures pick among sentences: each sentence also picks among the pictures.": {"sides": "pictures"},
    "only sentences pick among pictures: each picture also picks among the sentences.": {"sides": "sentences"},
    "the two directions are added; the exercise asks for their mean.": {"sides": "sum"},
    "the rows are added; the exercise asks for their mean, or a larger batch pays more for its size "
    "alone.": {"sides": "rows"},
    "another caption of the same picture counts as a wrong answer.": {"target": "diagonal"},
    "where a picture has several captions in the batch, its target adds up to more than one: they have to share.":
        {"target": "uncounted"},
    "nothing is smoothed.": {"spread": "none"},
    "the smoothed part is shared by the wrong candidates only: in this course, as in torch, all candidates share it.":
        {"spread": "wrong"},
    "the smoothed part goes to all but the diagonal: in this course, as in torch, all candidates share it.":
        {"spread": "others"},
    PROBABILITIES: {"twice": "each"},
    PROBABILITIES + " And it is the rows' softmax that you have transposed.": {"twice": "rows"},
    "that is CLIP's log-scale, which grows by exp: here the temperature is a plain number to divide by.":
        {"scale": "logarithm"},
    CUT_OFF + " (Yours ends at 0.5.)": {"scale": "at most a half"},
    CUT_OFF: {"scale": "at most one"},
}
# Two at once, where they do not meet in one part of the formula.
ITC_PAIRS = {(one, other): ITC_SLIPS[one] | ITC_SLIPS[other] for one, other in combinations(ITC_SLIPS, 2)
             if not ITC_SLIPS[one].keys() & ITC_SLIPS[other].keys()}


@exercise("06.2", "lesson 06, sections 3, 4 and 6")
def itc_loss(loss_of: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Both directions, divided by the temperature, smoothed, with shared targets."""
    given, losses = [], []
    for ids, smoothing, warm in (([0, 1, 2, 0, 3, 0], None, None), ([4, 4, 1, 7, 1], None, None),
                                 ([2, 0, 1, 2], 0.0, None), ([5, 3, 4], 0.0, 1.5), ([1, 2, 1], 0.5, None),
                                 ([1, 2], None, None)):
        random.shuffle(ids)
        b, smoothing = len(ids), random.uniform(0.1, 0.3) if smoothing is None else smoothing
        temperature = torch.tensor(warm or random.uniform(0.25, 0.6))
        same = torch.tensor(ids)[:, None] == torch.tensor(ids)
        cosine = 2 * torch.rand(b, b) - 1
        numbers = cosine.tolist(), same.tolist(), temperature.item(), smoothing
        output = expect_tensor(loss_of(cosine, same, temperature, smoothing), (),
                               f"with smoothing {smoothing:.2g} the loss", kind=torch.float32)
        expect(cosine.tolist() == numbers[0] and same.tolist() == numbers[1] and temperature.item() == numbers[2],
               "your function changed what it was given.")
        steady(loss_of(cosine, same, temperature, smoothing), output)
        given.append(numbers)
        losses.append(output.item())

    def like(**slip: str) -> bool:
        """Whether the losses are those of the loops with such a slip: all of them, as one may be so by chance."""
        return all(math.isclose(slow_itc(*numbers, **slip), loss, rel_tol=1e-4, abs_tol=1e-6)
                   for numbers, loss in zip(given, losses, strict=True))

    if not like():
        for meaning, slip in ITC_SLIPS.items():
            expect(not like(**slip), meaning)
        for two, slip in ITC_PAIRS.items():
            expect(not like(**slip), "two slips at once: " + " And: ".join(two))
        low, high = (loss_of(*map(torch.tensor, given[0][:3]), amount).item() for amount in (0.05, 0.6))
        expect(not math.isclose(low, high, rel_tol=1e-4), "your loss is the same for every label_smoothing: where does "
               "it take part?")
        cases = [(slow_itc(*numbers), loss, numbers) for numbers, loss in zip(given, losses, strict=True)]
        off = [not math.isclose(right, loss, rel_tol=1e-4, abs_tol=1e-6) for right, loss, _ in cases]
        right, loss, numbers = cases[off.index(True)]
        entropies = [sum(-xlogx((1 - numbers[3]) * one / sum(row) + numbers[3] / len(row))
                            for row in numbers[1] for one in row) / len(numbers[1]) for _, _, numbers in cases]
        expect(not all(math.isclose(loss, right - low, rel_tol=1e-3, abs_tol=1e-4)
                       for (right, loss, _), low in zip(cases, entropies, strict=True)), "your loss falls to zero "
               "where a model is as sure as its target: that is the divergence from the target. Cross-entropy also "
               "pays the target's own entropy.")
        bare = [numbers[3] == 0 for _, _, numbers in cases]
        expect(off != bare, "without smoothing (label_smoothing = 0) your loss is wrong, with it is right: 0 is a "
               "smoothing like others.")
        expect(off != [not one for one in bare], "without smoothing your loss is right, with it is wrong: what is "
               "taken from a target, and who gets how much of it?")
        alone = [all(sum(row) == 1 for row in numbers[1]) for _, _, numbers in cases]
        expect(any(wrong for wrong, one in zip(off, alone, strict=True) if one), "where every picture has one caption "
               "your loss is right, where one has several it is not: what does a row of targets add up to, and who "
               "belongs to whom?")
        expect(False, f"in a batch of {len(numbers[0])} your loss is {loss:.4f}, that of the loops {right:.4f}; it is "
               "none of the usual slips, nor two of them at once. Begin with one row of logits and its target.")
    eye = torch.eye(5, dtype=torch.bool)
    equal = loss_of(torch.full((5, 5), 0.3), eye, torch.tensor(0.07), 0.1).item()
    expect(math.isclose(equal, math.log(5), rel_tol=1e-4), f"if all 5 candidates are alike the loss should be ln 5 = "
           f"{math.log(5):.3f}, and yours is {equal:.3f}.")
    one = loss_of(torch.rand(1, 1), eye[:1, :1], torch.tensor(0.07), 0.1).item()
    expect(abs(one) < 1e-5, f"a batch of one has nothing to choose and pays 0; yours pays {one:.3f}.")
    sharp = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).roll(random.randint(0, 1), 0)
    output, right = loss_of(sharp, eye[:2, :2], torch.tensor(0.005), 0.1).item(), slow_itc(
        sharp.tolist(), eye[:2, :2].tolist(), 0.005, 0.1)
    expect(math.isfinite(output), f"at the temperature 0.005 your loss is {output}, and should be {right:.4g}: an "
           "exponential has overflowed, or the logarithm of a vanished probability was taken.")
    expect(math.isclose(output, right, rel_tol=1e-3),
           f"at the temperature 0.005 your loss is {output:.4g}, and should be "
           f"{right:.4g}: probabilities that small vanish in float32. Is something added to them before the logarithm, "
           "or are they clipped?")
    for ids, smoothing in (([0, 1, 2, 0], 0.1), ([0, 1, 2], 0.0)):
        same = torch.tensor(ids)[:, None] == torch.tensor(ids)
        cosine, temperature = 2 * torch.rand(len(ids), len(ids)) - 1, torch.tensor(0.3)
        one = loss_of(cosine.requires_grad_(), same, temperature, smoothing)
        expect(one.requires_grad, "no gradient flows from the loss: did .item(), .detach() or no_grad come between?")
        cosine = cosine.detach()
        learns = temperature.clone().requires_grad_()
        slope = torch.autograd.grad(loss_of(cosine, same, learns, smoothing), learns, allow_unused=True)[0] if (
            loss_of(cosine, same, learns, smoothing).requires_grad) else None
        expect(slope is not None and bool(slope != 0), "the temperature gets no gradient: it is a parameter and "
               "learns.")
        same_gradients(lambda cosine, temperature, same=same, smoothing=smoothing: loss_of(
            cosine, same, temperature, smoothing),
            lambda cosine, temperature, same=same, smoothing=smoothing: fast_itc(cosine, same, temperature, smoothing),
            {"cosines": cosine, "temperature": temperature})


def fast_itc(cosine: Tensor, same: Tensor, temperature: Tensor, smoothing: float) -> Tensor:
    """ITC through which gradients flow."""
    target = (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(cosine)
    logits = cosine / temperature
    return -(target * (logits.log_softmax(dim=1) + logits.T.log_softmax(dim=1))).sum() / (2 * len(cosine))


# --- numbers to know before training ----------------------------------------------------------------------------------


def xlogx(x: float) -> float:
    """x ln x, which is 0 at 0."""
    return x * math.log(x) if x > 0 else 0.0


def entropy(batch: int, smoothing: float) -> float:
    """That of a smoothed target."""
    right, share = 1 - smoothing + smoothing / batch, smoothing / batch
    return -xlogx(right) - (batch - 1) * xlogx(share)


# What is made of batch and smoothing instead of the start, and of the floor; what it means.
BEGINNINGS: dict[str, Callable[[int, float], float]] = {
    "that is counted in bits, with the logarithm to the base 2; torch counts with e.":
        lambda batch, smoothing: math.log2(batch),
    "that is the logarithm to the base 10; torch counts with e.": lambda batch, smoothing: math.log10(batch),
    "that is how many candidates there are, not what picking one of them costs.":
        lambda batch, smoothing: float(batch),
    "both directions are averaged, not added.": lambda batch, smoothing: 2 * math.log(batch),
    "that is how often a blind guess is wrong, not its cross-entropy.": lambda batch, smoothing: 1 - 1 / batch,
    "smoothing changes the target, not what is paid if all candidates are equally likely.":
        lambda batch, smoothing: (1 - smoothing) * math.log(batch),
    "a batch of B has B candidates, the right one among them.": lambda batch, smoothing: math.log(max(1, batch - 1)),
}
FLOORS: dict[str, Callable[[int, float], float]] = {
    "a model that is perfectly sure does pay: the smoothed target is not sure itself.": lambda batch, smoothing: 0.0,
    "the smoothing is a share of the target, not a loss.": lambda batch, smoothing: smoothing,
    "that is what the right answer would cost, were it all of the target.":
        lambda batch, smoothing: -math.log(1 - smoothing),
    "that is what the right answer would cost, were it all of the target, its share of the smoothing included.":
        lambda batch, smoothing: -math.log(1 - smoothing + smoothing / batch),
    "the wrong candidates are left out: each of them has a small part of the target.":
        lambda batch, smoothing: -xlogx(1 - smoothing + smoothing / batch),
    "only one wrong candidate is counted.": lambda batch, smoothing: -xlogx(
        1 - smoothing + smoothing / batch) - xlogx(smoothing / batch),
    "how many wrong candidates are there?": lambda batch, smoothing: -xlogx(
        1 - smoothing + smoothing / batch) - batch * xlogx(smoothing / batch),
    "the smoothed part is shared by all candidates; the right one gets its share of it, too.":
        lambda batch, smoothing: -xlogx(1 - smoothing) - (batch - 1) * xlogx(smoothing / max(1, batch - 1)),
    "these parts of the target do not sum to one: the right candidate gets its part of the smoothing, too.":
        lambda batch, smoothing: -xlogx(1 - smoothing) - (batch - 1) * xlogx(smoothing / batch),
    "the smoothed part does not go to one candidate: it is shared by all.":
        lambda batch, smoothing: -xlogx(1 - smoothing) - xlogx(smoothing),
    "that is counted in bits, with the base 2; torch counts with e.":
        lambda batch, smoothing: entropy(batch, smoothing) / math.log(2),
    "both directions are averaged, not added.": lambda batch, smoothing: 2 * entropy(batch, smoothing),
    "the sign: an entropy is never negative.": lambda batch, smoothing: -entropy(batch, smoothing),
}


@exercise("06.3", "lesson 06, section 4")
def start_and_floor(predict: Callable[[int, float], tuple[float, float]]) -> None:
    """What knowing nothing costs, and what nobody gets below."""
    given = [(32, 0.1), *((random.randint(3, 500), random.uniform(0.01, 0.4)) for _ in range(3)), (2, 0.1), (3, 0.25),
             (16, 0.0), (1, 0.1)]
    starts, floors = [], []
    for batch, smoothing in given:
        said = f"with a batch of {batch} and smoothing {smoothing:.3g}"
        try:
            output = predict(batch, smoothing)
        except (ValueError, ZeroDivisionError) as error:
            if smoothing and batch > 1:
                raise
            _start_and_floor(given[:len(starts)], starts, floors)
            expect(False, f"{said} your function stops ({error}). " + (
                "In a batch of one there is no wrong candidate." if smoothing else
                "A probability of 0 adds nothing: p ln p goes to 0 with p."))
        pair = numbers_or_nan(output)
        if any(map(math.isnan, pair)):
            _start_and_floor(given[:len(starts)], starts, floors)
        expect(not any(map(math.isnan, pair)), f"{said} your function gives nan: " + (
            "a probability of 0 adds nothing, as p ln p goes to 0 with p. And how many wrong candidates are there in a "
            "batch of one?" if not smoothing or batch == 1 else "of what was a logarithm taken?"))
        starts.append(pair[0]), floors.append(pair[1])
    _start_and_floor(given, starts, floors)


def _start_and_floor(given: list[tuple[int, float]], starts: list[float], floors: list[float]) -> None:
    """Raise Wrong with what wrong numbers mean."""
    def near(one: float, other: float) -> bool:
        return math.isclose(one, other, rel_tol=2e-5, abs_tol=2e-5)  # float32, too, is exact enough

    right = [math.log(batch) for batch, _ in given], [entropy(*case) for case in given]
    if not all(map(near, starts, right[0])):
        place = next(i for i, (one, other) in enumerate(zip(starts, right[0], strict=True)) if not near(one, other))
        said = "with a batch of {} and smoothing {:.3g}".format(*given[place])
        expect(not all(map(near, starts, right[1])), f"{said} your start is {starts[place]:.4f}, and your floor "
               f"{floors[place]:.4f}: are they exchanged?")
        slips = {meaning: [slip(*case) for case in given] for meaning, slip in BEGINNINGS.items()}
        expect(False, f"{said} your start is {starts[place]:.4f}; " + (
            named(starts, slips, near) or
            "what does cross-entropy make of a right answer that has the probability 1 in B?"))
    if not all(map(near, floors, right[1])):
        place = next(i for i, (one, other) in enumerate(zip(floors, right[1], strict=True)) if not near(one, other))
        said = "with a batch of {} and smoothing {:.3g}".format(*given[place])
        slips = {meaning: [slip(*case) for case in given] for meaning, slip in FLOORS.items()}
        expect(False, f"{said} your floor is {floors[place]:.4f}; " + (
            named(floors, slips, near) or
            "no prediction pays less than the entropy of its target. What is the target, candidate by candidate?"))


def numbers_or_nan(output: object) -> list[float]:
    """Two numbers, which may be nan."""
    if isinstance(output, tuple | list | Tensor) and len(output) == 2:
        output = [math.nan if isinstance(one, float | np.floating | Tensor) and one != one else number(one)
                  for one in output]
        return [float(one) for one in output]
    return numbers_of(output, 2, "two numbers, start and floor")


# --- bugs in a black box ----------------------------------------------------------------------------------------------

BUGS = ("right", "multiplied", "first query", "swapped")
MISSED = {
    "multiplied": "a box that multiplies by the temperature passes for right: which temperature did you give it? At 1 "
                  "both answer alike.",
    "first query": "a box that looks at the first query only passes for right: on what you fed it, would another query "
                   "have won?",
    "swapped": "a box whose rows are sentences passes for right: on what you fed it, would rows and columns differ?",
}


MAKES: dict[str, Callable[[Tensor, float], Tensor]] = {  # logits of cosines (b n q)
    "right": lambda cosine, temperature: cosine.amax(dim=2) / temperature,
    "multiplied": lambda cosine, temperature: cosine.amax(dim=2) * temperature,
    "first query": lambda cosine, temperature: cosine[..., 0] / temperature,
    "swapped": lambda cosine, temperature: cosine.amax(dim=2).T / temperature,
}


def black_box(bug: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Somebody's logits (b n) of images (b q e) and texts (n e), with a bug or without."""
    make = MAKES[bug]

    def logits_of(image: Tensor, text: Tensor, temperature: float) -> Tensor:
        expect(image.ndim == 3 and text.ndim == 2,
               f"the box takes image (b q e) and text (n e); you fed it the shapes "
               f"{tuple(image.shape)} and {tuple(text.shape)}.")
        return make(torch.einsum("bqe,ne->bnq", image, text), temperature)
    return logits_of


@exercise("06.4", "lesson 06, sections 2, 3 and 7")
def which_bug(name_of: Callable[[Callable[[Tensor, Tensor, float], Tensor]], str]) -> None:
    """Feed a black box what tells its bug."""
    for bug in random.sample(BUGS * 25, 25 * len(BUGS)):  # often: who draws what he feeds it may be lucky
        output = name_of(black_box(bug))
        expect(isinstance(output, str) and output in BUGS,
               f"your function answers {output!r}; the answers are {', '.join(map(repr, BUGS))}.")
        if output == bug:
            continue
        expect(output != "right", MISSED.get(bug, ""))
        expect(bug != "right", f"you call a right box {output!r}: what does the right one answer to what you fed it?")
        expect(False,
               f"you call a box {output!r} whose bug is {bug!r}: do the two answer alike to what you fed it? What "
               "would each of them answer?")

"""Checks of lesson 06: the best query, the contrastive loss, its start and its floor, and bugs in a black box."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor


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
    for b, n, q, e in ((3, 5, 4, 6), (1, 1, 1, 3), (4, 2, 7, 5)):
        images, texts = unit(b, q, e), unit(n, e)
        given = images.clone(), texts.clone()
        output = similarity_of(images, texts)
        expect(not isinstance(output, Tensor) or b == n or tuple(output.shape) != (n, b),
               "rows and columns are exchanged: a row belongs to a picture, a column to a sentence.")
        expect_tensor(output, (b, n), "the similarity", "(b n)", torch.float32)
        expect(torch.equal(images, given[0]) and torch.equal(texts, given[1]),
               "your function changed what it was given.")
        if close(output, over_queries(images, texts, max)):
            continue
        for meaning, make in SLIPS.items():
            expect(not close(output, over_queries(images, texts, make)), meaning)
        expect(close(similarity_of(images[:, torch.randperm(q)], texts), output),
               "the same queries in another order give other similarities: queries have no order.")
        expect(False, "with the loop over pictures, sentences and queries the numbers are others: which query counts?")
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
    expect(similarity_of(unit(2, 3, 4).double(), unit(2, 4).double()).dtype == torch.float64,
           "vectors of float64 give another kind of number: take the kind that comes in.")


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
              "logarithm": math.exp(temperature)}[scale]
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
ITC_SLIPS = {
    "the cosines are multiplied by the temperature: candidates are as good as equal, and the loss cannot leave ln B.":
        {"scale": "multiplied"},
    "the temperature takes no part: it is what stretches a range of 2 to one that softmax can use.": {"scale": "none"},
    "the temperature is applied twice.": {"scale": "squared"},
    "only pictures pick among sentences: each sentence also picks among the pictures.": {"sides": "pictures"},
    "only sentences pick among pictures: each picture also picks among the sentences.": {"sides": "sentences"},
    "the two directions are added; asked for is their mean.": {"sides": "sum"},
    "the rows are added; asked for is their mean, or a larger batch pays more for its size alone.": {"sides": "rows"},
    "another caption of the same picture counts as a wrong answer.": {"target": "diagonal"},
    "where a picture has several captions in the batch, its target adds up to more than one: they have to share.":
        {"target": "uncounted"},
    "nothing is smoothed.": {"spread": "none"},
    "the smoothed part is shared by the wrong candidates only: in this house, as in torch, all candidates share it.":
        {"spread": "wrong"},
    "the smoothed part goes to all but the diagonal: in this house, as in torch, all candidates share it.":
        {"spread": "others"},
    PROBABILITIES: {"twice": "each"},
    PROBABILITIES + " And it is the rows' softmax that you have turned.": {"twice": "rows"},
    "that is CLIP's log-scale, which grows by exp: here the temperature is a plain number to divide by.":
        {"scale": "logarithm"},
}
# Two at once, where they do not meet in one part of the formula.
ITC_PAIRS = {(one, other): ITC_SLIPS[one] | ITC_SLIPS[other] for one, other in combinations(ITC_SLIPS, 2)
             if not ITC_SLIPS[one].keys() & ITC_SLIPS[other].keys()}


@exercise("06.2", "lesson 06, sections 3, 4 and 6")
def itc_loss(loss_of: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Both directions, divided by the temperature, smoothed, with shared targets."""
    given, losses = [], []
    for ids in ([0, 1, 2, 0, 3, 0], [4, 4, 1, 7, 1], [2, 0, 1, 2]):
        random.shuffle(ids)
        b, smoothing, temperature = len(ids), random.uniform(0.1, 0.3), torch.tensor(random.uniform(0.1, 0.5))
        same = torch.tensor(ids)[:, None] == torch.tensor(ids)
        cosine = 2 * torch.rand(b, b) - 1
        numbers = cosine.tolist(), same.tolist(), temperature.item(), smoothing
        output = expect_tensor(loss_of(cosine, same, temperature, smoothing), (), "the loss")
        expect(cosine.tolist() == numbers[0] and same.tolist() == numbers[1],
               "your function changed what it was given.")
        given.append(numbers)
        losses.append(output.item())

    def like(**slip: str) -> bool:
        """Whether the losses are those of the loops with such a slip: all of them, as one may be so by chance."""
        return all(math.isclose(slow_itc(*numbers, **slip), loss, rel_tol=1e-4)
                   for numbers, loss in zip(given, losses, strict=True))

    if not like():
        for meaning, slip in ITC_SLIPS.items():
            expect(not like(**slip), meaning)
        for two, slip in ITC_PAIRS.items():
            expect(not like(**slip), "two slips at once: " + " And: ".join(two))
        expect(False, f"image ids {ids}: your loss is {losses[-1]:.4f}, that of the loops {slow_itc(*given[-1]):.4f}; "
               "it is none of the usual slips, nor two of them at once. Begin with one row of logits and its target.")
    eye = torch.eye(5, dtype=torch.bool)
    equal = loss_of(torch.full((5, 5), 0.3), eye, torch.tensor(0.07), 0.1).item()
    expect(math.isclose(equal, math.log(5), rel_tol=1e-4), f"if all 5 candidates are alike the loss should be ln 5 = "
           f"{math.log(5):.3f}, and yours is {equal:.3f}.")
    one = loss_of(torch.rand(1, 1), eye[:1, :1], torch.tensor(0.07), 0.1).item()
    expect(abs(one) < 1e-5, f"a batch of one has nothing to choose and pays 0; yours pays {one:.3f}.")
    sharp = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).roll(random.randint(0, 1), 0)
    output, right = loss_of(sharp, eye[:2, :2], torch.tensor(0.005), 0.1).item(), slow_itc(
        sharp.tolist(), eye[:2, :2].tolist(), 0.005, 0.1)
    expect(math.isclose(output, right, rel_tol=1e-3),
           f"at the temperature 0.005 your loss is {output:.4g}, and should be "
           f"{right:.4g}: an exponential has overflowed, or the logarithm of a vanished probability was taken.")
    cosine, temperature = (2 * torch.rand(4, 4) - 1).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    output = loss_of(cosine, eye[:4, :4], temperature, 0.1)
    expect(output.requires_grad, "no gradient flows from the loss: did .item(), .detach() or no_grad come between?")
    slopes = torch.autograd.grad(output, (cosine, temperature), allow_unused=True)
    expect(slopes[0] is not None and bool((slopes[0] != 0).all()), "some cosine gets no gradient: every pair of the "
           "batch takes part, in its row and in its column.")
    expect(slopes[1] is not None and bool(slopes[1] != 0), "the temperature gets no gradient: it is a parameter and "
           "learns.")


# --- numbers to know before training ----------------------------------------------------------------------------------


def xlogx(x: float) -> float:
    """x ln x, which is 0 at 0."""
    return x * math.log(x) if x > 0 else 0.0


@exercise("06.3", "lesson 06, section 4")
def start_and_floor(predict: Callable[[int, float], tuple[float, float]]) -> None:
    """What knowing nothing costs, and what nobody gets below."""
    drawn = [(random.randint(3, 500), random.uniform(0.01, 0.4)) for _ in range(3)]
    for batch, smoothing in [(32, 0.1), *drawn, (2, 0.1), (16, 0.0), (1, 0.1)]:
        said = f"with a batch of {batch} and smoothing {smoothing:.3g}"
        try:
            output = predict(batch, smoothing)
        except (ValueError, ZeroDivisionError) as error:
            expect(False, f"{said} your function stops ({error}). What has the probability 0 takes no part: p ln p "
                   "goes to 0 with p. And in a batch of one there is no wrong candidate.")
        expect(isinstance(output, tuple | list) and len(output) == 2,
               f"your function gives {output!r}; asked for are two numbers, start and floor.")
        start, floor = (float(number) for number in output)
        right, share = 1 - smoothing + smoothing / batch, smoothing / batch
        lowest = -xlogx(right) - (batch - 1) * xlogx(share)
        if math.isclose(start, math.log(batch), abs_tol=1e-6) and math.isclose(floor, lowest, abs_tol=1e-6):
            continue
        expect(floor <= start + 1e-6, f"{said} your floor lies above your start: are they exchanged?")
        starts = {math.log2(batch): "that is counted in bits, with the logarithm to the base 2; torch counts with e.",
                  math.log10(batch): "that is the logarithm to the base 10; torch counts with e.",
                  float(batch): "that is how many candidates there are, not what picking one of them costs.",
                  2 * math.log(batch): "both directions are averaged, not added.",
                  1 - 1 / batch: "that is how often a blind guess is wrong, not its cross-entropy."}
        meaning = next((why for number, why in starts.items() if math.isclose(start, number, abs_tol=1e-6)),
                       "what does cross-entropy make of a right answer that has the probability 1 in B?")
        expect(math.isclose(start, math.log(batch), abs_tol=1e-6), f"{said} your start is {start:.4f}; {meaning}")
        other = smoothing / max(1, batch - 1)
        floors = {0.0: "a model that is perfectly sure does pay: the smoothed target is not sure itself.",
                  smoothing: "the smoothing is a share of the target, not a loss.",
                  -math.log(1 - smoothing): "that is what the right answer would cost, were it all of the target.",
                  -math.log(right): "that is what the right answer would cost, were it all of the target.",
                  -xlogx(right): "the wrong candidates are left out: each of them is asked for, with a small share.",
                  -xlogx(right) - xlogx(share): "only one wrong candidate is counted.",
                  -xlogx(right) - batch * xlogx(share): "how many wrong candidates are there?",
                  -xlogx(1 - smoothing) - (batch - 1) * xlogx(other): "the smoothed part is shared by all candidates; "
                  "the right one gets its share of it, too.",
                  -xlogx(1 - smoothing) - (batch - 1) * xlogx(share): "these shares do not add up to one: the right "
                  "candidate gets its part of the smoothing, too.",
                  -xlogx(1 - smoothing) - xlogx(smoothing): "the smoothed part does not go to one candidate: it is "
                  "shared by all.",
                  lowest / math.log(2): "that is counted in bits, with the base 2; torch counts with e."}
        meaning = next((why for number, why in floors.items() if math.isclose(floor, number, abs_tol=1e-6)),
                       "no prediction pays less than the entropy of its target. What is the target, candidate by "
                       "candidate?")
        expect(False, f"{said} your floor is {floor:.4f}; {meaning}")


# --- bugs in a black box ----------------------------------------------------------------------------------------------

BUGS = ("right", "multiplied", "first query", "swapped")
MISSED = {
    "multiplied": "a box that multiplies by the temperature passes for right: at which temperature did you look? At 1 "
                  "nobody could tell.",
    "first query": "a box that looks at the first query only passes for right: on what you fed it, would another query "
                   "have won?",
    "swapped": "a box whose rows are sentences passes for right: on what you fed it, would rows and columns differ?",
}


def black_box(bug: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Somebody's logits (b n) of images (b q e) and texts (n e), with a bug or without."""
    def logits_of(image_features: Tensor, text: Tensor, temperature: float) -> Tensor:
        expect(image_features.ndim == 3 and text.ndim == 2,
               f"the box takes image (b q e) and text (n e); you fed it the shapes "
               f"{tuple(image_features.shape)} and {tuple(text.shape)}.")
        cosine = torch.einsum("bqe,ne->bnq", image_features, text)
        cosine = cosine[..., 0] if bug == "first query" else cosine.amax(dim=2)
        logits = cosine * temperature if bug == "multiplied" else cosine / temperature
        return logits.T if bug == "swapped" else logits
    return logits_of


@exercise("06.4", "lesson 06, sections 2, 3 and 7")
def which_bug(name_of: Callable[[Callable[[Tensor, Tensor, float], Tensor]], str]) -> None:
    """Feed a black box what tells its bug."""
    for bug in random.sample(BUGS * 3, 3 * len(BUGS)):
        output = name_of(black_box(bug))
        expect(isinstance(output, str) and output in BUGS,
               f"your function answers {output!r}; the answers are {', '.join(map(repr, BUGS))}.")
        if output == bug:
            continue
        expect(output != "right", MISSED.get(bug, ""))
        expect(bug != "right", f"you call a right box {output!r}: what does the right one answer to what you fed it?")
        expect(False,
               f"you call a box {output!r} whose bug is {bug!r}: the two answer alike to what you fed it, or you "
               "have taken their answers for each other.")

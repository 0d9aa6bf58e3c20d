"""Checks of lesson 07: the logits of the queries, the base rate, hard negatives, the triple, and re-ranking."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from . import Wrong, close, exercise, expect, expect_tensor
from .slips import name_slip, parts, quantity, slopes, telling

# --- what the queries say ---------------------------------------------------------------------------------------------


@exercise("07.1", "lesson 07, section 1")
def match_logits(logits_of: Callable[[Tensor, int, nn.Linear], Tensor]) -> None:
    """The head's logits, averaged over the queries."""
    draws, output, right = [], [], []
    for b, q, t, e in ((3, 4, 5, 6), (1, 1, 2, 3), (2, 7, 1, 4), (4, random.randint(8, 12), 3, 5)):
        states, head = 4 * torch.randn(b, q + t, e), nn.Linear(e, 2)
        nn.init.normal_(head.bias)
        given = states.clone()
        output.append(expect_tensor(logits_of(states, q, head), (b, 2), "the logits", "(b 2)", torch.float32).detach())
        expect(torch.equal(given, states), "your function changed the states that it was given.")
        weight, bias = head.weight.tolist(), head.bias.tolist()
        said = torch.tensor([[[sum(w * x for w, x in zip(row, state, strict=True)) + bias[side]
                               for side, row in enumerate(weight)] for state in one] for one in states.tolist()])
        draws.append((said, q, head.bias.detach()))  # what the head says of each place: (b s 2)
        right.append(said[:, :q].mean(dim=1))
        if not close(output[-1], right[-1]):
            other = torch.cat([states[:, :q], torch.randn(b, t, e)], dim=1)
            expect(close(logits_of(other, q, head), output[-1]),
                   "the answer changes with the states of words: it is to "
                   "be read from the queries alone, which stand before the text.")
            mixed = torch.cat([states[:, :q].roll(1, dims=1), states[:, q:]], dim=1)
            same_when_mixed = close(logits_of(mixed, q, head), output[-1])
            changed = [states.clone() for _ in range(q)]
            for place, some in enumerate(changed):
                some[:, place] += 1
            silent = [place for place, some in enumerate(changed) if close(logits_of(some, q, head), output[-1])]
    if not all(map(close, output, right)):
        name_slip(LOGIT_SLIPS, draws, output, right)
        expect(not silent, f"the logits do not change with the queries {silent}, counted from 0: every query counts.")
        expect(same_when_mixed, "the same queries in another order give another answer: queries have no order.")
        expect(False, "your logits differ from those of the loop over the queries. With one query, the result should "
               "be the head's logits for it; and with two?")
    states, head, weights = torch.randn(2, 5, 4, requires_grad=True), nn.Linear(4, 2), torch.randn(2, 2)
    made = logits_of(states, 3, head)
    expect(made.requires_grad, "no gradient flows from the logits.")
    inputs = {"the queries": states, "the head's weights": head.weight, "the head's biases": head.bias}
    wanted = slopes(head(states[:, :3]).mean(dim=1), [*inputs.values()], weights)
    for name, slope, asked in zip(inputs, slopes(made, [*inputs.values()], weights), wanted, strict=True):
        expect(bool(slope.any()), f"{name} get no gradient: queries and head both learn. Was something detached on the "
               "way?")
        expect(name != "the queries" or bool(slope[:, :3].any(dim=2).all()), "some query gets no gradient: every query "
               "counts.")
        expect(close(slope, asked), f"the logits are right, but {name} get another gradient than those of the loop "
               "over the queries: does some part of the way not let it through?")


LOGIT_SLIPS = {
    "only the first query is used.": lambda said, q, bias: said[:, 0],
    "the queries' logits are added: with twice as many queries everything would be twice as sure. The exercise asks "
    "for their mean.": lambda said, q, bias: said[:, :q].sum(dim=1),
    "you average probabilities: cross-entropy and ranking want logits, so softmax comes after the mean, if at all.":
        lambda said, q, bias: said[:, :q].softmax(dim=2).mean(dim=1),
    "these are probabilities; the exercise asks for logits: cross-entropy makes probabilities itself.":
        lambda said, q, bias: said[:, :q].mean(dim=1).softmax(dim=1),
    "these are logarithms of probabilities; the re-ranking adds the bare logit of a match, so leave them as they come.":
        lambda said, q, bias: said[:, :q].mean(dim=1).log_softmax(dim=1),
    "you average logarithms of probabilities; the exercise asks for the head's logits, as they come.":
        lambda said, q, bias: said[:, :q].log_softmax(dim=2).mean(dim=1),
    "the largest over the queries counts in ITC; in ITM every query counts alike.":
        lambda said, q, bias: said[:, :q].amax(dim=1),
    "the head's bias is missing.": lambda said, q, bias: said[:, :q].mean(dim=1) - bias,
    "the head's bias is counted once for each query.": lambda said, q, bias: said[:, :q].mean(dim=1) + (q - 1) * bias,
    "the head's bias is divided by the number of queries.": lambda said, q, bias: said[:, :q].mean(dim=1)
    - bias + bias / q,
    "the two logits are exchanged: they come as the head gives them.":
        lambda said, q, bias: said[:, :q].mean(dim=1).flip(1),
    "the median of the queries' logits is not their mean.": lambda said, q, bias: said[:, :q].median(dim=1).values,
}


# --- the base rate ----------------------------------------------------------------------------------------------------


def xlogx(x: float) -> float:
    """x ln x, which is 0 at 0."""
    return x * math.log(x) if x > 0 else 0.0


SAID_SLIPS = {
    "that is the ratio of true pairs to wrong ones; what share of all pairs is "
    "true?": lambda wrong, p: 1 / max(1, wrong),
    "that is the share of wrong pairs; the exercise asks for the probability of a match.": lambda wrong, p: 1 - p,
    "that is the best for as many wrong pairs as true ones.": lambda wrong, p: 0.5,
    "a model that says 0 pays without end for every true pair.": lambda wrong, p: 0.0,
}
PAID_SLIPS = {
    "that is paid by the true pairs alone; wrong ones pay, too.": lambda wrong, p: -math.log(p),
    "the wrong pairs pay as well.": lambda wrong, p: -xlogx(p),
    "the true pairs pay as well.": lambda wrong, p: -xlogx(1 - p),
    "that is paid by a model that says one half; a model that knows the share pays less.": lambda wrong, p: math.log(2),
    "both costs are added as if the two kinds were equally frequent, and there were one of each.":
        lambda wrong, p: -math.log(p) - math.log(1 - p) if wrong else None,
    "both costs count half, as if the two kinds were equally frequent.":
        lambda wrong, p: -(math.log(p) + math.log(1 - p)) / 2 if wrong else None,
    "that is the sum over a true pair and its wrong ones; the loss is a mean over pairs.":
        lambda wrong, p: (-xlogx(p) - xlogx(1 - p)) * (1 + wrong),
    "that is counted in bits, with the base 2; torch counts with e.":
        lambda wrong, p: (-xlogx(p) - xlogx(1 - p)) / math.log(2),
    "the two shares are exchanged: which share of the pairs pays −ln p, and which −ln (1 − p)?":
        lambda wrong, p: -(1 - p) * math.log(p) - p * math.log(1 - p) if wrong else None,
    "a cost is not negative: the logarithm of a probability is, so its sign has to be flipped.":
        lambda wrong, p: xlogx(p) + xlogx(1 - p),
}
RIGHT_SLIPS = {
    "that is the accuracy of a model that always says match; the likelier answer is the other.": lambda wrong, p: p,
    "that is the accuracy of a model that never says match, and without wrong pairs match is the likelier answer.":
        lambda wrong, p: 1 - p,
    "a coin would be right in one half; a model that knows the share does better.": lambda wrong, p: 0.5,
    "that is for drawing the answer by chance, not taking the likelier one.":
        lambda wrong, p: p * p + (1 - p) ** 2,
    "that is the share of wrong answers.": lambda wrong, p: min(p, 1 - p),
}


@exercise("07.2", "lesson 07, section 2")
def base_rate(predict: Callable[[int], tuple[float, float, float]]) -> None:
    """What a model pays that knows only how many pairs are wrong."""
    draws = [(wrong, 1 / (1 + wrong)) for wrong in (3, 2, 1, *random.sample(range(4, 30), 3), 0)]
    answers, stops = [], ""
    for wrong, _ in draws:
        try:
            output = predict(wrong)
        except (ValueError, ZeroDivisionError) as error:
            if wrong:
                raise
            stops = f"your function stops ({error})"
            break
        numbers = parts(output, 3, "three numbers: probability, loss, accuracy")
        if not wrong and any(isinstance(one, float | Tensor | np.floating) and one != one for one in numbers):
            stops = "your function gives nan"
            break
        answers.append([quantity(one, f"with {wrong} wrong pairs {what}") for one, what in
                        zip(numbers, ("the probability", "the loss", "the accuracy"), strict=True)])
    draws = draws[:len(answers)]
    wanted = [lambda wrong, p: p, lambda wrong, p: -xlogx(p) - xlogx(1 - p), lambda wrong, p: max(p, 1 - p)]
    asks = [("you would say match with the probability", SAID_SLIPS, "of all pairs, how many are true?"),
            ("your loss is", PAID_SLIPS, "what does a true pair pay, what a wrong one, and how many are there of "
             "each?"), ("your accuracy is", RIGHT_SLIPS, "always the likelier answer: how often is it right?")]
    for output, rule, (said, slips, question) in zip(zip(*answers, strict=True), wanted, asks, strict=True):
        right = [rule(*draw) for draw in draws]
        for (wrong, _), one, truth in zip(draws, output, right, strict=True):
            if not math.isclose(one, truth, rel_tol=1e-4, abs_tol=1e-5):
                at = f"with {wrong} wrong pairs for each true one {said} {one:.4f}; "
                name_slip({at + meaning: slip for meaning, slip in slips.items()}, draws, output, right)
                expect(False, at + question)
    expect(not stops, f"with 0 wrong pairs for each true one {stops}: p ln p goes to 0 with p, though the logarithm of "
           "0 does not exist.")


# --- hard negatives ---------------------------------------------------------------------------------------------------


def drawn(draw: Callable, similarity: Tensor, same_image: Tensor) -> tuple[Tensor, Tensor]:
    """What the learner drew, after its form was checked."""
    b, given = len(similarity), (similarity.clone(), same_image.clone())
    output = draw(similarity, same_image)
    expect(isinstance(output, tuple | list) and len(output) == 2,
           f"your function gives a {type(output).__name__}; the exercise asks for two tensors: an image for each text, "
           "and a text for each image.")
    for chosen, what in zip(output, ("the images", "the texts"), strict=True):
        expect_tensor(chosen, (b,), what, "(b)", torch.int64)
        expect(bool(((chosen >= 0) & (chosen < b)).all()), f"{what} are no numbers of places in the batch.")
    expect(torch.equal(similarity, given[0]) and torch.equal(same_image, given[1]),
           "your function changed what it was given: the similarities are needed for the loss as well.")
    return output[0], output[1]


def never_the_same(draw: Callable) -> None:
    """True pairs and siblings are by far the most similar here, and must not be drawn all the same."""
    for ids in torch.tensor([0, 0, 1, 2, 1, 3, 4]), torch.tensor([5, 2]), torch.tensor([0, 1, 1, 0, 2]):
        b = len(ids)
        same = ids[:, None] == ids
        for _ in range(10):
            for chosen in drawn(draw, torch.randn(b, b) + 8 * same, same):
                expect(not bool((chosen == torch.arange(b)).any()), "a true pair was drawn as a wrong one: it is the "
                       "most similar of all, and now one and the same pair is labelled yes and no.")
                expect(not bool((ids[chosen] == ids).any()), "another caption of the same picture was drawn as a wrong "
                       "one: it is true as well.")


def far_ahead(draw: Callable) -> None:
    """A trained temperature puts the true pair so far ahead that softmax leaves the others nothing."""
    eye = torch.eye(6, dtype=torch.bool)
    said = ("where the true pair is far more similar than all others, your function {}: once there are probabilities, "
            "nothing is left for the others. Is it too late there to take the true one out?")
    try:
        images, texts = drawn(draw, torch.randn(6, 6) + 150 * eye, eye)
    except RuntimeError as error:
        raise Wrong(said.format(f"stops ({str(error).splitlines()[0]})")) from None
    expect(not bool((images == torch.arange(6)).any() or (texts == torch.arange(6)).any()),
           said.format("draws the true one"))


def far_from_zero(draw: Callable) -> None:
    """Divided by a small temperature, similarities are large, and those of one picture larger than another's; and
    softmax, which sees differences alone, draws the same where all are far below zero."""
    own = torch.arange(8)
    for offset in (0.0, 100.0, -3e4):
        eye = torch.eye(8, dtype=torch.bool)
        similarity = torch.randn(8, 8) + offset + 120.0 * (own % 2)[:, None]
        said = f"similarities from {similarity.min():.0f} to {similarity.max():.0f}" + (
            ", as a small temperature makes them, {}: is the exponential of such numbers still a number? And must all "
            "rows share one largest?" if offset >= 0 else
            " {}: softmax sees differences alone, and those are as before. Is the exponential of such numbers more "
            "than 0?")
        try:
            images, texts = drawn(draw, similarity, eye)
        except (RuntimeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise Wrong(said.format(f"stop your function ({str(error).splitlines()[0] if str(error) else ''})")) \
                from None
        true = bool(((images == own) | (texts == own)).any())
        expect(offset >= 0 or not true, f"where all similarities are about {offset:,.0f} a true pair was drawn as a "
               "wrong one: what replaces a forbidden logit has to be below every logit. Which number is?")
        expect(bool((similarity[images, own] > offset + 60).all()) and not true,
               said.format("make it draw what softmax would never draw"))


def each_its_own_side(draw: Callable) -> None:
    """Row i likes text i + 1, and so column j likes image j - 1."""
    b = 9
    own = torch.arange(b)
    similarity = 40.0 * torch.eye(b).roll(1, dims=1)
    images, texts = drawn(draw, similarity, torch.eye(b, dtype=torch.bool))
    right = [float((images == (own - 1) % b).float().mean()), float((texts == (own + 1) % b).float().mean())]
    turned = [float((images == (own + 1) % b).float().mean()), float((texts == (own - 1) % b).float().mean())]
    expect(min(turned) < 0.9 or max(right) > 0.5, "images and texts are exchanged: first an image for each text, then "
           "a text for each image.")
    expect(turned[0] < 0.9 or right[1] < 0.9, "the images for the texts are drawn from the rows: a row holds a "
           "picture's similarities to the texts. Where are a text's similarities to the pictures?")
    expect(turned[1] < 0.9 or right[0] < 0.9, "the texts for the images are drawn from the columns: a column holds a "
           "text's similarities to the pictures. Where are a picture's similarities to the texts?")


def along_its_own_axis(draw: Callable) -> None:
    """Half of the texts are similar to all pictures, and half of the pictures to all texts: sums of rows differ."""
    b, calls, lift = 16, 40, 1.5
    hubs = [torch.randperm(b) < b // 2 for _ in range(2)]  # pictures, texts
    similarity = lift * hubs[0][:, None] + lift * hubs[1] - 2.0  # cosines may be negative, and so may these
    eye = torch.eye(b, dtype=torch.bool)
    seen = [0.0, 0.0]
    for _ in range(calls):
        for side, chosen in enumerate(drawn(draw, similarity, eye)):
            seen[side] += float(hubs[side][chosen].float().mean()) / calls
    for side, what, whose in ((0, "images", "text"), (1, "texts", "picture")):
        odds = [math.e**lift * (b // 2 - hub) / (b // 2 - (not hub)) for hub in hubs[side].tolist()]
        share = sum(odd / (1 + odd) for odd in odds) / b
        if abs(seen[side] - share) < 0.1:  # more than six standard deviations
            continue
        said = (f"half of the {what} are more similar to everything. Softmax draws a wrong one from among them in "
                f"{share:.2f} of cases, your function in {seen[side]:.2f}")
        expect(abs(seen[side] - 0.5) > 0.1, f"{said}, as if they were not: along which axis do your probabilities sum "
               f"to one? Each {whose} has a softmax of its own.")
        expect(seen[side] > 0.5, f"{said}: the less similar, the likelier. Similarities may be negative.")
        expect(False, f"{said}. What is done to the similarities besides softmax?")


def how_often(draw: Callable) -> None:
    """A third of the wrong ones is more similar, by one: shares are compared with those of softmax."""
    b, near, calls = 48, 16, 80
    steps = (torch.arange(b) - torch.arange(b)[:, None]) % b  # from row to column
    eye = steps == 0
    likes = (steps >= 1) & (steps <= near)
    similarity = 1.0 * likes + 12.0 * eye
    share = near * math.e / (near * math.e + b - 1 - near)  # of the more similar ones; even draws: 16 of 47
    own, counts, draws = torch.arange(b), [0, 0], []
    for _ in range(calls):
        images, texts = drawn(draw, similarity, eye)
        counts[0] += int(likes[images, own].sum())
        counts[1] += int(likes[own, texts].sum())
        draws.append((images, texts))
    fixed = all(torch.equal(one, first) for two in draws for one, first in zip(two, draws[0], strict=True))
    expect(not fixed, f"all {calls} draws gave the same: a wrong pair is drawn at random, or every picture meets the "
           "same near miss for ever.")
    for side, count in zip(("images", "texts"), counts, strict=True):
        seen = count / (b * calls)
        if abs(seen - share) < 0.05:  # more than six standard deviations
            continue
        output = (f"the more similar third of the wrong {side} was drawn in {seen:.2f} of cases; softmax gives "
                  f"{share:.2f}")
        expect(abs(seen - near / (b - 1)) >= 0.1, f"{output}. That is as often as blind draws: similarity plays no "
               "part, or as good as none.")
        expect(seen > near / (b - 1), f"{output}: the less similar, the likelier.")
        expect(seen > share, f"{output}: similarity counts for too little.")
        expect(False, f"{output}: similarity counts for too much. What is done to the logits besides softmax? They "
               "have been divided by the temperature already.")


def each_its_own_draw(draw: Callable) -> None:
    """Where all are nearly alike, some draw this one and some that one."""
    for chosen, what in zip(drawn(draw, 1e-3 * torch.randn(40, 40), torch.eye(40, dtype=torch.bool)),
                            ("texts draw one and the same image", "images draw one and the same text"), strict=True):
        expect(int(chosen.bincount().max()) < 20, f"where all are about equally similar, most {what}: each has a draw "
               "of its own, and so random numbers of its own.")


def nobody_left(draw: Callable) -> None:
    """A batch of one picture only."""
    for b in (3, 1):
        what = "a batch of one" if b == 1 else "a batch in which all captions are of one picture"
        try:
            drawn(draw, torch.randn(b, b), torch.ones(b, b, dtype=torch.bool))
        except Wrong:
            raise
        except ValueError:
            continue
        except Exception as error:
            raise Wrong(f"{what} has no wrong pair; your function stops with {type(error).__name__} "
                        f"({str(error).splitlines()[0] if str(error) else ''}), by accident: that does not say what is "
                        "wrong. Check before you draw, and raise a ValueError that says it.") from None
        expect(False, f"{what} has no wrong pair, and yet your function draws some: each of them is true. Refuse such "
               "a batch with a ValueError.")


@exercise("07.3", "lesson 07, sections 3 and 5")
def sample_negatives(draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Wrong partners, likelier the more similar, never from the same picture."""
    never_the_same(draw)
    far_ahead(draw)
    each_its_own_side(draw)
    each_its_own_draw(draw)
    how_often(draw)
    along_its_own_axis(draw)
    far_from_zero(draw)
    nobody_left(draw)


# --- the triple -------------------------------------------------------------------------------------------------------


@exercise("07.4", "lesson 07, section 4")
def match_triple(triple: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """True pairs, wrong images, wrong texts."""
    for b in (5, 2, random.randint(6, 9)):
        own = torch.arange(b)
        while True:  # two texts may have drawn the same image; texts are drawn apart from images
            steps = [torch.randint(1, b, (b,)) for _ in range(2)]
            wrong_image, wrong_text = ((own + step) % b for step in steps)
            if b == 2 or len({*wrong_image.tolist()}) < b and not torch.equal(wrong_image, wrong_text):
                break
        given = wrong_image.clone(), wrong_text.clone()
        output = triple(wrong_image, wrong_text)
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives a {type(output).__name__}; the exercise asks for three tensors: images, texts, "
               "labels.")
        for part, what in zip(output, ("images", "texts", "labels"), strict=True):
            expect_tensor(part, (3 * b,), what, "(3b)")
            expect(part.dtype == torch.int64, f"{what} hold {part.dtype}; places in a batch and classes are int64.")
        expect(torch.equal(wrong_image, given[0]) and torch.equal(wrong_text, given[1]),
               "your function changed what it was given.")
        images, texts, labels = output
        true = images == texts
        second, third = (images[b:2 * b], texts[b:2 * b]), (images[2 * b:], texts[2 * b:])
        expect(not (int(true.sum()) == b and bool(true[::3].all())), "the three pairs of a picture stand side by side; "
               "the exercise asks for blocks: all true pairs, all wrong images, all wrong texts.")
        expect(bool(true[:b].all()), "the true pairs do not stand first.")
        expect(bool((images[:b] == own).all()), "the true pairs are not in the batch's order.")
        if b > 2:
            expect(not (torch.equal(second[0], wrong_text) and torch.equal(third[1], wrong_image)),
                   "the wrong partners stand in each other's place: `wrong_image` are numbers of images, `wrong_text` "
                   "numbers of texts.")
            expect(not (torch.equal(second[1], wrong_text) and torch.equal(third[0], wrong_image)
                        and torch.equal(second[0], own) and torch.equal(third[1], own)), "the second block "
                   "holds wrong texts and the third wrong images: exchange these two.")
            expect(not (torch.equal(second[1], wrong_image) and torch.equal(third[0], wrong_text)), "images and texts "
                   "are exchanged: images come first, then texts, then labels.")
        expect(torch.equal(second[1], own), "in the second block the texts are not in the batch's own order: only the "
               "image is wrong there.")
        expect(torch.equal(third[0], own), "in the third block the images are not in the batch's own order: only the "
               "text is wrong there.")
        for block, chosen, what in ((second[0], wrong_image, "image"), (third[1], wrong_text, "text")):
            expect(torch.equal(block, chosen), f"the wrong {what}s are {block.tolist()}, and `wrong_{what}` was "
                   f"{chosen.tolist()}: which {what} was drawn for number 0, and which number does it have?")
        expect(set(labels.tolist()) <= {0, 1}, "labels are 0 and 1.")
        expect(not torch.equal(labels.bool(), ~true), "labels are the other way round: 1 is a match.")
        expect(int(labels.sum()) == b, f"{int(labels.sum())} of your labels say match; there are {b} true pairs.")
        expect(bool((labels[:b] == 1).all()), "the labels do not stand beside their pairs: which pairs come first?")


# --- re-ranking -------------------------------------------------------------------------------------------------------

def by(cosine: Tensor, scores: Tensor, k: int) -> Tensor:
    """ITC's order, its first k put in the order of other scores."""
    order = cosine.argsort(descending=True)
    return torch.cat([order[:k][scores[order[:k]].argsort(descending=True)], order[k:]])


def misplaced(cosine: Tensor, match: Tensor, k: int) -> Tensor:
    """The first k by their logits and the cosines of the candidates 0 to k - 1."""
    order = cosine.argsort(descending=True)
    first = order[:k]
    return torch.cat([first[(match[first] + cosine[:k]).argsort(descending=True)], order[k:]])


def renumbered(cosine: Tensor, match: Tensor, k: int) -> Tensor:
    """The first k by their places among themselves."""
    order = cosine.argsort(descending=True)
    return torch.cat([(match + cosine)[order[:k]].argsort(descending=True), order[k:]])


RERANK_SLIPS = {
    "the order is reversed: the best comes first.":
        lambda cosine, match, k: by(cosine, match + cosine, k).flip(0),
    "the order is ITC's: nothing has been re-ranked.": lambda cosine, match, k: cosine.argsort(descending=True),
    "among the first k only the match counts; the exercise asks for the sum of its logit and the cosine.":
        lambda cosine, match, k: by(cosine, match, k),
    "the match is made a probability first; the exercise asks for the sum of its logit and the cosine.":
        lambda cosine, match, k: by(cosine, match.sigmoid() + cosine, k),
    "among the first k the two are multiplied; the exercise asks for the sum of the logit and the cosine.":
        lambda cosine, match, k: by(cosine, match * cosine, k),
    "the cosine is subtracted; the exercise asks for the sum of the logit and the cosine.":
        lambda cosine, match, k: by(cosine, match - cosine, k),
    "a candidate's logit is added to the cosine of another one: `cosine[:k]` are those of the candidates 0 to k − 1.":
        misplaced,
    "the first k are reversed: the best comes first.": lambda cosine, match, k: by(cosine, -match - cosine, k),
    "the first k are numbered by their ranks among themselves: which candidate has each rank?": renumbered,
    "those that were not re-ranked are out of order: they should keep the order of ITC.":
        lambda cosine, match, k: torch.cat([by(cosine, match + cosine, k)[:k],
                                            by(cosine, match + cosine, k)[k:].sort().values]),
    "those that were not re-ranked come first.":
        lambda cosine, match, k: torch.cat([by(cosine, match + cosine, k)[k:], by(cosine, match + cosine, k)[:k]]),
    "those that were not re-ranked are reversed: of them, too, the most similar comes first.":
        lambda cosine, match, k: torch.cat([by(cosine, match + cosine, k)[:k],
                                            by(cosine, match + cosine, k)[k:].flip(0)]),
}
RERANK_SIZES = [(12, 5), (9, 4), (20, 7), (7, 3), (11, 6), (15, 6), (10, 1), (6, 6), (4, 9)]


@exercise("07.5", "lesson 07, section 6")
def rerank(rank: Callable[[Tensor, Callable[[Tensor], Tensor], int], Tensor]) -> None:
    """ITM looks again at the k best of ITC."""
    def rule(cosine: Tensor, match: Tensor, k: int) -> Tensor:
        """What is asked for."""
        return by(cosine, match + cosine, k)

    draws = telling(lambda: [(2 * torch.rand(n) - 1, 0.7 * torch.randn(n) + (0, -9, 9)[place // 3], k)
                             for place, (n, k) in enumerate(RERANK_SIZES)], rule, RERANK_SLIPS)
    answers, others = [], False
    for cosine, match, k in draws:
        n, asked = len(cosine), []

        def look(candidates: Tensor, match: Tensor = match, asked: list[int] = asked) -> Tensor:
            chosen = torch.as_tensor(candidates)
            expect(not chosen.is_floating_point() and chosen.dtype != torch.bool, "`match` takes numbers of "
                   f"candidates, and you ask it about {chosen.dtype}.")
            expect(bool(((chosen >= 0) & (chosen < len(match))).all()), f"there are {len(match)} candidates, and "
                   f"`match` is asked about the numbers {chosen.tolist()}.")
            asked.extend(chosen.reshape(-1).tolist())
            return match[chosen]

        given = cosine.clone()
        try:
            output = rank(cosine, look, k)
        except (RuntimeError, IndexError) as error:
            if k <= n or isinstance(error, NotImplementedError):
                raise
            raise Wrong(f"asked for the first {k} of {n} candidates your function stops ({error}): then nothing is "
                        "wrong, there are only fewer to look at.") from None
        expect(not isinstance(output, Tensor) or output.shape != (k,) or k >= n,
               f"of {n} candidates {k} are left. Those that were not re-ranked still have their place, behind the "
               "others.")
        expect_tensor(output, (n,), "the order", "(n)", torch.int64)
        expect(torch.equal(cosine, given), "your function changed the cosines that it was given.")
        expect(len(asked) <= min(k, n), f"`match` was asked about {len(asked)} candidates: it is expensive, and k "
               f"is {k}.")
        others |= set(asked) != set(cosine.argsort(descending=True)[:k].tolist())
        answers.append(output)
    right = [rule(*draw) for draw in draws]
    if all(map(torch.equal, answers, right)) and not others:
        low = rank(torch.tensor([0.1, 0.9, 0.8]),
                   lambda some: torch.tensor([-1e3, -4e3, -3e3])[torch.as_tensor(some)], 2).tolist()
        expect(low == [2, 1, 0], f"where logits are as low as -4,000, k = 2, your order of three candidates is {low}, "
               "and [2, 1, 0] is right: those that were not looked at stay behind, however little the others match.")
        cosine, match = 0.5 - 1e-4 * torch.randperm(12), torch.zeros(12)
        near, wanted = rank(cosine, lambda some: match[torch.as_tensor(some)], 3), cosine.argsort(descending=True)
        expect(torch.equal(near, wanted), f"where the cosines of 12 candidates differ by 0.0001, and all logits are "
               f"0, your order is {near.tolist()}, and ITC's own, {wanted.tolist()}, is right. A cosine from which a "
               "large number was taken away has lost its last digits: how can the others stay behind without that?")
        return
    name_slip(RERANK_SLIPS, draws, answers, right)
    expect(not others, "`match` was asked about others than the k most similar.")
    for (cosine, _, k), output, wanted in zip(draws, answers, right, strict=True):
        expect(torch.equal(output.sort().values, torch.arange(len(cosine))),
               "some candidate is missing or stands twice: "
               "the order names each of them once, by its number.")
        expect(set(output[:k].tolist()) == set(wanted[:k].tolist()), "among your first k is one that ITC has not put "
               "there: ITM can only reorder what ITC found.")
        expect(torch.equal(output[:k], wanted[:k]),
               f"of {len(cosine)} candidates the first k = {k} are the right ones, "
               "in another order than that of logit plus cosine.")
        expect(torch.equal(output, wanted),
               f"of {len(cosine)} candidates the first k = {k} are right; the others should "
               "follow as ITC has them, from the most similar on.")

"""Checks of lesson 07: hard negatives, the triple, logits of the queries, the base rate, and re-ranking."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import Wrong, close, exercise, expect, expect_tensor

# --- hard negatives ---------------------------------------------------------------------------------------------------


def drawn(draw: Callable, similarity: Tensor, same_image: Tensor) -> tuple[Tensor, Tensor]:
    """What the learner drew, after its form was checked."""
    b, given = len(similarity), (similarity.clone(), same_image.clone())
    output = draw(similarity, same_image)
    expect(isinstance(output, tuple | list) and len(output) == 2,
           f"your function gives a {type(output).__name__}; asked for are two tensors: an image for each text, and a "
           "text for each image.")
    for chosen, what in zip(output, ("the images", "the texts"), strict=True):
        expect_tensor(chosen, (b,), what, "(b)", torch.int64)
        expect(bool(((chosen >= 0) & (chosen < b)).all()), f"{what} are no numbers of places in the batch.")
    expect(torch.equal(similarity, given[0]) and torch.equal(same_image, given[1]),
           "your function changed what it was given: the similarities are needed for the loss as well.")
    return output[0], output[1]


def never_the_same(draw: Callable) -> None:
    """True pairs and siblings are by far the most similar here, and must not be drawn all the same."""
    ids = torch.tensor([0, 0, 1, 2, 1, 3, 4])
    same = ids[:, None] == ids
    for _ in range(10):
        for chosen in drawn(draw, torch.randn(7, 7) + 8 * same, same):
            expect(not bool((chosen == torch.arange(7)).any()), "a true pair was drawn as a wrong one: it is the most "
                   "similar of all, and now one and the same pair is labelled yes and no.")
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
    expect(turned[0] < 0.9 or right[1] < 0.9, "the images for the texts are drawn from the rows: a row says how a "
           "picture likes the texts. How does a text like the pictures?")
    expect(turned[1] < 0.9 or right[0] < 0.9, "the texts for the images are drawn from the columns: a column says how "
           "a text likes the pictures. How does a picture like the texts?")


def how_often(draw: Callable) -> None:
    """A third of the wrong ones is more similar, by one: shares are compared with those of softmax."""
    b, near, calls = 24, 8, 40
    steps = (torch.arange(b) - torch.arange(b)[:, None]) % b  # from row to column
    eye = steps == 0
    likes = (steps >= 1) & (steps <= near)
    similarity = 1.0 * likes + 12.0 * eye
    share = near * math.e / (near * math.e + b - 1 - near)  # of the more similar ones; even draws: 8 of 23
    own, counts, draws = torch.arange(b), [0, 0], []
    for _ in range(calls):
        images, texts = drawn(draw, similarity, eye)
        counts[0] += int(likes[images, own].sum())
        counts[1] += int(likes[own, texts].sum())
        draws.append((images, texts))
    fixed = all(torch.equal(one, first) for two in draws for one, first in zip(two, draws[0], strict=True))
    expect(not fixed, f"in {calls} draws the same was drawn: a wrong pair is drawn by chance, or every picture meets "
           "one and the same near miss for ever.")
    for side, count in zip(("images", "texts"), counts, strict=True):
        seen = count / (b * calls)
        if abs(seen - share) < 0.09:  # more than five standard deviations
            continue
        output = f"the more similar third of the wrong {side} was drawn in {seen:.2f} of cases; softmax gives {share:.2f}"
        expect(abs(seen - near / (b - 1)) >= 0.1, f"{output}. That is as often as blind draws: similarity plays no "
               "part, or as good as none.")
        expect(seen > near / (b - 1), f"{output}: the less similar, the likelier.")
        expect(seen > share, f"{output}: similarity counts for too little.")
        expect(False, f"{output}: you draw too eagerly. The logits have been divided by the temperature already.")


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
                        f"({str(error).splitlines()[0] if str(error) else ''}), by accident: nobody learns from it "
                        "what to do. Look before you draw, and raise a ValueError that says it.") from None
        expect(False, f"{what} has no wrong pair, and yet your function draws some: each of them is true. Refuse such "
               "a batch with a ValueError.")


@exercise("07.1", "lesson 07, sections 3 and 5")
def sample_negatives(draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Wrong partners, likelier the more similar, never from the same picture."""
    never_the_same(draw)
    far_ahead(draw)
    each_its_own_side(draw)
    how_often(draw)
    nobody_left(draw)


# --- the triple -------------------------------------------------------------------------------------------------------


@exercise("07.2", "lesson 07, section 4")
def match_triple(triple: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """True pairs, wrong images, wrong texts."""
    for b in (5, 2, random.randint(6, 9)):
        own = torch.arange(b)
        wrong_image, wrong_text = (own + 1) % b, (own + 2) % b if b > 2 else (own + 1) % b
        if b > 5:
            rest = torch.randperm(b - 1)[:2] + 1  # two different steps away from one's own
            wrong_image, wrong_text = (own + rest[0]) % b, (own + rest[1]) % b
        given = wrong_image.clone(), wrong_text.clone()
        output = triple(wrong_image, wrong_text)
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives a {type(output).__name__}; asked for are three tensors: images, texts, labels.")
        for part, what in zip(output, ("images", "texts", "labels"), strict=True):
            expect_tensor(part, (3 * b,), what, "(3b)")
            expect(part.dtype == torch.int64, f"{what} hold {part.dtype}; places in a batch and classes are int64.")
        expect(torch.equal(wrong_image, given[0]) and torch.equal(wrong_text, given[1]),
               "your function changed what it was given.")
        images, texts, labels = output
        true = images == texts
        expect(int(true.sum()) == b, f"of your {3 * b} pairs {int(true.sum())} are a picture with its own text; "
               f"it should be {b}: in each wrong pair one side is wrong, and one is one's own.")
        expect(not bool(true[::3].all()), "the three pairs of a picture stand side "
               "by side; asked for are blocks: all true pairs, all wrong images, all wrong texts.")
        expect(bool(true[:b].all()), "the true pairs do not stand first.")
        expect(bool((images[:b] == own).all()), "the true pairs are not in the batch's order.")
        second, third = (images[b:2 * b], texts[b:2 * b]), (images[2 * b:], texts[2 * b:])
        expect(not (torch.equal(second[0], own) and torch.equal(third[1], own)), "the second block holds wrong texts "
               "and the third wrong images: it is the other way round.")
        expect(torch.equal(second[1], own), "in the second block the texts are not in the batch's own order: only the "
               "image is wrong there.")
        expect(torch.equal(third[0], own), "in the third block the images are not in the batch's own order: only the "
               "text is wrong there.")
        expect(torch.equal(second[0], wrong_image) and torch.equal(third[1], wrong_text), "the wrong partners stand in "
               "each other's place: `wrong_image` are numbers of images, `wrong_text` numbers of texts.")
        expect(set(labels.tolist()) <= {0, 1}, "labels are 0 and 1.")
        expect(not torch.equal(labels.bool(), ~true), "labels are the other way round: 1 is a match.")
        expect(int(labels.sum()) == b, f"{int(labels.sum())} of your labels say match; there are {b} true pairs.")
        expect(bool((labels[:b] == 1).all()), "the labels do not stand beside their pairs: which pairs come first?")


# --- what the queries say ---------------------------------------------------------------------------------------------


@exercise("07.3", "lesson 07, section 1")
def match_logits(logits_of: Callable[[Tensor, int, nn.Linear], Tensor]) -> None:
    """The head's logits, averaged over the queries."""
    for b, q, t, e in ((3, 4, 5, 6), (1, 1, 2, 3), (2, 7, 1, 4)):
        states, head = torch.randn(b, q + t, e), nn.Linear(e, 2)
        nn.init.normal_(head.bias)
        output = expect_tensor(logits_of(states, q, head), (b, 2), "the logits", "(b 2)", torch.float32)
        weight, bias = head.weight.tolist(), head.bias.tolist()
        said = [[[sum(w * x for w, x in zip(row, state, strict=True)) + bias[side] for side, row in enumerate(weight)]
                 for state in one[:q]] for one in states.tolist()]  # (b q 2)
        right = torch.tensor(said).mean(dim=1)
        if close(output, right):
            continue
        other = torch.cat([states[:, :q], torch.randn(b, t, e)], dim=1)
        expect(close(logits_of(other, q, head), output),
               "the answer changes with the states of words: it is to be read "
               "from the queries alone, which stand before the text.")
        mixed = torch.cat([states[:, :q].roll(1, dims=1), states[:, q:]], dim=1)
        expect(not close(output, torch.tensor(said)[:, 0]), "only the first query is asked.")
        expect(not close(output, q * right),
               "the queries' logits are added: with twice as many queries everything would "
               "be twice as sure. Asked for is their mean.")
        expect(not close(output, torch.tensor(said).softmax(dim=2).mean(dim=1)), "you average probabilities: "
               "cross-entropy and ranking want logits, so softmax comes after the mean, if at all.")
        expect(not close(output, right.softmax(dim=1)), "these are probabilities; asked for are logits: cross-entropy "
               "makes probabilities itself.")
        expect(not close(output, right.log_softmax(dim=1)),
               "these are logarithms of probabilities; the re-ranking adds "
               "the bare logit of a match, so leave them as they come.")
        expect(not close(output, torch.tensor(said).amax(dim=1)), "the largest over the queries counts in ITC; in ITM "
               "all have the same say.")
        expect(not close(output + head.bias, right) and not close(output, right + (q - 1) * head.bias),
               "the head's bias is missing, or counted more than once.")
        expect(not close(output, right.flip(1)), "the two logits are exchanged: they come as the head gives them.")
        expect(close(logits_of(mixed, q, head), output),
               "the same queries in another order give another answer: queries "
               "have no order.")
        expect(False, f"with {q} queries and {t} words your logits are others than those of the loop over the queries.")
    states, head = torch.randn(2, 5, 4, requires_grad=True), nn.Linear(4, 2)
    output = logits_of(states, 3, head)
    expect(output.requires_grad, "no gradient flows from the logits.")
    slopes = torch.autograd.grad(output[:, 1].sum(), (states, head.weight), allow_unused=True)
    expect(slopes[0] is not None and slopes[1] is not None, "the queries or the head get no gradient: both learn.")
    expect(bool(slopes[0][:, :3].any(dim=2).all()), "some query gets no gradient: all have a say.")


# --- the base rate ----------------------------------------------------------------------------------------------------


def xlogx(x: float) -> float:
    """x ln x, which is 0 at 0."""
    return x * math.log(x) if x > 0 else 0.0


@exercise("07.4", "lesson 07, section 2")
def base_rate(predict: Callable[[int], tuple[float, float, float]]) -> None:
    """What a model pays that knows only how many pairs are wrong."""
    for wrong in (3, 2, 1, *(random.randint(3, 30) for _ in range(3)), 0):
        ratio = f"with {wrong} wrong pairs for each true one"
        try:
            output = predict(wrong)
        except (ValueError, ZeroDivisionError) as error:
            expect(False, f"{ratio} your function stops ({error}): p ln p goes to 0 with p.")
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives {output!r}; asked for are three numbers: probability, loss, accuracy.")
        said, loss, accuracy = (float(number) for number in output)
        p = 1 / (1 + wrong)
        lowest = -xlogx(p) - xlogx(1 - p)

        def like(number: float, other: float) -> bool:
            return math.isclose(number, other, abs_tol=1e-6)

        if not like(said, p):
            slips = {1 / max(1, wrong): "that is one for so many wrong ones; what is one of all pairs?",
                     1 - p: "that is the share of wrong pairs; asked for is the probability of a match.",
                     0.5: "that is the best for as many wrong pairs as true ones.",
                     0.0: "who says 0 pays without end for every true pair."}
            meaning = next((why for number, why in slips.items() if like(said, number)),
                           "the best constant is the share of true pairs among all.")
            expect(False, f"{ratio} you would say match with the probability {said:.4f}; {meaning}")
        if not like(loss, lowest):
            slips = {-math.log(p): "that is paid by the true pairs alone; wrong ones pay, too.",
                     -xlogx(p): "the wrong pairs pay as well.", -xlogx(1 - p): "the true pairs pay as well.",
                     math.log(2): "that is paid by who says one half, and the share allows for less.",
                     -math.log(p) - math.log(max(1 - p, 1e-30)): "both costs are added as if the two kinds were "
                     "equally frequent, and there were one of each.",
                     -(math.log(p) + math.log(max(1 - p, 1e-30))) / 2: "both costs count half, as if the two kinds "
                     "were equally frequent.",
                     -math.log(p) - wrong * math.log(max(1 - p, 1e-30)): "that is the sum over a true pair and its "
                     "wrong ones; the loss is a mean over pairs.",
                     lowest / math.log(2): "that is counted in bits, with the base 2; torch counts with e."}
            meaning = next((why for number, why in slips.items() if like(loss, number)),
                           "what does a true pair pay, what a wrong one, and how many are there of each?")
            expect(False, f"{ratio} your loss is {loss:.4f}; {meaning}")
        if not like(accuracy, max(p, 1 - p)):
            slips = {p: "that is the accuracy of who always says match; the likelier answer is the other.",
                     0.5: "a coin would be right in one half; who knows the share does better.",
                     p * p + (1 - p) ** 2: "that is for drawing the answer by chance, not taking the likelier one."}
            meaning = next((why for number, why in slips.items() if like(accuracy, number)),
                           "always the likelier answer: how often is it right?")
            expect(False, f"{ratio} your accuracy is {accuracy:.4f}; {meaning}")


# --- re-ranking -------------------------------------------------------------------------------------------------------

RERANK_SLIPS = {
    "the order is turned round: the best comes first.":
        lambda order, total, cosine, match, k: order.flip(0),
    "the order is ITC's: nothing has been re-ranked.":
        lambda order, total, cosine, match, k: cosine.argsort(descending=True),
    "among the first k only the match counts; asked for is the sum of its logit and the cosine.":
        lambda order, total, cosine, match, k: by(order, match, k),
    "the match is made a probability first; asked for is the sum of its logit and the cosine.":
        lambda order, total, cosine, match, k: by(order, match.sigmoid() + cosine, k),
    "the first k are turned round: the best comes first.":
        lambda order, total, cosine, match, k: by(order, -total, k),
    "the first k are numbered by their places among themselves: which candidate stands on such a place?":
        lambda order, total, cosine, match, k: torch.cat([total[cosine.argsort(descending=True)[:k]].argsort(
            descending=True), order[k:]]),
    "those that were not looked at again stand in no order: ITC has ordered them.":
        lambda order, total, cosine, match, k: torch.cat([order[:k], order[k:].sort().values]),
    "those that were not looked at again come first.":
        lambda order, total, cosine, match, k: torch.cat([order[k:], order[:k]]),
}


def by(order: Tensor, scores: Tensor, k: int) -> Tensor:
    """An order whose first k are put in the order of other scores."""
    return torch.cat([order[:k][scores[order[:k]].argsort(descending=True)], order[k:]])


@exercise("07.5", "lesson 07, section 6")
def rerank(rank: Callable[[Tensor, Callable[[Tensor], Tensor], int], Tensor]) -> None:
    """ITM looks again at the k best of ITC."""
    suspects = dict(RERANK_SLIPS)
    wrong = False
    for n, k in [(12, 5), (9, 4), (20, 7), (7, 3), (11, 6), (15, 6), (10, 1), (6, 6), (4, 9)]:
        cosine, match = 2 * torch.rand(n) - 1, 0.7 * torch.randn(n)
        asked: list[int] = []

        def look(candidates: Tensor, match: Tensor = match, asked: list[int] = asked) -> Tensor:
            asked += torch.as_tensor(candidates).reshape(-1).tolist()
            return match[candidates]

        given = cosine.clone()
        try:
            output = rank(cosine, look, k)
        except (RuntimeError, IndexError) as error:
            if k <= n or isinstance(error, NotImplementedError):
                raise
            raise Wrong(f"asked for the first {k} of {n} candidates your function stops ({error}): then nothing is "
                        "wrong, there are only fewer to look at.") from None
        expect(not isinstance(output, Tensor) or output.shape != (k,) or k >= n,
               f"of {n} candidates {k} are left. Those "
               "that were not looked at again still have their place, behind the others.")
        expect_tensor(output, (n,), "the order", "(n)", torch.int64)
        expect(torch.equal(cosine, given), "your function changed the cosines that it was given.")
        expect(len(asked) <= min(k, n), f"`match` was asked about {len(asked)} candidates: it is expensive, and k "
               f"is {k}.")
        order = cosine.argsort(descending=True)
        right = by(order, cosine + match, k)
        if torch.equal(output, right):
            continue
        suspects = {why: slip for why, slip in suspects.items()
                    if torch.equal(slip(right, cosine + match, cosine, match, k), output)}
        wrong = True
        if suspects:
            continue  # several slips may look alike on one draw: the next tells more
        expect(torch.equal(output.sort().values, torch.arange(n)),
               "some candidate is missing or stands twice: the order "
               "names each of them once, by its number.")
        expect(set(asked) == set(order[:k].tolist()), "`match` was asked about others than the k most similar.")
        expect(set(output[:k].tolist()) == set(right[:k].tolist()), "among your first k is one that ITC has not put "
               "there: ITM can only reorder what ITC found.")
        expect(False, f"with {n} candidates and k = {k} your order is another: the first k by logit plus cosine, the "
               "rest as ITC has them.")
    expect(not wrong, next(iter(suspects), ""))

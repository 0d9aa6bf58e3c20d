"""Checks of lesson 09: the rate, recall, what frozen means, what accumulation buys, and logs to be read."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import Wrong, close, exercise, expect
from .slips import agree, name_slip, parts, quantity, telling, unpatched

# --- the rate of a step -----------------------------------------------------------------------------------------------


def slow_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """What is asked for: a ramp whose last step reaches the peak, then half a cosine down to a part of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(angle)) / 2)


def half_cosine(share: float) -> float:
    """From 1 at share 0 to 0 at share 1."""
    return (1 + math.cos(math.pi * share)) / 2


Falls = Callable[[int, int, int, float, float], float | None]
FALLING: dict[str, Falls] = {  # what slips make of the i-th step behind the warm-up, as a part of the peak
    "the cosine runs since step 0, so that part of it is already over when the warm-up ends.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * half_cosine((i + warmup) / steps),
    "the cosine is stretched over all steps, so that it has not come down when the run ends.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * half_cosine(i / steps),
    "that is a whole cosine, which rises again in the second half: the exercise asks for half of one.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * half_cosine(2 * i / (steps - warmup)),
    "one step too short: the floor belongs to step number `steps`, one after the last, and you are there at the last. "
    "How many steps are there behind the warm-up?": lambda i, steps, warmup, peak, floor:
        floor + (1 - floor) * half_cosine(i / max(1, steps - warmup - 1)),
    "one step ahead: the first step behind the warm-up still has the full rate, as no share of the way is done.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * half_cosine((i + 1) / (steps - warmup)),
    "the warm-up lasts one step too long: counted from 0, its last step is number warmup - 1.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * half_cosine(i / (steps - warmup)) if i else (
            warmup + 1) / max(1, warmup),
    "that is a quarter of a cosine, which falls fastest at its end: it should be nearly flat there.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * math.cos(math.pi * i / (steps - warmup) / 2),
    "that is a straight line.": lambda i, steps, warmup, peak, floor: 1 - (1 - floor) * i / (steps - warmup),
    "it falls to zero: the floor takes no part.":
        lambda i, steps, warmup, peak, floor: half_cosine(i / (steps - warmup)),
    "the cosine is made smaller so that there is room for the floor, and then the floor is not added: it begins below "
    "the peak and falls to zero.":
        lambda i, steps, warmup, peak, floor: (1 - floor) * half_cosine(i / (steps - warmup)),
    "the curve is cut off at the floor: the exercise asks for one that comes to rest there, half a cosine from peak to "
    "it.":
        lambda i, steps, warmup, peak, floor: max(floor, half_cosine(i / (steps - warmup))),
    "the floor is added, so that the curve begins above its peak.":
        lambda i, steps, warmup, peak, floor: floor + half_cosine(i / (steps - warmup)),
    "the floor is a fraction of the peak, not a rate.": lambda i, steps, warmup, peak, floor:
        floor / peak + (1 - floor / peak) * half_cosine(i / (steps - warmup)),
    "the floor is a fraction of the peak, and it was subtracted from the peak as if it were a rate.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor / peak) * half_cosine(i / (steps - warmup)),
    "a cosine goes from 1 to −1: it has to be lifted and halved before it goes from 1 to 0.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * math.cos(math.pi * i / (steps - warmup)),
    "the curve is reversed: it rises where it should fall.":
        lambda i, steps, warmup, peak, floor: 1 - (1 - floor) * half_cosine(i / (steps - warmup)),
    "the angle goes to 1, and half a cosine is over at π.":
        lambda i, steps, warmup, peak, floor: floor + (1 - floor) * (1 + math.cos(i / (steps - warmup))) / 2,
    "peak and floor are exchanged: the floor's share is 1 − floor, and the cosine's is the floor.":
        lambda i, steps, warmup, peak, floor: 1 - floor + floor * half_cosine(i / (steps - warmup)),
}


@exercise("09.1", "lesson 09, section 1, 'A schedule for the rate'")
def rate(rate_of: Callable[[int, int, int, float, float], float]) -> None:
    """Linear warm-up, then half a cosine."""
    runs = [(random.randint(60, 90), random.randint(7, 20), random.uniform(0.1, 0.3)),
            (random.randint(31, 50), 1, random.uniform(0.4, 0.8)), (50, 0, random.uniform(0.1, 0.3)), (40, 5, 0.0),
            (30, 3, 1.0), (6, 6, 0.1), (1, 0, 0.2), (2, 1, 0.2)]
    draws, falls, right = [], [], []
    for steps, warmup, floor in runs:
        peak = random.uniform(1e-4, 1e-2)
        with_what = f"with {steps} steps, {warmup} of them warm-up, and floor {floor:.2f}"
        try:
            output = [quantity(rate_of(step, steps, warmup, peak, floor), f"the rate of step {step}") / peak
                      for step in range(steps)]
        except ZeroDivisionError as error:
            if 0 < warmup < steps:
                raise
            raise Wrong(f"{with_what} your function stops ({error}): a run may have no warm-up, or nothing else. What "
                        "does each of your divisions divide by then?") from None
        if warmup > 1:
            expect(output[0] > 0,
                   f"{with_what} the rate of step 0 is {output[0] * peak:.3g}: steps are counted from 0, "
                   "and a step at the rate 0 is wasted.")
            expect(output[0] < 0.9, f"{with_what} the first step has {output[0]:.0%} of the full rate: where is the "
                   "warm-up?")
            jump = output[1] - output[0]
            expect(all(math.isclose(output[i + 1] - output[i], jump, rel_tol=1e-3) for i in range(warmup - 1)),
                   f"{with_what} the rate does not rise in equal steps while it warms up.")
        if warmup:
            expect(math.isclose(output[warmup - 1], 1, rel_tol=1e-4),
                   f"{with_what} the last step of the warm-up, number "
                   f"{warmup - 1}, has {output[warmup - 1]:.3f} of the full rate: it should be there, neither short of "
                   "it nor lowered by the cosine.")
            expect(math.isclose(output[0], 1 / warmup, rel_tol=1e-4),
                   f"{with_what} step 0 has {output[0]:.3f} of the full "
                   "rate: the rises are equal, and how many of them has it made?")
        for step in range(warmup, steps):
            draws.append((step - warmup, steps, warmup, peak, floor))
            falls.append(output[step])
            right.append(slow_rate(step, steps, warmup, 1.0, floor))
    if agree(falls, right):
        return
    gaps = [abs(one - truth) if agree(one, truth) is False else 0.0 for one, truth in zip(falls, right, strict=True)]
    worst = gaps.index(max(gaps))
    i, steps, warmup, _, floor = draws[worst]
    said = (f"with {steps} steps, {warmup} of them warm-up, and floor {floor:.2f} the rate of step {warmup + i} is "
            f"{falls[worst]:.4f} of the peak: ")
    name_slip({said + meaning: slip for meaning, slip in FALLING.items()}, draws, falls, right)
    begins, at = falls[worst - i], f"{said}it should be {right[worst]:.4f}. "
    expect(agree(begins, 1.0), f"{at}The first step behind the warm-up has {begins:.4f} of the peak, and should have "
           "all of it: do the floor and what the cosine adds make 1 there?")
    ends, last = falls[worst - i + steps - warmup - 1], right[worst - i + steps - warmup - 1]
    expect(math.isclose(ends, last, abs_tol=0.02), f"{at}The fall begins right, and its last step has {ends:.4f} of "
           f"the peak instead of {last:.4f}: where does your curve come to rest, and when?")
    expect(False, f"{at}The beginning and the end of the fall are right; between them it is to be half a cosine.")


# --- what accumulation buys -------------------------------------------------------------------------------------------


Count = Callable[[int, int, int], float]
STEP_SLIPS: dict[str, Count] = {
    "that many batches there are: how many make one step?": lambda pairs, batch, times: pairs // batch,
    "accumulating makes steps rarer, not more frequent.": lambda pairs, batch, times: pairs // batch * times,
    "the last step would be short of pairs: only whole ones count.":
        lambda pairs, batch, times: math.ceil(pairs / (batch * times)),
    "the last step would be short of batches: only whole ones count.":
        lambda pairs, batch, times: math.ceil(pairs // batch / times),
    "the last batch would be short of pairs: only whole ones count.":
        lambda pairs, batch, times: math.ceil(pairs / batch) // times,
    "that forgets how many pairs make a batch.": lambda pairs, batch, times: pairs // times,
    "a fraction of a step is not a step.": lambda pairs, batch, times: pairs / (batch * times),
}
CHANCE_SLIPS: dict[str, Count] = {
    "the softmax runs over one batch: accumulating adds gradients, never candidates.":
        lambda pairs, batch, times: math.log(batch * times),
    "the gradients are divided so that the sum is a mean: the loss stays the same.":
        lambda pairs, batch, times: math.log(batch) / times,
    "the losses are averaged over the batches of a step, not added up.":
        lambda pairs, batch, times: times * math.log(batch),
    "that counts in bits, and torch with the base e.": lambda pairs, batch, times: math.log2(batch),
    "that counts in powers of ten, and torch with the base e.": lambda pairs, batch, times: math.log10(batch),
    "that is its probability of being right; what does it pay for that?": lambda pairs, batch, times: 1 / batch,
    "its own picture is among the candidates, too.": lambda pairs, batch, times: math.log(batch - 1),
    "it picks inside one batch, not from all the data.": lambda pairs, batch, times: math.log(pairs),
}
WRONG_SLIPS: dict[str, Count] = {
    "they are drawn inside one batch: the others are gone when it is computed.":
        lambda pairs, batch, times: batch * times - 1,
    "they are drawn inside one batch, and its own picture is none.": lambda pairs, batch, times: batch * times,
    "its own picture is not a wrong one.": lambda pairs, batch, times: batch,
    "they are drawn from the batch, not from all the data.": lambda pairs, batch, times: pairs - 1,
    "they are drawn from the batch, not from all the data, and its own picture is not a wrong one.":
        lambda pairs, batch, times: pairs,
}


@exercise("09.2", "lesson 09, section 1, 'A larger batch in the same memory'")
def accumulated(predict: Callable[[int, int, int], tuple[int, float, int]]) -> None:
    """Whole steps in an epoch, ITC's chance, and how many wrong pictures ITM may draw from."""
    rules: list[tuple[Count, dict[str, Count]]] = [
        (lambda pairs, batch, times: pairs // (batch * times), STEP_SLIPS),
        (lambda pairs, batch, times: math.log(batch), CHANCE_SLIPS),
        (lambda pairs, batch, times: batch - 1, WRONG_SLIPS)]
    while True:
        drawn = [(random.randint(900, 5000), random.randint(5, 60), random.randint(2, 7)) for _ in range(6)]
        draws = [(1000, 32, 1), (1000, 32, 4), *drawn]
        made = [[[slip(*draw) for draw in draws] for slip in (rule, *slips.values())] for rule, slips in rules]
        if all(not agree(one, other) for some in made for one, other in itertools.combinations(some, 2)):
            break
    asks = [("steps; ", "how many pairs does one step use up?"),
            ("for a blind ITC; ", "among how many candidates does it pick?"),
            ("wrong pictures for ITM; ", "which pictures are at hand when the negatives are drawn?")]
    names = "the number of steps", "the chance line", "the number of pictures"
    answers = []
    for draw in draws:
        output = parts(predict(*draw), 3, "three numbers: steps, chance and wrong pictures")
        answers.append([quantity(value, what) for value, what in zip(output, names, strict=True)])
    for output, (rule, slips), (unit, question) in zip(zip(*answers, strict=True), rules, asks, strict=True):
        right = [float(rule(*draw)) for draw in draws]
        for (pairs, batch, times), one, truth in zip(draws, output, right, strict=True):
            if not agree(one, truth):
                said = f"with {pairs} pairs, batches of {batch} and accumulation over {times} you say {one:.5g} {unit}"
                name_slip({said + meaning: slip for meaning, slip in slips.items()}, draws, output, right)
                expect(False, said + question)


# --- recall -----------------------------------------------------------------------------------------------------------


def slow_hits(similarity: list[list[float]], owner: list[int], k: int, tie: str = "behind") -> list[bool]:
    """For each picture, by counting, whether one of its captions is among the first k."""
    hits = []
    for image, row in enumerate(similarity):
        own = [score for score, of in zip(row, owner, strict=True) if of == image]
        others = [score for score, of in zip(row, owner, strict=True) if of != image]
        ahead = sum(1 for score in others if own and (score > max(own) or (tie == "behind" and score == max(own))))
        hits.append(bool(own) and ahead < k)
    return hits


FIRST_ONLY = "only the picture's first caption is looked at; any of them counts."


def own_of(similarity: Tensor, owner: Tensor) -> Tensor:
    """Whose caption is whose: (b n)."""
    return torch.arange(len(similarity))[:, None] == owner


def first_k(similarity: Tensor, k: int) -> Tensor:
    """Whether a caption is among the first k of a picture: (b n)."""
    return similarity.argsort(dim=1, descending=True).argsort(dim=1) < k


def found_own(similarity: Tensor, owner: Tensor, k: int) -> Tensor:
    """Whether a caption is among the first k of its own picture: (b n)."""
    return first_k(similarity, k) & own_of(similarity, owner)


def right_recall(similarity: Tensor, owner: Tensor, k: int, fill: float = -math.inf) -> float:
    """What is asked for; captions of others are filled before the best own one is looked for."""
    own = own_of(similarity, owner)
    best = similarity.masked_fill(~own, fill).amax(dim=1, keepdim=True)
    return float((((~own & (similarity >= best)).sum(dim=1) < k) & own.any(dim=1)).double().mean())


def first_own(similarity: Tensor, owner: Tensor, k: int, alone: bool) -> float:
    """How often the first own caption is found, among all, or alone among those of others."""
    own = own_of(similarity, owner)
    first = own.long().argmax(dim=1, keepdim=True)
    ahead = (similarity > similarity.gather(1, first)) & ~(own & alone)
    return float((ahead.sum(dim=1) < k).double().mean())


Share = Callable[[Tensor, Tensor, int], float | None]
RECALL_SLIPS: dict[str, Share] = {
    FIRST_ONLY: lambda similarity, owner, k: first_own(similarity, owner, k, alone=False),
    FIRST_ONLY + " (The picture's other captions do not stand in its way, that part is right.)":
        lambda similarity, owner, k: first_own(similarity, owner, k, alone=True),
    "row i and column i are taken for the pair: look into `owner`.":
        lambda similarity, owner, k: float(first_k(similarity, k).diagonal().double().mean()),
    "all captions of a picture have to be found: one of them is enough.": lambda similarity, owner, k: float(
        (found_own(similarity, owner, k).sum(dim=1) == own_of(similarity, owner).sum(dim=1)).double().mean()),
    "captions are counted, not pictures: a picture is found or it is not, however many of its captions are.":
        lambda similarity, owner, k: float(found_own(similarity, owner, k).sum()) / len(owner),
    "that is how many of the first K are right: count the pictures for which at least one is.":
        lambda similarity, owner, k: float(found_own(similarity, owner, k).sum()) / len(similarity) / k,
    "pictures are looked for, given captions: it should be the other way round, along a "
    "row.": lambda similarity, owner, k:
        float((first_k(similarity.T, k).T & own_of(similarity, owner)).any(dim=0).double().mean()),
    "the least similar come first in your ranking.": lambda similarity, owner, k: right_recall(-similarity, owner, k),
    "pictures are added up: the exercise asks for their share.":
        lambda similarity, owner, k: right_recall(similarity, owner, k) * len(similarity),
    "that counts in percent: the exercise asks for a share from 0 to 1.":
        lambda similarity, owner, k: right_recall(similarity, owner, k) * 100,
    "one too many is looked at: with K = 1 the picture's best caption has no other in front of it.":
        lambda similarity, owner, k: right_recall(similarity, owner, k + 1),
    "one too few is looked at: with K = 1 the picture's best caption has no other in front of it.":
        lambda similarity, owner, k: right_recall(similarity, owner, k - 1),
    "the captions of other pictures are filled with 0, which is more than a right caption with a negative similarity "
    "has: fill with what is less than anything.": lambda similarity, owner, k: right_recall(similarity, owner, k, 0.0),
    "K takes no part: that is Recall@1.": lambda similarity, owner, k: right_recall(similarity, owner, 1),
}


def draw_rows(shift: float, k: int) -> tuple[Tensor, Tensor, int]:
    """Similarities of b pictures with 2b captions in any order and of any number; shifted, all are negative."""
    b = random.randint(30, 50)
    owner = torch.cat([torch.arange(b), torch.randint(b, (b,))])[torch.randperm(2 * b)]  # one caption or several
    return torch.rand(b, 2 * b) + 0.3 * (torch.arange(b)[:, None] == owner) + shift, owner, k


@exercise("09.3", "lesson 09, sections 4 and 6, 'True captions counted as wrong'")
def recall(recall_of: Callable[[Tensor, Tensor, int], float]) -> None:
    """The share of pictures with a caption of their own among the first k."""
    def told_of(similarity: Tensor, owner: Tensor, k: int) -> float:
        """The learner's recall, after it was seen that nothing was changed."""
        given = similarity.clone(), owner.clone()
        output = quantity(recall_of(similarity, owner, k), "the recall")
        expect(torch.equal(similarity, given[0]) and torch.equal(owner, given[1]),
               "your function changed what it was given.")
        return output

    def make() -> list[tuple[Tensor, Tensor, int]]:
        """Similarities of one sign and of both, each with a K of its own."""
        return [draw_rows(shift, k) for shift, k in zip((0.0, -1.5, -0.6, -0.6), random.sample(range(3, 9), 4),
                                                        strict=True)]

    draws = telling(make, right_recall, RECALL_SLIPS)
    answers, right = [told_of(*draw) for draw in draws], [right_recall(*draw) for draw in draws]
    if not agree(answers, right):
        number, (similarity, owner, k), truth = next(
            one for one in zip(answers, draws, right, strict=True) if not agree(one[0], one[2]))
        said = f"{len(similarity)} pictures, {len(owner)} captions, K = {k}: you say {number:.3f}; "
        name_slip({said + meaning: slip for meaning, slip in RECALL_SLIPS.items()}, draws, answers, right)
        expect(False, f"{said}counting gives {truth:.3f}. Take one row, and write down which columns are its own and "
                      "how many others stand before the best of them.")
    output = told_of(torch.tensor([[-2001.0, -2000.0], [-2000.0, -2001.0]]), torch.tensor([0, 1]), 1)
    expect(output == 0, f"similarities may be any numbers: where all are about -2,000 and each picture's own caption "
           f"comes last, you find {output:.2f} of the pictures. What do captions of others get in place of theirs?")
    owner = torch.tensor([1, 0, 0, 2, 2, 1, 2])
    k = random.randint(8, 20)
    try:
        output = told_of(torch.rand(3, 7), owner, k)
    except (RuntimeError, IndexError) as error:
        if isinstance(error, NotImplementedError):
            raise
        expect(False, f"there are 7 captions and K is {k}: your function stops ({str(error)[:60]}). The first {k} of 7 "
                      "are all 7.")
    expect(output == 1,
           f"K is {k} and there are only 7 captions: then each picture is found, and you say {output:.3f}.")
    few = told_of(torch.rand(4, 7), owner, 10)  # nobody wrote anything about picture 3
    expect(math.isclose(few, 0.75, abs_tol=1e-4), f"one picture of four has no caption at all, K is larger than the "
           f"number of captions, and you say {few:.3f}: a picture without captions is not found, and it counts.")
    few = told_of(torch.rand(4, 7) - 2, owner, 2)
    expect(few <= 0.75, f"one picture of four has no caption at all, and you find {few:.2f} of them.")
    for alike in (0.3, -2000.0):
        output = told_of(torch.full((6, 6), alike), torch.randperm(6), 1)
        expect(output == 0, f"a model that finds all pairs equally similar, {alike:,g} each, gets {output:.2f} from "
               "you: a tie with a wrong caption is not to the model's credit, so the wrong one stands before the "
               "right one.")
    output = told_of(torch.tensor([[0.50001, 0.5], [0.5, 0.50001]]), torch.tensor([0, 1]), 1)
    expect(output == 1, f"each picture's own caption has 0.50001 and the wrong one 0.5, and you find {output:.2f} of "
           "the pictures: that is no tie. What decides a tie may not be as large as a difference.")
    for last in (2, 3):
        output = told_of(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), torch.tensor([0, 1]), last)
        expect(output == 1, f"K is {last}, there are 2 captions, and each picture's own is the last of them: all are "
               f"found, and you say {output:.2f}.")
    output = told_of(torch.tensor([[0.7, 0.7, 0.2], [0.1, 0.2, 0.9]]), torch.tensor([0, 0, 1]), 1)
    expect(output == 1, "two captions of one picture tie with each other before all others, and you call it a miss: "
                      "only a tie with a caption of another picture counts against it.")
    for _ in range(3):  # similarities with few values, so that many tie
        owner, k = torch.arange(8).repeat(2)[torch.randperm(16)], random.randint(1, 4)
        coarse = torch.randint(-3, 4, (8, 16)) / 2
        output, truth = told_of(coarse, owner, k), right_recall(coarse, owner, k)
        no_harm = sum(slow_hits(coarse.tolist(), owner.tolist(), k, "ahead")) / 8
        expect(not agree(output, no_harm) or agree(output, truth),
               f"where many similarities tie you say {output:.3f} for K = {k}, which counts a wrong caption that ties "
               "as if it stood behind: it stands before the right one.")
        expect(agree(output, truth),
               f"where many similarities tie you say {output:.3f} for K = {k}, and counting gives {truth:.3f}: a "
               "caption that ties with a wrong one stands behind it, and captions of one picture never stand in each "
               "other's way.")


# --- frozen -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A small expert with all that frozen has to reach: weights two floors down, dropout, running means."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.blocks = nn.Sequential(nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(b e) -> (b e)."""
        return self.norm(self.blocks(x * self.scale))


class Plain(nn.Module):
    """An expert whose dropout is no module, and whose parts stand in a list and in a dictionary."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.more = nn.ModuleDict({"norm": nn.LayerNorm(width)})
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """(b e) -> (b e)."""
        for layer in self.layers:
            x = x + torch.nn.functional.dropout(layer(x).tanh(), 0.5, self.training)
        return self.more["norm"](x) + self.shift


class Holder(nn.Module):
    """A model that has a frozen part, one of its kind that is not frozen, and a head."""

    def __init__(self, kind: type[nn.Module], width: int):
        super().__init__()
        self.expert, self.twin, self.head = kind(width), kind(width), nn.Linear(width, 1)


def called(train: Callable, meaning: str, *mode: bool) -> object:
    """What the method gives back, if it takes what it is given."""
    try:
        return train(*mode)
    except TypeError as error:
        raise Wrong(f"`.train({', '.join(map(str, mode))})` stops ({error}): {meaning}.") from None


PARTS = nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.LayerNorm, nn.Sequential, nn.ModuleList, nn.ModuleDict
CLASS_CHANGED = ("another module of the same class no longer follows when the mode changes: you have changed the class "
                 "where one module was meant.")


@exercise("09.4", "lesson 09, section 6, 'An encoder that is not quite frozen'")
def freeze(freeze_it: Callable[[nn.Module], nn.Module]) -> None:
    """No gradient for its weights, evaluation mode for good, and a gradient through it."""
    for base, training in ((Encoder, True), (Plain, True), (Encoder, False)):
        kind = type(base.__name__, (base,), {})  # made anew: whatever is done to a class is undone behind each attempt
        with unpatched(kind, *PARTS) as patched:
            stays_frozen(freeze_it, Holder(kind, random.randint(3, 6)).train(training), patched)


def stays_frozen(freeze_it: Callable[[nn.Module], nn.Module], model: nn.Module,
                 patched: Callable[[], list[str]]) -> None:
    """Look at the expert of one model after it was frozen."""
    expert, width = model.expert, model.head.in_features
    before, x = copy.deepcopy(expert.state_dict()), torch.randn(8, width, requires_grad=True)
    free, count = copy.deepcopy(model).eval(), len(list(expert.parameters()))
    output = freeze_it(expert)
    expect(output is expert,
           "your function gives back " + ("None" if output is None else "something else") + ": the exercise asks for "
           "the module that it was given, frozen in its place.")
    left = [name for name, weight in expert.named_parameters() if weight.requires_grad]
    expect(len(list(expert.parameters())) == count, "the module has lost some of its weights.")
    other = {name: value.dtype for name, value in expert.state_dict().items() if value.dtype != before[name].dtype}
    expect(not other, f"the frozen module holds other dtypes than before, {list(other.items())[:1]}: it is to be "
           "frozen, and nothing else.")
    expect(not left, f"{len(left)} of {count} weights still require a gradient, such as {left[:1]}: freezing has to "
                     "reach every submodule, however deep.")
    expect(not patched(), f"{', '.join(patched())} is no longer what it was: you have changed the class where one "
           "module was meant.")
    expect(not expert.training or "train" not in vars(expert), "the frozen module is in training mode, and its `train` "
           "is yours: was it put into evaluation mode before? `.eval()` calls `train(False)`, so where `train` is "
           "replaced first, `.eval()` no longer does anything.")
    expect(not expert.training, "the frozen module is in training mode: dropout is on in it, and running means move.")
    loud = [name for name, part in expert.named_modules() if part.training]
    expect(not loud, f"the part {loud[:1]} of the frozen module is in training mode.")
    twin = list(model.twin.modules())
    for mode in (True, False, True):
        called(model.train, "a model hands its mode on to each of its parts: your `train` has to take one", mode)
        expect(all(part.training == mode for part in twin), CLASS_CHANGED)
    expect(model.training and model.head.training, "after .train() of the model, other parts of it no longer train.")
    expect(not any(part.training for part in expert.modules()), "after .train() of the model that contains it, the "
           "frozen module is in training mode again: every training loop calls that, and switches its dropout on.")
    expect(all(weight.requires_grad for weight in model.twin.parameters()), "a module that your function was not given "
           "is frozen.")
    output = called(expert.train, "`.train()` may be called without an argument, and then means True")
    expect(output is expert, ".train() of a frozen module should still give back the module, as every .train() does.")
    expect(not any(part.training for part in expert.modules()), "its own .train() puts the frozen module into training "
           "mode.")
    expect(called(expert.eval, "`.eval()` takes no argument") is expert, ".eval() of a frozen module should still give "
           "back the module: many write `module = module.eval()`.")
    seen = expert(x)
    expect(seen.requires_grad, "no gradient gets through the frozen module: what stands below it could not learn. "
                               "Frozen weights are one thing, a cut graph is another.")
    slope, = torch.autograd.grad(model.head(seen).sum(), x)
    expect(bool(slope.any()), "no gradient gets through the frozen module to what stands below it.")
    expect(torch.equal(seen, expert(x)), "the frozen module gives something else for the same input the second time.")
    expect(all(torch.equal(before[name], value) for name, value in expert.state_dict().items()),
           "the frozen module is no longer what it was: a weight or a running mean has moved.")
    expect(close(seen, free.expert(x)), "the frozen module gives something else than in evaluation mode before.")
    asked, = torch.autograd.grad(free.head(free.expert(x)).sum(), x)
    expect(close(slope, asked), "the gradient that gets through the frozen module is not its own: part of the way is "
           "cut, or leads past it.")


# --- logs -------------------------------------------------------------------------------------------------------------

KINDS = ("healthy", "wait", "mispaired", "too fast", "finished")
STUCK = -math.log(2 / 3) * 2 / 3 - math.log(1 / 3) / 3  # what matching pays that always says no
CONFUSED = {
    ("wait", "mispaired"): "in both ITM stands still and the total falls. Which of the other two losses cannot fall "
                           "where the captions belong to other pictures?",
    ("mispaired", "too fast"): "in both ITC rests at chance. But grammar can be learned from any captions.",
    ("healthy", "wait"): "in both ITC and ITG fall. Has ITM moved, by the end? It may have stood still for long.",
    ("healthy", "finished"): "in both the losses are low at the end. And at the beginning?",
    ("wait", "too fast"): "in both ITM stands still. Do the other two move?",
    ("wait", "finished"): "in both ITC is low at the end. And at the beginning, and what does ITM say?",
    ("healthy", "mispaired"): "in both ITG falls. Which of the losses cannot fall where the captions belong to other "
                              "pictures, and what does a blind model pay there?",
    ("healthy", "too fast"): "compare each loss with what a blind model pays: does any of them stay there?",
    ("mispaired", "finished"): "compare ITC with what a blind model pays, at the beginning and at the end.",
    ("too fast", "finished"): "compare ITC with what a blind model pays, at the beginning and at the end.",
}


def _noise(steps: int, most: float, last: int) -> list[float]:
    """A factor for each line. Batches differ, so single lines tell little; two in a row make up for each other.

    The first line and the last are the ones that mislead most: the first upwards, the last up or down.
    """
    factors = []
    for pair in range(steps // 2):
        by = random.triangular(-most, most)
        by = {0: most, steps // 2 - 1: -last * most}.get(pair, by)
        factors += [1 + by, 1 - by]
    return factors


BATCHES, VOCABULARIES = (4, 32, 128, 1024), (3.3, 5.0, 7.0, 10.5)  # whoever bounds a loss by one number errs in some


def _log(kind: str, batch: int, words: float, long: bool) -> list[dict]:
    """A log such as a run of this kind would leave, over a vocabulary of which a blind model pays `words`."""
    lines, steps = math.log(batch), 2 * (random.randint(550, 800) if long else random.randint(150, 250))
    speed, low = random.uniform(25, 45), 0.3 if words > 10 else random.uniform(0.2, 0.3)
    leaves = random.uniform(0.3, 0.5) * steps
    noise = [_noise(steps, most, -1 if kind in ("mispaired", "too fast") else 1) for most in (0.6, 0.15, 0.4)]
    if kind != "finished":  # the first batch of a run that begins from nothing is an easy one
        noise[0][:2] = noise[0][1::-1]
    log = []
    for step in range(steps):
        seen = math.exp(-step / speed)
        itc = {"healthy": low + (1 - low) * seen, "wait": 0.35 + 0.65 * seen, "finished": low}.get(kind, 1.0) * lines
        itg = {"too fast": 1 - 0.1 * (1 - seen), "finished": low}.get(kind, low + (1 - low) * seen) * words
        met = {"healthy": 1 / (1 + math.exp((leaves - step) / 12)), "finished": 1.0}.get(kind, 0.0)
        itc, itm, itg = (value * factors[step] for value, factors in
                         zip((itc, STUCK + met * (0.05 - STUCK), itg), noise, strict=True))
        log.append({"step": step + 1, "loss": itc + itm + itg, "itc": itc, "itm": itm, "itg": itg,
                    "itm_accuracy": (2 + 0.97 * met) / 3 + random.uniform(-0.01, 0.01)})
    return log


@exercise("09.5", "lesson 09, sections 3 and 6")
def diagnose(name_of: Callable[[list[dict], int], str]) -> None:
    """Tell from a log what is the matter."""
    cases = [(kind, *case) for kind in KINDS for case in zip(
        random.sample(BATCHES, 4), random.sample(VOCABULARIES, 4), (True, False, True, False), strict=True)]
    for kind, batch, words, long in random.sample(cases, len(cases)):
        log = _log(kind, batch, words, long)
        given = [dict(line) for line in log]
        output = name_of(given, batch)
        expect(given == log, "your function changed the log that it was given.")
        expect(isinstance(output, str) and output in KINDS,
               f"your function answers {output!r}; the answers are {', '.join(map(repr, KINDS))}.")
        if output == kind:
            continue
        few = 20
        first, last = ({name: sum(line[name] for line in some) / few for name in log[0]}
                       for some in (log[:few], log[-few:]))
        shown = ", ".join(f"{name.upper()} from {first[name]:.2f} to {last[name]:.2f}"
                          for name in ("itc", "itm", "itg"))
        hint = next((text for pair, text in CONFUSED.items() if set(pair) == {kind, output}),
                    "compare each loss with what a blind model pays.")
        single = max(abs(log[i][name] / mean[name] - 1) for i, mean in ((0, first), (-1, last))
                     for name in ("itc", "itg"))
        level = [{name: (line[name] + log[i ^ 1][name]) / 2 for name in line} | {"step": i + 1}
                 for i, line in enumerate(log)]  # two lines in a row make up for each other
        noise = (f" And mind that a single line is off by up to {single:.0%}: average some."
                 if name_of(level, batch) == kind else "")
        expect(False, f"a log of {len(log)} steps with batches of {batch} ({shown}, accuracy at the end "
                      f"{last['itm_accuracy']:.2f}, all averaged over {few} lines) is {kind!r}, and you call it "
                      f"{output!r}: {hint}{noise}")

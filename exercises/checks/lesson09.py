"""Checks of lesson 09: the rate, recall, what frozen means, what accumulation buys, and logs to be read."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import Wrong, exercise, expect


def a_number(value: object, what: str) -> float:
    """The value as a float, if it is one number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(is_number or isinstance(value, Tensor) and value.ndim == 0,
           f"{what} is {f'a {type(value).__name__}' if value is not None else 'None'} and should be one number.")
    expect(not math.isnan(float(value)), f"{what} is nan.")
    return float(value)


# --- the rate of a step -----------------------------------------------------------------------------------------------


def slow_rate(step: int, steps: int, warmup: int, peak: float, floor: float) -> float:
    """What is asked for: a ramp whose last step reaches the peak, then half a cosine down to a part of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(angle)) / 2)


Shape = Callable[[int], float]


def _slips_of_rate(steps: int, warmup: int, peak: float, floor: float) -> list[tuple[Shape, str]]:
    """What the usual mistakes make of the i-th step behind the warm-up, as a part of the peak."""
    length = steps - warmup
    return [(lambda i: floor + (1 - floor) * (1 + math.cos(math.pi * (i + warmup) / steps)) / 2,
             "the cosine runs since step 0, so that part of it is already over when the warm-up ends."),
            (lambda i: floor + (1 - floor) * (1 + math.cos(math.pi * i / steps)) / 2,
             "the cosine is stretched over all steps, so that it has not come down when the run ends."),
            (lambda i: floor + (1 - floor) * (1 + math.cos(2 * math.pi * i / length)) / 2,
             "that is a whole cosine, which rises again in the second half: asked for is half of one."),
            (lambda i: floor + (1 - floor) * (1 + math.cos(math.pi * i / (length - 1))) / 2,
             "one step too short: the floor belongs to step number `steps`, one after the last, and you are there at "
             "the last. How many steps are there behind the warm-up?"),
            (lambda i: floor + (1 - floor) * (1 + math.cos(math.pi * (i + 1) / length)) / 2,
             "one step ahead: the first step behind the warm-up still has the full rate, as no share of the way is "
             "done."),
            (lambda i: floor + (1 - floor) * math.cos(math.pi * i / length / 2),
             "that is a quarter of a cosine, which falls fastest at its end: it should be nearly flat there."),
            (lambda i: 1 - (1 - floor) * i / length, "that is a straight line."),
            (lambda i: (1 + math.cos(math.pi * i / length)) / 2, "it falls to zero: the floor takes no part."),
            (lambda i: max(floor, (1 + math.cos(math.pi * i / length)) / 2),
             "the curve is cut off at the floor: asked for is one that comes to rest there, half a cosine from "
             "peak to floor."),
            (lambda i: floor + (1 + math.cos(math.pi * i / length)) / 2,
             "the floor is added, so that the curve begins above its peak."),
            (lambda i: floor / peak + (1 - floor / peak) * (1 + math.cos(math.pi * i / length)) / 2,
             "the floor is a part of the peak, not a rate.")]


@exercise("09.1", "lesson 09, section 3, 'How fast'")
def rate(rate_of: Callable[[int, int, int, float, float], float]) -> None:
    """Linear warm-up, then half a cosine."""
    for steps, warmup in ((random.randint(60, 90), random.randint(7, 20)), (random.randint(31, 50), 1), (50, 0)):
        peak, floor = random.uniform(1e-4, 1e-2), random.uniform(0.1, 0.3)
        output = [a_number(rate_of(step, steps, warmup, peak, floor), f"the rate of step {step}") / peak
                  for step in range(steps)]
        with_what = f"with {steps} steps, {warmup} of them warm-up, and floor {floor:.2f}"
        if warmup > 1:
            expect(output[0] > 0, f"{with_what} the rate of step 0 is {output[0]:.3g}: steps are counted from 0, and a "
                   "step at the rate 0 is wasted.")
            expect(output[0] < 0.9, f"{with_what} the first step has {output[0]:.0%} of the full rate: where is the "
                   "warm-up?")
            jump = output[1] - output[0]
            expect(all(math.isclose(output[i + 1] - output[i], jump, rel_tol=1e-4) for i in range(warmup - 1)),
                   f"{with_what} the rate does not rise in equal steps while it warms up.")
            top = output[warmup - 1]
            expect(math.isclose(top, 1, rel_tol=1e-4), f"{with_what} the last step of the warm-up, number "
                                                       f"{warmup - 1}, "
                   f"has {top:.3f} of the full rate: it should be there, neither short of it nor lowered by the "
                   "cosine.")
        falls = output[warmup:]
        right = [slow_rate(step, steps, warmup, 1.0, floor) for step in range(warmup, steps)]
        gaps = [abs(one - other) for one, other in zip(falls, right, strict=True)]
        if max(gaps) < 1e-4:
            continue
        worst = warmup + gaps.index(max(gaps))
        said = f"{with_what} the rate of step {worst} is {output[worst]:.4f} of the peak: "
        for slip, meaning in _slips_of_rate(steps, warmup, peak, floor):
            expect(max(abs(one - slip(i)) for i, one in enumerate(falls)) > 1e-3, said + meaning)
        expect(False, f"{said}asked for is {right[worst - warmup]:.4f}. What share of the way behind the warm-up is "
                      "done at that step?")
    whole = [a_number(rate_of(step, 6, 6, 0.5, 0.1), "the rate") for step in range(6)]
    expect(all(math.isclose(one, 0.5 * (i + 1) / 6, rel_tol=1e-4) for i, one in enumerate(whole)),
           "where all steps are warm-up, the rates are others than those of the ramp.")


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


FIRST_ONLY = "only the first own caption is asked; any of them counts."


def _slips_of_recall(rows: list[list[float]], owner: list[int], k: int) -> dict[str, float]:
    """What the usual mistakes would give."""
    b, n = len(rows), len(owner)
    ranked = [sorted(range(n), key=lambda j, row=row: -row[j])[:k] for row in rows]
    own = [[j for j in range(n) if owner[j] == image] for image in range(b)]
    found = [sum(j in some for j in mine) for some, mine in zip(ranked, own, strict=True)]
    columns = [sorted(range(b), key=lambda i, j=j: -rows[i][j])[:k] for j in range(n)]
    worst = [sorted(range(n), key=lambda j, row=row: row[j])[:k] for row in rows]
    return {
        FIRST_ONLY: sum(mine[0] in some for some, mine in zip(ranked, own, strict=True)) / b,
        FIRST_ONLY + " (Its brothers do not stand in its way, that part is right.)":
            sum(sum(row[j] >= row[mine[0]] for j in range(n) if j not in mine) < k
                for row, mine in zip(rows, own, strict=True)) / b,
        "row i and column i are taken for the pair: look into `owner`.":
            sum(i in some for i, some in enumerate(ranked)) / b,
        "all captions of a picture have to be found: one of them is enough.":
            sum(count == len(mine) for count, mine in zip(found, own, strict=True)) / b,
        "captions are counted, not pictures: a picture is found or it is not, however many of its captions are.":
            sum(found) / n,
        "that is how many of the first K are right: asked for is for how many pictures at least one is.":
            sum(found) / b / k,
        "pictures are looked for, given captions: asked for is the other way, along a row.":
            sum(owner[j] in some for j, some in enumerate(columns)) / n,
        "the least similar come first in your ranking.":
            sum(any(j in some for j in mine) for some, mine in zip(worst, own, strict=True)) / b,
        "pictures are added up: asked for is their share.": float(sum(count > 0 for count in found)),
        "that counts in percent: asked for is a share from 0 to 1.": 100 * sum(count > 0 for count in found) / b,
    }


def _telling() -> tuple[Tensor, Tensor, int, float, dict[str, float]]:
    """Similarities on which every mistake gives another number: with owner, k, the right recall and the mistakes'."""
    while True:
        b, k = random.randint(20, 30), random.randint(4, 7)
        owner = torch.arange(b).repeat(2)[torch.randperm(2 * b)]
        similarity = torch.rand(b, 2 * b) + 0.3 * (torch.arange(b)[:, None] == owner)
        rows, owners = similarity.tolist(), owner.tolist()
        right, slips = sum(slow_hits(rows, owners, k)) / b, _slips_of_recall(rows, owners, k)
        values = sorted([right, *slips.values()])
        if all(above - below > 1e-3 for below, above in zip(values[:-1], values[1:], strict=True)):
            return similarity, owner, k, right, slips


@exercise("09.2", "lesson 09, sections 8 and 10, 'Brothers counted as strangers'")
def recall(recall_of: Callable[[Tensor, Tensor, int], float]) -> None:
    """The share of pictures with a caption of their own among the first k."""
    def told_of(similarity: Tensor, owner: Tensor, k: int) -> float:
        """The learner's recall, after it was seen that nothing was changed."""
        given = similarity.clone(), owner.clone()
        output = a_number(recall_of(similarity, owner, k), "the recall")
        expect(torch.equal(similarity, given[0]) and torch.equal(owner, given[1]),
               "your function changed what it was given.")
        return output

    for _ in range(3):
        similarity, owner, k, right, slips = _telling()
        output = told_of(similarity, owner, k)
        if math.isclose(output, right, abs_tol=1e-4):
            continue
        said = f"{len(similarity)} pictures, {len(owner)} captions, K = {k}: you say {output:.3f}; "
        for meaning, value in slips.items():
            expect(not math.isclose(output, value, abs_tol=1e-4), said + meaning)
        expect(False, f"{said}counting gives {right:.3f}. Take one row, and write down which columns are its own and "
                      "how many others stand before the best of them.")
    owner = torch.tensor([1, 0, 0, 2, 2, 1, 2])
    k = random.randint(8, 20)
    try:
        output = told_of(torch.rand(3, 7), owner, k)
    except (RuntimeError, IndexError) as error:
        expect(False, f"there are 7 captions and K is {k}: your function stops ({str(error)[:60]}). The first {k} of 7 "
                      "are all 7.")
    expect(output == 1,
           f"K is {k} and there are only 7 captions: then each picture is found, and you say {output:.3f}.")
    few = told_of(torch.rand(4, 7), owner, 10)  # nobody wrote anything about picture 3
    expect(math.isclose(few, 0.75, abs_tol=1e-4), f"one picture of four has no caption at all, K is larger than the "
           f"number of captions, and you say {few:.3f}: a picture without captions is not found, and it counts.")
    alike = torch.full((6, 6), 0.3)
    order = torch.randperm(6)
    output = told_of(alike, order, 1)
    expect(output == 0, f"a model that finds all pairs equally similar gets {output:.2f} from you: a tie with a wrong "
                      "caption is none of the model's doing, so the wrong one stands before the own one.")
    output = told_of(torch.tensor([[0.7, 0.7, 0.2]]), torch.tensor([0, 0, 1]), 1)
    expect(output == 1, "two captions of one picture tie with each other before all others, and you call it a miss: "
                      "only a tie with a caption of another picture counts against it.")


# --- frozen -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A small expert with all that frozen has to reach: weights two floors down, dropout, running means."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))
        self.blocks = nn.Sequential(nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(b e) -> (b e)."""
        return self.norm(self.blocks(x * self.scale))


class Holder(nn.Module):
    """A model that has a frozen part, one of its kind that is not frozen, and a head."""

    def __init__(self, width: int):
        super().__init__()
        kind = type("Encoder", (Encoder,), {})  # made anew: who changes the class shall not spoil the next attempt
        self.expert, self.twin, self.head = kind(width), kind(width), nn.Linear(width, 1)


def called(train: Callable, meaning: str, *mode: bool) -> object:
    """What the method gives back, if it takes what it is given."""
    try:
        return train(*mode)
    except TypeError as error:
        raise Wrong(f"`.train({', '.join(map(str, mode))})` stops ({error}): {meaning}.") from None


@exercise("09.3", "lesson 09, section 10, 'An encoder that is not quite frozen'")
def freeze(freeze_it: Callable[[nn.Module], nn.Module]) -> None:
    """No gradient for its weights, evaluation mode for good, and a gradient through it."""
    width = random.randint(3, 6)
    model = Holder(width).train()
    expert = model.expert
    before, x = copy.deepcopy(expert.state_dict()), torch.randn(8, width, requires_grad=True)
    output = freeze_it(expert)
    expect(output is expert, "your function gives back " + ("None" if output is None else "something "
                                                                                      "else") + ": asked for is "
           "the module that it was given, frozen in its place.")
    left = [name for name, weight in expert.named_parameters() if weight.requires_grad]
    expect(len(list(expert.parameters())) == 5 + 2, "the module has lost some of its weights.")
    expect(not left, f"{len(left)} of {len(before) - 3} weights still ask for a gradient, such as {left[:1]}: "
                     "freezing has to reach every floor of the module.")
    expect(type(model.twin).train is nn.Module.train, "another module of the same class no longer follows when the "
           "mode changes: you have changed the class where one module was meant.")
    expect(not expert.training or "train" not in vars(expert), "the frozen module is in training mode, and its `train` "
           "is yours: `.eval()` calls `train(False)`, so where `train` is replaced first, `.eval()` no longer does "
           "anything.")
    expect(not expert.training, "the frozen module is in training mode: its dropout is on, and its running means move.")
    loud = [name for name, part in expert.named_modules() if part.training]
    expect(not loud, f"the part {loud[:1]} of the frozen module is in training mode.")
    twin = list(model.twin.modules())
    for mode in (True, False, True):
        called(model.train, "a model hands its mode on to each of its parts: your `train` has to take one", mode)
        expect(all(part.training == mode for part in twin), "another module of the same class no longer follows when "
               "the mode changes: you have changed the class where one module was meant.")
    expect(model.training and model.head.training, "after .train() of the model, other parts of it no longer train.")
    expect(not any(part.training for part in expert.modules()), "after .train() of the model that contains it, the "
                                                                "frozen "
           "module is in training mode again: whoever trains the rest calls that, and wakes its dropout.")
    expect(all(weight.requires_grad for weight in model.twin.parameters()), "a module that nobody froze is frozen.")
    output = called(expert.train, "`.train()` may be called without an argument, and then means True")
    expect(output is expert, ".train() of a frozen module should still give back the module, as every .train() "
           "does.")
    expect(not any(part.training for part in expert.modules()), "its own .train() wakes the frozen module.")
    seen = expert(x)
    expect(seen.requires_grad, "no gradient gets through the frozen module: what stands below it could not learn. "
                               "Frozen weights are one thing, a cut wire is another.")
    slope, = torch.autograd.grad(model.head(seen).sum(), x)
    expect(bool(slope.any()), "no gradient gets through the frozen module to what stands below it.")
    expect(torch.equal(seen, expert(x)), "the frozen module gives something else for the same input the second time.")
    expect(all(torch.equal(before[name], value) for name, value in expert.state_dict().items()),
           "the frozen module is no longer what it was: a weight or a running mean has moved.")


# --- what accumulation buys -------------------------------------------------------------------------------------------


@exercise("09.4", "lesson 09, sections 2 and 4")
def accumulated(predict: Callable[[int, int, int], tuple[int, float, int]]) -> None:
    """Whole steps in an epoch, ITC's chance, and how many wrong pictures ITM may draw from."""
    drawn = [(random.randint(900, 5000), random.randint(5, 60), random.randint(2, 7)) for _ in range(4)]
    for pairs, batch, times in [(1000, 32, 1), (1000, 32, 4), *drawn]:
        output = predict(pairs, batch, times)
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives {output!r}; asked for are three numbers: steps, chance and candidates.")
        named = zip(output, ("the number of steps", "the chance line", "the number of pictures"), strict=True)
        steps, chance, wrong = (a_number(value, what) for value, what in named)
        said = f"with {pairs} pairs, batches of {batch} and accumulation over {times}"
        right = pairs // (batch * times)
        slips = {pairs // batch: "that many batches there are: how many make one step?",
                 pairs // batch * times: "accumulating makes steps rarer, not more frequent.",
                 math.ceil(pairs / (batch * times)): "the last step would be short of pairs: only whole ones count.",
                 pairs // times: "that forgets how many pairs make a batch."}
        expect(steps == right or steps == int(steps), f"{said} you say {steps:g} steps: a part of a step is none.")
        expect(steps == right, f"{said} you say {steps:g} steps; " + slips.get(
            int(steps), "how many pairs does one step use up?"))
        lines = {math.log(batch * times): "the softmax runs over one batch: accumulating adds gradients, never "
                 "candidates.",
                 math.log(batch) / times: "the gradients are divided so that the sum is a mean: what is paid stays.",
                 times * math.log(batch): "the losses are averaged over the batches of a step, not added up.",
                 math.log2(batch): "that counts in bits, and torch with the base e."}
        expect(math.isclose(chance, math.log(batch), abs_tol=1e-4), f"{said} you expect a blind ITC to pay "
                                                                    f"{chance:.3f}; "
               + next((why for value, why in lines.items() if math.isclose(value, chance, abs_tol=1e-4)),
                      "among how many candidates does it pick?"))
        counts = {batch * times - 1: "they are drawn inside one batch: the others are gone when it is computed.",
                  batch * times: "they are drawn inside one batch, and the own picture is none.",
                  batch: "the own picture is no wrong one.",
                  pairs - 1: "they are drawn from the batch, not from all the data."}
        expect(wrong == batch - 1, f"{said} you let ITM draw from {wrong:g} wrong pictures; " + counts.get(
            int(wrong), "which pictures are at hand when the negatives are drawn?"))


# --- logs -------------------------------------------------------------------------------------------------------------

KINDS = ("healthy", "wait", "mispaired", "too fast", "finished")
STUCK = -math.log(2 / 3) * 2 / 3 - math.log(1 / 3) / 3  # what matching pays that always says no
CONFUSED = {
    ("wait", "mispaired"): "in both ITM stands still and the total falls. Which of the other two losses cannot fall "
                           "where the captions belong to other pictures?",
    ("mispaired", "too fast"): "in both ITC rests at chance. But grammar can be learned from anybody's captions.",
    ("healthy", "wait"): "in both ITC and ITG fall. Has ITM moved, by the end? It may have stood still for long.",
    ("healthy", "finished"): "in both the losses are low at the end. And at the beginning?",
    ("wait", "too fast"): "in both ITM stands still. Do the other two move?",
}


def _noise(steps: int, most: float, last: int) -> list[float]:
    """A factor for each line. Batches differ, so single lines tell little; two in a row make up for each other.

    The first line and the last are the ones that mislead most: the first upwards, the last up or down.
    """
    factors = []
    for pair in range(steps // 2):
        by = random.choice((-1, 1)) * random.uniform(most / 2, most)
        by = {0: most, steps // 2 - 1: -last * most}.get(pair, by)
        factors += [1 + by, 1 - by]
    return factors


def _log(kind: str, batch: int) -> list[dict]:
    """A log such as a run of this kind would leave."""
    lines, words, steps = math.log(batch), random.uniform(4, 9), 2 * random.randint(150, 250)
    speed, low = random.uniform(25, 45), random.uniform(0.2, 0.3)
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


@exercise("09.5", "lesson 09, sections 7 and 10")
def diagnose(name_of: Callable[[list[dict], int], str]) -> None:
    """Tell from a log what is the matter."""
    for kind in random.sample(KINDS * 4, 4 * len(KINDS)):
        batch = random.choice((4, 8, 32, 128, 1024))
        log = _log(kind, batch)
        output = name_of([dict(line) for line in log], batch)
        expect(isinstance(output, str) and output in KINDS,
               f"your function answers {output!r}; the answers are {', '.join(map(repr, KINDS))}.")
        if output == kind:
            continue
        few = 20
        first, last = ({name: sum(line[name] for line in some) / few for name in log[0]}
                       for some in (log[:few], log[-few:]))
        shown = ", ".join(f"{name.upper()} from {first[name]:.2f} to {last[name]:.2f}"
                          for name in ("itc", "itm", "itg"))
        single = max(abs(log[i][name] / mean[name] - 1) for i, mean in ((0, first), (-1, last))
                     for name in ("itc", "itg"))
        hint = next((text for pair, text in CONFUSED.items() if set(pair) == {kind, output}),
                    "compare each loss with what a blind model pays.")
        expect(False, f"a log of {len(log)} steps with batches of {batch} ({shown}, accuracy at the end "
                      f"{last['itm_accuracy']:.2f}, all averaged over {few} lines) is {kind!r}, and you call it "
                      f"{output!r}: {hint} And mind that a single line is off by up to {single:.0%}: average some.")

"""Checks of lesson 15: what is there whatever the batch, a plan for a card, and a large batch in small parts."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import a_number, close, exercise, expect, same_numbers, slip_of

# --- whatever the batch -----------------------------------------------------------------------------------------------

Bytes = Callable[[int, int, int], float]
BYTE_SLIPS: dict[str, Bytes] = {
    "a trained number takes only the four bytes of itself: what else is kept of it between two steps, and while one is "
    "made?": lambda trained, frozen, value: 4 * trained + value * frozen,
    "each trained number has 8 bytes: Adam remembers something of it, too.":
        lambda trained, frozen, value: 8 * trained + value * frozen,
    "each trained number has 12 bytes: one of these four is missing, itself, its gradient, and Adam's two moments.":
        lambda trained, frozen, value: 12 * trained + value * frozen,
    "each trained number has 20 bytes: one thing is counted twice.":
        lambda trained, frozen, value: 20 * trained + value * frozen,
    "frozen numbers take as much as trained ones: have they a gradient, and does Adam know them?":
        lambda trained, frozen, value: 16 * (trained + frozen),
    "frozen numbers are counted in float32: `value` says how many bytes each of them takes.":
        lambda trained, frozen, value: 16 * trained + 4 * frozen,
    "what is trained stays in float32, whatever the products are computed in.":
        lambda trained, frozen, value: 4 * value * trained + value * frozen,
    "the frozen models are left out: they take no gradient, but they are there.":
        lambda trained, frozen, value: 16 * trained,
    "trained and frozen are exchanged.": lambda trained, frozen, value: 16 * frozen + value * trained,
    "that is in GB; the exercise asks for bytes.": lambda trained, frozen, value: (16 * trained + value * frozen) / 1e9,
    "that is in GiB; the exercise asks for "
    "bytes.": lambda trained, frozen, value: (16 * trained + value * frozen) / 2**30,
    "that is in bits; the exercise asks for bytes.": lambda trained, frozen, value: 8 * (16 * trained + value * frozen),
}


@exercise("15.1", "lesson 15, section 2")
def fixed_bytes(bytes_of: Bytes) -> None:
    """Sixteen bytes for each trained number, `value` for each frozen one."""
    def right_of(trained: int, frozen: int, value: int) -> int:
        return 16 * trained + value * frozen

    while True:  # until every slip shows as itself on some draw: with two bytes for each value several are one
        games = [(random.randint(10**5, 10**8), random.randint(10**5, 10**9), value) for value in (2, 1, 4, 2)]
        results = [[right_of(*game) for game in games], *([slip(*game) for game in games] for slip in
                                                          BYTE_SLIPS.values())]
        if all(not same_numbers(*two, 0.01) for two in combinations(results, 2)):
            break
    output, right = [[a_number(bytes_of(*game))] for game in games], [[right_of(*game)] for game in games]
    if all(map(same_numbers, output, right)):
        return
    slip = slip_of(output, right, {why: [[slip(*game)] for game in games] for why, slip in BYTE_SLIPS.items()})
    expect(not slip, slip)
    number = next(number for number in range(len(games)) if not same_numbers(output[number], right[number]))
    trained, frozen, value = games[number]
    expect(False, f"of {trained:,} trained numbers and {frozen:,} frozen ones of {value} bytes you make "
           f"{output[number][0]:,.0f} bytes. What is kept of a trained number, and what of a frozen one?")


# --- a plan for a card ------------------------------------------------------------------------------------------------

Plan = tuple[int, int] | None
Planner = Callable[[int, float, float, float], Plan]


def plan_of(wanted: int, fixed: float, each: float, memory: float, room: float = 0.9) -> Plan:
    """The largest part of a batch that fits and of which so many make the batch; None where not even one pair fits."""
    for batch in range(wanted, 0, -1):
        if wanted % batch == 0 and fixed + batch * each <= room * memory:
            return batch, wanted // batch
    return None


def halved(wanted: int, fixed: float, each: float, memory: float) -> Plan:
    """A slip: halves only."""
    batch = wanted
    while batch and fixed + batch * each > 0.9 * memory:
        batch = batch // 2 if batch % 2 == 0 else 0
    return (batch, wanted // batch) if batch else None


def tenth_of_the_rest(wanted: int, fixed: float, each: float, memory: float) -> Plan:
    """A slip: the tenth is taken off what the weights leave."""
    return plan_of(wanted, 0, each, memory - fixed)


PLAN_SLIPS: dict[str, Planner] = {
    "the whole memory is used: a tenth is left to the system.": lambda *game: plan_of(*game, room=1.0),
    "a tenth of what the weights leave is kept free: the exercise asks for a tenth of the memory.": tenth_of_the_rest,
    "a tenth is added to what is needed: the exercise asks for a tenth of the memory.":
        lambda *game: plan_of(*game, room=1 / 1.1),
    "`fixed` is forgotten: it is there with any batch.":
        lambda wanted, fixed, each, memory: plan_of(wanted, 0, each, memory),
    "you halve until it fits, and pass by larger parts that would have made the batch as well.": halved,
    "the two numbers are exchanged: first the pairs of a part, then how many parts.":
        lambda *game: plan_of(*game) and plan_of(*game)[::-1],
    "one pair at a time always fits, and is slow: the largest part is asked for.":
        lambda wanted, *rest: plan_of(wanted, *rest) and (1, wanted),
    "where not even one pair fits the answer is None: no number of parts helps there.":
        lambda wanted, *rest: plan_of(wanted, *rest) or (1, wanted),
}


def drawn_plan(kind: str) -> tuple[int, float, float, float]:
    """A batch that is wanted, and what a stage takes on a card: it fits as it is, in parts, or not at all."""
    wanted = random.choice((48, 60, 72, 90, 96, 120)) if kind != "prime" else random.choice((7, 11, 13))
    memory = random.choice((8e9, 12e9, 24e9))
    fixed = memory * random.uniform(0.35, 0.6)
    room = 0.9 * memory - fixed
    fits = {"whole": wanted * random.uniform(1.05, 1.6), "none": random.uniform(0.2, 0.8),
            "prime": random.uniform(2.2, 5.8), "parts": random.uniform(2.2, wanted * 0.9)}.get(kind, 1.0)
    if kind == "too heavy":
        return wanted, memory * random.uniform(0.92, 1.5), memory / 1000, memory
    return wanted, fixed, room / fits, memory


@exercise("15.2", "lesson 15, section 9")
def fit(plan: Planner) -> None:
    """Pairs of a part, and how many parts make the batch."""
    kinds = ("whole", "parts", "parts", "prime", "none", "too heavy", "parts")
    while True:  # until each slip shows somewhere, and nothing stands on the edge
        games = [drawn_plan(kind) for kind in kinds]
        right = [plan_of(*game) for game in games]
        made = [[slip(*game) for game in games] for slip in PLAN_SLIPS.values()]
        sharp = all(plan_of(*game, room=0.895) == plan_of(*game) == plan_of(*game, room=0.905) for game in games)
        if sharp and all(one != other for one, other in combinations([right, *made], 2)):
            break
    output: list[Plan] = []
    for wanted, *game in games:
        pair = plan(wanted, *game)
        expect(pair is None or hasattr(pair, "__len__") and len(pair) == 2,
               f"your function gives {pair!r}; the exercise asks for two numbers, or None where nothing fits.")
        output.append(None if pair is None else tuple(a_number(one, "each of the two", whole=True) for one in pair))
    if output == right:
        return
    slip = slip_of(output, right, dict(zip(PLAN_SLIPS, made, strict=True)), lambda one, two: one == two)
    expect(not slip, slip)
    for (wanted, fixed, each, memory), pair, asked in zip(games, output, right, strict=True):
        seen = f"for a batch of {wanted} on {memory / 1e9:.0f} GB, {fixed / 1e9:.2f} GB of them taken"
        expect(pair is not None or asked is None, f"{seen}, you find no plan: does a single pair, of "
               f"{each / 1e9:.3f} GB, not fit?")
        expect(pair is None or asked is not None, f"{seen}, you plan {pair}: does a single pair, of {each / 1e9:.3f} "
               "GB, fit?")
        if pair is None:
            continue
        batch, parts = pair
        expect(batch * parts == wanted, f"{seen}, you plan {parts} parts of {batch} pairs: that is a batch of "
               f"{batch * parts}, and a different step.")
        expect(fixed + batch * each <= 0.9 * memory, f"{seen}, parts of {batch} pairs take "
               f"{(fixed + batch * each) / 1e9:.2f} GB: that is more than nine tenths.")
        expect(pair == asked, f"{seen}, parts of {batch} pairs fit, and larger ones would, too.")


# --- a large batch in small parts -------------------------------------------------------------------------------------

LIVE: list[weakref.ref] = []  # what the layers of `Encoder` keep for the gradient


class Keeps(torch.autograd.Function):
    """The square of a tensor; what it keeps for its gradient can be counted."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """x * x."""
        kept = x.clone()
        ctx.save_for_backward(kept)
        LIVE.append(weakref.ref(kept))
        return x * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """2 x."""
        kept, = ctx.saved_tensors
        return 2 * kept * gradient


class Encoder(nn.Module):
    """Rows (b c) to vectors (b e), each of length one; counts what it is asked and what it keeps."""

    def __init__(self, c: int, e: int):
        super().__init__()
        self.first, self.last = nn.Linear(c, 2 * e), nn.Linear(2 * e, e)
        self.asked: list[int] = []
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        """(b c) -> (b e)."""
        self.asked.append(len(x))
        made = F.normalize(self.last(Keeps.apply(self.first(x))), dim=-1)
        LIVE[:] = [one for one in LIVE if one() is not None]
        self.most = max(self.most, sum(len(one()) for one in LIVE))
        return made


class Contrast(nn.Module):
    """The loss of vectors (b e) of which each is to find the one `pairs` away: every row meets every other."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(random.uniform(0.2, 0.5)))

    def forward(self, vectors: Tensor) -> Tensor:
        """()."""
        scores = (vectors @ vectors.T / self.temperature).masked_fill(torch.eye(len(vectors), dtype=torch.bool), -1e4)
        return F.cross_entropy(scores, torch.arange(len(vectors)).roll(1))


Step = Callable[[nn.Module, nn.Module, Tensor, int], float]


def gradients(*models: nn.Module) -> list[Tensor]:
    """The gradients that were left in some models, zeros where there are none."""
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for model in models for weight in model.parameters()]


def alike(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of gradients agree."""
    return all(close(a, b, 1e-3) for a, b in zip(one, other, strict=True))


def naive(encoder: nn.Module, loss_of: nn.Module, rows: Tensor, size: int, mean: bool = True) -> None:
    """A slip: each part by itself."""
    parts = rows.split(size)
    for part in parts:
        (loss_of(encoder(part)) / (len(parts) if mean else 1)).backward()


@exercise("15.3", "lesson 15, section 9, and lesson 09, section 4")
def in_parts(step: Step) -> None:
    """The gradients of the whole batch's loss, with the layers' memory of a part."""
    for n, size in ((12, 3), (14, 4), (10, 5), (9, 2), (6, 6)):
        while True:  # until no gradient is so small that rounding shows in it, such as the temperature's
            encoder, loss_of = Encoder(random.randint(4, 6), random.randint(3, 5)), Contrast()
            rows = torch.randn(n, encoder.first.in_features)
            whole = loss_of(encoder(rows))
            whole.backward()
            right = gradients(encoder, loss_of)
            if all(float(one.abs().max()) > 1e-2 for one in right):
                break
        slips = {}
        for why, run in (("each part is compared with itself alone: rows of other parts are no negatives any more.",
                          lambda *given: naive(*given)),
                         ("each part is compared with itself alone, and their losses are added up.",
                          lambda *given: naive(*given, mean=False))):
            encoder.zero_grad(), loss_of.zero_grad()
            run(encoder, loss_of, rows, size)
            slips[why] = gradients(encoder, loss_of)
        encoder.zero_grad(), loss_of.zero_grad()
        last = encoder(rows[n - (n % size or size):])
        vectors = torch.cat([encoder(rows).detach()[:n - len(last)], last])
        loss_of(vectors).backward()
        slips["only the last part's gradient is left in the encoder: those of all parts are to be "
              "added up."] = gradients(encoder, loss_of)
        encoder.zero_grad(), loss_of.zero_grad()
        modes = [(module, module.training) for module in encoder.modules()]
        del LIVE[:]
        encoder.asked, encoder.most = [], 0
        given, weights = rows.clone(), [weight.detach().clone() for weight in encoder.parameters()]
        output = step(encoder, loss_of, rows, size)
        expect(torch.equal(rows, given) and all(torch.equal(*two) for two in zip(weights, encoder.parameters(),
                                                                               strict=True)),
               "your function changed the rows or the weights: it is to leave gradients, and nothing else.")
        expect(max(encoder.asked, default=0) <= size, f"the encoder was given {max(encoder.asked, default=0)} rows at "
               f"once, and {size} fit.")
        expect(all(module.training == mode for module, mode in modes) and not rows.requires_grad, "your function left "
               "the encoder in another mode, or changed the rows: it is to leave gradients, and nothing else.")
        found = gradients(encoder, loss_of)
        count = len(right) - 1  # the last is the temperature's
        expect(any(bool(one.any()) for one in found), "no gradient is left in the encoder or in the loss.")
        expect(any(bool(one.any()) for one in found[:count]), "no gradient reaches the encoder: of what was computed "
               "under no_grad, or detached, it has to be computed again.")
        expect(sum(encoder.asked) >= n, f"the encoder was given {sum(encoder.asked)} rows in all, and there are {n}: "
               "the last part may be smaller.")
        if n > size:
            for why, slip in slips.items():
                expect(alike(slip, right) or not alike(found, slip), why)
        if alike(found, right):
            expect(n <= 2 * size or encoder.most <= 2 * size, f"the gradients are right, but at one time the layers "
                   f"kept what {encoder.most} of {n} rows need: parts of {size} save nothing if all of their graphs "
                   "wait for one backward pass.")
            value = a_number(output.detach() if isinstance(output, Tensor) else output, "the loss")
            expect(same_numbers([value], [whole.item()], 1e-3), f"the gradients are right; the loss that you give is "
                   f"{value:.4f}, that of the whole batch {whole.item():.4f}.")
            continue
        if alike(found[:count], right[:count]):
            times = (found[count] / right[count]).item() if right[count].any() else 0.0
            expect(False, "the encoder's gradients are right, the temperature's is "
                   f"{times + 0.0:.3g} times what it should be: how often does its loss call backward?")
        ratios = [(one.norm() / other.norm()).item() for one, other in zip(found[:count], right, strict=False)
                  if other.norm() > 1e-6]
        straight = all(close(one / one.norm(), other / other.norm(), 1e-3)
                       for one, other in zip(found[:count], right, strict=False)
                       if one.norm() > 1e-6 and other.norm() > 1e-6)
        expect(not (straight and max(ratios) < 1.001 * min(ratios)), "the encoder's gradients point the right way and "
               f"are {ratios[0]:.3g} times as long as they should be.")
        expect(False, f"with {n} rows in parts of {size} the gradients are not those of the whole batch's loss. Which "
               "gradient does each vector have, before it is led on into the encoder?")

"""Checks of lesson 17: a gather that keeps the gradient, a mean of unequal parts, and steps that bfloat16 swallows."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor, slip_of

# --- a gather that keeps the gradient ---------------------------------------------------------------------------------

Gather = Callable[[list[Tensor], int], Tensor]


def times(own: Tensor, factor: float) -> Tensor:
    """The same numbers, whose gradient is so many times as large."""
    return own.detach() + factor * (own - own.detach())


def gathered(parts: list[Tensor], rank: int, own: Callable[[Tensor, int], Tensor], others: bool = False) -> Tensor:
    """All rows, of which `own` makes what this process contributes; others carry a gradient only as a slip."""
    return torch.cat([own(part, len(parts)) if number == rank else part if others else part.detach()
                      for number, part in enumerate(parts)])


GATHER_SLIPS: dict[str, Gather] = {
    "no gradient comes back to your own rows: what all_gather brings is a constant, and so are your own rows in it.":
        lambda parts, rank: gathered(parts, rank, lambda own, size: own.detach()),
    "your own rows carry their gradient as it is. DistributedDataParallel divides the sum over processes by W: what is "
    "left of it?": lambda parts, rank: gathered(parts, rank, lambda own, size: own),
    "your own gradient is divided by W: DistributedDataParallel does that already, what has to be done before?":
        lambda parts, rank: gathered(parts, rank, lambda own, size: times(own, 1 / size)),
    "the gradient is multiplied by W squared.":
        lambda parts, rank: gathered(parts, rank, lambda own, size: times(own, size ** 2)),
    "the rows of the others carry a gradient as well: here they are copies, and what is sent back to them is counted "
    "twice, or never.": lambda parts, rank: gathered(parts, rank, lambda own, size: times(own, size), others=True),
    "the rows of all carry their gradient, and none is multiplied: the others' are copies here.":
        lambda parts, rank: gathered(parts, rank, lambda own, size: own, others=True),
    "the rows themselves are multiplied by W: only their gradient is to be.":
        lambda parts, rank: gathered(parts, rank, lambda own, size: size * own),
    "your own rows come first: rows stand where they do in the whole batch, on every process alike.":
        lambda parts, rank: torch.cat([times(parts[rank], len(parts)), *[part.detach() for number, part in enumerate(
            parts) if number != rank]]),
}


def seen_by(gather: Gather, parts: list[Tensor], rank: int, line: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a gather gives, and the gradient of a loss of it with respect to each part."""
    leaves = [part.clone().requires_grad_() for part in parts]
    given = [leaf.view_as(leaf) for leaf in leaves]
    kept = list(given)
    made = gather(given, rank)
    expect(len(given) == len(kept) and all(a is b for a, b in zip(given, kept, strict=True)), "your function changed "
           "the list that it was given: other losses read your own rows from it.")
    expect_tensor(made, (sum(map(len, parts)), *parts[0].shape[1:]), "what is gathered", "(n ...)", torch.float32)
    slopes = (torch.autograd.grad((made.square() * line).sum(), leaves, allow_unused=True) if made.requires_grad
              else [None] * len(leaves))
    return made.detach(), [torch.zeros_like(part) if slope is None else slope
                           for part, slope in zip(parts, slopes, strict=True)]


def same_seen(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    """Whether two gathers give the same numbers and the same gradients."""
    return close(one[0], other[0]) and all(close(a, b) if bool(b.any()) else not bool(a.any())
                                           for a, b in zip(one[1], other[1], strict=True))


@exercise("17.1", "lesson 17, section 2")
def gather(gather_of: Gather) -> None:
    """Rows of all processes; the own ones carry W times their gradient, the others none."""
    output, right, made = [], [], {why: [] for why in GATHER_SLIPS}

    def right_of(parts: list[Tensor], rank: int) -> Tensor:
        return gathered(parts, rank, lambda own, size: times(own, size))

    for size, rank, shape in ((2, 1, (4,)), (3, 0, (2, 3)), (4, 2, (3,)), (3, 2, ()), (1, 0, (5,))):
        parts = [torch.randn(random.randint(2, 5), *shape) for _ in range(size)]
        line = torch.randn(sum(map(len, parts)), *shape)
        output.append(seen_by(gather_of, parts, rank, line))
        right.append(seen_by(right_of, parts, rank, line))
        for why, slip in GATHER_SLIPS.items():
            made[why].append(seen_by(slip, parts, rank, line))
    # the own rows may be used elsewhere as well: there their gradient must stay what it is
    parts = [torch.randn(3, 4), torch.randn(2, 4)]
    own = parts[0].clone().requires_grad_()
    mine = own * 1.0
    whole = gather_of([mine, parts[1]], 0)
    if all(map(same_seen, output, right)):
        slope, = torch.autograd.grad(whole.sum() + mine.sum(), own)
        halves = [torch.randn(3, 4).bfloat16() for _ in range(5)]
        halves[1].requires_grad_()
        expect(torch.equal(gather_of(list(halves), 1), torch.cat(halves)), "in bfloat16 your own rows come out as "
               "other numbers than they are: W times a number less W - 1 times it is rounded on the way.")
        expect(close(slope, torch.full_like(own, 3.0)), "your own rows are used elsewhere as well, and their gradient "
               "is multiplied there, too: change that of the copy that is gathered, not that of the rows themselves.")
        return
    slip = slip_of(output, right, made, same_seen)
    expect(not slip, slip)
    expect(all(close(one[0], other[0]) for one, other in zip(output, right, strict=True)),
           "the rows are not those of all processes, one below the other, in the order of their numbers.")
    expect(not any(bool(a.any()) and not bool(b.any()) for one, other in zip(output, right, strict=True)
                   for a, b in zip(one[1], other[1], strict=True)), "a gradient flows into the rows of the others: "
           "here they are copies, and have to be constants.")
    one, other = next((one, other) for one, other in zip(output, right, strict=True) if not same_seen(one, other))
    factors = [(a.norm() / b.norm()).item() for a, b in zip(one[1], other[1], strict=True) if bool(b.any())]
    expect(False, f"with {len(one[1])} processes the gradient of your own rows is "
           f"{' and '.join(f'{factor:.3g}' for factor in factors)} times what it should be before "
           "DistributedDataParallel takes the mean over processes.")


# --- a mean of unequal parts ------------------------------------------------------------------------------------------

Mean = Callable[[Tensor, Tensor], Tensor]


def weighted(means: Tensor, counts: Tensor) -> Tensor:
    """The mean over everything, of means over so many things each; a part without any says nothing."""
    return torch.where(counts > 0, means * counts, 0.0).sum() / counts.sum()


MEAN_SLIPS: dict[str, Mean] = {
    "that is the mean of the means: a word in a short part weighs more than one in a long part.":
        lambda means, counts: means[counts > 0].mean(),
    "that is the mean of the means, with an empty part among them.":
        lambda means, counts: torch.where(counts > 0, means, 0.0).mean(),
    "the parts are added up: a mean has to be divided by all that it is a mean of.":
        lambda means, counts: weighted(means, counts) * counts.sum(),
    "you divide by the number of processes: by how many things?":
        lambda means, counts: weighted(means, counts) * counts.sum() / len(counts),
    "long parts weigh less than short ones: it is the other way round.":
        lambda means, counts: (means[counts > 0] / counts[counts > 0]).sum() / (1 / counts[counts > 0]).sum(),
    "each part weighs by the square of what it holds.":
        lambda means, counts: weighted(means, counts * counts),
    "that is the mean of the largest part alone.": lambda means, counts: means[counts.argmax()],
}


@exercise("17.2", "lesson 17, section 2, 'Not the mean of the means'")
def mean_of_all(mean_of: Mean) -> None:
    """The mean over the whole batch, of the parts' means."""
    output, right, made, games = [], [], {why: [] for why in MEAN_SLIPS}, []
    for size, empty in ((2, 0), (4, 0), (3, 1), (1, 0), (5, 2)):
        while True:
            means, counts = torch.rand(size) * 4 + 1, torch.tensor(random.sample(range(2, 40), size))
            hollow = random.sample(range(size), empty)
            counts[hollow] = 0
            results = [weighted(means, counts), *(slip(means, counts) for slip in MEAN_SLIPS.values())]
            same = sum(bool(torch.isclose(one, other, rtol=0.01)) for one, other in combinations(results, 2))
            if size == 1 or same <= (empty == 0):  # without an empty part two of the slips are one
                break
        means[hollow] = torch.nan  # the mean of nothing
        games.append((means, counts))
        given = means.clone(), counts.clone()
        found = mean_of(means, counts)
        expect(torch.equal(given[1], counts) and torch.equal(given[0].nan_to_num(-1), means.nan_to_num(-1)),
               "your function changed what it was given.")
        expect(not (isinstance(found, Tensor) and found.numel() == 1 and bool(found.isnan()) and empty),
               "a part without words has nan for its mean, and yours is nan for all: nan times nothing is nan. Which "
               "parts take part?")
        output.append(expect_tensor(found, (), "the mean", kind=means.dtype))
        right.append(weighted(means.nan_to_num(0), counts))
        for why, slip in MEAN_SLIPS.items():
            made[why].append(slip(means.nan_to_num(0), counts))
    same = lambda one, other: bool(torch.isclose(one.double(), other.double(), rtol=1e-4))  # noqa: E731
    if all(map(same, output, right)):
        single = mean_of(torch.tensor([2.0, 4.0]), torch.tensor([1, 3])).item()
        expect(abs(single - 3.5) < 1e-3, f"of the means 2 and 4 over 1 and 3 words you make {single:.3f}, and 3.5 is "
               "right: a part with a single word takes part as well.")
        means = torch.tensor([random.random(), torch.nan, random.random()], requires_grad=True)
        slope, = torch.autograd.grad(mean_of(means, torch.tensor([2, 0, 6])), means) if mean_of(
            means, torch.tensor([2, 0, 6])).requires_grad else (None,)
        expect(slope is not None and close(slope, torch.tensor([0.25, 0.0, 0.75])), "no gradient reaches the parts' "
               "means, or one that is not their weight in the loss.")
        return
    slip = slip_of(output, right, made, same)
    expect(not slip, slip)
    number = next(number for number in range(len(output)) if not same(output[number], right[number]))
    means, counts = games[number]
    expect(False, f"of means {[round(one, 2) for one in means.tolist()]} over {counts.tolist()} words you make "
           f"{output[number].item():.3f}. How much does one word of each part weigh?")


# --- steps that bfloat16 swallows -------------------------------------------------------------------------------------

Stays = Callable[[Tensor, Tensor], Tensor]


def swallowed(weights: Tensor, steps: Tensor) -> Tensor:
    """Whether each weight is the same number after its step, when it is kept in bfloat16."""
    kept = weights.bfloat16()
    return (kept - steps.bfloat16()).bfloat16() == kept


def in_one_go(weights: Tensor, steps: Tensor) -> Tensor:
    """Rounded once, after the step in float32: equal to `swallowed` but for ties."""
    return (weights.bfloat16().float() - steps).bfloat16() == weights.bfloat16()


STAY_SLIPS: dict[str, Stays] = {
    "in float32 hardly a step is lost: what happens to the sum, if the weight is kept in bfloat16?":
        lambda weights, steps: weights - steps == weights,
    "the weight is still in float32 when it takes its step: kept in bfloat16, it was rounded before.":
        lambda weights, steps: (weights - steps).bfloat16().float() == weights,
    "float16 has three bits more in its mantissa than bfloat16.":
        lambda weights, steps: (weights.half() - steps.half()) == weights.half(),
    "the exercise asks for the weights that stay; you name those that move.":
        lambda weights, steps: ~swallowed(weights, steps),
    "whether a step is lost depends on the size of the weight: a small one moves.":
        lambda weights, steps: steps.abs() < 2**-9,
    "towards zero the numbers below a power of two lie twice as close as those above it.":
        lambda weights, steps: steps.abs() < 2 ** (weights.bfloat16().float().abs().log2().floor() - 8),
    "the weight takes the step the other way: it is subtracted.":
        lambda weights, steps: (weights.bfloat16() + steps.bfloat16()) == weights.bfloat16(),
}


def drawn_steps(n: int) -> tuple[Tensor, Tensor]:
    """Weights and steps, many near the border; on none does it matter how often one rounds."""
    weights = torch.randn(n) * 10 ** torch.empty(n).uniform_(-8, 1)
    powers = 2.0 ** weights.abs().log2().floor()
    weights = torch.where(torch.rand(n) < 0.2, powers * weights.sign(), weights)  # below these numbers lie closer
    weights = torch.where(torch.rand(n) < 0.3, weights.bfloat16().float(), weights)  # some are in bfloat16 already
    sizes = torch.where(torch.rand(n) < 0.2, -30.0, torch.empty(n).uniform_(-14, -6))  # and some steps are tiny
    steps = weights.abs() * 2 ** sizes * torch.randn(n).sign()
    sharp = (swallowed(weights, steps) == in_one_go(weights, steps)) & (
        swallowed(weights, steps * 0.97) == swallowed(weights, steps * 1.03))
    return weights[sharp], steps[sharp]


@exercise("17.3", "lesson 17, section 3, 'Half the bits'")
def stays(stays_of: Stays) -> None:
    """Which weights are the same after their step, kept in bfloat16."""
    output, right, made = [], [], {why: [] for why in STAY_SLIPS}
    for n in (400, 300, 2):
        weights, steps = drawn_steps(n)
        while n == 2 and len(weights) < 2:
            weights, steps = drawn_steps(n)
        given = weights.clone(), steps.clone()
        found = stays_of(weights, steps)
        expect(torch.equal(given[0], weights) and torch.equal(given[1], steps), "your function changed what it was "
               "given.")
        output.append(expect_tensor(found, tuple(weights.shape), "what stays", "(n)", torch.bool))
        right.append(swallowed(weights, steps))
        for why, slip in STAY_SLIPS.items():
            made[why].append(slip(weights, steps))
    if all(map(torch.equal, output, right)):
        return
    slip = slip_of(output, right, made, torch.equal)
    expect(not slip, slip)
    wrong = next(number for number in range(len(output)) if not torch.equal(output[number], right[number]))
    place = (output[wrong] != right[wrong]).nonzero()[0].item()
    expect(False, f"{(output[wrong] != right[wrong]).sum()} of {len(right[wrong])} weights are judged wrongly; you "
           f"say that one {'stays' if output[wrong][place] else 'moves'}, and in bfloat16 it does not. At which points "
           "is it rounded?")

"""Answers to the exercises of lesson 17."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Answers


class Times(torch.autograd.Function):
    """The same numbers; their gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


def by_function(parts, rank):
    return torch.cat([Times.apply(part, len(parts)) if number == rank else part.detach()
                      for number, part in enumerate(parts)])


def by_hook(parts, rank):
    size, rows = len(parts), [part.detach() for part in parts]
    rows[rank] = parts[rank].view_as(parts[rank])
    if rows[rank].requires_grad:
        rows[rank].register_hook(lambda gradient: size * gradient)
    return torch.cat(rows)


def by_difference(parts, rank):
    own, size = parts[rank], len(parts)
    return torch.cat([*[part.detach() for part in parts[:rank]], own.detach() + size * (own - own.detach()),
                      *[part.detach() for part in parts[rank + 1:]]])


def in_place(parts, rank):
    whole = torch.cat(parts).detach().clone()
    begins = sum(map(len, parts[:rank]))
    whole[begins:begins + len(parts[rank])] = Times.apply(parts[rank], len(parts))
    return whole


def hook_on_the_rows(parts, rank):
    """A slip that only other uses of the rows show: their gradient is multiplied as well."""
    size = len(parts)
    if parts[rank].requires_grad:
        parts[rank].register_hook(lambda gradient: size * gradient)
    return torch.cat([part if number == rank else part.detach() for number, part in enumerate(parts)])


def joined(own=lambda own, size: Times.apply(own, size), others=lambda part: part.detach(),
           order=lambda rows, rank: rows):
    """A gather with a slip in the own rows, in those of the others, or in their order."""
    return lambda parts, rank: torch.cat(order([own(part, len(parts)) if number == rank else others(part)
                                                for number, part in enumerate(parts)], rank))


def own_first(rows, rank):
    return [rows[rank], *rows[:rank], *rows[rank + 1:]]


def by_where(means, counts):
    return torch.where(counts > 0, means, 0.0) @ counts.to(means.dtype) / counts.sum()


def by_selection(means, counts):
    known = counts > 0
    return (means[known] * counts[known]).sum() / counts[known].sum()


def by_loop(means, counts):
    total, words = means.new_zeros(()), 0
    for mean, count in zip(means, counts.tolist(), strict=True):
        if count:
            total, words = total + mean * count, words + count
    return total / words


def rounded(weights, steps):
    return weights.bfloat16() - steps.bfloat16() == weights.bfloat16()


def rounded_at_the_end(weights, steps):
    kept = weights.to(torch.bfloat16)
    return torch.eq((kept.float() - steps).to(torch.bfloat16), kept)


def in_place_step(weights, steps):
    kept = weights.bfloat16().clone()
    before = kept.clone()
    kept -= steps
    return kept == before


def nn_parameter(weights, steps):
    kept = nn.Parameter(weights.bfloat16())
    kept.grad = steps.bfloat16()
    torch.optim.SGD([kept], lr=1.0).step()
    return kept.detach() == weights.bfloat16()


def first_of_many(parts, rank):
    """The mistake to take the first rows for the own ones where there are many processes."""
    return by_difference(parts, 0 if len(parts) > 3 else rank)


def in_the_given_list(parts, rank):
    for i, part in enumerate(parts):
        parts[i] = part.detach() if i != rank else len(parts) * part - (len(parts) - 1) * part.detach()
    return torch.cat(parts)


ANSWERS = {
    "gather": Answers(
        [by_function, by_hook, by_difference, in_place],
        [(in_the_given_list, "your function changed the list"),
         (first_of_many, ""),
         (joined(own=lambda own, size: own.detach()), "is a constant"), (joined(own=lambda own, size: own), "carry "
          "their gradient as it is"), (joined(own=lambda own, size: Times.apply(own, 1 / size)), "divided by W"),
         (joined(own=lambda own, size: Times.apply(own, size ** 2)), "W squared"),
         (joined(others=lambda part: part), "rows of the others carry"),
         (joined(own=lambda own, size: own, others=lambda part: part), "rows of all carry"),
         (joined(own=lambda own, size: size * own), "only their gradient"), (joined(order=own_first), "come first"),
         (hook_on_the_rows, "used elsewhere"), (joined(order=lambda rows, rank: rows[::-1]), "one below the other"),
         (joined(own=lambda own, size: Times.apply(own, size + 1)), "times what it should be"),
         (lambda parts, rank: parts, "a list"), (lambda parts, rank: torch.stack([parts[rank]]), "it should be")]),
    "mean_of_all": Answers(
        [lambda means, counts: (means * counts).nansum() / counts.sum(),
         by_where, by_selection, by_loop],
        [(lambda means, counts: by_where(means.double(), counts), "float64"),
         (lambda means, counts: means.mean(), "nan times nothing"),
         (lambda means, counts: (means * counts).sum() / counts.sum(), "nan times nothing"),
         (lambda means, counts: means[counts > 0].mean(), "in a short part weighs more"),
         (lambda means, counts: means.nan_to_num(0).mean(), "with an empty part"),
         (lambda means, counts: (means.nan_to_num(0) * counts).sum(), "are added up"),
         (lambda means, counts: (means.nan_to_num(0) * counts).sum() / len(counts), "number of processes"),
         (lambda means, counts: (means.nan_to_num(0) * counts**2).sum() / (counts**2).sum(), "the square of"),
         (lambda means, counts: by_selection(means, torch.where(counts > 0, 1 / counts, 0)), "other way round"),
         (lambda means, counts: means[counts.argmax()], "of the largest part alone"),
         (lambda means, counts: by_where(means, torch.where(counts > 1, counts, 0)), "a single word"),
         (lambda means, counts: torch.where(counts > 1, means * counts, 0.0).sum() / counts.sum(), "a single word"),
         (lambda means, counts: by_where(means, counts).detach(), "no gradient reaches"),
         (lambda means, counts: by_where(means, counts) + 1, "How much does one word"),
         (lambda means, counts: by_where(means, counts)[None], "it should be ()"),
         (lambda means, counts: by_where(means, counts).item(), "a float")]),
    "stays": Answers(
        [rounded, rounded_at_the_end, in_place_step, nn_parameter],
        [(lambda weights, steps: weights - steps == weights, "what happens to the sum"),
         (lambda weights, steps: (weights - steps).bfloat16() == weights, "it was rounded before"),
         (lambda weights, steps: weights.bfloat16().float() - steps == weights.bfloat16().float(), "what happens to"),
         (lambda weights, steps: weights.half() - steps.half() == weights.half(), "float16"),
         (lambda weights, steps: ~rounded(weights, steps), "those that move"),
         (lambda weights, steps: rounded(weights, -steps), "the other way"),
         (lambda weights, steps: steps.abs() < 2**-9, "size of the weight"),
         (lambda weights, steps: steps.abs() < 2 ** (weights.bfloat16().float().abs().log2().floor() - 8),
          "twice as close"),
         (lambda weights, steps: rounded(weights, steps / 2), "At which points"),
         (lambda weights, steps: rounded(weights, steps).float(), "torch.bool"),
         (lambda weights, steps: rounded(weights, steps).sum(), "it should be (n)"),
         (lambda weights, steps: F.relu(weights) == weights, "At which points")]),
}

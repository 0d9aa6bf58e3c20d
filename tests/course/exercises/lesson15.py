"""Answers to the exercises of lesson 15."""

import math

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from . import Answers


def divisors(wanted):
    return [batch for batch in range(wanted, 0, -1) if wanted % batch == 0]


def planned(wanted, fixed, each, memory):
    for batch in divisors(wanted):
        if fixed + each * batch <= 0.9 * memory:
            return batch, wanted // batch
    return None


def planned_by_parts(wanted, fixed, each, memory):
    most = math.floor((memory - memory / 10 - fixed) / each)
    parts = next((parts for parts in range(1, wanted + 1) if wanted % parts == 0 and wanted // parts <= most), None)
    return None if parts is None else [np.int64(wanted // parts), parts]


def by_halves(wanted, fixed, each, memory):
    batch = wanted
    while fixed + each * batch > 0.9 * memory:
        if batch % 2:
            return None
        batch //= 2
    return batch, wanted // batch


def largest(wanted, fixed, each, memory):
    most = min(wanted, int((0.9 * memory - fixed) / each))
    return (most, math.ceil(wanted / most)) if most > 0 else None


def without(change):
    """A plan with a slip in what is known of the card: change(fixed, each, memory)."""
    return lambda wanted, *card: planned(wanted, *change(*card))


def cached(encoder, loss_of, rows, size):
    """Vectors without a graph, their gradient, and then part by part into the encoder."""
    with torch.no_grad():
        vectors = torch.cat([encoder(part) for part in rows.split(size)])
    vectors.requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    for part, gradient in zip(rows.split(size), vectors.grad.split(size), strict=True):
        encoder(part).backward(gradient)
    return loss.detach()


def by_loops(encoder, loss_of, rows, size):
    found = []
    for first in range(0, len(rows), size):
        found.append(encoder(rows[first:first + size]).detach())
    whole = torch.cat(found).requires_grad_(True)
    loss = loss_of(whole)
    loss.backward()
    for first in range(0, len(rows), size):
        made = encoder(rows[first:first + size])
        (made * whole.grad[first:first + size]).sum().backward()
    return loss.item()


def by_checkpoint(reentrant):
    def run(encoder, loss_of, rows, size):
        given = rows.clone().requires_grad_(reentrant)
        loss = loss_of(torch.cat([checkpoint(encoder, part, use_reentrant=reentrant) for part in given.split(size)]))
        loss.backward()
        return loss
    return run


def part_by_part(encoder, loss_of, rows, size):
    """The others as constants; the loss's own parameter then hears of the loss once for each part."""
    with torch.no_grad():
        known = list(torch.cat([encoder(part) for part in rows.split(size)]).split(size))
    for number, part in enumerate(rows.split(size)):
        loss = loss_of(torch.cat([*known[:number], encoder(part), *known[number + 1:]]))
        loss.backward()
    return loss


def each_alone(mean=True):
    def run(encoder, loss_of, rows, size):
        parts = rows.split(size)
        losses = []
        for part in parts:
            losses.append(loss_of(encoder(part)))
            (losses[-1] / (len(parts) if mean else 1)).backward()
        return sum(losses) / len(parts)
    return run


def with_gradients(change):
    """Cached, with a slip in the gradients that are led on: change(gradient, parts)."""
    def run(encoder, loss_of, rows, size):
        with torch.no_grad():
            vectors = torch.cat([encoder(part) for part in rows.split(size)])
        vectors.requires_grad_()
        loss = loss_of(vectors)
        loss.backward()
        parts = rows.split(size)
        for part, gradient in zip(parts, vectors.grad.split(size), strict=True):
            encoder(part).backward(change(gradient, len(parts)))
        return loss
    return run


def all_graphs(encoder, loss_of, rows, size):
    loss = loss_of(torch.cat([encoder(part) for part in rows.split(size)]))
    loss.backward()
    return loss


def at_once(encoder, loss_of, rows, size):
    loss = loss_of(encoder(rows))
    loss.backward()
    return loss


def first_pass_only(encoder, loss_of, rows, size):
    vectors = torch.cat([encoder(part).detach() for part in rows.split(size)]).requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    return loss


def of_the_last_part(encoder, loss_of, rows, size):
    cached(encoder, loss_of, rows, size)
    with torch.no_grad():
        return loss_of(encoder(rows[:size])) + 1


def takes_a_step(encoder, loss_of, rows, size):
    loss = cached(encoder, loss_of, rows, size)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight -= 0.1 * weight.grad
    return loss


ANSWERS = {
    "fixed_bytes": Answers(
        [lambda trained, frozen, value: 16 * trained + value * frozen,
         lambda trained, frozen, value: np.float64(4 * (trained + trained + 2 * trained)) + frozen * value,
         lambda trained, frozen, value: torch.tensor(16 * trained + frozen * value)],
        [(lambda trained, frozen, value: 4 * trained + value * frozen, "only the four bytes"),
         (lambda trained, frozen, value: 8 * trained + value * frozen, "Adam remembers"),
         (lambda trained, frozen, value: 12 * trained + value * frozen, "one of these four"),
         (lambda trained, frozen, value: 20 * trained + value * frozen, "counted twice"),
         (lambda trained, frozen, value: 16 * (trained + frozen), "as much as trained"),
         (lambda trained, frozen, value: 16 * trained + 4 * frozen, "`value` says"),
         (lambda trained, frozen, value: value * (4 * trained + frozen), "stays in float32"),
         (lambda trained, frozen, value: 16 * trained, "left out"),
         (lambda trained, frozen, value: 16 * frozen + value * trained, "exchanged"),
         (lambda trained, frozen, value: (16 * trained + value * frozen) / 1e9, "in GB"),
         (lambda trained, frozen, value: (16 * trained + value * frozen) / 2**30, "in GiB"),
         (lambda trained, frozen, value: 8 * (16 * trained + value * frozen), "in bits"),
         (lambda trained, frozen, value: 3 * trained, "What is kept of a trained number"),
         (lambda trained, frozen, value: f"{16 * trained + value * frozen}", "a number")]),
    "fit": Answers(
        [lambda *given: plan and np.array(plan) if (plan := planned(*given)) else None,
         planned, planned_by_parts],
        [(lambda wanted, fixed, each, memory: planned(wanted, fixed, each, memory / 0.9), "a tenth is left"),
         (without(lambda fixed, each, memory: (0, each, (memory - fixed))), "of what the weights leave"),
         (without(lambda fixed, each, memory: (0, each, memory)), "forgotten"), (by_halves, "you halve"),
         (lambda *game: planned(*game) and planned(*game)[::-1], "exchanged"),
         (lambda wanted, *card: planned(wanted, *card) and (1, wanted), "the largest part"),
         (lambda wanted, *card: planned(wanted, *card) or (1, wanted), "no number of parts helps"),
         (largest, "a different step"), (lambda wanted, *card: (wanted, 1), "that is more than nine tenths"),
         (lambda wanted, *card: None, "you find no plan"), (lambda wanted, *card: wanted, "two numbers"),
         (lambda wanted, *card: planned(wanted, *card) and (planned(wanted, *card)[0] + 0.5, 1), "whole number")]),
    "in_parts": Answers(
        [by_loops, cached, by_checkpoint(False), by_checkpoint(True)],
        [(each_alone(), "compared with itself alone"), (each_alone(mean=False), "losses are added up"),
         (part_by_part, "how often does its loss call backward"), (at_once, "rows at once"),
         (all_graphs, "wait for one backward pass"), (first_pass_only, "no gradient reaches the encoder"),
         (with_gradients(lambda gradient, parts: gradient / parts), "times as long"),
         (with_gradients(lambda gradient, parts: torch.ones_like(gradient)), "Which gradient does each vector have"),
         (of_the_last_part, "the loss that you give"), (takes_a_step, "changed the rows or the weights"),
         (lambda *given: None, "no gradient is left"),
         (lambda *given: cached(*given) * 0 + torch.nan, "the loss that you give")]),
}

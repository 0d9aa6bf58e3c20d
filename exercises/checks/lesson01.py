"""Checks of lesson 01: how scores spread, attention, heads, another sequence, and a fault found by its symptoms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import close, exercise, expect, expect_tensor


def sizes() -> tuple[int, int, int, int, int]:
    """b, h, s, k and d: small, drawn anew, all but b different from each other."""
    h, s, k, d = random.sample(range(3, 8), 4)
    return random.randint(2, 3), h, s, k, d


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by loops, number by number: (b h s d); a row that may look at nothing gives zeros."""
    result = torch.zeros_like(query)
    b, h, s, _ = query.shape
    for i, j, row in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(s)).tolist():
        may = [n for n in range(key.shape[2]) if mask is None or mask[i, 0, row, n]]
        fits = [math.exp(float(query[i, j, row] @ key[i, j, n]) / math.sqrt(query.shape[3])) for n in may]
        for fit, n in zip(fits, may, strict=True):
            result[i, j, row] += fit / sum(fits) * value[i, j, n]
    return result


def some_mask(b: int, s: int, k: int) -> Tensor:
    """A random mask (b 1 s k); each row sees somebody, and not somebody else; neighbours in a batch are not alike."""
    mask = torch.rand(b, 1, s, k) > 0.4
    for row in range(s):
        yes, no = random.sample(range(k), 2)
        mask[::2, :, row, yes] = mask[1::2, :, row, no] = True
        mask[::2, :, row, no] = mask[1::2, :, row, yes] = False
    return mask


def unchanged(before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
    """Nothing that the learner's function was given has changed."""
    expect(all(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
           "your function changed a tensor that it was given; whoever gave it still needs it.")


@exercise("01.1", "lesson 01, section 3")
def spread(predict: Callable[[int, float, float], float]) -> None:
    """The standard deviation of a score, before it is divided by anything."""
    drawn = [(random.randint(5, 300), random.uniform(1.5, 4), random.uniform(0.2, 0.7)) for _ in range(4)]
    for d, of_query, of_key in [(64, 3.0, 0.5), *drawn]:
        output = predict(d, of_query, of_key)
        expect(isinstance(output, int | float) and not isinstance(output, bool),
               f"your function gives a {type(output).__name__} and should give a number.")
        variance = sum((of_query * of_key) ** 2 for _ in range(d))  # of independent terms: they add up
        if abs(output - math.sqrt(variance)) <= 0.05 * math.sqrt(variance):
            continue
        slips = [(variance, "that is the variance."),
                 (d * of_query * of_key, "that grows like d, as if all the products had the same sign. They do not: "
                  "what adds up, when terms are independent, is something else than their deviations."),
                 (of_query * of_key, "that does not grow with d: it is the deviation of one single product, or of a "
                  "score that was already divided."),
                 (math.sqrt(d), "you forget that the entries have deviations of their own."),
                 (math.sqrt(d) * (of_query + of_key), "an entry of the query and one of the key are multiplied."),
                 (math.sqrt(d * of_query * of_key), "the root was taken of one factor too many."),
                 (math.sqrt(d) * of_query, "the key's deviation counts as well."),
                 (math.sqrt(d) * of_key, "the query's deviation counts as well.")]
        scores = (torch.randn(4000, d) * of_query * torch.randn(4000, d) * of_key).sum(dim=1)
        meaning = next((text for value, text in slips if abs(output - value) <= 0.01 * value),
                       "begin with one product, then ask what happens to the variance when you add d of them.")
        expect(False, f"with d = {d} and deviations {of_query:.2f} and {of_key:.2f} you predict {output:.3g}; measured "
                      f"on 4000 scores it is about {float(scores.std()):.2g}: {meaning}")


@exercise("01.2", "lesson 01, sections 2 to 4")
def attention(attend: Callable) -> None:
    """softmax(q·k / √d) v under a mask."""
    b, h, s, k, d = sizes()
    query, key, value = (torch.randn(b, h, count, d) for count in (s, k, k))
    before = query.clone(), key.clone(), value.clone()
    result = _result(attend, query, key, value, None)
    unchanged(before, (query, key, value))
    alone = _result(attend, query[:, :, :1], key, value, None)
    expect(close(alone, result[:, :, :1]), "a query's result depends on which other queries stand beside it: your "
           "shares are handed out among queries, where each query has to share itself out among keys.")
    constant = _result(attend, query, key, torch.ones_like(value), None)
    expect(close(constant, torch.ones_like(constant)), f"all values are 1, yet the mixture holds "
           f"{float(constant.detach().flatten()[0]):.3g}: the shares of a query have to be one in all.")
    order = torch.arange(k).roll(1)
    expect(close(_result(attend, query, key[:, :, order], value[:, :, order], None), result),
           "the result depends on the order in which keys and values stand, though they were shuffled together.")
    right = attended(query, key, value, None)
    if not close(result, right):
        for factor, meaning in ((math.sqrt(d), "the scores are used as they come: something is missing that keeps "
                                 "their spread from growing with the width."),
                                (1 / math.sqrt(d), "the scores were divided by too much: compare how their spread "
                                 "grows with the width."),
                                (math.sqrt(d / k), "the scores were divided according to the number of keys: it is "
                                 "the width of the vectors that makes scores large."),
                                (-1.0, "the best keys get the smallest shares: there is a sign too many.")):
            expect(not close(result, attended(query * factor, key, value, None)), meaning)
        expect(False, "without a mask the numbers are not those of plain loops, though the shares are one in all: "
                      "look at how the scores are made, and which share meets which value.")
    _masked(attend, query, key, value, some_mask(b, s, k))
    exact = _result(attend, *(tensor.double() for tensor in (query, key, value)), None)
    expect(exact.dtype == torch.float64, f"given float64 you return {exact.dtype}: keep the dtype that comes in.")
    _masked(attend, query[:1, :, :1], key[:1], value[:1], some_mask(1, 1, k))  # one batch, one query


def _result(attend: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The learner's result, after its form was checked."""
    return expect_tensor(attend(query, key, value, mask), query.shape, "the result", "(b h s d)")


def _masked(attend: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    """What a mask has to do: for rows that see something, and for one that sees nothing."""
    before = mask.clone()
    value = value.clone().requires_grad_()
    result = _result(attend, query, key, value, mask)
    expect(torch.equal(before, mask), "your function changed the mask that it was given.")
    row = int(torch.randint(query.shape[2], ()))
    expect(result.requires_grad, "no gradient flows from the result to the values: stay in torch, without detaching.")
    slope, = torch.autograd.grad(result[:, :, row].sum(), value)
    touched, may = slope.abs().sum(dim=(1, 3)) > 0, mask[:, 0, row]
    expect(not close(result, _result(attend, query, key, value, None)), "with a mask the result is the same as "
           "without: it is not used.")
    expect(not bool((touched & ~may).any()) or bool((touched & may).any()),
           "only what is forbidden is looked at: in this house True means may look.")
    expect(not bool((touched & ~may).any()), "a forbidden key still has a share: its value changes the result. "
           "Where the mask is False nothing may get through.")
    ones = _result(attend, query, key, torch.ones_like(value), mask)
    expect(close(ones, torch.ones_like(ones)), "under a mask the shares are no longer one in all: forbidden keys were "
           "counted when the shares were handed out, and struck out only then.")
    expect(close(result, attended(query, key, value.detach(), mask)), "under a mask the numbers are not those of loops "
           "over the allowed keys. Is each batch entry under its own mask, and each row?")
    nothing = mask.clone()
    nothing[0, 0, row] = False
    output = attend(query, key, value, nothing)
    expect(isinstance(output, Tensor) and not bool(output.isnan().any()),
           "a query that may look at nothing gets nan: all "
           "its scores were struck out, and zero was divided by zero.")
    output = expect_tensor(output, query.shape, "the result", "(b h s d)")
    empty = output[0, :, row]
    expect(not close(empty, value[0].detach().mean(dim=1)), "a query that may look at nothing gets the average of all "
           "values, forbidden as they are: scores that are all equally small are all equal.")
    expect(not bool(empty.any()), "a query that may look at nothing gets something: asked for are zeros.")
    expect(close(output, attended(query, key, value.detach(), nothing)),
           "one query may look at nothing, and the result "
           "of another one is wrong.")


@exercise("01.3", "lesson 01, section 6")
def in_heads(apply: Callable) -> None:
    """Cut into heads, work, join."""
    for b in (2, 1):
        heads, d, s, _, _ = random.sample(range(2, 7), 5)
        x, answer, given = torch.randn(b, s, heads * d), torch.randn(b, heads, s, d), []

        def work(cut: Tensor, given: list = given, answer: Tensor = answer) -> Tensor:
            """Keep what comes, and give back something else, so that cutting and joining are seen apart."""
            given.append(expect_tensor(cut, answer.shape, "what you give to work", "(b h s d)").clone())
            return answer

        before = x.clone()
        result = expect_tensor(apply(x, heads, work), x.shape, "the result", "(b s e)")
        expect(torch.equal(before, x), "your function changed the x that it was given.")
        expect(len(given) == 1, f"work was called {len(given)} times; asked for is once, for all heads together.")
        cut, joined = torch.zeros_like(answer), torch.zeros_like(x)
        for head in range(heads):
            own = range(head * d, (head + 1) * d)
            for place, number in enumerate(own):
                cut[:, head, :, place] = x[:, :, number]
                joined[:, :, number] = answer[:, head, :, place]
        if not close(given[0], cut):
            every_other = torch.stack([x[:, :, head::heads] for head in range(heads)], dim=1)
            expect(not close(given[0], every_other), "each head gets every n-th number of a token, for so many "
                   "heads: it should own one slice, in one piece.")
            expect(not close(given[0], x.reshape(answer.shape)), "your cut gives the right shape and mixes tokens: "
                   "memory was only counted anew, and what should be two axes changing place is not.")
            expect(False, "what you give to work is not the slices of the vectors: cut[b, h, s] has to come from "
                          "token s of x[b], and from nowhere else.")
        if not close(result, joined):
            shuffled = torch.stack([answer[:, :, :, place] for place in range(d)], dim=1)  # (b d h s)
            alternate = shuffled.permute(0, 3, 1, 2).reshape(x.shape)
            expect(not close(result, alternate), "the cut is right, but joining deals the heads' numbers out in turns: "
                   "each head's answer should be one slice again.")
            expect(not close(result, answer.reshape(x.shape)), "the cut is right, but joining mixes tokens: heads and "
                   "tokens have to change place before the last two axes become one.")
            expect(False, "the cut is right, but what you return is not the answer of work, joined. Do you return what "
                          "work gave, or what it was given?")


@exercise("01.4", "lesson 01, section 7")
def cross_attention(layer_class: Callable) -> None:
    """A layer that reads another sequence."""
    heads = random.randint(2, 3)
    d = heads + random.randint(1, 2)
    width, wide = heads * d, heads * d + random.randint(3, 9)
    layer = layer_class(width, heads, wide)
    expect(isinstance(layer, nn.Module), f"your class makes a {type(layer).__name__}, not an nn.Module.")
    parts = dict(layer.named_children())
    for name in ("query", "key", "value", "out"):
        expect(isinstance(parts.get(name), nn.Linear), f"the layer has no linear map named {name}: then nobody can "
               "load other people's weights into it.")
        reads = wide if name in ("key", "value") else width
        expect(parts[name].in_features == reads, f"the map {name} reads vectors of width {parts[name].in_features}, "
               f"and there come vectors of width {reads}: from which sequence is it made?")
        expect(parts[name].out_features == width, f"the map {name} makes vectors of width {parts[name].out_features}: "
               "the heads together are as wide as the model.")
        expect(parts[name].bias is not None, f"the map {name} has no bias.")
    layer = layer.eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5)  # nothing is zero: zeros hide mistakes
    for b, q, v in ((2, 3, 5), (1, 4, 2), (2, 1, 7)):
        x, context = torch.randn(b, q, width), torch.randn(b, v, wide)
        seen = expect_tensor(layer(x, context), x.shape, "the result",
                             "(b q e): as long as x, however long the context is")
        order = torch.arange(v).roll(1)
        expect(close(layer(x, context[:, order]), seen), "the result depends on the order in which the context stands.")
        mask = some_mask(b, q, v)
        masked = expect_tensor(layer(x, context, mask), x.shape, "the result under a mask", "(b q e)")
        for output, may in ((seen, None), (masked, mask)):
            with torch.no_grad():
                if not close(output, _looked(parts, x, context, may, heads)):
                    _explain(output, parts, x, context, may, heads)


def _looked(parts: dict[str, nn.Module], x: Tensor, context: Tensor, mask: Tensor | None, heads: int,
            scale: float | None = None, interleaved: bool = False, out: bool = True) -> Tensor:
    """Cross-attention, one head after another: (b q e)."""
    query, key, value = parts["query"](x), parts["key"](context), parts["value"](context)
    d = query.shape[2] // heads
    mixed = torch.zeros_like(query)
    for head in range(heads):
        own = list(range(head, heads * d, heads) if interleaved else range(head * d, (head + 1) * d))
        scores = query[:, :, own] @ key[:, :, own].mT * (d ** -0.5 if scale is None else scale)
        shares = scores.exp() if mask is None else scores.exp() * mask[:, 0]
        mixed[:, :, own] = shares / shares.sum(dim=2, keepdim=True) @ value[:, :, own]
    return parts["out"](mixed) if out else mixed


def _explain(output: Tensor, parts: dict[str, nn.Module], x: Tensor, context: Tensor, mask: Tensor | None,
             heads: int) -> None:
    """Raise Wrong with what a wrong result means."""
    width = x.shape[2]
    twin = parts | {"value": parts["key"]}
    known = [(dict(out=False), parts, "the last linear map, which mixes the heads' answers, has not run."),
             (dict(interleaved=True), parts, "each head owns every n-th number, for so many heads: it should own "
              "one slice."),
             (dict(scale=width ** -0.5), parts, "the scores were divided according to the width of the whole vector: "
              "a head's scores are sums over the head's own slice."),
             (dict(scale=1.0), parts, "the scores were not divided by anything."),
             (dict(), twin, "the values are made by the map that makes the keys.")]
    for settings, maps, meaning in known:
        expect(not close(output, _looked(maps, x, context, mask, heads, **settings)), meaning)
    expect(not close(output, _looked(parts, x, context, mask, 1)),
           f"there should be {heads} heads; your result is that "
           "of a single one over the whole width.")
    if mask is not None:
        expect(not close(output, _looked(parts, x, context, None, heads)), "with a mask the result is the same as "
               "without: it is not used.")
        expect(not close(output, _looked(parts, x, context, ~mask, heads)), "only what is forbidden is looked at: True "
               "means may look.")
    expect(False, f"{'with' if mask is not None else 'without'} a mask the numbers are not those of one head after "
           "another: queries from x, keys and values from the context, each head its slice, then out.")


@exercise("01.5", "lesson 01, sections 4 and 12")
def mended(weights_of: Callable) -> None:
    """The weights of attention, without the two faults of the given function."""
    b, h, s, k, d = sizes()
    query, key, mask = torch.randn(b, h, s, d), torch.randn(b, h, k, d), some_mask(b, s, k)
    mask[0, 0, :, 0] = False  # a key that nobody may look at
    mask[0, 0, :, 1] = True
    before = query.clone(), key.clone(), mask.clone()
    weights = weights_of(query, key, mask)
    expect(not (isinstance(weights, Tensor) and bool(weights.isnan().any())), "a fault is left: there is nan where "
           "nobody may look at a key. Every row sees somebody, so only a column can be empty, and a column is not what "
           "shares itself out.")
    expect_tensor(weights, (b, h, s, k), "your matrix of weights", "(b h s k)")
    unchanged(before, (query, key, mask))
    expect(not bool(weights.masked_select(~mask).any()), "some weight falls on a forbidden key.")
    for row in range(s):
        alone = expect_tensor(weights_of(query[:, :, row:row + 1], key, mask[:, :, row:row + 1]), (b, h, 1, k),
                              "your matrix of weights", "(b h s k)")
        expect(close(alone, weights[:, :, row:row + 1]), "a fault is left: a query's weights depend on which other "
               "queries stand beside it.")
    moved = key.clone()
    moved[0, :, 0] += 5 * torch.randn(h, d)
    expect(close(weights_of(query, moved, mask), weights), "a fault is left: a key that nobody may look at was "
           "changed, and the weights of others changed with it. When does it have to be out of the game?")
    sums = weights.sum(dim=3)
    expect(close(sums, torch.ones_like(sums)), f"a row sums to {float(sums.flatten()[0]):.3g}: a query hands out one "
           "whole.")
    right = torch.zeros_like(weights)
    for n in range(k):  # with one value after another, what comes out is one column of weights after another
        value = torch.zeros(b, h, k, d)
        value[:, :, n] = 1
        right[..., n] = attended(query, key, value, mask)[..., 0]
    expect(close(weights, right), "rows sum to one, but the weights are not those of plain loops: what was right in "
           "the given function, its scores, should stay as it was.")

"""Checks of lesson 01: how scores spread, attention, heads, another sequence, and a fault found by its symptoms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import Wrong, close, drawn_apart, exercise, expect, expect_tensor, named, number, same_gradients, steady


def sizes(d: int | None = None) -> tuple[int, int, int, int, int]:
    """b, h, s, k and d: small, drawn anew, all but b different from each other, and d not the given one."""
    while True:
        h, s, k, width = random.sample(range(3, 8), 4)
        if width != d:
            return random.randint(2, 3), h, s, k, width


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


def shares_of(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Weights (b h s k) through which gradients flow; each row may look at somebody."""
    scores = torch.einsum("bhsd,bhkd->bhsk", query, key) * (query.shape[3] ** -0.5 if scale is None else scale)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=3)


def some_mask(b: int, s: int, k: int) -> Tensor:
    """A random mask (b 1 s k); each row sees somebody, and not somebody else; neighbours in a batch are not alike."""
    mask = torch.rand(b, 1, s, k) > 0.4
    for row in range(s):
        yes, no = random.sample(range(k), 2)
        mask[::2, :, row, yes] = mask[1::2, :, row, no] = True
        mask[::2, :, row, no] = mask[1::2, :, row, yes] = False
    return mask


def same_kind(given: Tensor) -> torch.dtype | None:
    """What a result has to hold where float32 was given; what becomes of float64 is asked apart."""
    return torch.float32 if given.dtype == torch.float32 else None


def far_off(shape: tuple[int, int, int, int, int], size: float = 60.0) -> tuple[Tensor, Tensor]:
    """Query (b h s d) and key (b h k d), for b, h, s, k and d, whose scores, divided by √d, are all about -`size`, or
    about `size` if it is negative."""
    b, h, s, k, d = shape
    length = math.sqrt(abs(size) / math.sqrt(d))
    return (torch.full((b, h, s, d), length),
            -math.copysign(length, size) * torch.ones(b, h, k, d) + 0.3 * torch.randn(b, h, k, d))


def led_by_forbidden(shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and mask for b, h, s, k and d; a key that no query may look at has a score of about 60, all others
    about -60. Exponentials of both are numbers of float32, that of their difference is zero."""
    b, h, s, k, d = shape
    first, length = random.randrange(k), math.sqrt(60 / math.sqrt(d))
    query, key = torch.full((b, h, s, d), length), torch.full((b, h, k, d), -length)
    query = query * (1 + 0.02 * torch.rand(b, h, s, 1))
    key += (3 * torch.rand(b, h, k, 1) - 1.5) / (length * math.sqrt(d))  # moves scores by 1.5 at most
    key[:, :, first] *= -1
    mask = torch.zeros(b, 1, s, k, dtype=torch.bool)
    mask[..., [n for n in range(k) if n != first]] = some_mask(b, s, k - 1)
    return query, key, mask


def expect_untouched(output: object, right: Tensor, what: str) -> None:
    """A result under `led_by_forbidden`; raise Wrong with what became of it."""
    became = ("is wrong" if not isinstance(output, Tensor) or output.shape != right.shape
              else "is right" if output.dtype == right.dtype and close(output, right, 1e-3)
              else "is nan" if bool(output.isnan().any())
              else "is zero" if not bool(output.any()) else "is wrong")
    expect(became == "is right", f"where the best score, about 60, is that of a forbidden key, and the others are "
           f"about -60, {what} {became}. In a softmax over all keys the forbidden one takes everything, and what "
           "others get is rounded to zero: a mask that comes afterwards leaves nothing to normalise again. Whatever "
           "forbidden keys score, the others may not notice.")


def unchanged(before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
    """Nothing that the learner's function was given has changed."""
    expect(all(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
           "your function changed a tensor that it was given; the caller still needs it.")


# What is made of d and the deviations of query and key, and what it means.
SPREADS: dict[str, Callable[[int, float, float], float]] = {
    "that is the variance.": lambda d, a, b: d * (a * b) ** 2,
    "that grows like d, as if all the products had the same sign. They do not: when terms are independent, it is not "
    "their deviations that add up.": lambda d, a, b: d * a * b,
    "that does not grow with d: it is the deviation of one single product, or of a score that was already divided.":
        lambda d, a, b: a * b,
    "you forget that the entries have deviations of their own.": lambda d, a, b: math.sqrt(d),
    "an entry of the query and one of the key are multiplied.": lambda d, a, b: math.sqrt(d) * (a + b),
    "an entry of the query and one of the key are multiplied, and each brings its own deviation.":
        lambda d, a, b: math.sqrt(d * (a * a + b * b)),
    "the root was taken of one factor too many.": lambda d, a, b: math.sqrt(d * a * b),
    "the key's deviation counts as well.": lambda d, a, b: math.sqrt(d) * a,
    "the query's deviation counts as well.": lambda d, a, b: math.sqrt(d) * b,
    "a score is a sum of d products; you count one too few.": lambda d, a, b: math.sqrt(d - 1) * a * b,
    "the squares of the deviations belong under the root, with d; outside it stand the deviations themselves.":
        lambda d, a, b: math.sqrt(d) * (a * b) ** 2,
}


@exercise("01.1", "lesson 01, section 3")
def spread(predict: Callable[[int, float, float], float]) -> None:
    """The standard deviation of a score, before it is divided by anything."""
    def draw(low: int, high: int) -> tuple[int, float, float]:
        return drawn_apart(lambda: (random.randint(low, high), random.uniform(1.5, 4), random.uniform(0.2, 0.7)),
                           lambda case: abs(math.log(case[1] * case[2])) > 0.3)

    given = [(64, 3.0, 0.5), draw(2, 2), draw(3, 9), (d := draw(100, 300))[:1] + d[:0:-1], draw(10, 90)]
    output = [number(predict(*case)) for case in given]
    right = [math.sqrt(d) * a * b for d, a, b in given]
    wrong = [abs(one - other) > 0.08 * other for one, other in zip(output, right, strict=True)]
    if any(wrong):
        slips = {meaning: [slip(*case) for case in given] for meaning, slip in SPREADS.items()}
        meaning = named(output, slips, lambda one, other: abs(one - other) <= 0.01 * other)
        (d, of_query, of_key), said, _ = [case for case in zip(given, output, wrong, strict=True) if case[2]][0]
        scores = (torch.randn(4000, d) * of_query * torch.randn(4000, d) * of_key).sum(dim=1)
        expect(False, f"with d = {d} and deviations {of_query:.2f} and {of_key:.2f} you predict {said:.3g}; measured "
                      f"on 4000 scores it is about {float(scores.std()):.2g}: "
                      f"{meaning or 'begin with one product, then ask what happens to the variance when you add d of '}"
                      f"{'' if meaning else 'them.'}")


# What scores that should be divided by √d were multiplied by besides, from b, h, s, d and k; and what it means.
SCALES: dict[str, Callable[[int, int, int, int, int], float]] = {
    "the scores are used as they come: something is missing that keeps their spread from growing with the width.":
        lambda b, h, s, d, k: math.sqrt(d),
    "the scores were divided by too much: compare how their spread grows with the width.":
        lambda b, h, s, d, k: 1 / math.sqrt(d),
    "the scores were multiplied by √d: they should be divided by it.": lambda b, h, s, d, k: d,
    "the scores were divided according to the number of keys: it is the width of the vectors that makes scores large.":
        lambda b, h, s, d, k: math.sqrt(d / k),
    "the scores were divided according to the number of queries: it is the width of the vectors that makes scores "
    "large.": lambda b, h, s, d, k: math.sqrt(d / s),
    "the scores were divided according to the number of heads: it is the width of a head's vectors that makes scores "
    "large.": lambda b, h, s, d, k: math.sqrt(d / h),
    "the scores were divided according to the width of all heads together: a score is a sum over the numbers of one "
    "head.": lambda b, h, s, d, k: math.sqrt(1 / h),
    "the best keys get the smallest weights: there is a minus sign too many.": lambda b, h, s, d, k: -1.0,
}


@exercise("01.2", "lesson 01, sections 2, 4 and 6")
def attention(attend: Callable) -> None:
    """softmax(q·k / √d) v under a mask."""
    b, h, s, k, d = sizes()
    query, key, value = (torch.randn(b, h, count, d) for count in (s, k, k))
    before = query.clone(), key.clone(), value.clone()
    result = _result(attend, query, key, value, None)
    unchanged(before, (query, key, value))
    steady(_result(attend, query, key, value, None), result)
    alone = _result(attend, query[:, :, :1], key, value, None)
    if not close(alone, result[:, :, :1]):
        scores = query @ key.mT
        columns = [(scores * scale).softmax(dim=2) @ value for scale in (d ** -0.5, 1.0)]
        expect(not any(close(result, one) for one in columns), "a query's result depends on which other queries stand "
               "beside it: your weights are normalised over the queries, where those of each query have to be "
               "normalised over the keys.")
        expect(False, "a query's result depends on which other queries stand beside it. Along which axis do the "
               "weights sum to one?")
    constant = _result(attend, query, key, torch.ones_like(value), None)
    expect(close(constant, torch.ones_like(constant)), "all values are 1, yet the mixture holds "
           f"{float(constant.detach().flatten()[0]):.3g}: the weights of a query have to sum to one.")
    order = torch.arange(k).roll(1)
    expect(close(_result(attend, query, key[:, :, order], value[:, :, order], None), result),
           "the result depends on the order in which keys and values stand, though they were shuffled together.")
    right = attended(query, key, value, None)
    if not close(result, right):
        b_, h_, s_, k_, d_ = sizes(d)
        draws = [(query, key, value), tuple(torch.randn(b_, h_, count, d_) for count in (s_, k_, k_))]
        output, slips = [_result(attend, *draw, None) for draw in draws], {}
        for meaning, factor in SCALES.items():
            slips[meaning] = [attended(draw[0] * factor(*draw[0].shape, draw[1].shape[2]), *draw[1:], None)
                              for draw in draws]
        expect(False, named(output, slips, close) or "without a mask the numbers are not those of plain loops, though "
               "the weights sum to one: look at how the scores are made, and which weight meets which value.")
    same_gradients(lambda q, k, v: _result(attend, q, k, v, None), lambda q, k, v: shares_of(q, k, None) @ v,
                   {"query": query, "key": key, "value": value})
    _masked(attend, query, key, value, some_mask(b, s, k))
    exact = _result(attend, *(tensor.double() for tensor in (query, key, value)), None)
    expect(exact.dtype == torch.float64, f"given float64 you return {exact.dtype}: keep the dtype that comes in.")
    for size in (60.0, -60.0):
        near, far = far_off((b, h, s, k, d), size)
        mask = some_mask(b, s, k)
        expect(close(_result(attend, near, far, value, mask), attended(near, far, value, mask), 1e-3),
               f"where all scores are about {-size:.0f} your result under a mask is wrong, where they are small it is "
               "right. What replaces a forbidden score has to be below every score that can occur.")
    near, far, mask = led_by_forbidden((b, h, s, k, d))
    expect_untouched(attend(near, far, value, mask), attended(near, far, value, mask), "your result")
    near, far = far_off((b, h, s, k, d), 1e6)
    mask, others = torch.ones(b, 1, s, k, dtype=torch.bool), torch.ones_like(value)
    if close(attend(near, far, others, None), torch.ones_like(near), 0.3):  # exponentials as they come are zero here
        mask[..., 0], others[:, :, 0] = False, 0.0
        expect(close(attend(near, far, others, mask), torch.ones_like(near), 0.3),  # numbers so large are rounded
               "where all scores are about -1,000,000 your result under a mask is wrong, without a mask it is right. "
               "What replaces a forbidden score has to be below every score that can occur. Which number is?")
    _masked(attend, query[:1, :, :1], key[:1], value[:1], some_mask(1, 1, k))  # one batch, one query
    _masked(attend, query[:, :b], key[:, :b], value[:, :b], some_mask(b, s, k))  # as many heads as batch entries
    b, h, s, k, other = sizes(d)  # a size that was written down as a number does not fit twice
    query, key, value = (torch.randn(b, h, count, other) for count in (s, k, k))
    expect(close(_result(attend, query, key, value, None), attended(query, key, value, None)),
           f"with heads of width {d} the numbers are right, with heads of width {other} they are not: is some size "
           "written down as a number?")


def _result(attend: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The learner's result, after its form was checked."""
    return expect_tensor(attend(query, key, value, mask), query.shape, "the result", "(b h s d)", same_kind(query))


def _masked(attend: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    """What a mask has to do: for rows that see something, and for one that sees nothing."""
    before = mask.clone()
    value = value.clone().requires_grad_()
    result = _result(attend, query, key, value, mask)
    expect(torch.equal(before, mask), "your function changed the mask that it was given.")
    expect(result.requires_grad, "under a mask no gradient flows from the result to the values: stay in torch, "
           "without detaching.")
    touched, may = torch.zeros_like(mask[:, 0]), mask[:, 0]
    for row in range(query.shape[2]):
        slope, = torch.autograd.grad(result[:, :, row].sum(), value, retain_graph=True, allow_unused=True)
        expect(slope is not None, "under a mask no gradient reaches the values: stay in torch, without detaching.")
        touched[:, row] = slope.abs().sum(dim=(1, 3)) > 0
    expect(not close(result, _result(attend, query, key, value, None)), "with a mask the result is the same as "
           "without: it is not used.")
    expect(not torch.equal(touched, ~may), "only what is forbidden is looked at: in this course True means may look.")
    expect(not bool((touched & ~may).any()), "a forbidden key still has a weight: its value changes the result. Where "
           "the mask is False nothing may get through.")
    ones = _result(attend, query, key, torch.ones_like(value), mask)
    expect(close(ones, torch.ones_like(ones)), "under a mask the weights no longer sum to one. When do forbidden keys "
           "have to be masked: before the softmax, or after it?")
    expect(close(result, attended(query, key, value.detach(), mask)), "under a mask the numbers are not those of loops "
           "over the allowed keys. Is each batch entry under its own mask, and each row?")
    if len(query) > 1:
        same_gradients(lambda q, k, v: _result(attend, q, k, v, mask), lambda q, k, v: shares_of(q, k, mask) @ v,
                       {"query": query, "key": key, "value": value.detach()})
    nothing, entry, row = mask.clone(), random.randrange(len(mask)), random.randrange(mask.shape[2])
    nothing[entry, 0, row] = False
    output = attend(query, key, value, nothing)
    if isinstance(output, Tensor) and output.shape == query.shape and bool(output.isnan().any()):
        others = output.isnan().any(dim=3)
        others[entry, :, row] = False
        expect(not bool(others.any()), "where one query may look at nothing, the result of another one is nan.")
        expect(False, "a query that may look at nothing gets nan: if all its scores are masked, what does the softmax "
               "divide by?")
    output = expect_tensor(output, query.shape, "the result", "(b h s d)")
    empty = output[entry, :, row]
    expect(not close(empty, value[entry].detach().mean(dim=1)), "a query that may look at nothing gets the average of "
           "all values, though all are forbidden: scores that are all equally small are all equal.")
    expect(not bool(empty.any()), "a query that may look at nothing gets something: it should get zeros.")
    expect(close(output, attended(query, key, value.detach(), nothing)),
           "one query may look at nothing, and the result "
           "of another one is wrong.")
    try:
        same_gradients(lambda q, k, v: attend(q, k, v, nothing), lambda q, k, v: torch.where(
            nothing, shares_of(q, k, nothing | ~nothing.any(dim=3, keepdim=True)), 0.0) @ v,
                       {"query": query, "key": key, "value": value.detach()})
    except Wrong as wrong:
        nan = " A nan that is masked out of the result still comes back in the gradient."
        raise Wrong(f"one query may look at nothing. {str(wrong)[0].upper()}{str(wrong)[1:]}"
                    f"{nan if 'not finite' in str(wrong) else ''}") from wrong


@exercise("01.3", "lesson 01, section 6")
def in_heads(apply: Callable) -> None:
    """Cut into heads, work, join."""
    small, middle, large = random.sample(range(3, 8), 3)
    cases = [(2, small, 3, 4), (2, middle, large, small), (2, large, middle, 2), (1, 3, 2, large), (3, 1, 4, 5),
             (2, 4, 5, 1)]  # b, heads, s, d
    cuts, joins = [], []
    for b, heads, s, d in cases:
        x, answer, given = torch.randn(b, s, heads * d), torch.randn(b, heads, s, d), []
        parts = answer.clone()

        def work(cut: Tensor, given: list = given, answer: Tensor = answer) -> Tensor:
            """Keep what comes, and give back something else, so that cutting and joining are seen apart."""
            given.append(expect_tensor(cut, answer.shape, "what you give to work", "(b h s d)", answer.dtype).clone())
            return answer

        before = x.clone()
        result = expect_tensor(apply(x, heads, work), x.shape, "the result", "(b s e)", torch.float32)
        expect(torch.equal(before, x), "your function changed the x that it was given.")
        expect(len(given) == 1, f"work was called {len(given)} times; call it once, for all heads together.")
        cut, joined = torch.zeros_like(parts), torch.zeros_like(x)
        for head in range(heads):
            own = range(head * d, (head + 1) * d)
            for place, number_ in enumerate(own):
                cut[:, head, :, place] = x[:, :, number_]
                joined[:, :, number_] = parts[:, head, :, place]
        cuts.append((given[0], cut, torch.stack([x[:, :, head::heads] for head in range(heads)], dim=1),
                     x.reshape(parts.shape)))
        turns = torch.stack([parts[:, :, :, place] for place in range(d)], dim=1)  # (b d h s)
        joins.append((result, joined, turns.permute(0, 3, 1, 2).reshape(x.shape), parts.reshape(x.shape), x))

    def explain(found: list[tuple[Tensor, ...]], meanings: tuple[str, ...], otherwise: str) -> None:
        output, right, *slips = zip(*found, strict=True)
        if not all(map(close, output, right)):
            expect(False, named(output, dict(zip(meanings, slips, strict=True)), close, right) or otherwise)

    explain(cuts, ("each head gets every n-th number of a token, n being the number of heads: it should own one "
                   "contiguous slice.",
                   "your cut gives the right shape and mixes tokens: the memory was only reshaped, where two axes "
                   "should have been transposed."),
            "what you give to work is not the slices of the vectors: cut[b, h, s] has to come from token s of x[b], "
            "and from nowhere else.")
    explain(joins, ("the cut is right, but joining interleaves the heads' numbers: each head's answer should be one "
                    "slice again.", "the cut is right, but joining mixes tokens: the axes of heads and tokens have "
                    "to be transposed before the last two axes become one.",
                    "the cut is right, but you return the x that you "
                    "were given: work's answer is lost."),
            "the cut is right, but what you return is not the answer of work, joined. Do you return what work gave, or "
            "what it was given?")
    heads, d = random.sample(range(2, 6), 2)
    weight = torch.randn(2, heads, 3, d)
    same_gradients(lambda x: apply(x, heads, lambda cut: cut * weight),
                   lambda x: (x.unflatten(2, (heads, d)).movedim(2, 1) * weight).movedim(1, 2).flatten(2),
                   {"x": torch.randn(2, 3, heads * d)})
    exact = apply(torch.randn(2, 3, heads * d).double(), heads, lambda cut: cut)
    expect(exact.dtype == torch.float64, f"given float64 you return {exact.dtype}: keep the dtype that comes in.")


@exercise("01.4", "lesson 01, section 7")
def cross_attention(layer_class: Callable) -> None:
    """A layer that reads another sequence."""
    drawn, seen = random.sample(range(3, 7), 3), []
    for heads, d, more in ((2, drawn[0], 5), (drawn[1], 2, -1), (drawn[2], 3, random.randint(1, 6)), (1, 4, 3)):
        width, wide = heads * d, heads * d + more
        layer, parts = _layer(layer_class, width, heads, wide)
        for b, q, v in ((2, 3, 5), random.choice([(1, 4, 2), (2, 1, 7)]), (2, 4, 4))[:3 if heads == 2 else 1]:
            x, context = torch.randn(b, q, width), torch.randn(b, v, wide)
            before = x.clone(), context.clone()
            output = expect_tensor(layer(x, context), x.shape, "the result",
                                   "(b q e), as long as x, however long the context is,", torch.float32)
            unchanged(before, (x, context))
            steady(layer(x, context), output)
            order = torch.arange(v).roll(1)
            expect(close(layer(x, context[:, order]), output), "the result depends on the order in which the context "
                   "stands.")
            mask = some_mask(b, q, v)
            masked = expect_tensor(layer(x, context, mask), x.shape, "the result under a mask", "(b q e)")
            seen += [(output.detach(), parts, x, context, None, heads),
                     (masked.detach(), parts, x, context, mask, heads)]
    with torch.no_grad():
        for case in ("without a mask", "with a mask"):
            cases = [one for one in seen if (one[4] is None) == (case == "without a mask")]
            if not all(close(output, _looked(*rest)) for output, *rest in cases):
                _explain(cases, case)
    for mask in (None, some_mask(b, q, v)):
        same_gradients(lambda x, context, mask=mask: layer(x, context, mask),
                       lambda x, context, mask=mask: _looked(parts, x, context, mask, heads),
                       {"x": x, "context": context})
    learns = torch.autograd.grad(layer(x, context).square().sum(), list(layer.parameters()), allow_unused=True)
    for (name, _), slope in zip(layer.named_parameters(), learns, strict=True):
        expect(slope is not None, f"no gradient reaches {name}: it will never learn.")
    exact = layer.double()(x.double(), context.double())
    expect(exact.dtype == torch.float64, f"in float64 you return {exact.dtype}: keep the dtype that comes in.")


def _layer(layer_class: Callable, width: int, heads: int, wide: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The learner's layer with random weights, after its maps were checked, and the maps by name."""
    layer = layer_class(width, heads, wide)
    expect(isinstance(layer, nn.Module), f"your class makes a {type(layer).__name__}, not an nn.Module.")
    parts = dict(layer.named_children())
    for name in ("query", "key", "value", "out"):
        expect(isinstance(parts.get(name), nn.Linear), f"the layer has no linear map named {name}: then pretrained "
               "weights cannot be loaded into it.")
        reads = wide if name in ("key", "value") else width
        expect(parts[name].in_features == reads, f"the map {name} reads vectors of width {parts[name].in_features}, "
               f"and is given vectors of width {reads}: which sequence should it read?")
        expect(parts[name].out_features == width, f"the map {name} makes vectors of width {parts[name].out_features}: "
               "the heads together are as wide as the model.")
        expect(parts[name].bias is not None, f"the map {name} has no bias.")
    maps = [parts[name] for name in ("query", "key", "value", "out")]
    expect(len({id(part.weight) for part in maps}) == 4, "two of the four maps are one and the same: whatever one "
           "learns overwrites the other.")
    expect(all(weight.requires_grad for weight in layer.parameters()), "some weight of the layer has "
           "requires_grad=False: it will never learn.")
    with torch.no_grad():
        for weight in layer.parameters():  # nothing is zero: zeros hide mistakes
            weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim < 2 else 1.5 * weight.shape[1] ** -0.5))
    return layer.eval(), parts


def _looked(parts: dict[str, nn.Module], x: Tensor, context: Tensor, mask: Tensor | None, heads: int,
            scale: float | None = None, interleaved: bool = False, out: bool = True) -> Tensor:
    """Cross-attention, one head after another: (b q e)."""
    query, key, value = parts["query"](x), parts["key"](context), parts["value"](context)
    d = query.shape[2] // heads
    owners = [list(range(head, heads * d, heads) if interleaved else range(head * d, (head + 1) * d))
              for head in range(heads)]
    mixed = []
    for own in owners:
        scores = query[:, :, own] @ key[:, :, own].mT * (d ** -0.5 if scale is None else scale)
        scores = scores if mask is None else scores.masked_fill(~mask[:, 0], -torch.inf)
        mixed.append(scores.softmax(dim=2) @ value[:, :, own])
    places = torch.tensor([place for own in owners for place in own]).argsort()
    mixed = torch.cat(mixed, dim=2)[:, :, places]
    return parts["out"](mixed) if out else mixed


def _explain(cases: list[tuple], case: str) -> None:
    """Raise Wrong with what wrong results mean, all of them."""
    known = {
        "the last linear map, which mixes the heads' answers, has not run.": dict(out=False),
        "each head owns every n-th number, n being the number of heads: it should own one slice.":
            dict(interleaved=True),
        "the scores were divided according to the width of the whole vector: a head's scores are sums over the head's "
        "own slice.": lambda width, heads: dict(scale=width ** -0.5),
        "the scores were not divided by anything.": dict(scale=1.0),
        "the scores were divided by the width of a head itself: compare how their spread grows with it.":
            lambda width, heads: dict(scale=heads / width),
        "the scores were divided according to the number of heads: it is the width of a head that makes them large.":
            lambda width, heads: dict(scale=heads ** -0.5)}
    slips: dict[str, list[Tensor]] = {}
    for meaning, how in known.items():
        slips[meaning] = [_looked(parts, x, context, mask, heads, **(how(x.shape[2], heads) if callable(how) else how))
                          for _, parts, x, context, mask, heads in cases]
    for (one, other), meaning in {
            ("value", "key"): "the values are made by the map that makes the keys.",
            ("key", "value"): "the keys are made by the map that makes the values."}.items():
        slips[meaning] = [_looked(parts | {one: parts[other]}, *rest) for _, parts, *rest in cases]
    slips["keys and values are swapped: a patch is found by its key, and its value is what it says."] = [
        _looked(parts | {"key": parts["value"], "value": parts["key"]}, *rest) for _, parts, *rest in cases]
    slips["your result is that of a single head over the whole width, however many heads are asked for."] = [
        _looked(parts, x, context, mask, 1) for _, parts, x, context, mask, _ in cases]
    if case == "with a mask":
        slips["with a mask the result is the same as without: it is not used."] = [
            _looked(parts, x, context, None, heads) for _, parts, x, context, _, heads in cases]
        slips["only what is forbidden is looked at: True means may look."] = [
            _looked(parts, x, context, ~mask, heads) for _, parts, x, context, mask, heads in cases]
        slips["every batch entry is under the mask of the first: each has its own."] = [
            _looked(parts, x, context, mask[:1].expand_as(mask), heads)
            for _, parts, x, context, mask, heads in cases]
    output, right = [one[0] for one in cases], [_looked(*rest) for _, *rest in cases]
    expect(False, named(output, slips, close, right) or
           f"{case} the numbers are not those of one head after another: queries from x, keys and values from the "
           "context, each head its slice, then out.")


@exercise("01.5", "lesson 01, sections 2 and 4")
def mended(weights_of: Callable) -> None:
    """The weights of attention, without the two faults of the given function."""
    _weights(weights_of, *(first := sizes()))
    try:
        _weights(weights_of, *(second := sizes(first[4])))
    except Wrong as wrong:
        for _ in range(3):
            _weights(weights_of, *first)  # was it luck that the first was right?
        raise Wrong(f"with heads of width {first[4]} the weights are right, with heads of width {second[4]} they are "
                    "not: is some size written down as a number?") from wrong


def _weights(weights_of: Callable, b: int, h: int, s: int, k: int, d: int) -> None:
    """Weights of the right form, free of both faults, and the numbers of plain loops."""
    query, key, mask = torch.randn(b, h, s, d), torch.randn(b, h, k, d), some_mask(b, s, k)
    mask[0, 0, :, 0] = False  # a key that nobody may look at
    mask[0, 0, :, 1] = True
    before = query.clone(), key.clone(), mask.clone()
    weights = weights_of(query, key, mask)
    closed = (~mask.any(dim=2, keepdim=True)).expand(b, h, s, k)
    if isinstance(weights, Tensor) and weights.shape == (b, h, s, k):
        expect(not torch.equal(weights.isnan(), closed), "a fault is left: there is nan where no query may look at a "
               "key. Every row sees some key, so only a column can be empty, and it is not columns that have to "
               "sum to one.")
    expect_tensor(weights, (b, h, s, k), "your matrix of weights", "(b h s k)", torch.float32)
    unchanged(before, (query, key, mask))
    steady(weights_of(query, key, mask), weights)
    if not weights.masked_select(~mask & ~closed).any():
        expect(not bool((weights[closed] > 0).all()), "a fault is left: a key that no query may look at gets "
               "weight, and no other forbidden key does. Over which axis do your weights sum to one?")
    expect(not bool(weights.masked_select(~mask).any()), "some weight falls on a forbidden key.")
    for row in range(s):
        alone = expect_tensor(weights_of(query[:, :, row:row + 1], key, mask[:, :, row:row + 1]), (b, h, 1, k),
                              "your matrix of weights", "(b h s k)")
        expect(close(alone, weights[:, :, row:row + 1]), "a fault is left: a query's weights depend on which other "
               "queries stand beside it.")
    moved = key.clone()
    moved[0, :, 0] += 5 * torch.randn(h, d)
    expect(close(weights_of(query, moved, mask), weights), "a fault is left: a key that no query may look at was "
           "changed, and the weights of others changed with it. When does it have to be masked?")
    sums = weights.sum(dim=3)
    expect(close(sums, torch.ones_like(sums)), f"a row sums to {float(sums.flatten()[(sums - 1).abs().argmax()]):.4g}: "
           "the weights of a query sum to one.")
    right = torch.zeros_like(weights)
    for n in range(k):  # with one value after another, what comes out is one column of weights after another
        value = torch.zeros(b, h, k, d)
        value[:, :, n] = 1
        right[..., n] = attended(query, key, value, mask)[..., 0]
    if not close(weights, right):
        meanings = {"the scores are no longer divided by √d, as they were in the given function.": 1.0,
                    "the scores are divided by d; what was right in the given function is √d.": 1 / d,
                    "the scores are divided by √8, which was √d in the cell above: d is not always 8.": 8 ** -0.5}
        expect(False, next((text for text, scale in meanings.items()
                            if close(weights, shares_of(query, key, mask, scale))),
                           "rows sum to one, but the weights are not those of plain loops: what was right in the given "
                           "function, its scores, should stay as it was."))
    for near, far, exactly in ((*far_off((b, h, s, k, d)), 1e-3), (*far_off((b, h, s, k, d), -60.0), 1e-3),
                               (6 * query, key, 1e-4)):
        expect(close(weights_of(near, far, mask), shares_of(near, far, mask), exactly), "where scores are small your "
               "weights are right, where they are large, or far below zero, they are not. What replaces a forbidden "
               "score has to be below every score that can occur, and a small weight has to stay small.")
    near, far, led = led_by_forbidden((b, h, s, k, d))
    expect_untouched(weights_of(near, far, led), shares_of(near, far, led), "your matrix of weights")
    same_gradients(lambda query, key: weights_of(query, key, mask), lambda query, key: shares_of(query, key, mask),
                   {"query": query, "key": key})
    exact = weights_of(query.double(), key.double(), mask)
    expect(exact.dtype == torch.float64, f"given float64 you return {exact.dtype}: keep the dtype that comes in.")

"""Answers to the exercises of lesson 01."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

from minblip2.attention import attend, attention_weights

from . import Answers


def by_matmul(query, key, value, mask=None):
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is None:
        return scores.softmax(dim=-1) @ value
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).nan_to_num(0.0) @ value


def by_loop(query, key, value, mask=None):
    b, h, s, d = query.shape
    rows = []
    for i in range(b):
        for j in range(h):
            for row in range(s):
                shares = (key[i, j] @ query[i, j, row] / d**0.5).exp()
                if mask is not None:
                    shares = shares * mask[i, 0, row]
                rows.append((shares / shares.sum().clamp(min=1e-30)) @ value[i, j])
    return torch.stack(rows).view(b, h, s, d)


def general(scale=lambda d: d**-0.5, axis=-1, fill=None, after=False, first=False, upside_down=False):
    """Attention with one thing in another way."""
    def attention(query, key, value, mask=None):
        scores = query @ key.mT * scale(query.shape[-1])
        if mask is not None:
            mask = (mask[:1] if first else mask) ^ upside_down
        if mask is None or after:
            weights = scores.softmax(dim=axis)
            return (weights if mask is None else weights * mask) @ value
        lowest = torch.finfo(scores.dtype).min if fill is None else fill
        weights = scores.masked_fill(~mask, lowest).softmax(dim=axis)
        return (weights if fill is not None or axis != -1 else weights * mask) @ value
    return attention


def average(query, key, value, mask=None):
    return general(fill=torch.finfo(torch.float32).min)(query, key, value, mask)


def additive(query, key, value, mask=None):
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + (0 if mask is None else mask.float())
    return scores.softmax(dim=-1) @ value


def in_place(query, key, value, mask=None):
    query *= query.shape[-1] ** -0.5
    return F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)


def single_float(query, key, value, mask=None):
    return by_matmul(query.float(), key.float(), value.float(), mask)


def without_gradient(query, key, value, mask=None):
    return by_matmul(query.detach(), key.detach(), value.detach(), mask)


def values_behind(query, key, value, mask=None):
    """The values stand in another order than their keys."""
    return attend(query, key, value.flip(2), mask)


def detached(*which, with_mask=True):
    """Right numbers, but some of the gradients are cut off: of query, key, value, scores or weights."""
    def attention(query, key, value, mask=None):
        given = {"query": query, "key": key, "value": value}
        query, key, value = (one.detach() if name in which else one for name, one in given.items())
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1).nan_to_num(0.0)
        cut = "weights" in which and (with_mask or mask is None)
        return (weights.detach() if cut else weights) @ value
    return attention


def with_dropout(query, key, value, mask=None):
    return F.dropout(by_matmul(query, key, value, mask), 0.1)


def over_heads(query, key, value, mask=None):
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=1) @ value


def nan_everywhere(query, key, value, mask=None):
    """Where somebody may look at nothing, all is nan."""
    result = by_matmul(query, key, value, mask)
    return result if mask is None or mask.any(dim=-1).all() else result * torch.nan


def by_where(query, key, value, mask=None):
    scores = torch.einsum("bhsd,bhkd->bhsk", query, key) * query.shape[-1] ** -0.5
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    best = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).amax(dim=-1, keepdim=True)
    shares = torch.where(mask, (scores - best).clamp(max=0).exp(), 0.0)
    return torch.einsum("bhsk,bhkd->bhsd", shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-30), value)


def best_of_all(query, key, value, mask=None):
    """The mistake to take the largest score away from all before the mask, though it may be that of a forbidden key."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    shares = (scores - scores.amax(dim=-1, keepdim=True)).exp() * (1 if mask is None else mask)
    return shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-30) @ value


def masked_after(normalise):
    """The mistake to mask after softmax, and to make the rows sum to one again."""
    def attention(query, key, value, mask=None):
        shares = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
        return (shares if mask is None else normalise(shares * mask)) @ value
    return attention


def clamped(shares):
    return shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def without_nan(shares):
    return (shares / shares.sum(dim=-1, keepdim=True)).nan_to_num(0.0)


def where_some(shares):
    """Normalised where there is something to normalise; the rest stays zero."""
    total = shares.sum(dim=-1, keepdim=True)
    return shares / torch.where(total > 0, total, 1.0)


def with_added(number):
    """The mask as numbers that are added to the scores."""
    def attention(query, key, value, mask=None):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is None:
            return scores.softmax(dim=-1) @ value
        return ((scores + number * ~mask).softmax(dim=-1) * mask) @ value
    return attention


# --- heads ------------------------------------------------------------------------------------------------------------


def by_einops(x, heads, work):
    return rearrange(work(rearrange(x, "b s (h d) -> b h s d", h=heads)), "b h s d -> b s (h d)")


def by_view(x, heads, work):
    b, s, e = x.shape
    return work(x.view(b, s, heads, e // heads).transpose(1, 2)).transpose(1, 2).reshape(b, s, e)


def by_chunks(x, heads, work):
    return torch.cat(list(work(torch.stack(x.chunk(heads, dim=2), dim=1)).unbind(dim=1)), dim=2)


def other_cut(x, heads, work):
    return rearrange(work(rearrange(x, "b s (d h) -> b h s d", h=heads)), "b h s d -> b s (d h)")


def other_join(x, heads, work):
    return rearrange(work(rearrange(x, "b s (h d) -> b h s d", h=heads)), "b h s d -> b s (d h)")


def only_counted(x, heads, work):
    b, s, e = x.shape
    return work(x.reshape(b, heads, s, e // heads)).reshape(b, s, e)


def joined_by_counting(x, heads, work):
    return work(rearrange(x, "b s (h d) -> b h s d", h=heads)).reshape(x.shape)


def tokens_before_heads(x, heads, work):
    return rearrange(work(rearrange(x, "b s (h d) -> b s h d", h=heads)), "b s h d -> b s (h d)")


def one_by_one(x, heads, work):
    return torch.cat([work(part[:, None])[:, 0] for part in x.chunk(heads, dim=2)], dim=2)


def head_by_head(x, heads, work):
    """Cut and join by plain loops."""
    d = x.shape[2] // heads
    answer = work(torch.stack([x[:, :, head * d:(head + 1) * d] for head in range(heads)], dim=1))
    result = torch.zeros_like(x)
    for head in range(heads):
        result[:, :, head * d:(head + 1) * d] = answer[:, head]
    return result


def always(heads=None, d=None):
    """The mistake to write a size down as a number."""
    def apply(x, given, work):
        cut = rearrange(x, "b s (h d) -> b h s d", **({"h": heads} if heads else {"d": d}))
        return rearrange(work(cut), "b h s d -> b s (h d)")
    return apply


def answer_dropped(x, heads, work):
    work(rearrange(x, "b s (h d) -> b h s d", h=heads))
    return x


# --- another sequence -------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    """Cross-attention with einops and PyTorch's function."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)

    def cut(self, x):
        return rearrange(x, "b s (h d) -> b h s d", h=self.heads)

    def join(self, x):
        return rearrange(x, "b h s d -> b s (h d)")

    def mix(self, query, key, value, mask):
        return attend(query, key, value, mask)

    def forward(self, x, context, mask=None):
        query, key, value = self.cut(self.query(x)), self.cut(self.key(context)), self.cut(self.value(context))
        return self.out(self.join(self.mix(query, key, value, mask)))


class CrossByHand(Cross):
    """The same with views and matrix products."""

    def cut(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def join(self, x):
        return x.transpose(1, 2).flatten(2)

    def mix(self, query, key, value, mask):
        return by_matmul(query, key, value, mask)


class CrossByEinsum(Cross):
    """The same, the heads a letter of two sums."""

    def forward(self, x, context, mask=None):
        query, key, value = (rearrange(part, "b s (h d) -> b s h d", h=self.heads)
                             for part in (self.query(x), self.key(context), self.value(context)))
        scores = einsum(query, key, "b q h d, b v h d -> b h q v") / query.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -1e9)
        mixed = einsum(scores.softmax(dim=-1), value, "b h q v, b v h d -> b q h d")
        return self.out(rearrange(mixed, "b q h d -> b q (h d)"))


class KeysFromX(Cross):
    def __init__(self, width, heads, context_width):
        super().__init__(width, heads, width)


class Swapped(Cross):
    def __init__(self, width, heads, context_width):
        super().__init__(width, heads, context_width)
        self.query, self.key = self.key, self.query


class WithoutOut(Cross):
    def forward(self, x, context, mask=None):
        query, key, value = self.cut(self.query(x)), self.cut(self.key(context)), self.cut(self.value(context))
        return self.join(self.mix(query, key, value, mask))


class Interleaved(Cross):
    def cut(self, x):
        return rearrange(x, "b s (d h) -> b h s d", h=self.heads)

    def join(self, x):
        return rearrange(x, "b h s d -> b s (d h)")


class OneHead(Cross):
    def __init__(self, width, heads, context_width):
        super().__init__(width, 1, context_width)


class WholeWidth(Cross):
    def mix(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=(self.heads * query.shape[-1]) ** -0.5)


class Unscaled(Cross):
    def mix(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)


class ValuesOfKeys(Cross):
    def forward(self, x, context, mask=None):
        query, key = self.cut(self.query(x)), self.cut(self.key(context))
        return self.out(self.join(self.mix(query, key, key, mask)))


class Unmasked(Cross):
    def mix(self, query, key, value, mask):
        return attend(query, key, value)


class UpsideDown(Cross):
    def mix(self, query, key, value, mask):
        return attend(query, key, value, None if mask is None else ~mask)


class Unregistered(Cross):
    def __init__(self, width, heads, context_width):
        super().__init__(width, heads, context_width)
        self.layers, self.key = [self.key], None


class ThePictureLooks(Cross):
    """Queries from the context: the result is as long as the wrong sequence."""

    def forward(self, x, context, mask=None):
        query, key = self.cut(self.key(context)), self.cut(self.query(x))
        return self.out(self.join(self.mix(query, key, key, None)))


class CountedOnly(Cross):
    def cut(self, x):
        return x.reshape(len(x), self.heads, x.shape[1], -1)


class TwoHeads(Cross):
    def __init__(self, width, heads, context_width):
        super().__init__(width, 2, context_width)


class WidthOfFour(Cross):
    """The mistake to write the number of heads down by a width that happens to fit."""

    def cut(self, x):
        return rearrange(x, "b s (h d) -> b h s d", d=4 if x.shape[2] % 4 == 0 else x.shape[2])


class CrossOfTorch(nn.MultiheadAttention):
    """PyTorch's own layer cannot have the four names."""

    def __init__(self, width, heads, context_width):
        super().__init__(width, heads, kdim=context_width, vdim=context_width, batch_first=True)


class CrossByName(Cross):
    """PyTorch's function with the mask by name."""

    def mix(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class CrossHeadByHead(Cross):
    """One head after another."""

    def forward(self, x, context, mask=None):
        query, key, value = (part.chunk(self.heads, dim=2) for part in
                             (self.query(x), self.key(context), self.value(context)))
        mixed = [F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, 0])
                 for q, k, v in zip(query, key, value, strict=True)]
        return self.out(torch.cat(mixed, dim=-1))


class Detached(Cross):
    def forward(self, x, context, mask=None):
        return super().forward(x, context.detach(), mask)


class WithoutGradient(Cross):
    @torch.no_grad()
    def forward(self, x, context, mask=None):
        return super().forward(x, context, mask)


class FirstMask(Cross):
    def mix(self, query, key, value, mask):
        return super().mix(query, key, value, None if mask is None else mask[:1].expand_as(mask))


class KeysAndValuesSwapped(Cross):
    def forward(self, x, context, mask=None):
        query, value, key = self.cut(self.query(x)), self.cut(self.key(context)), self.cut(self.value(context))
        return self.out(self.join(self.mix(query, key, value, mask)))


class DropsOut(Cross):
    def forward(self, x, context, mask=None):
        return F.dropout(super().forward(x, context, mask), 0.1)


class Single(Cross):
    def forward(self, x, context, mask=None):
        return super().forward(x, context, mask).float()


class OneMap(Cross):
    def __init__(self, width, heads, context_width):
        super().__init__(width, heads, context_width)
        self.value = self.key


# --- the broken one ---------------------------------------------------------------------------------------------------


def weights(query, key, mask):
    return attention_weights(query, key, mask)


def renormalised(query, key, mask):
    shares = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1) * mask
    return shares / shares.sum(dim=-1, keepdim=True)


def weights_clamped(query, key, mask):
    return clamped((query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1) * mask)


def weights_added(number):
    return lambda query, key, mask: (query @ key.mT / query.shape[-1] ** 0.5 + number * ~mask).softmax(dim=-1)


def weights_filled(number):
    return lambda query, key, mask: (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, number).softmax(-1)


def weights_by_loops(query, key, mask):
    """Row by row, over the allowed keys only."""
    result = query.new_zeros(*query.shape[:3], key.shape[2])
    for i, j, row in np.ndindex(*query.shape[:3]):
        may = mask[i, 0, row].nonzero().flatten()
        result[i, j, row, may] = (key[i, j, may] @ query[i, j, row] / query.shape[-1] ** 0.5).softmax(dim=0)
    return result


def by_exponentials(query, key, mask):
    shares = (einsum(query, key, "b h s d, b h k d -> b h s k") / query.shape[-1] ** 0.5).exp() * mask
    return shares / shares.sum(dim=3, keepdim=True)


def broken(query, key, mask):
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=2) * mask


def only_axis(query, key, mask):
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1) * mask


def only_mask(query, key, mask):
    return (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(dim=2)


def only_mask_finite(query, key, mask):
    return (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -1e9).softmax(dim=2) * mask


def made_to_fit(query, key, mask):
    shares = broken(query, key, mask)
    return shares / shares.sum(dim=-1, keepdim=True)


def unscaled_weights(query, key, mask):
    return (query @ key.mT).masked_fill(~mask, -torch.inf).softmax(dim=-1)


def zeros_before(query, key, mask):
    return (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, 0.0).softmax(dim=-1)


def heads_in_one(query, key, mask):
    return weights(query, key, mask).mean(dim=1)


def scaled_by(scale):
    return lambda query, key, mask: (query @ key.mT * scale(query)).masked_fill(~mask, -torch.inf).softmax(dim=-1)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def filled_with(number):
    """The mistake to take some number for smaller than every score."""
    def attention(query, key, value, mask=None):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is None:
            return scores.softmax(dim=-1) @ value
        return scores.masked_fill(~mask, number).softmax(dim=-1).masked_fill(~mask, 0.0) @ value
    return attention


def nan_in_the_gradient(query, key, value, mask=None):
    """The mistake to strike nan out of the result: it comes back with the gradient."""
    if mask is None:
        return by_matmul(query, key, value)
    result = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value
    return torch.where(mask.any(dim=-1, keepdim=True), result, 0.0)


def cut_where_empty(query, key, value, mask=None):
    result = by_matmul(query, key, value, mask)
    return result if mask is None or mask.any(dim=-1).all() else result.detach()


def each_by_itself(query, key, value, mask=None):
    """A loop that leaves a query at zero that sees nothing: then no gradient flows, and none should."""
    result = torch.zeros_like(query)
    for i in range(query.shape[0]):
        for n in range(query.shape[2]):
            seen = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[i, 0, n]
            if seen.any():
                scores = torch.einsum("hd,hkd->hk", query[i, :, n], key[i][:, seen]) / query.shape[3] ** 0.5
                result[i, :, n] = torch.einsum("hk,hkd->hd", scores.softmax(dim=1), value[i][:, seen])
    return result


def by_logarithms(query, key, value, mask=None):
    scores = torch.einsum("bhsd,bhkd->bhsk", query, key) / math.sqrt(query.size(-1))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()
    return (shares if mask is None else shares * mask) @ value


class Lying(Cross):
    """The mistake to turn the mask on its side where it fits both ways."""

    def mix(self, query, key, value, mask):
        square = mask is not None and mask.shape[2] == mask.shape[3]
        return attend(query, key, value, mask.mT if square else mask)


class CrossByBias(Cross):
    """The mask as numbers that are added."""

    def mix(self, query, key, value, mask):
        bias = None if mask is None else torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, bias)


def never_small(query, key, mask):
    return weights(query, key, mask).clamp(min=1e-3) * mask


def by_fused(query, key, mask):
    """With one value for each key, what comes out are the weights."""
    ones = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(query, key, ones, mask)


ANSWERS = {
    "spread": Answers(
        [lambda d, of_query, of_key: np.linalg.norm([of_query * of_key] * d),
         lambda d, a, b: d**0.5 * a * b, lambda d, a, b: math.sqrt(sum(a * a * b * b for _ in range(d))),
         lambda d, a, b: (torch.randn(20000, d) * a * torch.randn(20000, d) * b).sum(dim=1).std().item(),
         lambda d, a, b: np.float32(np.sqrt(d) * a * b), lambda d, a, b: torch.tensor(d * (a * b) ** 2).sqrt()],
        [(lambda d, a, b: math.sqrt(d + 1) * a * b, "begin with one product"),
         (lambda d, a, b: d * a * b, "grows like d"), (lambda d, a, b: a * b, "does not grow"),
         (lambda d, a, b: 1.0, "begin with one product"), (lambda d, a, b: d * a * a * b * b, "variance"),
         (lambda d, a, b: math.sqrt(d), "deviations of their own"), (lambda d, a, b: d**0.5 * (a + b), "multiplied"),
         (lambda d, a, b: (d * a * b) ** 0.5, "one factor too many"), (lambda d, a, b: d**0.5 * a, "key's deviation"),
         (lambda d, a, b: d**0.5 * b, "query's deviation"), (lambda d, a, b: "√d", "a number"),
         (lambda d, a, b: (d - 1) ** 0.5 * a * b, "one too few"), (lambda d, a, b: 8 * a * b, "begin with one product"),
         (lambda d, a, b: math.isqrt(d) * a * b, "begin with one product"), (lambda d, a, b: math.nan, "nan"),
         (lambda d, a, b: (d * (a * a + b * b)) ** 0.5, "its own deviation"), (lambda d, a, b: True, "a number"),
         (lambda d, a, b: a * b / d**0.5, "begin with one product")]),
    "attention": Answers(
        [by_logarithms, each_by_itself,
         filled_with(-1e9), filled_with(-math.inf), filled_with(torch.finfo(torch.float32).min), with_added(-1e4),
         with_added(-1e9),
         attend, by_matmul, by_loop, by_where,
         lambda query, key, value, mask=None: F.scaled_dot_product_attention(query, key, value, mask)],
        [(filled_with(-20.0), "every score that can occur"), (filled_with(-500.0), "about -1,000,000"),
         (filled_with(-1e4), "about -1,000,000"),
         (masked_after(clamped), "is zero. In a softmax over all keys"),
         (masked_after(without_nan), "comes back in the gradient"),
         (masked_after(where_some), "leaves nothing to normalise again"),
         (masked_after(lambda shares: shares / shares.sum(dim=-1, keepdim=True)), "gets nan"),
         (best_of_all, "the others may not notice"),
         (nan_in_the_gradient, "comes back in the gradient"),
         (cut_where_empty, "one query may look at nothing. The numbers are right, but no gradient flows"),
         (general(axis=2), "which other queries"), (general(scale=lambda d: 1.0), "as they come"),
         (general(scale=lambda d: 1 / d), "divided by too much"),
         (general(scale=lambda d: -(d**-0.5)), "sign too many"), (general(fill=-torch.inf), "gets nan"),
         (average, "average of all"), (general(fill=-1e9), "average of all"), (general(after=True), "or after it"),
         (general(upside_down=True), "True means may look"), (general(fill=0.0), "still has a weight"),
         (additive, "still has a weight"), (general(first=True), "a forbidden key"),
         (lambda query, key, value, mask=None: attend(query, key, value), "it is not used"),
         (in_place, "changed a tensor"), (single_float, "keep the dtype"), (without_gradient, "no gradient"),
         (values_behind, "the order in which keys"), (detached("query"), "reaches the query"),
         (detached("key"), "reaches the key"), (detached("value"), "reaches the value"),
         (detached("weights"), "reaches the query"), (detached("weights", with_mask=False), "reaches the query"),
         (with_dropout, "two different results"), (over_heads, "sum to one"), (nan_everywhere, "another one is nan"),
         (general(scale=lambda d: 0.5), ""), (general(scale=lambda d: d**0.5), "should be divided"),
         (lambda query, key, value, mask=None: by_matmul(query, key, value, mask).detach().numpy(), "NumPy"),
         (lambda query, key, value, mask=None: (query @ key.mT).relu() @ value, "sum to one"),
         (lambda query, key, value, mask=None: attend(query, key, value, mask)[0], "(b h s d)")]),
    "in_heads": Answers(
        [lambda x, heads, work: work(x.unflatten(-1, (heads, -1)).movedim(-2, 1)).movedim(1, -2).flatten(-2),
         by_einops, by_view, by_chunks, head_by_head],
        [(lambda x, heads, work: by_einops(x.double(), heads, work), "float64"),
         (lambda x, heads, work: by_einops(x.flip(2), heads, work).flip(2), "from nowhere else"),
         (other_cut, "every n-th number"), (only_counted, "only reshaped"), (other_join, "interleaves"),
         (joined_by_counting, "joining mixes tokens"), (tokens_before_heads, "what you give to work"),
         (one_by_one, "what you give to work"), (always(heads=2), ""), (always(heads=4), ""), (always(d=4), ""),
         (lambda x, heads, work: by_einops(x.detach(), heads, work), "no gradient flows"),
         (lambda x, heads, work: by_einops(x, heads, lambda cut: work(cut).detach()), "no gradient flows"),
         (lambda x, heads, work: by_einops(x, heads, work).float(), "torch.float32"),
         (lambda x, heads, work: by_einops(x, heads, lambda cut: work(cut).flip(1)), "joined"),
         (answer_dropped, "work's answer is lost"),
         (lambda x, heads, work: x, "0 times"),
         (lambda x, heads, work: by_einops(x.flip(1), heads, work), "from nowhere else"),
         (lambda x, heads, work: work(rearrange(x, "b s (h d) -> b h s d", h=heads)), "(b s e)")]),
    "cross_attention": Answers(
        [CrossByBias,
         Cross, CrossByHand, CrossByEinsum, CrossByName, CrossHeadByHead],
        [(Lying, "with a mask"),
         (KeysFromX, "which sequence"), (Swapped, "which sequence"), (WithoutOut, "has not run"),
         (Interleaved, "every n-th number"), (OneHead, "a single head"), (WholeWidth, "the whole vector"),
         (Unscaled, "not divided"), (ValuesOfKeys, "makes the keys"), (Unmasked, "not used"),
         (UpsideDown, "True means may look"), (Unregistered, "no linear map named key"),
         (TwoHeads, ""), (WidthOfFour, ""),
         (CrossOfTorch, "no linear map named query"), (Detached, "reaches the context"),
         (WithoutGradient, "no gradient flows"), (FirstMask, "under the mask of the first"),
         (KeysAndValuesSwapped, "are swapped"), (DropsOut, "two different results"), (Single, "keep the dtype"),
         (OneMap, "no linear map named value"),
         (ThePictureLooks, "(b q e)"), (CountedOnly, "order in which the context"),
         (lambda width, heads, context_width: nn.Linear(width, width), "no linear map named query")]),
    "mended": Answers(
        [by_fused,
         weights, by_exponentials, weights_by_loops, weights_filled(-torch.inf), weights_filled(-1e4),
         weights_filled(torch.finfo(torch.float32).min), weights_added(-1e4), weights_added(-1e9)],
        [(never_small, ""),
         (renormalised, "is nan. In a softmax over all keys"), (weights_clamped, "leaves nothing to normalise again"),
         (broken, "which other queries"), (only_axis, "have to be masked"), (only_mask, "a column"),
         (only_mask_finite, "which other queries"), (made_to_fit, "which other queries"),
         (unscaled_weights, "no longer divided"), (zeros_before, "falls on a forbidden key"),
         (heads_in_one, "(b h s k)"),
         (scaled_by(lambda query: 8 ** -0.5), "not always 8"), (scaled_by(lambda query: 1 / query.shape[-1]), "by d"),
         (scaled_by(lambda query: 0.5), ""),
         (lambda query, key, mask: F.dropout(weights(query, key, mask), 0.1), "two different results"),
         (lambda query, key, mask: weights(query, key.detach(), mask), "reaches the key"),
         (lambda query, key, mask: weights(query, key, mask).detach(), "no gradient flows"),
         (lambda query, key, mask: weights(query, key, mask) * torch.nan, "holds nan"),
         (lambda query, key, mask: weights(query.float(), key.float(), mask), "keep the dtype"),
         (lambda query, key, mask: weights(query, key, mask[:1].expand_as(mask)), "falls on a forbidden key"),
         (lambda query, key, mask: weights(query, key, ~mask), "falls on a forbidden key")]),
}

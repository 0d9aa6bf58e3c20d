"""Attention against torch's own layer, and what it does where nothing may be attended to."""

import pytest
import torch
from einops import einsum
from torch import nn

from minblip2.attention import (
    KVCache,
    LayerCache,
    Memory,
    MultiHeadAttention,
    attend,
    attention_weights,
    capture_attention,
)
from minblip2.masks import causal

from .parity import difference, randomise


def example(b=2, h=3, s=5, k=7, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(b, h, n, d, generator=generator).requires_grad_() for n in (s, k, k))
    return query, key, value, torch.rand(b, 1, s, k, generator=generator) > 0.4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 5, 7, 4), (1, 1, 1, 1, 1), (3, 2, 4, 1, 8)])
def test_fused_equals_explicit_equals_a_loop(sizes, masked):
    query, key, value, mask = example(*sizes)
    mask = mask | (torch.arange(sizes[3]) == 0) if masked else None
    fused = attend(query, key, value, mask)
    weights = attention_weights(query, key, mask)
    explicit = einsum(weights, value, "b h s k, b h k d -> b h s d")
    assert difference(explicit, fused) < 1e-6
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    for b, h, s in torch.cartesian_prod(*(torch.arange(n) for n in sizes[:3])):
        allowed = [k for k in range(sizes[3]) if mask is None or mask[b, 0, s, k]]
        raw = torch.stack([query[b, h, s] @ key[b, h, k] / sizes[4] ** 0.5 for k in allowed]).exp()
        by_hand = sum(r / raw.sum() * value[b, h, k] for r, k in zip(raw, allowed, strict=True))
        assert (fused[b, h, s] - by_hand).abs().max() < 1e-5


@pytest.mark.parametrize("context_width", [None, 20])
@pytest.mark.parametrize("width, heads", [(24, 3), (16, 1)])
def test_layer_equals_torch(context_width, width, heads):
    ours = randomise(MultiHeadAttention(width, heads, context_width))
    theirs = nn.MultiheadAttention(width, heads, kdim=context_width, vdim=context_width, batch_first=True).eval()
    weights = [ours.query.weight, ours.key.weight, ours.value.weight]
    state = ({"in_proj_weight": torch.cat(weights)} if context_width is None else
             dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True)))
    biases = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias])
    theirs.load_state_dict(state | {"in_proj_bias": biases, "out_proj.weight": ours.out.weight,
                                    "out_proj.bias": ours.out.bias})
    x, context = torch.randn(2, 5, width), torch.randn(2, 7, context_width or width)
    mask = (torch.rand(2, 1, 5, 7) > 0.3) | (torch.arange(7) == 3)
    with torch.no_grad(), capture_attention(ours) as seen:
        explicit = ours(x, mask, context=ours.project(context))
    with torch.no_grad():
        fused = ours(x, mask, context=ours.project(context))
        expected, weights = theirs(x, context, context, attn_mask=~mask.repeat(1, heads, 1, 1).flatten(0, 1),
                                   average_attn_weights=False)
        if context_width is None:
            assert difference(ours(x), theirs(x, x, x)[0]) < 1e-5
    assert difference(fused, expected) < 1e-5 and difference(explicit, expected) < 1e-5
    assert difference(seen[0], weights) < 1e-5


@pytest.mark.parametrize("explicit", [False, True])
def test_rows_that_may_see_nothing_give_zeros_and_finite_gradients(explicit):
    query, key, value, mask = example()
    mask[:, :, 1] = False
    mask[1] = False
    mixed = attention_weights(query, key, mask) @ value if explicit else attend(query, key, value, mask)
    assert (mixed[:, :, 1] == 0).all() and (mixed[1] == 0).all() and (mixed[0, :, 0] != 0).any()
    mixed.square().sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.isfinite().all() and (tensor.grad[1] == 0).all() and tensor.grad[0].abs().sum() > 0


@pytest.mark.parametrize("captured", [False, True])
def test_dropout_keeps_the_mean_and_is_off_in_evaluation(captured):
    torch.manual_seed(0)
    layer = randomise(MultiHeadAttention(8, 2, dropout=0.5))
    x = torch.randn(1, 6, 8)
    with torch.no_grad():
        calm = layer(x)
        assert torch.equal(calm, layer(x))
        layer.train()
        if captured:
            with capture_attention(layer):
                noisy = torch.stack([layer(x) for _ in range(4000)])
        else:
            noisy = torch.stack([layer(x) for _ in range(4000)])
    assert noisy.std(dim=0).min() > 0.01
    assert (noisy.mean(0) - calm).abs().max() < 6 * noisy.std(0).max() / 4000**0.5


@pytest.mark.parametrize("pieces", [[3, 1, 1], [1, 1, 1, 1, 1], [2, 3]])
def test_cache_in_pieces_equals_one_pass(pieces):
    layer, x = randomise(MultiHeadAttention(12, 3)), torch.randn(2, 5, 12)
    mask, cache, done, outputs = causal(torch.ones(2, 5, dtype=torch.bool)), LayerCache(), 0, []
    for n in pieces:
        assert (0 if cache.key is None else cache.key.shape[2]) == done
        outputs.append(layer(x[:, done:done + n], mask[:, :, done:done + n, :done + n], cache=cache))
        done += n
    assert difference(torch.cat(outputs, dim=1), layer(x, mask)) < 1e-5


def filled(layers, x):
    """A cache in which each of these layers has read x (b s e)."""
    cache = KVCache(len(layers))
    for layer, room in zip(layers, cache.layers, strict=True):
        layer(x, cache=room)
    return cache


def test_select_takes_rows_of_every_layer_and_leaves_the_original():
    layers, x = [randomise(MultiHeadAttention(8, 2), seed) for seed in (1, 2)], torch.randn(3, 4, 8)
    cache, rows, more = filled(layers, x), torch.tensor([2, 0, 0, 1]), torch.randn(4, 1, 8)
    cache.memory = Memory([(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)) for _ in layers],
                          torch.rand(3, 1, 1, 5) > 0.5)
    chosen = cache.select(rows)
    for layer, room in zip(layers, chosen.layers, strict=True):
        whole = layer(torch.cat([x[rows], more], dim=1))[:, -1:]
        assert difference(layer(more, cache=room), whole) < 1e-5
    assert chosen.length == 5 and cache.length == 4 and KVCache(2).length == 0
    assert torch.equal(chosen.memory.mask, cache.memory.mask[rows])
    for ours, theirs in zip(chosen.memory.layers, cache.memory.layers, strict=True):
        assert torch.equal(ours[0], theirs[0][rows]) and torch.equal(ours[1], theirs[1][rows])


@torch.no_grad()
def test_beams_that_move_in_place_are_what_copying_makes_of_them():
    """Reordered in place from where beams differ, a cache is what selecting whole rows makes of it."""
    layers = [randomise(MultiHeadAttention(8, 2), seed) for seed in (1, 2)]
    start, beams = filled(layers, torch.randn(2, 4, 8)), torch.tensor([0, 0, 1, 1])
    copied, moved = start.select(beams), start.select(beams)
    for step, rows in enumerate(([1, 0, 3, 3], [0, 0, 3, 2], [1, 1, 2, 2])):
        word = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(step))
        for layer, ours, theirs in zip(layers, moved.layers, copied.layers, strict=True):
            assert difference(layer(word, cache=ours), layer(word, cache=theirs)) < 1e-6
        copied = copied.select(torch.tensor(rows))
        moved.reorder(torch.tensor(rows), start=4)
        for ours, theirs in zip(moved.layers, copied.layers, strict=True):
            assert torch.equal(ours.key, theirs.key) and torch.equal(ours.value, theirs.value)
    assert moved.length == 7 and start.length == 4


def test_record_keeps_order_and_gradient_and_restores_after_an_error():
    first, second, x = MultiHeadAttention(8, 2), MultiHeadAttention(8, 4), torch.randn(1, 3, 8)
    with capture_attention(first, second) as seen:
        second(first(x)).sum().backward()
    assert [weights.shape[1] for weights in seen] == [2, 4] and seen[0].requires_grad
    with pytest.raises(RuntimeError, match="stop"), capture_attention(first):
        raise RuntimeError("stop")
    first(x)
    assert first.captured is None and second.captured is None and len(seen) == 2


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="10.*3"):
        MultiHeadAttention(10, 3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_on_a_cpu_computes_the_same_with_gradient(masked, biased):
    """The explicit form, which `attend` takes there, against the fused kernel in float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 4, generator=generator).bfloat16() for n in (5, 7, 7))
    mask = (torch.rand(2, 1, 5, 7, generator=generator) > 0.4) | (torch.arange(7) == 0) if masked else None
    bias = torch.randn(2, 3, 5, 7, generator=generator).bfloat16() if biased else None
    for scale in (None, 1.0):
        low = attend(query.requires_grad_(), key, value, mask, bias=bias, scale=scale)
        high = attend(*(x.detach().float() for x in (query, key, value)), mask,
                      bias=None if bias is None else bias.float(), scale=scale)
        assert low.dtype == torch.bfloat16 and difference(low.float(), high) < 0.03
    torch.manual_seed(0)
    dropped = torch.stack([attend(query, key, value, mask, dropout=0.5).float() for _ in range(200)])
    assert dropped.std(dim=0).min() > 0.01


def test_captured_attention_takes_bias_and_scale_as_the_fused_one_does():
    """T5's layers, whose maps would be wrong otherwise though nothing else is."""
    layer, x, bias = randomise(MultiHeadAttention(12, 3, scale=1.0)), torch.randn(2, 5, 12), torch.randn(2, 3, 5, 5)
    mask = torch.ones(5, 5).tril().bool()[None, None]
    with capture_attention(layer):
        explicit = layer(x, mask, bias=bias)
    assert difference(explicit, layer(x, mask, bias=bias)) < 1e-5

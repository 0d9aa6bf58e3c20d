"""The masks, entry by entry, and proved by gradients: what is forbidden has a derivative of exactly zero."""

import pytest
import torch

from minblip2 import masks
from minblip2.qformer import QFormer

from .parity import TINY, difference, lengths_mask, randomise

RULES = {  # facts §2: may row i look at key j? `iq`, `jq`: is it a query; v: is key j a real token
    "bidirectional": lambda iq, jq, i, j, v: jq or v,
    "unimodal": lambda iq, jq, i, j, v: jq if iq else (not jq and v),
    "multimodal_causal": lambda iq, jq, i, j, v: jq if iq else (jq or (j <= i and v)),
}
QUERIES = TINY.num_queries


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("queries", [0, 1, 4])
@pytest.mark.parametrize("lengths, side", [([3, 5, 1], "right"), ([2, 4], "left"), ([1], "right")])
def test_every_entry(name, queries, lengths, side):
    text_mask = lengths_mask(lengths, side)
    mask = getattr(masks, name)(queries, text_mask)
    s = queries + text_mask.shape[1]
    assert mask.dtype == torch.bool and mask.shape == (len(lengths), 1, s, s)
    for b, i, j in torch.cartesian_prod(torch.arange(len(lengths)), torch.arange(s), torch.arange(s)):
        valid = j >= queries and bool(text_mask[b, j - queries])
        expected = RULES[name](bool(i < queries), bool(j < queries), i, j, valid)
        assert mask[b, 0, i, j] == bool(expected), (name, b, i, j)


@pytest.mark.parametrize("lengths, side", [([3, 5, 1], "right"), ([2, 4], "left")])
def test_causal_is_lower_triangle_without_padding(lengths, side):
    attention_mask = lengths_mask(lengths, side)
    n = attention_mask.shape[1]
    expected = [[[[j <= i and bool(row[j]) for j in range(n)] for i in range(n)]] for row in attention_mask]
    assert masks.causal(attention_mask).tolist() == expected


@pytest.mark.parametrize("lengths, side", [([3, 5, 1], "right"), ([2, 4], "left")])
def test_positions_count_the_tokens_before(lengths, side):
    attention_mask = lengths_mask(lengths, side)
    counted = masks.token_positions(attention_mask)
    for row, places in zip(attention_mask, counted, strict=True):
        assert places[row].tolist() == list(range(int(row.sum())))


def run(name, x, image, text_mask):
    """Outputs (b s e) of a small Q-Former whose input tokens x (b s e) carry gradient."""
    model = randomise(QFormer(TINY))
    del model.query_tokens  # a parameter; x takes its place
    model.query_tokens, model.embed_text = x[:, :QUERIES], lambda ids, first_position=0: x[:, QUERIES:]
    out = model(model.project_image(image), torch.zeros_like(text_mask, dtype=torch.long),
                getattr(masks, name)(QUERIES, text_mask))
    return torch.cat([out.queries, out.text], dim=1)


@pytest.mark.parametrize("name", RULES)
def test_gradient_is_exactly_zero_where_forbidden_and_not_where_allowed(name):
    text_mask = lengths_mask([5])
    text_mask[:, 4] = False
    x = torch.randn(1, QUERIES + 5, TINY.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    image = torch.randn(1, 6, TINY.image_width).requires_grad_()
    out, mask = run(name, x, image, text_mask), getattr(masks, name)(QUERIES, text_mask)[0, 0]
    reach = mask | torch.eye(len(mask), dtype=torch.bool)  # the residual path is always open
    for _ in range(TINY.layers):  # who is seen by whom through several layers
        reach = (reach.float() @ reach.float()) > 0
    for i in range(QUERIES + 5):
        towards, to_image = torch.autograd.grad(out[0, i].square().sum(), [x, image], retain_graph=True,
                                                allow_unused=True)
        touched = towards[0].abs().amax(dim=1) > 0
        assert touched.tolist() == reach[i].tolist(), (name, i)
        assert (to_image.abs().sum() > 0) == bool(reach[i, :QUERIES].any()), (name, i)


@pytest.fixture(scope="module")
def model():
    return randomise(QFormer(TINY))


def inputs(seed=0, lengths=(3, 6, 1)):
    generator = torch.Generator().manual_seed(seed)
    text_mask = lengths_mask(list(lengths))
    return (torch.randn(len(lengths), 5, TINY.image_width, generator=generator),
            torch.randint(0, 50, text_mask.shape, generator=generator), text_mask)


def test_unimodal_joint_pass_is_two_separate_passes(model):
    image, ids, text_mask = inputs()
    kv = model.project_image(image)
    joint = model(kv, ids, masks.unimodal(QUERIES, text_mask))
    text = model(text_ids=ids, mask=masks.unimodal(0, text_mask)).text
    assert difference(joint.queries, model(kv).queries) < 1e-5
    assert difference(joint.text[text_mask], text[text_mask]) < 1e-5


def test_text_on_cached_queries_is_the_joint_causal_pass(model):
    image, ids, text_mask = inputs()
    kv, cache, mask = model.project_image(image), model.new_cache(), masks.multimodal_causal(QUERIES, text_mask)
    alone = model(kv, cache=cache)
    cached = model(text_ids=ids, mask=mask[:, :, QUERIES:], cache=cache).text
    joint = model(kv, ids, mask)
    assert difference(joint.queries, alone.queries) < 1e-5
    assert difference(cached[text_mask], joint.text[text_mask]) < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_padding_changes_nothing(model, name):
    image, ids, text_mask = inputs()
    kv, make = model.project_image(image), getattr(masks, name)
    padded_ids = torch.nn.functional.pad(ids, (0, 4), value=7)
    padded_mask = torch.nn.functional.pad(text_mask, (0, 4), value=False)
    short, long = model(kv, ids, make(QUERIES, text_mask)), model(kv, padded_ids, make(QUERIES, padded_mask))
    assert difference(long.queries, short.queries) < 1e-5
    assert difference(long.text[padded_mask], short.text[text_mask]) < 1e-5
    alone = model(model.project_image(image[:1]), ids[:1, :3], make(QUERIES, text_mask[:1, :3]))
    assert difference(short.queries[:1], alone.queries) < 1e-5 and difference(short.text[:1, :3], alone.text) < 1e-5

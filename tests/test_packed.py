"""Packed matrices are the same matrices, and only where they may be used."""

import copy

import pytest
import torch
from torch import nn

from minblip2.lm import packed
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.lm.packed import PackedLinears
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """The matrices that packed products were asked for."""
    asked, multiply = [], packed.multiply
    monkeypatch.setattr(packed, "multiply", lambda x, weight, bias=None: (
        asked.append(weight) or multiply(x, weight, bias)))
    return asked


def frozen(width=24, out=40, bias=True):
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (8, 1), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("low", [False, True])
def test_products_are_the_same_but_for_rounding(products, shape, bias, low):
    layer, x = frozen(bias=bias), torch.randn(*shape, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = layer(x)
        with PackedLinears():
            found = layer(x)
    assert found.dtype == expected.dtype == (torch.bfloat16 if low else torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-2 if low else 1e-6, rtol=1e-2 if low else 1e-5)
    assert products == [layer.weight]


def test_only_frozen_matrices_without_gradient(products):
    layer, trained, x = frozen(), nn.Linear(24, 40), torch.randn(3, 24, requires_grad=True)
    with PackedLinears():
        layer(x).sum().backward()
        with torch.no_grad():
            trained(x)
            nn.functional.linear(x, layer.weight * 2)
    assert products == [] and torch.allclose(x.grad, layer.weight.sum(dim=0).expand(3, -1), atol=1e-5)
    with torch.no_grad():
        layer(x)
    assert products == [], "the mode has ended"


def test_a_changed_matrix_is_packed_anew_and_the_old_copy_goes():
    layer, x = frozen(bias=False), torch.randn(3, 24)
    with torch.no_grad(), PackedLinears():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert len(packed.COPIES[layer.weight]) == 1
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x)
    before = len(packed.COPIES)
    del layer
    assert len(packed.COPIES) == before - 1, "copies live as long as their matrix"


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_the_same(products, beams):
    torch.manual_seed(0)
    lm = OPT(OPTConfig(vocab_size=60, width=32, layers=2, heads=4, mlp_width=48, max_positions=64))
    config = QFormerConfig(width=24, layers=2, heads=3, mlp_width=40, num_queries=4, image_width=20, vocab_size=60)
    stage2 = Stage2.from_stage1(Stage1(config), lm).eval()
    image, prompt = torch.randn(5, 9, 20), torch.full((5, 1), 2)
    write = lambda: stage2.generate(image, prompt, prompt.bool(), eos_id=2, beams=beams, max_length=9)  # noqa: E731
    expected = write()
    with PackedLinears():
        assert torch.equal(write(), expected)
    assert any(weight is lm.token_embedding.weight for weight in products), "the head, too"
    assert len({id(weight) for weight in products}) == 1 + 6 * 2, "and each matrix of two blocks"
    copied = copy.deepcopy(stage2)
    with PackedLinears():
        assert torch.equal(copied.generate(image, prompt, prompt.bool(), eos_id=2, beams=beams, max_length=9), expected)

"""Packed matrices are the same matrices, and only where they may be used."""

import copy
import os
import subprocess
import sys

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


@pytest.mark.parametrize("low", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_that_onednn_may_refuse_are_multiplied_all_the_same(products, kind, low):
    layer, x = frozen().to(kind), torch.randn(3, 24).to(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = layer(x)
        with PackedLinears():
            found = layer(x)
    assert found.dtype == expected.dtype and products == [layer.weight]
    torch.testing.assert_close(found, expected, atol=1e-12 if kind == torch.float64 else 2e-2, rtol=1e-2)


def test_where_onednn_refuses_no_copy_is_made(products, monkeypatch):
    monkeypatch.setattr(packed, "packable", lambda dtype: dtype != torch.bfloat16)
    layer, x = frozen(), torch.randn(3, 24)
    with torch.no_grad(), PackedLinears(), torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
        assert products == [layer.weight] and layer.weight not in packed.COPIES
    torch.testing.assert_close(low, layer(x).bfloat16(), atol=2e-2, rtol=1e-2)


def test_what_onednn_packs_it_says_itself():
    assert packed.packable(torch.float32) and not packed.packable(torch.float64)
    with torch.no_grad(), PackedLinears():
        assert frozen(24, 1)(torch.randn(0, 24)).shape == (0, 1)
        for rows, columns in ((0, 24), (3, 0)):  # matrices without rows or columns
            empty = nn.Parameter(torch.empty(rows, columns), requires_grad=False)
            assert nn.functional.linear(torch.randn(2, columns), empty).shape == (2, rows)
        with pytest.raises(RuntimeError):  # as without it: dtypes that differ are no product
            frozen()(torch.randn(3, 24, dtype=torch.float64))


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
        layer.weight.data = torch.randn(40, 24)
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x)
    before = len(packed.COPIES)
    del layer
    assert len(packed.COPIES) == before - 1, "copies live as long as their matrix"


def test_a_matrix_made_in_inference_mode_is_multiplied_all_the_same(products):
    with torch.inference_mode():
        layer, x = frozen(), torch.randn(3, 24)
        expected = layer(x)
        with PackedLinears():
            assert torch.equal(layer(x), expected) and not products


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


def test_an_older_cpu_writes_the_same():
    """oneDNN limited to AVX2, as it is on a CPU without AVX-512: bfloat16 is multiplied, though not packed."""
    code = ("import torch\nfrom torch import nn\nfrom minblip2.lm import packed\n"
            "layer, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(3, 24)\n"
            "with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):\n"
            "    expected = layer(x)\n"
            "    with packed.PackedLinears():\n"
            "        torch.testing.assert_close(layer(x), expected, atol=2e-2, rtol=1e-2)\n"
            "print(packed.packable(torch.float32), packed.packable(torch.bfloat16))")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].split()[0] == "True", done.stdout + done.stderr

"""Llama against transformers' LlamaForCausalLM: grouped queries, untied heads, rotary base, padding, cache."""

import pytest
import torch

from minblip2.lm.llama import Llama, LlamaConfig

from .pairs import LLAMA_SIZES, check_parity, llama_pair


@pytest.mark.parametrize("sizes", LLAMA_SIZES, ids=["grouped", "untied", "one-key-head"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lengths, side", [([7, 7], "right"), ([3, 8, 1], "right"), ([3, 8, 1], "left"), ([1], "left")])
def test_equals_transformers(sizes, seed, lengths, side):
    check_parity(*llama_pair(sizes, seed), lengths, side)


def test_defaults_are_smollm2_135m():
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(LlamaConfig()).parameters()) == 134_515_008

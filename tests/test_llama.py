"""Llama against transformers' LlamaForCausalLM: grouped queries, untied heads, rotary base, padding, cache."""

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from minblip2.lm.llama import Llama, LlamaConfig
from minblip2.weights import names
from minblip2.weights.checkpoint import load_into

from .parity import randomise
from .test_opt import check_parity

SIZES = [dict(vocab_size=40, width=24, layers=2, heads=6, kv_heads=2, mlp_width=48, rope_theta=1e4, tied=True),
         dict(vocab_size=101, width=32, layers=3, heads=4, kv_heads=4, mlp_width=20, rope_theta=1e5, eps=1e-6,
              tied=False),
         dict(vocab_size=60, width=32, layers=2, heads=4, kv_heads=1, mlp_width=40, rope_theta=500.0, tied=False)]


def llama_pair(sizes=SIZES[0], seed=0, **extra):
    """Our Llama and transformers' with the same random weights."""
    theirs = LlamaForCausalLM(TheirConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["width"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["mlp_width"], rms_norm_eps=sizes.get("eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        tie_word_embeddings=sizes["tied"], max_position_embeddings=64, **extra))
    randomise(theirs, seed)
    ours = Llama(LlamaConfig(**sizes))
    load_into(ours, theirs.state_dict().items(), names.LLAMA, "transformers")
    return ours.eval(), theirs


@pytest.mark.parametrize("sizes", SIZES, ids=["grouped", "untied", "one-key-head"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lengths, side", [([7, 7], "right"), ([3, 8, 1], "right"), ([3, 8, 1], "left"), ([1], "left")])
def test_equals_transformers(sizes, seed, lengths, side):
    check_parity(*llama_pair(sizes, seed), lengths, side)


def test_defaults_are_smollm2_135m():
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(LlamaConfig()).parameters()) == 134_515_008

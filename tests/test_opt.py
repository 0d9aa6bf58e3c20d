"""OPT against transformers' OPTForCausalLM on random weights; padding on either side, with and without a cache."""

import pytest
import torch

from minblip2.lm.opt import OPT, OPTConfig

from .pairs import OPT_SIZES, check_parity, opt_pair


@pytest.mark.parametrize("sizes", OPT_SIZES, ids=["heads3", "heads4", "350m"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lengths, side", [([7, 7], "right"), ([3, 8, 1], "right"), ([3, 8, 1], "left"), ([1], "left")])
def test_equals_transformers(sizes, seed, lengths, side):
    check_parity(*opt_pair(sizes, seed), lengths, side)


def test_defaults_are_opt_125m():
    with torch.device("meta"):
        assert sum(p.numel() for p in OPT(OPTConfig()).parameters()) == 125_239_296
        opt_2_7b = OPTConfig(vocab_size=50304, width=2560, layers=32, heads=32, mlp_width=10240)  # padded as on the hub
        assert sum(p.numel() for p in OPT(opt_2_7b).parameters()) == 2_651_678_720

"""OPT against transformers' OPTForCausalLM on random weights; padding on either side, with and without a cache."""

import pytest
import torch
from transformers import OPTConfig as TheirConfig
from transformers import OPTForCausalLM

from minblip2 import masks
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.weights import names
from minblip2.weights.checkpoint import load_into

from .parity import difference, lengths_mask, randomise

SIZES = [dict(vocab_size=40, width=24, layers=2, heads=3, mlp_width=48, max_positions=32),
         dict(vocab_size=101, width=16, layers=3, heads=4, mlp_width=20, max_positions=64),
         dict(vocab_size=40, width=24, layers=3, heads=2, mlp_width=28, max_positions=32, pre_norm=False, embed_dim=10)]


def opt_pair(sizes=SIZES[0], seed=0, **extra):
    """Our OPT and transformers' with the same random weights."""
    theirs = OPTForCausalLM(TheirConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["width"],
        word_embed_proj_dim=sizes.get("embed_dim", sizes["width"]), do_layer_norm_before=sizes.get("pre_norm", True),
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], ffn_dim=sizes["mlp_width"],
        max_position_embeddings=sizes["max_positions"], **extra))
    randomise(theirs, seed)
    ours = OPT(OPTConfig(**sizes))
    load_into(ours, theirs.state_dict().items(), names.OPT, "transformers")
    return ours.eval(), theirs


def check_parity(ours, theirs, lengths, side):
    """Logits on valid tokens, in one pass and in pieces through the cache, equal transformers'."""
    mask = lengths_mask(lengths, side)
    ids = torch.randint(0, ours.vocab_size, mask.shape, generator=torch.Generator().manual_seed(3))
    whole = masks.causal(mask)
    with torch.no_grad():
        expected = theirs(inputs_embeds=theirs.get_input_embeddings()(ids), attention_mask=mask.long()).logits
        embeds, cache, positions = ours.embed(ids), ours.new_cache(), masks.token_positions(mask)
        once = ours.lm_logits(ours(embeds, whole, positions))
        first = ids.shape[1] // 2
        pieces = [ours(embeds[:, :first], whole[:, :, :first, :first], positions[:, :first], cache)] if first else []
        pieces += [ours(embeds[:, i:i + 1], whole[:, :, i:i + 1, :i + 1], positions[:, i:i + 1], cache)
                   for i in range(first, ids.shape[1])]
        cached = ours.lm_logits(torch.cat(pieces, dim=1))
    assert difference(once[mask], expected[mask]) < 1e-5
    assert difference(cached[mask], expected[mask]) < 1e-5


@pytest.mark.parametrize("sizes", SIZES, ids=["heads3", "heads4", "350m"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lengths, side", [([7, 7], "right"), ([3, 8, 1], "right"), ([3, 8, 1], "left"), ([1], "left")])
def test_equals_transformers(sizes, seed, lengths, side):
    check_parity(*opt_pair(sizes, seed), lengths, side)


def test_defaults_are_opt_125m():
    with torch.device("meta"):
        assert sum(p.numel() for p in OPT(OPTConfig()).parameters()) == 125_239_296
        opt_2_7b = OPTConfig(vocab_size=50304, width=2560, layers=32, heads=32, mlp_width=10240)  # padded as on the hub
        assert sum(p.numel() for p in OPT(opt_2_7b).parameters()) == 2_651_678_720

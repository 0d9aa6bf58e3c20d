"""Language models of ours and of transformers with the same random weights, and what is asked of both."""

import torch
from torch import nn
from transformers import LlamaConfig as TheirLlamaConfig
from transformers import LlamaForCausalLM, OPTForCausalLM, T5ForConditionalGeneration
from transformers import OPTConfig as TheirOPTConfig
from transformers import T5Config as TheirT5Config

from minblip2 import masks
from minblip2.generation import generate
from minblip2.lm.llama import Llama, LlamaConfig
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.lm.t5 import T5, T5Config
from minblip2.weights import names
from minblip2.weights.checkpoint import load_into

from .batches import END
from .parity import difference, lengths_mask, randomise

OPT_SIZES = [dict(vocab_size=40, width=24, layers=2, heads=3, mlp_width=48, max_positions=32),
             dict(vocab_size=101, width=16, layers=3, heads=4, mlp_width=20, max_positions=64),
             dict(vocab_size=40, width=24, layers=3, heads=2, mlp_width=28, max_positions=32, pre_norm=False,
                  embed_dim=10)]
LLAMA_SIZES = [dict(vocab_size=40, width=24, layers=2, heads=6, kv_heads=2, mlp_width=48, rope_theta=1e4, tied=True),
               dict(vocab_size=101, width=32, layers=3, heads=4, kv_heads=4, mlp_width=20, rope_theta=1e5, eps=1e-6,
                    tied=False),
               dict(vocab_size=60, width=32, layers=2, heads=4, kv_heads=1, mlp_width=40, rope_theta=500.0, tied=False)]
FLAN = dict(vocab_size=40, width=24, layers=2, heads=3, head_width=8, mlp_width=40, buckets=8, max_distance=20,
            activation="gelu", gated=True, tied=False, scaled=False)
T5_SIZES = {"flan, as in blip-2": FLAN,
            "flan, as trained": FLAN | dict(activation="gelu_new", head_width=5, layers=3, decoder_layers=1),
            "1.1, tied": FLAN | dict(activation="gelu_new", tied=True, layers=1, decoder_layers=2, buckets=32),
            "1.0": FLAN | dict(activation="relu", gated=False, tied=True, scaled=True, heads=2, head_width=12),
            "1.0, untied, scaled": FLAN | dict(activation="relu", gated=False, scaled=True)}


def opt_pair(sizes=OPT_SIZES[0], seed=0, **extra):
    """Our OPT and transformers' with the same random weights."""
    theirs = OPTForCausalLM(TheirOPTConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["width"],
        word_embed_proj_dim=sizes.get("embed_dim", sizes["width"]), do_layer_norm_before=sizes.get("pre_norm", True),
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], ffn_dim=sizes["mlp_width"],
        max_position_embeddings=sizes["max_positions"], **extra))
    randomise(theirs, seed)
    ours = OPT(OPTConfig(**sizes))
    load_into(ours, theirs.state_dict().items(), names.OPT, "transformers")
    return ours.eval(), theirs


def llama_pair(sizes=LLAMA_SIZES[0], seed=0, **extra):
    """Our Llama and transformers' with the same random weights."""
    theirs = LlamaForCausalLM(TheirLlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["width"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["mlp_width"], rms_norm_eps=sizes.get("eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        tie_word_embeddings=sizes["tied"], max_position_embeddings=64, **extra))
    randomise(theirs, seed)
    ours = Llama(LlamaConfig(**sizes))
    load_into(ours, theirs.state_dict().items(), names.LLAMA, "transformers")
    return ours.eval(), theirs


def t5_pair(sizes=FLAN, seed=0, **extra):
    """Our T5 and transformers' with the same random weights."""
    kind = ("gated-" if sizes["gated"] else "") + sizes["activation"].removesuffix("_new")
    theirs = T5ForConditionalGeneration(TheirT5Config(
        vocab_size=sizes["vocab_size"], d_model=sizes["width"], d_kv=sizes["head_width"], d_ff=sizes["mlp_width"],
        num_layers=sizes["layers"], num_decoder_layers=sizes.get("decoder_layers", sizes["layers"]),
        num_heads=sizes["heads"], relative_attention_num_buckets=sizes["buckets"],
        relative_attention_max_distance=sizes["max_distance"], feed_forward_proj=kind, dense_act_fn=sizes["activation"],
        tie_word_embeddings=sizes["scaled"], decoder_start_token_id=0, **extra))
    if not sizes["tied"]:  # T5Config ties them whatever one asks for
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.shared.weight))
    randomise(theirs, seed)
    ours = T5(T5Config(**sizes))
    state = theirs.state_dict()
    if sizes["tied"]:
        del state["lm_head.weight"]
    load_into(ours, state.items(), names.T5_GATED if sizes["gated"] else names.T5_PLAIN, "transformers")
    return ours.eval(), theirs


PAIRS = {"opt": opt_pair, "llama": llama_pair, "t5": t5_pair}


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


def prompts(ours, lengths=(2, 4, 1, 1, 3), seed=0):
    """Embeddings and mask laid out as in BLIP-2: two visual tokens, padding, a text of `lengths` tokens.

    For an encoder padding comes last: where it stands between tokens, transformers' T5 takes it for distance.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = lengths_mask([*lengths], "right" if ours.decoder_start_ids else "left")
    mask = torch.cat([torch.ones(len(lengths), 2, dtype=torch.bool), texts], dim=1)
    return torch.randn(*mask.shape, ours.width, generator=generator), mask


def write(lm, embeds, mask, **settings):
    """Our decoding after the given embeddings."""
    cache = lm.new_cache()

    @torch.no_grad()
    def step(ids, attention_mask, cache):
        positions = masks.token_positions(attention_mask)[:, -1:]
        return lm.lm_logits(lm(lm.embed(ids), attention_mask[:, None, None], positions, cache)[:, -1])

    with torch.no_grad():
        first, attention_mask = lm.prefill(embeds, mask, cache)
        logits = lm.lm_logits(first)
    return generate(step, logits, attention_mask, cache, eos_id=END, decoder_start_ids=lm.decoder_start_ids, **settings)

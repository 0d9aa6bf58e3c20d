"""The official checkpoints by name, shape and count: transformers' models at full size, as outlines without numbers."""

import pytest
import torch
import transformers
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, OPTConfig, T5Config

from minblip2.lm import opt, t5
from minblip2.qformer import QFormerConfig
from minblip2.vit import CLIP_L, EVA_G
from minblip2.weights import names, official, pretrained
from minblip2.weights.checkpoint import Checkpoint
from minblip2.weights.official import load_blip2, load_stage1
from minblip2.weights.pretrained import load_vit

LMS = {  # the language models' settings on the hub, and how many parameters stage 2 trains with each (paper, Table 2)
    "OPT-2.7B": (OPTConfig(vocab_size=50304, hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240,
                           num_hidden_layers=32, num_attention_heads=32, eos_token_id=50118), 107_133_696),
    "OPT-6.7B": (OPTConfig(vocab_size=50304, hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384,
                           num_hidden_layers=32, num_attention_heads=32, eos_token_id=50118), 108_314_880),
    "FlanT5-XL": (T5Config(vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
                           feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False),
                  106_739_968),
    "FlanT5-XXL": (T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                            feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False),
                   108_314_880),
}


def outline(kind, config, folder, monkeypatch):
    """transformers' model without numbers; loading from the folder finds its tensors, and its settings as written."""
    with torch.device("meta"):
        model = kind(config)
        if getattr(config.text_config, "model_type", "") == "t5" and hasattr(model, "language_model"):
            shared = model.language_model.shared.weight  # FlanT5's head is its own, whatever T5Config says
            model.language_model.lm_head.weight = nn.Parameter(torch.empty_like(shared))
    config.save_pretrained(folder)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for reader in (official, pretrained):
        monkeypatch.setattr(reader, "open_hub", lambda folder: Checkpoint(str(folder), shapes, state.items()))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("lm", LMS)
def test_every_tensor_has_its_place_and_stage2_trains_the_papers_number(lm, tmp_path, monkeypatch):
    text, trained = LMS[lm]
    config = Blip2Config(text_config=text, image_token_index=32100)
    outline(Blip2ForConditionalGeneration, config, tmp_path, monkeypatch)
    vit, stage2 = load_blip2(tmp_path)
    assert count(vit) == 0 and count(stage2) == trained
    assert sum(p.numel() for p in vit.parameters()) == 985_952_256 - 2 * 1408  # the last norm is the bridge's here
    assert sum(p.numel() for p in load_vit(tmp_path).parameters()) == 985_952_256 - 2 * 1408


def test_every_tensor_for_retrieval_has_its_place(tmp_path, monkeypatch):
    config = Blip2Config(qformer_config=dict(vocab_size=30523, use_qformer_text_input=True))
    outline(Blip2ForImageTextRetrieval, config, tmp_path, monkeypatch)
    assert count(load_stage1(tmp_path)) == 186_705_470  # facts of the original: Q-Former, heads, norm, temperature


@pytest.mark.parametrize("key_map, ours, theirs", [
    (names.QFORMER, QFormerConfig(), transformers.Blip2QFormerConfig(vocab_size=30523)),
    (names.EVA, EVA_G, transformers.Blip2VisionConfig()),
    (names.CLIP, CLIP_L, transformers.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                                                       num_attention_heads=16, patch_size=14)),
    (names.OPT, opt.OPTConfig(embed_dim=768), transformers.OPTConfig()),
    (names.T5_GATED, t5.T5Config(decoder_layers=6), transformers.T5Config())],
    ids=["qformer", "eva", "clip", "opt", "t5"])
def test_default_sizes_are_the_originals(key_map, ours, theirs):
    for setting, name in key_map.settings.items():
        assert getattr(ours, name) == getattr(theirs, setting), (setting, name)

"""Real weights give transformers' numbers, and every kind of broken hub folder is named in one sentence."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from minblip2 import UserError, masks
from minblip2.attention import KVCache
from minblip2.data.tokenizer import Tokenizer
from minblip2.generation import generate
from minblip2.qformer import QFormer
from minblip2.weights import names as key_maps
from minblip2.weights import pretrained
from minblip2.weights.checkpoint import HubConfig
from minblip2.weights.official import bert_sizes, init_from_bert
from minblip2.weights.pretrained import load_lm, load_vit, read_config

from .parity import difference, lengths_mask, randomise

CAPTION = "Two dogs run along the beach while a child in a red coat throws a ball."


@torch.no_grad()
def test_dinov2_small_features(parts):
    folder = parts / "dinov2-small"
    ours, theirs = load_vit(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for size in [(518, 518), (224, 224), (112, 168)]:
        image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        assert difference(ours(image), theirs(image).last_hidden_state) < 1e-5
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@torch.no_grad()
def test_minilm_text_states(parts):
    folder = parts / "all-MiniLM-L6-v2"
    config = bert_sizes(folder, read_config(folder), image_width=20, num_queries=4)
    tokenizer = Tokenizer.from_folder(folder)
    ours = init_from_bert(QFormer(config), folder).eval()
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.embeddings.token_type_embeddings.weight.zero_()  # the Q-Former drops them, as LAVIS does
    ids, mask = tokenizer.pad([tokenizer.encode(CAPTION), tokenizer.encode("a cat")])
    expected = theirs(ids, attention_mask=mask.long()).last_hidden_state
    assert difference(ours(text_ids=ids, mask=masks.unimodal(0, mask)).text[mask], expected[mask]) < 1e-5
    assert len(tokenizer) == config.vocab_size == ours.token_embedding.weight.shape[0] == ours.dec_id + 1


@torch.no_grad()
def test_smollm2_logits_and_greedy_tokens(parts):
    folder = parts / "SmolLM2-135M-Instruct"
    tokenizer, ours = Tokenizer.from_folder(folder), load_lm(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask = tokenizer.pad([tokenizer.encode_prompt(CAPTION), tokenizer.encode_prompt("The sea is")], side="left")
    expected = theirs(ids, attention_mask=mask.long()).logits
    cache = KVCache(ours.config.layers)
    logits = ours.lm_logits(ours(ours.embed(ids), masks.causal(mask), masks.token_positions(mask), cache))
    assert difference(logits[mask], expected[mask]) < 1e-4

    def step(ids, mask, cache):
        visible, position = mask[:, None, None], masks.token_positions(mask)[:, -1:]
        return ours.lm_logits(ours(ours.embed(ids), visible, position, cache)[:, -1])

    written = generate(step, logits[:, -1], mask, cache, eos_id=-1, max_length=30)
    reference = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, min_new_tokens=30, max_new_tokens=30,
                                eos_token_id=None, pad_token_id=2)
    assert written.tolist() == reference[:, ids.shape[1]:].tolist()


SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)


def build(kind, folder):
    """A small random hub folder, as transformers writes it."""
    model = {"vit": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=28, mlp_ratio=2)),
             "lm": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=3)),
             "bert": lambda: BertModel(BertConfig(**SIZES, vocab_size=50)),
             "mlm": lambda: BertForMaskedLM(BertConfig(**SIZES, vocab_size=50))}[kind]()
    randomise(model, 1).save_pretrained(folder)
    return model


def load_bert(folder):
    torch.manual_seed(0)
    config = bert_sizes(folder, read_config(folder), image_width=20, num_queries=4, dropout=0.0)
    return init_from_bert(QFormer(config), folder).eval()


LOADERS = {"vit": load_vit, "lm": load_lm, "bert": load_bert, "mlm": load_bert}


@pytest.mark.parametrize("old_names", [False, True])
@torch.no_grad()
def test_bert_fills_both_feed_forwards_and_the_lm_head_and_grows_dec(tmp_path, old_names):
    theirs = build("mlm", tmp_path)
    if old_names:  # as in the file of bert-base-uncased itself
        weights = load_file(tmp_path / "model.safetensors")
        save_file({k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                   for k, v in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    ours = load_bert(tmp_path)
    for block in ours.blocks:
        for text, query in ((block.text_mlp, block.query_mlp), (block.text_norm, block.query_norm)):
            for a, b in zip(text.parameters(), query.parameters(), strict=True):
                assert torch.equal(a, b) and a.data_ptr() != b.data_ptr() and a.requires_grad and b.requires_grad
    words = theirs.get_input_embeddings().weight
    assert ours.token_embedding.weight.shape == (51, 24) and torch.equal(ours.token_embedding.weight[:50], words)
    assert 0 < ours.token_embedding.weight[50].std() < 0.05 and ours.lm_head.bias[50] == 0
    theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    mask = lengths_mask([5, 3])
    ids = torch.randint(1, 50, mask.shape)
    expected = theirs(ids, attention_mask=mask.long()).logits
    logits = ours.lm_logits(ours(text_ids=ids, mask=masks.unimodal(0, mask)).text)
    assert difference(logits[mask][:, :50], expected[mask]) < 1e-5


@pytest.mark.parametrize("holds", ["both, copy first", "both, words first", "copy alone", "another"])
def test_a_bert_may_hold_its_word_embeddings_as_the_head_too(tmp_path, holds):
    """As pickles do, which do not know that the two are one; they have one row less than with [DEC]."""
    weights = build("mlm", tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    words, head = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    expected = weights[words].clone()
    order = reversed(weights) if holds == "both, copy first" else weights
    weights = {name: weights[name] + (holds == "another" and name == head) for name in order
               if holds != "copy alone" or name != words}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    if holds == "another":
        with pytest.raises(UserError, match="cls.predictions.decoder.weight is not a copy of the word embeddings"):
            load_bert(tmp_path)
    else:
        found = load_bert(tmp_path).token_embedding.weight
        assert torch.equal(found[:-1], expected) and 0 < found[-1].std() < 0.05


def edit(change):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        name = sorted(name for name in weights if "layer" in name and name.endswith("weight"))[0]
        change(weights, name)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return name
    return spoil


def configure(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {k: v for k, v in (config | changes).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return spoil


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("kind", ["vit", "lm", "bert"])
def test_what_is_loaded_no_longer_depends_on_the_file(tmp_path, kind):
    build(kind, tmp_path)
    before = {name: tensor.clone() for name, tensor in LOADERS[kind](tmp_path).state_dict().items()}
    loaded, path = LOADERS[kind](tmp_path), tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


SPOILED = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text('{"model_', encoding="utf-8"),
                      "config.json is not JSON"),
    "config without a size": (configure(num_attention_heads=None), "num_attention_heads"),
    "another model": (configure(model_type="gpt2"), "'gpt2'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file"),
    "truncated": (cut, "model.safetensors cannot be read"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
    "missing tensor": (edit(lambda weights, name: weights.pop(name)), "lacks the weights of"),
    "left-over tensor": (edit(lambda weights, name: weights.update({"extra.thing": torch.zeros(2)})), "extra.thing"),
    "wrong shape": (edit(lambda weights, name: weights.update({name: torch.zeros(3, 5)})), r"\(3, 5\)"),
    "one layer too few": (configure(num_hidden_layers=1), "layers?.1.*does not have"),
}


@pytest.mark.parametrize("kind", ["vit", "lm", "bert"])
@pytest.mark.parametrize("fault", SPOILED)
def test_broken_folders_are_named_in_one_sentence(tmp_path, kind, fault):
    build(kind, tmp_path)
    LOADERS[kind](tmp_path)
    spoil, names = SPOILED[fault]
    name = spoil(tmp_path)
    with pytest.raises(UserError, match=names) as error:
        LOADERS[kind](tmp_path)
    assert "\n" not in str(error.value)
    assert fault != "wrong shape" or name in str(error.value)


def test_a_missing_shard_is_noticed(tmp_path):
    build("lm", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for i, names in enumerate((sorted(weights)[:5], sorted(weights)[5:])):
        save_file({name: weights[name] for name in names}, tmp_path / f"model-{i}.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    load_lm(tmp_path)
    shutil.move(tmp_path / "model-1.safetensors", tmp_path / "model-1.part")
    with pytest.raises(UserError, match="lacks the weights of"):
        load_lm(tmp_path)


@pytest.mark.parametrize("change, names", [({"use_swiglu_ffn": True}, "gated"), ({"hidden_act": "relu"}, "GELU"),
                                           ({"mlp_ratio": 2.0}, None)], ids=str)
def test_dinov2_variants(tmp_path, change, names):
    theirs = build("vit", tmp_path)
    configure(**change)(tmp_path)
    if names:
        with pytest.raises(UserError, match=names):
            load_vit(tmp_path)
    else:
        image = torch.randn(1, 3, 28, 42)
        assert difference(load_vit(tmp_path)(image), theirs(image).last_hidden_state) < 1e-5


@pytest.mark.parametrize("kind, change, names", [
    ("lm", {"hidden_act": "gelu"}, "'gelu', not SiLU"), ("bert", {"hidden_act": "relu"}, "relu"),
    ("bert", {"position_embedding_type": "relative_key"}, "relative_key positions"),
    ("bert", {"is_decoder": True}, "is_decoder = True"), ("mlm", {"tie_word_embeddings": False}, "tie_word_embeddings"),
], ids=str)
def test_what_would_compute_something_else_is_refused(tmp_path, kind, change, names):
    """All weights fit: nothing else would notice."""
    build(kind, tmp_path)
    configure(**change)(tmp_path)
    with pytest.raises(UserError, match=names):
        LOADERS[kind](tmp_path)


@pytest.mark.parametrize("changes", [
    dict(rope_parameters=dict(rope_type="default", rope_theta=1e4), rope_theta=50.0),
    dict(rope_scaling=dict(rope_type="default", rope_theta=50.0), rope_theta=500.0),
    dict(rope_parameters=None, rope_theta=50.0), dict(num_key_value_heads=None, num_attention_heads=3)], ids=str)
@torch.no_grad()
def test_rotary_settings_count_as_in_transformers(tmp_path, changes):
    build("lm", tmp_path)
    configure(**changes)(tmp_path)
    if "num_key_value_heads" in changes:
        LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50)).save_pretrained(tmp_path)
        configure(**changes)(tmp_path)
    ids = torch.randint(50, (2, 9))
    expected = LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits
    lm = load_lm(tmp_path)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ours = lm.lm_logits(lm(lm.embed(ids), masks.causal(mask), masks.token_positions(mask)))
    assert difference(ours, expected) < 1e-5


@pytest.mark.parametrize("other", [False, True])
def test_a_tied_head_is_the_word_embeddings(tmp_path, other):
    """A file may hold it twice; where it is another, transformers of different versions read different models."""
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50, tie_word_embeddings=True)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + float(other)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    if not other:
        load_lm(tmp_path)
        return
    with pytest.raises(UserError, match="lm_head.weight is not a copy of the word embeddings"):
        load_lm(tmp_path)


@torch.no_grad()
def test_older_clips_have_settings_in_two_places(tmp_path):
    vision = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=28,
                  patch_size=14)
    config = transformers.CLIPVisionConfig(**vision, hidden_act="gelu")
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    for first, second, counts in (({}, dict(hidden_act="gelu"), "gelu"), (dict(hidden_act="gelu"), {}, "quick_gelu")):
        hub = dict(model_type="clip", vision_config=vision | first, vision_config_dict=vision | second)
        (tmp_path / "config.json").write_text(json.dumps(hub))
        assert load_vit(tmp_path).config.activation == counts
        assert transformers.CLIPConfig(**hub).vision_config.hidden_act == counts


LLAMA = dict(vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize("config, changes", [
    (LlamaConfig(**LLAMA), dict(attention_bias=True)), (LlamaConfig(**LLAMA), dict(mlp_bias=True)),
    (LlamaConfig(**LLAMA), dict(head_dim=7)), (transformers.OPTConfig(), dict(enable_bias=False)),
    (transformers.OPTConfig(), dict(layer_norm_elementwise_affine=False)),
    (transformers.OPTConfig(), dict(tie_word_embeddings=False))])
def test_a_language_model_of_another_form_is_refused_by_the_setting(config, changes):
    """Otherwise the setting would be ignored, or the file called damaged."""
    pretrained.empty_lm("folder", HubConfig(config.to_dict()), True, torch.float32)
    with pytest.raises(UserError, match=next(iter(changes))):
        pretrained.empty_lm("folder", HubConfig(config.to_dict() | changes), True, torch.float32)


@pytest.mark.parametrize("config, key_map, name, value", [
    (transformers.Dinov2Config(), key_maps.DINOV2, "qkv_bias", False),
    (transformers.Blip2VisionConfig(), key_maps.EVA, "qkv_bias", False),
    (transformers.Blip2QFormerConfig(), key_maps.QFORMER, "hidden_act", "relu")])
def test_a_model_of_another_form_is_refused_by_the_setting(config, key_map, name, value):
    pretrained.rename_settings(HubConfig(config.to_dict()), key_map)
    with pytest.raises(UserError, match=f"has {name} = {value!r}, and only"):
        pretrained.rename_settings(HubConfig(config.to_dict() | {name: value}), key_map)


def test_a_t5_is_refused_in_float16():
    """Its feed-forwards overflow there (transformers keeps one of their matrices in float32)."""
    config = HubConfig(transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).to_dict())
    pretrained.empty_lm("folder", config, True, torch.bfloat16)
    with pytest.raises(UserError, match="overflows in float16"):
        pretrained.empty_lm("folder", config, True, torch.float16)


def test_constants_in_old_files_of_llamas_are_left_aside(tmp_path):
    build("lm", tmp_path)
    before, weights = load_lm(tmp_path).state_dict(), load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    after = load_lm(tmp_path).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

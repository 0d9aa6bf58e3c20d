"""Whole BLIP-2 folders of transformers give the same numbers here, and what is written here gives them there."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

from minblip2 import UserError
from minblip2.stage1 import Stage1
from minblip2.weights.blip2 import Blip2
from minblip2.weights.export import save_pretrained
from minblip2.weights.official import load_blip2, load_stage1
from minblip2.weights.pretrained import load_vit
from minblip2.weights.retriever import Retriever

from .parity import difference, lengths_mask, randomise
from .pictures import smooth
from .tiny_blip2 import END, IMAGE, LMS, QFORMERS, VISIONS, blip2_config, official_folder, official_retrieval_folder

CASES = [(lm, size) for lm in LMS for size in (0, 1)]


@cache
def original(lm, size):
    """A small BLIP-2 of transformers in which nothing is zero."""
    model = Blip2ForConditionalGeneration(blip2_config(lm, size))
    if lm == "t5":  # FlanT5 has a head of its own, though T5Config ties it whatever one asks for
        model.language_model.lm_head.weight = nn.Parameter(torch.empty(40, 24))
    return randomise(model, size)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def pair(request, tmp_path):
    """transformers' model, and ours from the files that it writes."""
    theirs = original(*request.param)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if request.param[1] else "5GB")
    return theirs, *load_blip2(tmp_path)


def inputs(theirs, lengths, side="right", seed=0):
    """Pixels, prompt ids and mask, with and without transformers' image tokens before them."""
    generator = torch.Generator().manual_seed(seed)
    size, q = theirs.config.vision_config.image_size, theirs.config.num_query_tokens
    mask = lengths_mask([*lengths], side)
    ids = torch.randint(3, IMAGE, mask.shape, generator=generator)
    pixels = torch.randn(len(lengths), 3, size, size, generator=generator)
    images = torch.full((len(ids), q), IMAGE)
    whole = dict(pixel_values=pixels, input_ids=torch.cat([images, ids], dim=1),
                 attention_mask=torch.cat([torch.ones_like(images), mask.long()], dim=1))
    return pixels, ids, mask, whole


def our_logits(vit, stage2, pixels, ids, mask, targets, targets_mask):
    return stage2(vit(pixels), ids, mask, targets, targets_mask).word_logits


@pytest.mark.parametrize("lengths", [(0,), (5,), (3, 7, 1)], ids=str)
@torch.no_grad()
def test_logits_equal_transformers_with_and_without_a_prompt(pair, lengths):
    theirs, vit, stage2 = pair
    pixels, ids, mask, whole = inputs(theirs, lengths)
    text_mask = lengths_mask([4, 2, 6][:len(lengths)])
    text = torch.randint(3, IMAGE, text_mask.shape, generator=torch.Generator().manual_seed(9))
    if theirs.config.text_config.is_encoder_decoder:
        expected = theirs(**whole, decoder_input_ids=theirs.language_model._shift_right(text)).logits[text_mask]
    else:  # every position after the image: prompt and text are one
        whole["input_ids"] = torch.cat([whole["input_ids"], text], dim=1)
        whole["attention_mask"] = torch.cat([whole["attention_mask"], text_mask.long()], dim=1)
        both = torch.cat([mask, text_mask], dim=1)
        # transformers' Llama counts padding unless told not to; its OPT does not
        places = whole["attention_mask"].cumsum(dim=1) - 1
        q = stage2.qformer.config.num_queries
        logits = theirs(**whole, position_ids=places.clamp(min=0)).logits[:, q - 1:]
        newest = [[j for j in range(i + 1) if j == 0 or row[j - 1]][-1] for row in both for i in range(both.shape[1])]
        newest = torch.tensor(newest).view_as(both)  # what stands last before each word
        expected = logits.gather(1, newest[..., None].expand(-1, -1, 40))[both]
        if mask.all():
            nothing = torch.zeros(len(ids), 0)
            ours = our_logits(vit, stage2, pixels, nothing.long(), nothing.bool(), torch.cat([ids, text], dim=1), both)
            assert difference(ours, expected) < 1e-4
        expected = expected[torch.cat([torch.zeros_like(mask), text_mask], dim=1)[both]]
    assert difference(our_logits(vit, stage2, pixels, ids, mask, text, text_mask), expected) < 1e-4


@pytest.mark.parametrize("settings", [
    dict(), dict(min_length=5), dict(beams=5), dict(beams=5, length_penalty=-1.0, max_length=10),
    dict(beams=5, length_penalty=2.0, min_length=3)], ids=str)
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 5)], ids=str)
def test_what_is_written_equals_transformers(pair, lengths, settings):
    theirs, vit, stage2 = pair
    encoder_decoder = theirs.config.text_config.is_encoder_decoder
    settings = dict(max_length=12) | settings
    pixels, ids, mask, whole = inputs(theirs, lengths, "right" if encoder_decoder else "left")
    with torch.no_grad():
        ours = stage2.generate(vit(pixels), ids, mask, eos_id=END, **settings)
    expected = theirs.generate(**whole, num_beams=settings.get("beams", 1), do_sample=False, early_stopping=False,
                               max_new_tokens=settings["max_length"], min_new_tokens=settings.get("min_length", 0),
                               length_penalty=settings.get("length_penalty", 1.0), eos_token_id=END, pad_token_id=END)
    expected = expected[:, 1 if encoder_decoder else whole["input_ids"].shape[1]:]
    n = max(ours.shape[1], expected.shape[1])
    ours, expected = ([row + [END] * (n - len(row)) for row in rows.tolist()] for rows in (ours, expected))
    assert ours == expected


# --- stage 1 ----------------------------------------------------------------------------------------------------------


def retrieval(size, folder):
    settings = blip2_config("opt", size)
    settings.qformer_config.use_qformer_text_input = True
    theirs = randomise(Blip2ForImageTextRetrieval(settings), size + 5)
    theirs.config.image_token_index = None  # texts come without placeholders
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("lengths", [(4,), (3, 7, 1)], ids=str)
@torch.no_grad()
def test_itc_and_itm_equal_transformers(size, lengths, tmp_path):
    theirs, generator = retrieval(size, tmp_path), torch.Generator().manual_seed(1)
    vit, stage1 = load_vit(tmp_path), load_stage1(tmp_path)
    mask, side = lengths_mask([*lengths]), theirs.config.vision_config.image_size
    ids = torch.randint(0, 50, mask.shape, generator=generator)
    pixels = torch.randn(len(ids), 3, side, side, generator=generator)
    image = stage1.image_kv(vit(pixels))
    cosine = stage1.similarity(stage1.embed_image(image), stage1.embed_text(ids, mask))
    itc = theirs(pixels, ids, mask.long(), use_image_text_matching_head=False).logits_per_image
    itm = theirs(pixels, ids, mask.long(), use_image_text_matching_head=True).logits_per_image
    assert difference(cosine, itc) < 1e-5 and difference(stage1.itm_logits(image, ids, mask), itm) < 1e-5
    # what a file for retrieval lacks is as before training
    assert stage1.temperature == Stage1.TEMPERATURE and 0 < stage1.qformer.lm_head.dense.weight.std() < 0.05
    assert all(p.requires_grad and p.device.type == "cpu" for p in stage1.parameters())


def lavis_names(stage1):
    """A stage-1 checkpoint as LAVIS writes it: its names (facts §7.1), written out here by hand."""
    state, found = stage1.state_dict(), {}
    parts = {"self_attention": "attention.self", "cross_attention": "crossattention.self",
             "self_norm": "attention.output.LayerNorm", "cross_norm": "crossattention.output.LayerNorm",
             "text_mlp.up": "intermediate.dense", "text_mlp.down": "output.dense", "text_norm": "output.LayerNorm",
             "query_mlp.up": "intermediate_query.dense", "query_mlp.down": "output_query.dense",
             "query_norm": "output_query.LayerNorm"}
    heads = {"vision_norm": "ln_vision", "vision_projection": "vision_proj", "text_projection": "text_proj",
             "itm_head": "itm_head", "temperature": "temp", "qformer.query_tokens": "query_tokens",
             "qformer.norm": "Qformer.bert.embeddings.LayerNorm",
             "qformer.token_embedding": "Qformer.bert.embeddings.word_embeddings",
             "qformer.position_embedding": "Qformer.bert.embeddings.position_embeddings",
             "qformer.lm_head.dense": "Qformer.cls.predictions.transform.dense",
             "qformer.lm_head.norm": "Qformer.cls.predictions.transform.LayerNorm",
             "qformer.lm_head.bias": "Qformer.cls.predictions.bias"}
    for name, tensor in state.items():
        if name.startswith("qformer.blocks."):
            _, _, i, *rest = name.split(".")
            rest = ".".join(rest)
            if ".out." in rest:
                theirs = rest.replace("self_attention.out", "attention.output.dense").replace(
                    "cross_attention.out", "crossattention.output.dense")
            else:
                known = next(part for part in parts if rest.startswith(part))
                theirs = parts[known] + rest[len(known):]
            found[f"Qformer.bert.encoder.layer.{i}.{theirs}"] = tensor
        else:
            known = next(part for part in heads if name == part or name.startswith(part + "."))
            found[heads[known] + name[len(known):]] = tensor
    found["Qformer.cls.predictions.decoder.weight"] = found["Qformer.bert.embeddings.word_embeddings.weight"]
    found["Qformer.cls.predictions.decoder.bias"] = found["Qformer.cls.predictions.bias"]
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(24).expand(1, -1)
    return found


@pytest.mark.parametrize("size", [0, 1])
def test_stage1_from_lavis_file_gives_the_same_numbers(size, tmp_path):
    retrieval(size, tmp_path)
    heads = QFORMERS[size]["num_attention_heads"]
    expected = randomise(load_stage1(tmp_path), 7)
    expected.vision_norm.eps = 1e-5  # LAVIS; transformers has 1e-6
    torch.save({"model": lavis_names(expected), "epoch": 3}, tmp_path / "stage1.pth")
    ours = load_stage1(tmp_path / "stage1.pth", heads=heads)
    mask, generator = lengths_mask([5, 3, 6]), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 50, mask.shape, generator=generator)
    image = torch.randn(3, 7, VISIONS[size]["hidden_size"], generator=generator)
    negatives = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    for a, b in zip(ours(image, ids, mask, negatives=negatives), expected(image, ids, mask, negatives=negatives),
                    strict=True):
        assert torch.equal(a, b)
    assert ours.qformer.config == expected.qformer.config
    assert all(p.requires_grad for p in ours.parameters())


def without(name):
    return lambda state: state.pop(name)


LAVIS_FAULTS = {
    "a tensor is missing": (without("Qformer.bert.encoder.layer.1.output.dense.bias"), "layer.1.output.dense.bias"),
    "sizes cannot be read": (without("query_tokens"), "query_tokens"),
    "one too many": (lambda state: state.update({"Qformer.bert.pooler.bias": torch.ones(3)}), "pooler.bias"),
    "wrong shape": (lambda state: state.update({"itm_head.bias": torch.ones(3)}), r"itm_head.bias has shape \(3,\)"),
    "flat queries": (lambda state: state.update({"query_tokens": torch.ones(4, 18)}), r"query_tokens .* \(4, 18\)"),
}


@pytest.mark.parametrize("fault", LAVIS_FAULTS)
def test_spoiled_lavis_files_are_named_in_one_sentence(fault, tmp_path):
    retrieval(0, tmp_path)
    state = lavis_names(load_stage1(tmp_path))
    spoil, said = LAVIS_FAULTS[fault]
    spoil(state)
    torch.save({"model": state}, tmp_path / "stage1.pth")
    with pytest.raises(UserError, match=said) as error:
        load_stage1(tmp_path / "stage1.pth", heads=3)
    assert "\n" not in str(error.value)


class Code:
    """Something that only running code could unpickle."""

    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("content, said", [
    ({"model": Code()}, "code, which is never run"), ({"other": 1}, 'no "model"'), ([1], 'no "model"'),
    (None, "does not exist"),
    ({"model": {"a": 3}}, 'no "model"'), (b"half a file", "cannot be read")],
    ids=["code", "no model", "a list", "absent", "no tensors", "half a file"])
def test_what_is_no_checkpoint_is_refused_without_running_it(content, said, tmp_path, capsys):
    path = tmp_path / "stage1.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=said) as error:
        load_stage1(path, heads=3)
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_heads_are_asked_for_when_they_cannot_be_guessed(tmp_path):
    retrieval(0, tmp_path)
    torch.save({"model": lavis_names(load_stage1(tmp_path))}, tmp_path / "stage1.pth")
    with pytest.raises(UserError, match="give heads="):
        load_stage1(tmp_path / "stage1.pth")


# --- writing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_transformers_load_save_is_bit_identical(pair, tmp_path):
    theirs, vit, stage2 = pair
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    save_pretrained(first, vit, stage2, image_token=IMAGE, eos_token_id=END)
    again = Blip2ForConditionalGeneration.from_pretrained(first).eval()
    again.save_pretrained(second)
    save_pretrained(third, *load_blip2(second), image_token=IMAGE, eos_token_id=END)
    a, b, c = (load_file(folder / "model.safetensors") for folder in (first, second, third))
    assert set(a) == set(b) == set(c)
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    one, other = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (first, third))
    assert one == other

    _, _, _, whole = inputs(theirs, (3, 5))
    if theirs.config.text_config.is_encoder_decoder:
        whole["decoder_input_ids"] = torch.tensor([[0, 5, 6], [0, 7, 3]])
    assert torch.equal(again(**whole).logits, theirs(**whole).logits)


def test_what_transformers_cannot_express_is_refused(tmp_path):
    from minblip2.lm.opt import OPT, OPTConfig
    from minblip2.stage2 import Stage2
    from minblip2.vit import ViT, ViTConfig

    from .parity import TINY

    small = dict(image_size=28, width=20, layers=1, heads=2, mlp_width=8)
    eva = ViT(ViTConfig(**small, layer_scale=False, final_norm=False))
    lm = OPT(OPTConfig(vocab_size=40, width=24, layers=1, heads=2, mlp_width=8))
    stage2 = Stage2.from_stage1(Stage1(TINY), lm)
    save_pretrained(tmp_path, eva, stage2, image_token=39)
    load_blip2(tmp_path)
    with pytest.raises(UserError, match="EVA's kind"):
        save_pretrained(tmp_path, ViT(ViTConfig(**small)), stage2, image_token=39)
    with pytest.raises(UserError, match="image token 40"):
        save_pretrained(tmp_path, eva, stage2, image_token=40)
    narrow = OPT(OPTConfig(vocab_size=40, width=24, layers=1, heads=2, mlp_width=8, embed_dim=6, pre_norm=False))
    with pytest.raises(UserError, match="OPT-350m"):
        save_pretrained(tmp_path, eva, Stage2.from_stage1(Stage1(TINY), narrow), image_token=39)


# --- files ------------------------------------------------------------------------------------------------------------


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return spoil


def leftover(folder, part="qformer.extra.weight"):
    weights(lambda tensors: tensors.update({part: torch.ones(2)}))(folder)


HUB_FAULTS = {
    "a tensor of the encoder is missing": (weights(without("vision_model.encoder.layers.1.self_attn.qkv.bias")),
                                           "vision_model.encoder.layers.1.self_attn.qkv.bias"),
    "a tensor of the Q-Former is missing": (
        weights(without("qformer.encoder.layer.2.crossattention.attention.key.bias")),
        "qformer.encoder.layer.2.crossattention.attention.key.bias"),
    "a tensor of the language model is missing": (weights(without("language_model.model.decoder.layers.0.fc1.bias")),
                                                  "language_model.model.decoder.layers.0.fc1.bias"),
    "one too many": (leftover, "qformer.extra.weight"),
    "wrong shape": (weights(lambda tensors: tensors.update({"language_projection.bias": torch.ones(5)})),
                    r"language_projection.bias has shape \(5,\)"),
    "fused tensor of a wrong shape": (weights(lambda tensors: tensors.update({
        "vision_model.encoder.layers.0.self_attn.qkv.bias": torch.ones(71)})), r"qkv.bias has shape \(71,\)"),
}


@pytest.mark.parametrize("fault", HUB_FAULTS)
def test_spoiled_folders_are_named_in_one_sentence(fault, tmp_path):
    original("opt", 0).save_pretrained(tmp_path)
    spoil, said = HUB_FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_blip2(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_that_files_leave_out_are_those_of_transformers(tmp_path):
    """In nested settings transformers writes only what differs from its own defaults."""
    theirs = original("opt", 0)
    theirs.save_pretrained(tmp_path)
    hub = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    usual = {"vision_config": Blip2VisionConfig(), "qformer_config": Blip2QFormerConfig(), "text_config": OPTConfig()}
    for part, config in usual.items():
        hub[part] = {key: value for key, value in hub[part].items() if value != getattr(config, key, None)}
    assert "patch_size" not in hub["vision_config"] and "do_layer_norm_before" not in hub["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(hub), encoding="utf-8")
    vit, stage2 = load_blip2(tmp_path)
    assert vit.config.patch_size == 14 and stage2.qformer.config.cross_attention_every == 2


def test_the_q_formers_dropout_is_read_and_written(tmp_path):
    config = blip2_config("opt", 0)
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.25
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "theirs")
    vit, stage2 = load_blip2(tmp_path / "theirs")
    assert stage2.qformer.config.dropout == stage2.qformer.blocks[0].self_attention.dropout == 0.25
    save_pretrained(tmp_path / "ours", vit, stage2, IMAGE)
    again = json.loads((tmp_path / "ours" / "config.json").read_text())["qformer_config"]
    assert again["hidden_dropout_prob"] == again["attention_probs_dropout_prob"] == 0.25


def test_a_missing_shard_is_named(tmp_path):
    original("opt", 0).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=shard.name):
        load_blip2(tmp_path)


def test_a_folder_that_is_written_again_is_not_mixed_with_the_old_shards(tmp_path):
    original("opt", 0).save_pretrained(tmp_path, max_shard_size="20KB")
    vit, stage2 = load_blip2(tmp_path)
    with torch.no_grad():
        stage2.projection.weight.fill_(3.0)
    save_pretrained(tmp_path, vit, stage2, image_token=IMAGE)
    assert (load_blip2(tmp_path)[1].projection.weight == 3.0).all()


def test_dtypes_are_as_asked_for(tmp_path):
    theirs = original("t5", 1)
    theirs.save_pretrained(tmp_path)
    vit, stage2 = load_blip2(tmp_path, torch.bfloat16)
    assert {p.dtype for p in vit.parameters()} == {p.dtype for p in stage2.lm.parameters()} == {torch.bfloat16}
    bridge = [p for name, p in stage2.named_parameters() if not name.startswith("lm.")]
    assert {p.dtype for p in bridge} == {torch.float32} and all(p.requires_grad for p in bridge)
    assert not any(p.requires_grad for p in [*vit.parameters(), *stage2.lm.parameters()])
    pixels, ids, mask, _ = inputs(theirs, (2, 4))
    exact = load_blip2(tmp_path)
    with torch.no_grad():
        half = stage2(vit(pixels.bfloat16()), ids, mask, ids, mask).word_logits
        assert difference(half, exact[1](exact[0](pixels), ids, mask, ids, mask).word_logits) < 0.1
    assert stage2.generate(vit(pixels.bfloat16()), ids, mask, eos_id=END, max_length=3).shape == (2, 3)


# --- texts given to whole models --------------------------------------------------------------------------------------


def test_one_text_is_a_list_of_one_and_none_is_refused(tmp_path):
    official_retrieval_folder(tmp_path)
    retriever = Retriever.from_folder(tmp_path, torch.float32, torch.device("cpu"))
    several, text = [smooth(40 + 7 * i, 50, seed=i) for i in range(2)], "two dogs"
    cosine = retriever.similarity(several, [text])
    ways = {"text_ids": lambda texts: retriever.text_ids(texts)[0], "embed_texts": retriever.embed_texts,
            "similarity": lambda texts: retriever.similarity(several, texts),
            "match": lambda texts: retriever.match(several, texts),
            "rerank": lambda texts: retriever.rerank(several, texts, cosine, 1, 0),
            "attention_maps": lambda texts: retriever.attention_maps(several[0], texts)}
    for name, way in ways.items():
        assert torch.equal(way(text), way([text])), name
        for nothing, said in (([], "no text"), ((), "no text"), ("", "no word"), (["a bus", "\u200b"], "no word")):
            with pytest.raises(UserError, match=said):
                way(nothing)


def test_no_question_is_refused(tmp_path):
    official_folder("opt", tmp_path)
    blip2 = Blip2.from_folder(tmp_path, torch.float32, torch.device("cpu"))
    for images in (smooth(40, 50), [smooth(40, 50)]):
        with pytest.raises(UserError, match="no question: ask at least one"):
            blip2.ask(images, [])

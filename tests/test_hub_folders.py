"""Hub folders as people have them: read as transformers reads them, or refused by the name of what they are."""

import json
import pickle
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from minblip2 import UserError
from minblip2.__main__ import main
from minblip2.data.tokenizer import Tokenizer
from minblip2.data.transforms import Transform
from minblip2.weights.blip2 import Blip2
from minblip2.weights.checkpoint import is_finite
from minblip2.weights.official import load_blip2, load_stage1
from minblip2.weights.pretrained import load_lm
from minblip2.weights.retriever import Retriever

from .parity import difference, randomise
from .test_blip2 import retrieval
from .tiny_blip2 import blip2_config, official_retrieval_folder, tokenizer

CPU = torch.device("cpu")


@cache
def model_of(lm):
    words, settings = tokenizer(lm), blip2_config(lm, 1)
    settings.image_token_index = words.convert_tokens_to_ids("<image>")
    settings.text_config.vocab_size, settings.text_config.eos_token_id = len(words) + 3, words.eos_token_id
    settings.vision_config.image_size = 42
    return randomise(Blip2ForConditionalGeneration(settings), 3), words


def folder_of(lm, folder):
    """A small BLIP-2 as transformers 4 wrote it."""
    model, words = model_of(lm)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size=dict(height=42, width=42)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def state_of(blip2):
    return {f"{name}.{key}": tensor for name in ("vit", "stage2") for key, tensor in
            getattr(blip2, name).state_dict().items()}


def same(folder, expected):
    found = state_of(Blip2.from_folder(folder, torch.float32, CPU))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def edit(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- weights in pickles


@pytest.mark.parametrize("lm", ["opt", "t5"])
@pytest.mark.parametrize("kind", ["whole", "older", "sharded"])
def test_pickled_weights_are_read(tmp_path, lm, kind):
    expected = state_of(Blip2.from_folder(folder_of(lm, tmp_path), torch.float32, CPU))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if kind == "sharded":
        names = sorted(state)
        where = {name: f"pytorch_model-0000{1 + (i > 20)}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(where.values()):
            torch.save({name: state[name] for name in names if where[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "whole")
    torch.save({"any": "settings"}, tmp_path / "training_args.bin")  # lies beside them, and is no weights
    same(tmp_path, expected)
    if kind == "sharded":
        (tmp_path / file).unlink()
        with pytest.raises(UserError, match=f"{file} is missing, though pytorch_model.bin.index.json names it"):
            load_blip2(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    expected = state_of(Blip2.from_folder(folder_of("opt", tmp_path), torch.float32, CPU))
    (tmp_path / "pytorch_model.bin").write_bytes(b"half a file")
    same(tmp_path, expected)


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("content, said", [
    (Code(), "code, which is never run"), ({"a": Code()}, "code, which is never run"), ([1], "more than named tensors"),
    ({"a": 3}, "more than named tensors"), (b"half a file", "pytorch_model.bin"), (b"", "pytorch_model.bin"),
    (b"PK\3\4 and no more", "pytorch_model.bin cannot be read"), (None, "no .safetensors file, and no pytorch_model")])
@pytest.mark.parametrize("zipped", [True, False])
def test_spoiled_and_hostile_pickles_are_refused(tmp_path, capsys, content, said, zipped):
    folder_of("opt", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Code) and not zipped:
        path.write_bytes(pickle.dumps(content))
    elif content is not None:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=said) as error:
        load_blip2(tmp_path)
    assert "\n" not in str(error.value) and "must never" not in capsys.readouterr().out


def test_a_language_model_in_a_pickle_is_read(tmp_path):
    model, _ = model_of("opt")
    model.language_model.save_pretrained(tmp_path)
    expected = load_lm(tmp_path).state_dict()
    torch.save(model.language_model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = load_lm(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()


# ---------------------------------------------------------------- preprocessing


SETTINGS = [
    dict(), dict(do_normalize=False), dict(do_rescale=False), dict(do_rescale=False, do_normalize=False),
    dict(rescale_factor=1 / 127.5), dict(rescale_factor=1.0), dict(rescale_factor=0.5, do_normalize=False),
    dict(image_mean=[0.5] * 3, image_std=[0.1, 0.2, 0.3], rescale_factor=1 / 128), dict(resample="bicubic")]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_those_of_transformers(tmp_path, settings, file):
    theirs = BlipImageProcessorPil(**{"size": dict(height=42, width=42)} | settings | (
        dict(resample=3) if "resample" in settings else {}))
    if file == "processor_config.json":  # all that transformers 5 writes
        Blip2Processor(theirs, model_of("opt")[1], num_query_tokens=5).save_pretrained(tmp_path)
        assert not (tmp_path / "preprocessor_config.json").exists()
        whole = json.loads((tmp_path / file).read_text())
        edit(tmp_path, file, image_processor=whole["image_processor"] | settings)
    else:
        theirs.save_pretrained(tmp_path)
        edit(tmp_path, file, **settings)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 60, 3), dtype=np.uint8))
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert difference(Transform.from_folder(tmp_path)(image), expected) < 1e-6


def test_of_two_files_the_newer_counts(tmp_path):
    """As in transformers, which writes the newer one only, and leaves the other where it is."""
    BlipImageProcessorPil(size=dict(height=28, width=28)).save_pretrained(tmp_path)
    Blip2Processor(BlipImageProcessorPil(size=dict(height=42, width=42), image_mean=[0.1] * 3), model_of("opt")[1],
                   num_query_tokens=5).save_pretrained(tmp_path)
    found = Transform.from_folder(tmp_path)
    assert found.size == 42 and found.mean == (0.1,) * 3
    edit(tmp_path, "processor_config.json", image_processor=None)
    json_file = tmp_path / "processor_config.json"
    json_file.write_text(json.dumps({"num_query_tokens": 5}))  # as the official folders have it
    assert Transform.from_folder(tmp_path).size == 28


def test_pictures_that_no_patches_fit_are_refused_when_the_folder_is_read(tmp_path):
    edit(folder_of("opt", tmp_path), "preprocessor_config.json", size=dict(height=43, width=43))
    with pytest.raises(UserError, match="43 pixels is not a multiple of the patch size 14"):
        Blip2.from_folder(tmp_path, torch.float32, CPU)


def test_the_usual_settings_are_exactly_those_of_the_file(tmp_path):
    BlipImageProcessorPil(size=dict(height=42, width=42)).save_pretrained(tmp_path)
    assert Transform.from_folder(tmp_path) == Transform(size=42)


@pytest.mark.parametrize("changes", [
    dict(do_resize=False), dict(size=None), dict(size="224"), dict(size=dict(height="42", width="42")),
    dict(size=[42, 42]),
    dict(image_mean=None), dict(image_mean=[0.5, 0.5]), dict(image_mean=["0.5"] * 3), dict(image_std=[0.0] * 3),
    dict(rescale_factor=0), dict(rescale_factor="1/255"), dict(rescale_factor=None), dict(resample=2),
    dict(do_center_crop=True, crop_size=28), dict(do_pad=True, pad_size=dict(height=56, width=56)),
    dict(image_processor_type="LevitImageProcessor"), dict(size=dict(height=True, width=True)),
    dict(size=dict(shortest_edge=42, longest_edge=60), crop_size=42, do_center_crop=True),
    dict(size=dict(shortest_edge=42), crop_size=28),  # BLIP's does not cut unless it is told to
    dict(resample="nearest"), dict(size=dict(longest_edge=42)), dict(size=0), dict(size=dict(height=42.5, width=42.5))])
def test_other_preprocessing_is_refused(tmp_path, changes):
    BlipImageProcessorPil(size=dict(height=42, width=42)).save_pretrained(tmp_path)
    edit(tmp_path, "preprocessor_config.json", **changes)
    with pytest.raises(UserError) as error:
        Transform.from_folder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"image_processor": None}, {"image_processor": []}, []])
def test_a_processor_file_without_preprocessing_is_refused(tmp_path, content):
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="processor_config.json"):
        Transform.from_folder(tmp_path)


# ---------------------------------------------------------------- settings that are not what they should be


@pytest.mark.parametrize("lm", ["opt", "t5"])
@pytest.mark.parametrize("change", [
    lambda c: [], lambda c: "text", lambda c: c | {"text_config": []}, lambda c: c | {"vision_config": "vit"},
    lambda c: c | {"qformer_config": [1]}, lambda c: c | {"text_config": None}, lambda c: c | {"vision_config": None},
    lambda c: c | {"qformer_config": None}, lambda c: c | {"model_type": ["blip-2"]},
    *[lambda c, part=part, value=value: c | {part: c[part] | {"hidden_size": value, "d_model": value}}
      for part in ("vision_config", "qformer_config", "text_config") for value in ("20", None, 0, -3, 20.5, True, [])],
    *[lambda c, value=value: c | {"num_query_tokens": value} for value in ("5", None, 0, 5.0, [5])],
    *[lambda c, key=key: c | {"text_config": c["text_config"] | {key: [7]}} for key in (
        "model_type", "vocab_size", "num_heads", "num_attention_heads", "feed_forward_proj", "dense_act_fn",
        "activation_function", "decoder_start_token_id", "do_layer_norm_before")],
    lambda c: c | {"vision_config": c["vision_config"] | {"num_attention_heads": 7}},
    lambda c: c | {"vision_config": c["vision_config"] | {"layer_norm_eps": "1e-6"}},
    lambda c: c | {"vision_config": c["vision_config"] | {"hidden_act": 3}},
    lambda c: c | {"vision_config": c["vision_config"] | {"patch_size": 100}}])
def test_settings_of_another_kind_are_refused_or_do_not_matter(tmp_path, lm, change):
    before = json.loads((folder_of(lm, tmp_path) / "config.json").read_text())
    expected = state_of(Blip2.from_folder(tmp_path, torch.float32, CPU))
    (tmp_path / "config.json").write_text(json.dumps(change(before)))
    try:
        same(tmp_path, expected)  # what this architecture does not read may be anything
    except UserError as error:
        assert "\n" not in str(error)
    else:
        after = change(before)
        changed = {(part, key) for part in ("vision_config", "qformer_config", "text_config")
                   for key in after[part] if after[part][key] != before[part].get(key)}
        not_read = {"hidden_size", "num_attention_heads", "activation_function", "do_layer_norm_before"} if lm == "t5" \
            else {"d_model", "num_heads", "feed_forward_proj", "dense_act_fn", "decoder_start_token_id"}
        assert all(part == "text_config" and key in not_read or key == "d_model" for part, key in changed), changed
        assert after["num_query_tokens"] == before["num_query_tokens"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_byte_order_mark_does_not_matter(tmp_path, name):
    expected = state_of(Blip2.from_folder(folder_of("opt", tmp_path), torch.float32, CPU))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    same(tmp_path, expected)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "7", "{", '{"eos_token": []}', '{"eos_token": {}}', '{"eos_token": 1.5}',
                                     '{"eos_token": "none such"}', '{"eos_token": -1}', '{"pad_token": ["<pad>"]}'])
def test_ends_of_another_kind_are_refused_or_do_not_matter(tmp_path, name, content):
    (folder_of("t5", tmp_path) / name).write_text(content)
    try:
        assert Blip2.from_folder(tmp_path, torch.float32, CPU).tokenizer.eos_id == 1
    except UserError as error:
        assert "\n" not in str(error) and ("eos_token" in str(error) or name in str(error))


# ---------------------------------------------------------------- folders of another kind


def quantised(state, how):
    """The language model's matrices as quantisers leave them, which no config.json need say."""
    found = dict(state)
    for name, tensor in state.items():
        if name.startswith("language_model") and tensor.ndim == 2 and "embed" not in name:
            stem = name.removesuffix(".weight")
            found |= {
                "int8": {name: tensor.to(torch.int8), f"{stem}.SCB": tensor[:, 0].clone()},
                "int8 alone": {name: tensor.to(torch.int8)},
                "nf4": {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4)},
                "gptq": {f"{stem}.qweight": tensor.int(), f"{stem}.qzeros": torch.zeros(2).int()},
                "fp8": {name: tensor.to(torch.float8_e4m3fn)},
                "fp8 with scales": {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)},
            }[how]
    return found


@pytest.mark.parametrize("how", ["int8", "int8 alone", "nf4", "gptq", "fp8", "fp8 with scales"])
@pytest.mark.parametrize("said", [True, False])
def test_quantised_weights_are_called_so(tmp_path, how, said):
    folder_of("opt", tmp_path)
    state = quantised(load_file(tmp_path / "model.safetensors"), how)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    if said:
        edit(tmp_path, quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True))
    with pytest.raises(UserError, match="quantised.*fetch the model's own weights"):
        Blip2.from_folder(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_value_that_is_no_number_is_found_in_any_type(dtype):
    for value in (float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).min):
        tensor = torch.zeros(3, 5, dtype=dtype)
        tensor[1, 3] = value
        assert is_finite(tensor) == bool(tensor.isfinite().all())
    assert is_finite(tensor.to("meta")) and is_finite(tensor[:0]) and is_finite(torch.arange(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    folder_of("t5", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["language_projection.bias"][3] = value
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="language_projection.bias holds values that are no finite numbers"):
        load_blip2(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_adapters_are_called_so(tmp_path, beside):
    if beside:
        folder_of("opt", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", base_model_name_or_path="a/b")))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(8, 24)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter .*of a/b, not a whole model.*merge_and_unload"):
        Blip2.from_folder(tmp_path)


@pytest.mark.parametrize("below", ["models--a--b/snapshots/abc", "snapshots/abc", "checkpoint-500", "abc"])
def test_a_folder_too_high_names_the_right_one(tmp_path, below):
    folder_of("opt", tmp_path / below)
    with pytest.raises(UserError, match=f"has no config.json.*as .*{below} below it"):
        Blip2.from_folder(tmp_path)


@pytest.mark.parametrize("names", [("tokenizer.json",), ("preprocessor_config.json",),
                                   ("tokenizer.json", "preprocessor_config.json")])
def test_checkpoints_of_the_trainer_name_what_they_lack(tmp_path, names):
    folder_of("opt", tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    expected = state_of(Blip2.from_folder(tmp_path, torch.float32, CPU))
    for name in names:
        shutil.move(tmp_path / name, tmp_path / f"{name}.away")
    with pytest.raises(UserError, match=f"Trainer, which lacks {names[0]}.*copy them"):
        Blip2.from_folder(tmp_path)
    for name in names:
        shutil.move(tmp_path / f"{name}.away", tmp_path / name)
    same(tmp_path, expected)


def test_weights_for_retrieval_and_for_writing_name_each_others_commands(tmp_path):
    retrieval(0, folder_of("opt", tmp_path / "retrieval"))
    with pytest.raises(UserError, match="for retrieval.*`retrieve --model` or `attend --model`"):
        Blip2.from_folder(tmp_path / "retrieval")
    with pytest.raises(UserError, match="writes texts.*`caption --model` or `ask --model`"):
        load_stage1(folder_of("opt", tmp_path / "writing"))


# ---------------------------------------------------------------- weights for retrieval in the commands


@pytest.fixture
def itm(tmp_path):
    """A small BLIP-2 for retrieval with a BERT's tokenizer, transformers' model of it, and pictures with captions."""
    theirs = retrieval(0, tmp_path / "itm")
    words = Tokenizer.from_texts(["a red bus two dogs in the rain"])
    words.backend.save(str(tmp_path / "itm" / "tokenizer.json"))
    BlipImageProcessorPil(size=dict(height=28, width=28)).save_pretrained(tmp_path / "itm")
    noise = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(noise.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "my.csv").write_text("\n".join(f"{i}.png,{text}" for i, text in enumerate(
        ["a red bus", "two dogs", "the rain", "a bus in the rain", "red dogs", "two red dogs"])))
    return theirs, words, tmp_path


def command(monkeypatch, capsys, folder, *words):
    monkeypatch.chdir(folder)  # features are kept below runs/
    monkeypatch.setattr("minblip2.device.compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(sys, "argv", ["minblip2", *map(str, words)])
    code = main()
    return code, *capsys.readouterr()


def test_retrieval_weights_rank_as_in_transformers(itm, monkeypatch, capsys):
    theirs, words, folder = itm
    code, out, _ = command(monkeypatch, capsys, folder, "retrieve", "--model", "itm", "a red bus", "--data", "my.csv",
                           "--split", "train", "--show", "6")
    pixels = torch.stack([Transform.from_folder("itm")(Image.open(f"{i}.png")) for i in range(6)])
    ids, mask = words.pad([words.encode("a red bus")] * 6)
    with torch.no_grad():
        itc = theirs(pixels, ids, mask.long(), use_image_text_matching_head=False).logits_per_image.diagonal()
        both = theirs(pixels, ids, mask.long(), use_image_text_matching_head=True).logits_per_image
        match, probability = both[:, 1], both.softmax(dim=1)[:, 1]
    lines = out.splitlines()[1:-1:2]  # between them stand captions
    rows = [int(line.split()[2].rpartition("/")[2].removesuffix(".png")) for line in lines]
    assert code == 0 and rows == (itc + match).argsort(descending=True).tolist()
    for line, row in zip(lines, rows, strict=True):
        percent, cosine = (float(cell.strip("%")) for cell in line.split()[:2])
        assert abs(percent - 100 * probability[row]) < 0.6 and abs(cosine - float(itc[row])) < 0.003


def test_what_retrieval_does_not_need_may_be_in_the_file(tmp_path):
    """An LM head, a temperature, constants of older versions: transformers leaves them aside as well."""
    official_retrieval_folder(tmp_path)
    expected = Retriever.from_folder(tmp_path, torch.float32, CPU)
    weights = load_file(tmp_path / "model.safetensors")
    more = {"embeddings.position_ids": torch.arange(9)[None], "temp": torch.tensor(0.07),
            "cls.predictions.bias": torch.zeros(9), "cls.predictions.transform.dense.weight": torch.zeros(3, 3)}
    save_file(weights | more, tmp_path / "model.safetensors", {"format": "pt"})
    found = Retriever.from_folder(tmp_path, torch.float32, CPU)
    for part in ("vit", "stage1"):
        ours, theirs = (getattr(one, part).state_dict() for one in (found, expected))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "lm_head" not in name)


@pytest.mark.parametrize(("lm", "name", "alias"), [
    ("opt", "model.decoder.embed_tokens.weight", "lm_head.weight"),
    ("t5", "shared.weight", "encoder.embed_tokens.weight"), ("t5", "shared.weight", "decoder.embed_tokens.weight")])
def test_the_word_embeddings_may_stand_under_a_name_of_their_copy(tmp_path, lm, name, alias):
    """Tools that write each tensor once keep any of its names."""
    expected = state_of(Blip2.from_folder(folder_of(lm, tmp_path), torch.float32, CPU))
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"language_model.{alias}"] = weights.pop(f"language_model.{name}")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    same(tmp_path, expected)


def test_commands_take_weights_for_retrieval(itm, monkeypatch, capsys):
    _, _, folder = itm
    code, _, _ = command(monkeypatch, capsys, folder, "attend", "--model", "itm", "0.png", "a red bus", "--to", "a.png")
    assert code == 0 and Image.open(folder / "a.png").size[0] > 100
    code, out, _ = command(monkeypatch, capsys, folder, "evaluate", "--model", "itm", "--data", "my.csv", "--split",
                           "train")
    assert code == 0 and "re-ranked by ITM" in out and "R@1 by chance (%)" in out and "16.7" in out
    folder_of("opt", folder / "writing")
    capsys.readouterr()  # its progress
    code, out, _ = command(monkeypatch, capsys, folder, "evaluate", "--model", "writing", "--data", "my.csv", "--split",
                           "train")
    assert code == 0 and "CIDEr-D ×100" in out and "of another picture, the control" in out
    for words, said in ((("retrieve", "a bus"), "caption --model"), (("attend", "0.png", "a bus"), "caption --model")):
        more = ("--data", "my.csv", "--split", "train") if words[0] == "retrieve" else ()
        code, _, err = command(monkeypatch, capsys, folder, *words, "--model", "writing", *more)
        assert code == 2 and said in err and err.count("\n") == 1
    for words in (("retrieve", "a bus"), ("evaluate",)):
        code, _, err = command(monkeypatch, capsys, folder, *words, "--model", "itm")
        assert code == 2 and "--data" in err

"""One's own pictures on official weights: trained is stage 2 alone, and transformers writes the same captions."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration

from minblip2 import UserError
from minblip2.__main__ import main
from minblip2.data.coco import CocoCaptions
from minblip2.evaluation.handover import finetune_and_measure
from minblip2.training import finetune
from minblip2.training.stages import prompt_of
from minblip2.weights.blip2 import Blip2
from minblip2.weights.checkpoint import open_hub

from .test_hub_folders import CPU, edit, folder_of

COLOURS = {"a red bus": (200, 30, 20), "two dogs": (30, 40, 190), "the rain": (240, 240, 230)}


def pictures(folder, count=12, split=""):
    """Noisy pictures of one colour each and a table of their captions, which tell it."""
    random = np.random.default_rng(len(split))
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,caption" + (",split" if split else "")]
    for i in range(count):
        text = list(COLOURS)[i % 3]
        pixels = np.clip(np.array(COLOURS[text]) + random.integers(-30, 30, (30, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{text}" + (f",{'val' if i % 4 == 3 else 'train'}" if split else ""))
    (folder / "my.csv").write_text("\n".join(lines))
    return folder / "my.csv"


@pytest.fixture
def plenty(monkeypatch):
    monkeypatch.setattr(finetune, "free_memory", lambda device: 1e12)


def transformers_captions(folder, paths, settings=None):
    """What transformers writes with a folder, in float32, of pictures as our transform gives them."""
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Blip2.from_folder(folder, torch.float32, CPU)
    pixels = torch.stack([ours.transform(Image.open(path).convert("RGB")) for path in paths])
    ids = torch.tensor([[theirs.config.image_token_index] * theirs.config.num_query_tokens
                        + ours.tokenizer.encode_prompt("")] * len(pixels))
    written = theirs.generate(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=5,
                              max_new_tokens=30, min_new_tokens=1, do_sample=False, early_stopping=False,
                              eos_token_id=ours.tokenizer.eos_id, pad_token_id=ours.tokenizer.pad_id)
    skipped = 1 if theirs.config.text_config.is_encoder_decoder else ids.shape[1]
    images = [Image.open(path).convert("RGB") for path in paths]
    return [ours.tokenizer.decode(row[skipped:]) for row in written], ours.caption(images)


@pytest.mark.parametrize(("lm", "layout"), [("opt", "whole"), ("t5", "whole"), ("opt", "sharded"), ("opt", "pickle")])
def test_training_goes_on_and_transformers_writes_the_same(tmp_path, plenty, lm, layout):
    source, out = folder_of(lm, tmp_path / "source"), tmp_path / "out"
    if layout == "sharded":
        (source / "model.safetensors").unlink()
        Blip2ForConditionalGeneration.from_pretrained(folder_of(lm, tmp_path / "again")).save_pretrained(
            source, max_shard_size="30KB")
    if layout == "pickle":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    data = CocoCaptions(pictures(tmp_path / "mine"), "train")
    config = finetune.settings_for(len(data.pairs), steps=40, learning_rate=3e-3)
    assert config.batch_size == 12
    results = finetune_and_measure(source, data, None, out, config)
    assert results["after"]["loss"] < 0.8 * results["before"]["loss"]

    before, after = (dict(open_hub(folder).tensors) for folder in (source, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if name.startswith(("qformer.", "language_projection.", "query_tokens",
                                                           "vision_model.post_layernorm."))}
    assert before.keys() == after.keys() and changed and changed <= trained
    assert {"query_tokens", "language_projection.weight", "vision_model.post_layernorm.bias"} <= changed
    theirs, ours = transformers_captions(out, [record.path for record in data.images])
    assert theirs == ours and len(set(ours)) > 1
    card = (out / "README.md").read_text()
    assert "12 pictures with 12 captions" in card and f"{results['after']['loss']:.2f}" in card and "40 steps" in card
    assert str(tmp_path) not in card

    log, weights = (out / "stage2" / "log.jsonl").read_text(), (out / "model.safetensors")
    again = finetune_and_measure(source, data, None, out, config)  # finished: measured, not trained again
    assert again == results and (out / "stage2" / "log.jsonl").read_text() == log and (
        weights.exists() or layout == "sharded")
    (out / "stage2" / "log.jsonl").write_text(log.replace("\n", "\n\n", 1))
    finetune_and_measure(source, data, None, out, config, resume=False)
    assert (out / "stage2" / "log.jsonl").read_text() == log, "trained again from the beginning, as asked"


def test_only_the_bridge_learns_and_the_rest_is_in_half_precision(tmp_path, plenty):
    blip2 = finetune.load_for_training(folder_of("opt", tmp_path), 12, 4)
    learning = {name for name, parameter in blip2.stage2.named_parameters() if parameter.requires_grad}
    assert learning and not any(name.startswith("lm.") for name in learning)
    assert {parameter.dtype for parameter in blip2.stage2.lm.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in blip2.vit.parameters()} == {torch.bfloat16}
    assert {blip2.stage2.get_parameter(name).dtype for name in learning} == {torch.float32}
    needed = finetune.cost(tmp_path, 12, 4)
    assert needed.trained == sum(blip2.stage2.get_parameter(name).numel() for name in learning)
    assert needed.frozen == sum(p.numel() for model in (blip2.vit, blip2.stage2.lm) for p in model.parameters())
    assert needed.features == 12 * 10 * 20 * 2  # tokens, width, float16


def test_too_little_memory_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "free_memory", lambda device: 1000.0)
    monkeypatch.setattr(Blip2, "from_folder", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"takes about \d+\.\d GB of memory .*but 0.0 GB are free.*--batch-size"):
        finetune.load_for_training(folder_of("opt", tmp_path), 12, 4)


def test_a_prompt_is_given_and_not_learned(tmp_path):
    for lm in ("opt", "t5"):
        blip2 = Blip2.from_folder(folder_of(lm, tmp_path / lm), torch.float32, CPU)
        (ids,), (given, first) = finetune.caption_ids(blip2, ["A red bus!"], "a photo of"), prompt_of(
            blip2.tokenizer, "a photo of")
        assert given == blip2.tokenizer.encode_prompt("a photo of") and ids[:first] == given[:first]
        assert blip2.tokenizer.decode(ids[first:]) == "a red bus" and ids[-1] == blip2.tokenizer.eos_id
        whole = blip2.tokenizer.token_ids("a photo of a red bus")  # as one text is cut into pieces
        assert ids[len(ids) - 1 - len(whole):-1] == whole


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.bfloat16), ("float32", torch.float32), ("float16", None)])
def test_the_frozen_parts_are_of_the_dtype_that_is_asked_for(tmp_path, monkeypatch, plenty, asked, dtype):
    if asked:
        monkeypatch.setenv("MINBLIP2_DTYPE", asked)
    folder = folder_of("opt", tmp_path)
    if dtype is None:
        with pytest.raises(UserError, match="choose bfloat16 or float32"):
            finetune.cost(folder, 12, 4)
        return
    assert f"frozen in {str(dtype).removeprefix('torch.')}" in str(finetune.cost(folder, 12, 4))
    assert {one.dtype for one in finetune.load_for_training(folder, 12, 4).stage2.lm.parameters()} == {dtype}


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["minblip2", *map(str, words)])
    code = main()
    return code, *capsys.readouterr()


def test_the_command(tmp_path, monkeypatch, capsys, plenty):
    source, table = folder_of("opt", tmp_path / "source"), pictures(tmp_path / "mine", split="yes")
    words = ["train", "--from", source, "--data", table, "--out", tmp_path / "out", "--steps", "3", "--batch-size", "4"]
    code, out, _ = run(monkeypatch, capsys, *words, "--dry-run")
    assert code == 0 and "parameters are trained" in out and "GB of memory" in out and not (tmp_path / "out").exists()
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 0 and "| CIDEr-D ×100 " in out and "another picture, the control" in out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["held_out"] is True
    assert "held out" in (tmp_path / "out" / "README.md").read_text() and "nothing is held out" not in err
    code, _, err = run(monkeypatch, capsys, *words[:-6], "--out", tmp_path / "val", "--steps", "1", "--batch-size", "2",
                       "--train-split", "val")
    assert code == 0 and "'val' is trained on, so nothing is held out" in err
    assert json.loads((tmp_path / "val" / "results.json").read_text())["held_out"] is False
    code, out, _ = run(monkeypatch, capsys, "caption", "--model", tmp_path / "out", tmp_path / "mine" / "0.png")
    assert code == 0
    code, _, err = run(monkeypatch, capsys, "caption", "--run", tmp_path / "out", tmp_path / "mine" / "0.png")
    assert code == 2 and "is a folder of the model hub, and no run of a recipe: name it with --model" in err
    code, out, _ = run(monkeypatch, capsys, *words[:-6], "--out", tmp_path / "prompted", "--steps", "20", "--split",
                       "train", "--prompt", "a photo of")
    assert code == 0 and f"--model {tmp_path / 'prompted'} --prompt 'a photo of' PICTURE" in out
    measured = json.loads((tmp_path / "prompted" / "results.json").read_text())["after"]["cider"]
    figures = {}
    for more in ((), ("--prompt", "a photo of")):
        code, out, _ = run(monkeypatch, capsys, "evaluate", "--model", tmp_path / "prompted", "--data", table,
                           "--split", "train", "--dtype", "bfloat16", *more)
        figures[more] = next(line for line in out.splitlines() if "CIDEr" in line).split()[-1]
    assert figures["--prompt", "a photo of"] == f"{measured:.1f}"
    for more, said in (((), "--data"), (("--data", table, "--out", source), "starts from"),
                       (("--data", table, "--split", "tset"), "no split 'tset'"),
                       (("--data", table, "--batch-size", "400"), "batch size is 400 for 9 pairs")):
        code, _, err = run(monkeypatch, capsys, "train", "--from", source, *more)
        assert code == 2 and said in err.splitlines()[-1], more
    edit(source, "config.json", model_type="bert")
    assert run(monkeypatch, capsys, *words)[0] == 2
    shutil.rmtree(source)
    assert run(monkeypatch, capsys, *words)[0] == 2


def test_several_processes_are_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    for name, value in dict(TORCHELASTIC_RUN_ID="none", RANK="1", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    code, _, err = run(monkeypatch, capsys, "train", "--from", tmp_path / "nowhere")
    assert code == 2 and "runs in one process: start it without torchrun" in err

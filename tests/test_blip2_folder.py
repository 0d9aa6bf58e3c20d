"""From a photograph to words as in transformers: preprocessing, prompts, stop token, settings; and the command line."""

import json
import sys

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from minblip2 import UserError
from minblip2.__main__ import main
from minblip2.data.transforms import Transform
from minblip2.weights.blip2 import Blip2

from .parity import difference
from .tiny_blip2 import official_folder

QUESTIONS = ["Question: what is the dog doing? Answer:", "Question: a bus? Answer:"]
Q = 5


@pytest.fixture(params=["opt", "t5"])
def original(request, tmp_path):
    """A small BLIP-2 with tokenizer and preprocessing: transformers' model and processor, and the folder."""
    return *official_folder(request.param, tmp_path), tmp_path


def pictures():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((60, 33), (42, 42))]


# what LAVIS sets, in transformers' words: for captions, and for answers with the paper's length penalty
CAPTION = dict(num_beams=5, max_new_tokens=30, min_new_tokens=1)
ANSWER = dict(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)


def theirs(model, processor, prompts, settings):
    inputs = processor(images=pictures(), text=prompts, padding=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, early_stopping=False, **settings)
    given = 0 if model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [text.strip() for text in processor.tokenizer.batch_decode(ids[:, given:], skip_special_tokens=True)]


def test_captions_and_answers_equal_transformers(original):
    model, processor, folder = original
    blip2 = Blip2.from_folder(folder, torch.float32, torch.device("cpu"))
    for prompts, expected_prompts in (("", ["", ""]), ("a photo of", ["a photo of"] * 2)):
        expected = theirs(model, processor, expected_prompts, CAPTION)
        assert blip2.caption(pictures(), prompts) == expected
    answers = blip2.ask(pictures(), QUESTIONS)
    assert answers == theirs(model, processor, QUESTIONS, ANSWER)
    assert blip2.ask(pictures(), QUESTIONS, batch_size=1) == answers
    assert blip2.ask(pictures(), QUESTIONS, max_length=None, length_penalty=None, beams=None) == answers
    assert any(answers) and blip2.caption(pictures(), beams=1, max_length=2) != answers


def test_prompts_are_tokenised_as_by_the_processor(original):
    _, processor, folder = original
    blip2 = Blip2.from_folder(folder, torch.float32, torch.device("cpu"))
    for prompt in ["", "a photo of", *QUESTIONS]:
        expected = processor(images=pictures()[0], text=prompt, return_tensors="pt")["input_ids"][0, Q:].tolist()
        assert blip2.tokenizer.encode_prompt(prompt) == expected
    assert blip2.tokenizer.backend.id_to_token(blip2.tokenizer.eos_id) in ("Ċ", "</s>")


def test_pixels_equal_transformers_on_photographs(photos):
    files = sorted((photos / "images").iterdir())[:5]
    processor = BlipImageProcessorPil(size=dict(height=224, width=224))
    for path in files:
        with Image.open(path) as image:
            image = image.convert("RGB").resize((301, 200))
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        assert difference(Transform()(image), expected) < 1e-6


def test_saved_folders_load_here_and_there(original, tmp_path):
    model, processor, folder = original
    blip2 = Blip2.from_folder(folder, torch.float32, torch.device("cpu"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "processor_config.json").write_text('{"image_processor": {"size": 28}}')  # of another model
    blip2.save(tmp_path / "saved")
    again = Blip2.from_folder(tmp_path / "saved", torch.float32, torch.device("cpu"))
    assert again.tokenizer.encode_prompt("a bus") == blip2.tokenizer.encode_prompt("a bus")
    assert again.caption(pictures()) == blip2.caption(pictures())
    there = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert theirs(there, processor, QUESTIONS, ANSWER) == blip2.ask(pictures(), QUESTIONS)
    blip2.save(tmp_path / "named", image_token=7)
    assert json.loads((tmp_path / "named" / "config.json").read_text())["image_token_index"] == 7
    blip2.transform = Transform(size=42, mode="crop", resize_to=50)
    with pytest.raises(UserError, match="square"):
        blip2.save(tmp_path / "cut")


def test_who_reads_a_saved_folder_elsewhere_begins_texts_as_we_do(tmp_path):
    """Some tokenizers name a start token and never add it (SmolLM2's); a bridge on such a model has learned with it."""
    official_folder("opt", tmp_path)
    blip2 = Blip2.from_folder(tmp_path, torch.float32, torch.device("cpu"))
    plain = json.loads(blip2.tokenizer.backend.to_str()) | {"post_processor": None}
    blip2.tokenizer.backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
    blip2.save(tmp_path / "saved")
    there = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "saved" / "tokenizer.json"))
    assert there("a bus")["input_ids"] == blip2.tokenizer.encode_prompt("a bus") != blip2.tokenizer.token_ids("a bus")


def test_commands(original, tmp_path, monkeypatch, capsys):
    _, _, folder = original
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for image, path in zip(pictures(), files, strict=True):
        image.save(path)
    blip2 = Blip2.from_folder(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["minblip2", *map(str, arguments)])
        code = main()
        return code, capsys.readouterr()

    code, said = run("caption", "--model", folder, *files, "--prompt", "a photo of")
    expected = blip2.caption(pictures(), "a photo of")
    assert code == 0 and said.out == "".join(f"{path}: {text}\n" for path, text in zip(files, expected, strict=True))
    code, said = run("ask", "--model", folder, files[0], QUESTIONS[0])
    assert code == 0 and said.out == f"{QUESTIONS[0]} {blip2.ask(pictures()[:1], QUESTIONS[:1])[0]}\n"
    code, said = run("ask", "--model", tmp_path / "nowhere", files[0], "?")
    assert code == 2 and "nowhere" in said.err and said.err.count("\n") == 1

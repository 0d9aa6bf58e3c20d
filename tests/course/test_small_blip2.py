"""What lesson 16 draws, and what it says of a spoiled file."""

import pytest
import torch

from minblip2.course import small_blip2
from minblip2.training import budget
from minblip2.weights.blip2 import Blip2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("small") / "blip2"
    small_blip2.learn_by_heart(small_blip2.eight_scenes(), steps=1).save(place)
    return place


def test_a_spoiled_file_is_refused_and_the_folder_stays(folder):
    assert "lacks the weights of query_tokens" in small_blip2.refusal(folder, lambda file: file.pop("query_tokens"))
    assert Blip2.from_folder(folder, torch.float32, torch.device("cpu"))


def test_a_whole_file_is_not_called_refused(folder):
    with pytest.raises(AssertionError, match="was loaded"):
        small_blip2.refusal(folder, lambda file: None)


def test_traps_are_sorted_and_marked():
    left, right = small_blip2.traps([("mild", 1e-4, 8), ("bad", 0.5, 3)], 8).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["mild", "bad"]
    assert [text.get_text() for text in right.texts] == ["8 of 8", "3 of 8"]
    marks = [len(line.get_xdata()) for line in right.lines]
    assert marks == [8, 0, 3, 5]  # as before and another one, for each mistake
    dots = [line for line in left.lines if line.get_marker() != "None"]
    assert dots[0].get_color() != dots[1].get_color() and dots[0].get_marker() != dots[1].get_marker()


def test_stacked_marks_what_lies_in_the_wrong_place():
    words = [text.get_text() for text in small_blip2.stacked().axes[0].texts]
    assert words.count("q₁") == words.count("k₂") == words.count("v₃") == 3


def test_official_language_models_have_the_published_sizes():
    sizes = {name: round(budget.parameters(lm) / 1e8) / 10
             for name, lm in small_blip2.official_language_models().items()}
    assert sizes == {"blip2-opt-2.7b": 2.7, "blip2-opt-6.7b": 6.7, "blip2-flan-t5-xl": 2.8, "blip2-flan-t5-xxl": 11.1}


def test_what_was_not_fetched_or_does_not_fit_is_left_out_with_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINBLIP2_PARTS", str(tmp_path))
    (tmp_path / "blip2-flan-t5-xl").mkdir()
    (tmp_path / "blip2-flan-t5-xl" / "model.safetensors").touch()
    monkeypatch.setattr(small_blip2.budget, "free_memory", lambda device: 1e9)
    assert small_blip2.fetched({"blip2-flan-t5-xl": {2: 8e9, 4: 16e9}}) == {}
    missing, large = capsys.readouterr().out.splitlines()
    assert missing.startswith("blip2-opt-2.7b: not there; fetch it with: ")
    assert large.startswith("blip2-flan-t5-xl: there, but it needs ")

"""What the lesson on the language model measures is what it says."""

import math

import pytest
import torch
import torch.nn.functional as F

from minblip2.course import language
from minblip2.data.scene_captions import write_texts
from minblip2.data.scenes import draw_scenes
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.training.experts import lm_tokenizer


@pytest.fixture(scope="module")
def words():
    return lm_tokenizer()


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    made = OPT(OPTConfig(len(words), width=32, layers=2, heads=2, mlp_width=64, max_positions=128))
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.eval().requires_grad_(False)


def test_losses_are_those_of_each_next_word_and_places_count_texts(model, words):
    rows = [language.row_of(words, ["a red star", "a blue ring"]), language.row_of(words, ["two"])]
    losses, real, place = language.word_losses(model, words, rows)
    for row, some, which, where in zip(rows, losses, real, place, strict=True):
        ids = torch.tensor([row])
        logits = model.lm_logits(language.states(model, model.embed(ids), torch.ones_like(ids) > 0))
        assert torch.allclose(some[which], F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"), atol=1e-4)
        assert where[which].tolist() == [1 + row[1:i].count(words.eos_id) for i in range(1, len(row))]
    by_place = language.loss_by_place(model, words, [["a red star", "a blue ring"]], 2)
    assert by_place == pytest.approx([losses[0][place[0] == 1].mean().item(), losses[0][place[0] == 2].mean().item()])
    assert language.spelled(words, language.row_of(words, ["a red"])) == "[SEP] a red\n    [SEP]"


def test_a_soft_prompt_of_words_costs_what_the_words_do(model, words):
    ids = torch.tensor([[*words.bos_ids, *words.token_ids("red star")]])
    text = "a red star"
    mine = language.prompted_loss(model, words, model.embed(ids), [text])
    row = torch.tensor([[*ids[0].tolist(), *language.row_of(words, [text])]])
    logits = model.lm_logits(language.states(model, model.embed(row), torch.ones_like(row) > 0))
    count = len(words.token_ids(text)) + 1
    assert mine.item() == pytest.approx(F.cross_entropy(logits[0, -count - 1:-1], row[0, -count:]).item(), abs=1e-4)


def test_a_soft_prompt_can_be_fitted_and_leaves_the_model_alone(model, words):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    captions = [six[0] for six in write_texts(2, seed=0)]
    soft = torch.zeros(2, 4, 32, requires_grad=True)
    optimiser, losses = torch.optim.Adam([soft], lr=0.03), []
    for _ in range(6):
        losses.append(language.prompted_loss(model, words, soft, captions))
        soft.grad, = torch.autograd.grad(losses[-1], [soft])
        optimiser.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    said = language.written(model, words, [words.bos_ids] * 2, soft.detach())
    assert len(said) == 2 and said == language.written(model, words, [words.bos_ids] * 2, soft.detach(), side="right")


def test_lies_change_one_colour_that_is_unique_to_one_that_is_absent():
    texts, truths = write_texts(30, seed=1), [scene for *_, scene in draw_scenes(30, "1 text")]
    found = language.lies([six[5] for six in texts], truths)
    assert found
    for true, false, text, lie in found:
        assert false not in text.split() and lie == text.replace(true, false) and lie != text
    assert language.share_right([six[0] for six in texts], truths) == 1.0
    assert language.share_right(["a picture of nothing"] * 30, truths) == 0.0


def test_derivatives_by_later_words_are_zero_and_figures_show_them(model, words):
    ids = torch.tensor([words.encode("a red star")])
    values = language.slopes(model, ids)
    later = torch.ones_like(values).triu(1).bool()
    assert (values[later] == 0).all() and (values[~later] > 0).all()
    figure = language.slope_figure(values, [str(i) for i in ids[0].tolist()])
    assert sum(text.get_text() == "0" for text in figure.axes[0].texts) == int(later.sum())
    batch = words.pad([words.encode("a red star"), words.encode("two")])
    labels = [text.get_text() for text in language.shift_figure(*batch, words).axes[0].texts]
    assert labels.count("reads") == labels.count("predicts") == 2 and labels.count("star") == 2
    assert len(language.belief_figure({"red": 0.1, "blue": 0.2}).axes[0].patches) == 2
    assert "soft prompt" in " ".join(text.get_text() for text in language.decoder_figure().axes[0].texts)
    assert math.isfinite(values.sum())

"""The own bridge: pieces are read, judged and lent as told; with those of the solutions it is the module's."""

import copy
import linecache
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

import own
from checks import DONE, OPEN, WRONG, lesson01, lesson02, lesson05, lesson08, lesson10
from minblip2 import UserError
from minblip2.data.batches import Batch
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2

from ..batches import stage1_batch as batch
from ..parity import TINY, randomise

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pieces():
    return own.collect(ROOT / "solutions")


def written(folder, lesson, change):
    """A copy of a solved notebook in which one text is another: a learner's, with a mistake."""
    source = next((ROOT / "solutions").glob(f"{lesson}_*.ipynb"))
    notebook, (old, new) = nbformat.read(source, as_version=4), change
    assert sum(cell.source.count(old) for cell in notebook.cells) == 1, old
    for cell in notebook.cells:
        cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, folder / source.name)
    return folder


# --- reading ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_read_out_of_its_notebook_and_its_errors_show_their_line():
    notebook = next((ROOT / "solutions").glob("01_*.ipynb"))
    layer = own.answer_in(notebook, "cross_attention").value
    assert lesson01.cross_attention.verdict(layer).status == DONE
    with pytest.raises(own.NotThere, match="01_attention.ipynb holds nothing that is given to check.recall"):
        own.answer_in(notebook, "recall")
    wrong = lesson01.cross_attention.verdict(lambda *sizes: layer(*sizes[:2], "wide"))
    assert "nn.Linear(context_width, width)" in wrong.message
    assert any(name.startswith("<01_attention.ipynb") for name in linecache.cache)


def test_unsolved_notebooks_have_no_pieces_and_nothing_is_trained(capsys):
    pieces = own.collect(ROOT / "exercises")
    output = capsys.readouterr().out
    assert pieces.yours == 0 and f"0 of {len(pieces.all)} pieces are yours" in output
    assert {piece.status for piece in pieces.all.values()} == {OPEN} and output.count("solution's is put in") == 23

    verdict = lesson10.own_bridge.verdict(lambda: own.train_stage1(pieces, 1, 1e-3))
    assert verdict.status == OPEN and "None of the pieces is yours" in verdict.message


def test_solved_ones_are_yours(pieces):
    assert pieces.yours == len(pieces.all) == 23
    with pytest.raises(AttributeError, match="no piece rotary"):
        getattr(pieces, "rotary")  # noqa: B009


@pytest.mark.parametrize("lesson, check, change, said", [
    ("02", lesson02.bidirectional, ("return repeat(attention_mask, \"b k -> b 1 s k\", s=attention_mask.shape[1])",
                                    "return unimodal(queries, text_mask)"), "in both directions"),
    ("02", lesson02.multimodal_causal, ("(column < queries) | (column <= row)", "column <= row"), "no order"),
    ("05", lesson05.run_block, ("if queries and parts.cross_attention is not None:", "if False:"),
     "cross-attention did not run"),
    ("08", lesson08.next_words, ("F.pad(real[:, 1:], (0, 1), value=-100)", "real"), "copying"),
    ("10", lesson10.shifted_loss, ("logits[:, :-1], targets[:, 1:]", "logits, targets"), "repeat what it sees"),
    ("10", lesson10.labels, ("masked_fill(~text_mask, -100)", "masked_fill(text_mask, -100)"), "no label"),
    ("10", lesson10.lm_logits, ("lm.requires_grad_(False).eval()\n    return lm(embeds)",
                                "with torch.no_grad():\n        return lm.eval()(embeds)"), "graph is cut"),
    ("10", lesson10.sequence, ("[soft, prompt, text]", "[prompt, soft, text]"), "in front"),
    ("10", lesson10.sequence, ("soft = projection(queries)", "soft = projection(queries"), "line 4, is no Python"),
    ("10", lesson10.sequence, ("soft = projection(queries)", "soft = projektion(queries)"), "NameError")])
def test_a_wrong_piece_is_named_with_its_mistake_and_not_put_in(tmp_path, lesson, check, change, said):
    piece = own.judged(check, written(tmp_path, lesson, change))
    assert not piece.yours and piece.status in (WRONG, OPEN) and said in piece.message, piece
    assert f"{piece.status}; the solution's is put in" in own.Pieces([piece]).table()
    assert piece.message in own.Pieces([piece]).table()


def test_what_nobody_can_lend_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"01.2 attention is not done yet, and .* has none to lend: do it first"):
        own.collect(tmp_path, lender=tmp_path)


# --- the same numbers as the module's ---------------------------------------------------------------------------------


@pytest.fixture
def stage1(pieces):
    return randomise(own.OwnStage1(TINY, 16, pieces))


def test_stage1_of_solved_pieces_is_the_modules(stage1):
    theirs = Stage1(TINY, 16).eval()
    theirs.load_state_dict(stage1.state_dict())  # all names and shapes are the module's
    image, ids, mask = batch()
    given = image, ids, mask, torch.tensor([3, 5, 3, 8]), (torch.tensor([1, 0, 3, 2]), torch.tensor([3, 2, 1, 0]))
    ours = stage1.eval()(*given)
    for one, other in zip(ours, theirs(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def small_lm():
    return randomise(OPT(OPTConfig(vocab_size=23, width=16, layers=2, heads=2, mlp_width=32, max_positions=64)))


def test_stage2_of_solved_pieces_is_the_modules(stage1):
    ours, lm = own.OwnStage2(stage1, small_lm()).eval(), small_lm()
    lm.load_state_dict(ours.lm.state_dict())
    module1 = Stage1(TINY, 16)
    module1.load_state_dict(stage1.state_dict())
    theirs = Stage2.from_stage1(module1, lm).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)  # ours keeps the text side of the Q-Former
    image, ids, mask = batch()
    prompt, known = ids[:, :1] * 0 + 2, torch.ones(4, 1, dtype=torch.bool)
    given = image, prompt, known, ids % 23, mask
    for one, other in zip(ours(*given), theirs(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    wrote = [model.generate(image, prompt, known, eos_id=2, max_length=6) for model in (ours, theirs)]
    assert torch.equal(*wrote)


# --- training ---------------------------------------------------------------------------------------------------------


def test_frozen_stays_and_the_rest_learns(stage1):
    model = own.OwnStage2(stage1, small_lm())
    image, ids, mask = batch()
    frozen, soft = copy.deepcopy(model.lm.state_dict()), model.projection.weight.clone()
    rates, paid = [], []

    def rate(step, steps, warmup, peak, floor):
        rates.append((step, steps, warmup, peak))
        return peak

    def loss_of(some):
        paid.append(model(some, ids[:, :1] % 23, mask[:, :1], ids % 23, mask).loss)
        return paid[-1]

    own.learn(model, loss_of, iter([image] * 20), 20, 3e-3, rate, "stage 2", fresh="projection")
    assert all(torch.equal(value, model.lm.state_dict()[name]) for name, value in frozen.items())
    assert not torch.equal(soft, model.projection.weight) and paid[-1] < 0.9 * paid[0]
    assert rates[0] == (0, 20, 1, 3e-3) and rates[-1][0] == 19 and not model.training

    def too_fast():
        own.learn(model, lambda some: loss_of(some) * torch.nan, iter([image]), 1, 3e-3, rate, "stage 2")

    message = lesson10.own_bridge.verdict(too_fast).message
    assert "the loss of stage 2 is nan at step 1: lower the peak rate" in message and "in too_fast, line" in message


class SmallWorld:
    """A world in which nothing was trained: eight pictures, as many words."""

    def __init__(self):
        lm = small_lm()
        tokenizer = SimpleNamespace(encode_prompt=lambda text: [2], eos_id=2, prompt_end=[],
                                    decode=lambda row: " ".join(map(str, row.tolist())))
        self.backbones = SimpleNamespace(qformer=TINY, lm=lm, lm_tokenizer=tokenizer)
        self.features, self.ids = torch.randn(8, 5, TINY.image_width).numpy(), torch.randint(3, 20, (8, 6))
        self.bridge = SimpleNamespace(retriever=SimpleNamespace(text_ids=self.texts))

    def texts(self, texts):
        return torch.randint(3, 20, (len(texts), 6)), torch.ones(len(texts), 6, dtype=torch.bool)

    def batches(self, for_lm):
        while True:
            ids = self.ids % 23 if for_lm else self.ids
            yield Batch(torch.from_numpy(self.features), ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(8))

    def encode_images(self, images):
        return torch.randn(len(images), 5, TINY.image_width)


def test_the_whole_way_in_small(pieces, monkeypatch, capsys):
    small = SmallWorld()
    monkeypatch.setattr(own, "world", lambda: small)
    monkeypatch.setattr(own, "TRAINED", [])
    own.show()
    assert "not done yet" in capsys.readouterr().out

    def bridge():
        return own.captioner(own.train_stage2(own.train_stage1(pieces, 4, 1e-3), 4, 1e-3))

    verdict = lesson10.own_bridge.verdict(bridge)
    output = capsys.readouterr().out
    assert verdict.status == WRONG and "captions" in verdict.message  # it has learned nothing
    assert "stage 1, step 4 of 4: loss" in output and "find their own caption first" in output and len(own.TRAINED) == 1


@pytest.fixture
def small(monkeypatch):
    world = SmallWorld()
    monkeypatch.setattr(own, "world", lambda: world)
    for name, empty in (("TRAINED", []), ("KEPT", {}), ("LOSSES", {})):
        monkeypatch.setattr(own, name, empty)
    return world


def test_nothing_is_trained_twice_and_nothing_that_was_kept_changes(pieces, small, capsys):
    def bridge(steps=3):
        stage1 = own.train_stage1(pieces, steps, 1e-3)
        return stage1, own.train_stage2(stage1, 3, 1e-3)

    first = [copy.deepcopy(model.state_dict()) for model in bridge()]
    assert "trained before" not in capsys.readouterr().out
    again = bridge()
    output = capsys.readouterr().out
    assert output.count("trained before") == 2 and "step 3 of 3" not in output
    for model, weights in zip(again, first, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        for weight in model.parameters():  # whatever is done with what was handed out
            weight.data.zero_()
    third = bridge()
    assert all(torch.equal(value, first[1][name]) for name, value in third[1].state_dict().items())
    capsys.readouterr()
    bridge(steps=4)
    assert "trained before" not in capsys.readouterr().out, "other steps, another bridge"
    changed = own.Pieces([own.replace(piece, source="another") if piece.exercise.__name__ == "sequence" else piece
                          for piece in pieces.all.values()])
    stage1 = own.train_stage1(changed, 3, 1e-3)
    assert "stage 1: trained before" in capsys.readouterr().out
    own.train_stage2(stage1, 3, 1e-3)
    assert "trained before" not in capsys.readouterr().out, "a piece of lesson 10 is another"


@pytest.mark.parametrize("make, said", [
    (lambda pieces: own.train_stage1(pieces, "3", 1e-3), "steps is '3'"),
    (lambda pieces: own.train_stage1(pieces, 3, 2), "peak is 2"),
    (lambda pieces: own.train_stage1(3, 1e-3, pieces), "takes the pieces that own.collect gives, not a int"),
    (lambda pieces: own.train_stage2(pieces, 3, 1e-3), "takes what own.train_stage1 gives, not a Pieces"),
    (lambda pieces: own.captioner(own.train_stage1(pieces, 3, 1e-3)), "takes what own.train_stage2 gives"),
    (lambda pieces: own.train_stage2(own.train_stage1(pieces, 300, 1e-3), 300, 1e-3), "gives a OwnStage2; the"),
    (lambda pieces: own.train_stage1(pieces, 300, 1e-3) and None, "gives None"),
    (lambda pieces: own.train_stage1(pieces, 300, 1e-3) and (lambda images: "a dog"), "as many captions")])
def test_what_cannot_be_gone_to_the_end_is_told_before_anything_is_trained(pieces, small, capsys, make, said):
    verdict = lesson10.own_bridge.verdict(lambda: make(pieces))
    assert verdict.status == WRONG and said in verdict.message
    assert "step" not in capsys.readouterr().out and not own.KEPT


def test_losses_are_looked_at_before_captions(monkeypatch):
    def bridge(**losses):
        def make():
            own.LOSSES.update(losses)
            return lambda images: [""] * len(images)
        return make

    monkeypatch.setattr(own, "LOSSES", {"stage 2": [9.0] * 60})  # of an earlier call: it is forgotten
    falls, stays = [7.0 - step / 20 for step in range(100)], [7.0] * 100
    message = lesson10.own_bridge.verdict(bridge(**{"stage 1": stays, "stage 2": falls})).message
    assert "the loss of stage 1 begins at 7.00 and ends, 100 steps later, at 7.00" in message
    for losses in ({"stage 1": falls, "stage 2": falls}, {}, {"stage 1": [7.0] * 20}):
        assert "the end is said before any word" in lesson10.own_bridge.verdict(bridge(**losses)).message


def test_fused_may_be_called_as_pytorchs_is():
    seen = []
    fused = own.called_as_pytorchs(lambda *given: seen.append(given) or given[0])
    q, mask = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    fused(q, q, q, mask), fused(q, q, q, attn_mask=mask), fused(query=q, key=q, value=q), fused(q, q, q, dropout_p=0.0)
    assert [given[3] is mask for given in seen] == [True, True, False, False]


def test_the_exam_is_fair():
    images, scenes, captions = own.exam()
    assert len(images) == len(scenes) == len(captions) == own.EXAM
    assert lesson10.share(captions, scenes) == 1
    assert max(len(caption.split()) for caption in captions) < lesson10.LONG
    assert not any(map(lesson10.stutters, captions))

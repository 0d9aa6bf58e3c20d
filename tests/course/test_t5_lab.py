"""What lesson 12 works with: its small T5's texts, its measures, and its figures."""

import torch

from minblip2.course import t5_figures, t5_lab, viz
from minblip2.data import scene_captions


def test_texts_name_one_or_two_things_and_their_keywords_name_them_too():
    pairs = t5_lab.corpus(count=50)
    assert pairs and all(t5_lab.is_short(text) for _, text in pairs)
    for words, text in pairs:
        assert {colour for colour, _ in scene_captions.parse(text).things} <= set(words.replace(",", " ").split())


def test_withheld_keywords_are_masked_and_the_two_pieces_make_the_caption():
    tokenizer, pairs = t5_lab.vocabulary(), t5_lab.corpus(count=20)[:8]
    for withheld, seen in ((0.0, True), (1.0, False)):
        given, mask, text, text_mask = t5_lab.text_batch(pairs, tokenizer, torch.Generator().manual_seed(0), withheld)
        for row, (words, caption) in enumerate(pairs):
            found, rest = given[row][mask[row]].tolist(), text[row][text_mask[row]].tolist()
            known = tokenizer.token_ids(words) if seen else []
            assert found[:len(known)] == known
            assert [*found[len(known):-1], *rest] == tokenizer.encode(caption)


def test_right_tells_colours_from_things():
    truths, _ = t5_lab.new_scenes(count=30)
    truth = next(some for some in truths if len(some.things) == 2 and len({x.colour for x in some.things}) == 2
                 and len({x.shape for x in some.things}) == 2)
    one, two = truth.things
    phrase = scene_captions.phrase
    true = f"a picture of {phrase(one.colour, one.shape)} and {phrase(two.colour, two.shape)}"
    swapped = f"a picture of {phrase(two.colour, one.shape)} and {phrase(one.colour, two.shape)}"
    assert t5_lab.right([true, swapped], [truth, truth]) == (1, 0.5)
    assert t5_lab.marks([true, swapped], [truth, truth]) == ["✓", "✗"]
    assert t5_lab.examples(["a", "b"], [swapped, true], [truth, truth]) == [["b", true, "✓"], ["a", swapped, "✗"]]


def test_a_small_t5_learns_from_text_and_is_frozen_then():
    tokenizer, pairs = t5_lab.vocabulary(), t5_lab.corpus(count=50)
    lm = t5_lab.small_t5(tokenizer)
    log = t5_lab.read_texts(lm, tokenizer, pairs, steps=15)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert not lm.training and not any(p.requires_grad for p in lm.parameters())
    written = t5_lab.from_keywords(lm, tokenizer, ["red star", "blue ring top left"])
    assert len(written) == 2 and all(text.startswith(t5_lab.OPENING) for text in written)


def test_dependence_finds_exact_zeros():
    x = torch.randn(1, 3, 4, requires_grad=True)
    y = torch.randn(1, 1, 4, requires_grad=True)
    assert t5_figures.dependence(x.cumsum(dim=1), (x, y)).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_the_figures_are_drawn():
    ahead = torch.arange(-5, 6)
    made = [t5_figures.two_halves(), t5_figures.buckets(ahead, {"one": ahead.abs(), "two": (-ahead).clamp(min=0)}, 4),
            t5_figures.dependence_grids({"one": torch.ones(3, 3).bool()}, "abc", [0, 1, 2]),
            t5_figures.cuts([([1, 2], [3, 4, 5], 0.5)], str),
            t5_figures.loss_curve([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}], 0.8, "chance")]
    assert all(viz.png(figure) for figure in made)
    assert [len(panel.get_lines()) for panel in made[1].axes] == [3, 2], "max_distance on the sides that are counted"

"""What lesson 17 counts and looks up: multiply-adds, gradients, and the table of relatives."""

import re
import string

import pytest
import torch
from torch import nn

from minblip2.course import scaling, viz
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1

TINY = OPTConfig(vocab_size=40, width=16, layers=2, heads=2, mlp_width=32, max_positions=64)


def test_multiply_adds_are_those_of_the_products():
    with torch.device("meta"):
        layer = nn.Linear(30, 50)
    assert scaling.giga(lambda: layer(torch.empty(7, 30))) == pytest.approx(7 * 30 * 50 / 1e9)


def test_a_longer_text_or_image_costs_more_in_each_pass():
    with torch.device("meta"):
        stage1, lm = Stage1(QFormerConfig(), 256), OPT(TINY)
    for one, other in (
            (lambda: scaling.stage1_pass(stage1, 257, 13), lambda: scaling.stage1_pass(stage1, 257, 32)),
            (lambda: scaling.stage1_pass(stage1, 65, 13), lambda: scaling.stage1_pass(stage1, 257, 13)),
            (lambda: scaling.prefill(lm, 8), lambda: scaling.prefill(lm, 16)),
            (lambda: scaling.language_pass(lm, 4, 8), lambda: scaling.language_pass(lm, 8, 8))):
        assert 0 < scaling.giga(one) < scaling.giga(other)


def test_every_row_of_relatives_has_all_its_cells_by_year():
    words = "".join(cell for row in scaling.RELATIVES for cell in row)
    names = {name for _, name, *_ in string.Formatter().parse(words) if name}
    rows = scaling.relatives(dict.fromkeys(names, 2_000_000_000))
    assert {len(row) for row in rows} == {len(scaling.RELATIVES_HEADER)}
    assert "".join(cell for row in rows for cell in row).count("**2.0 B**") == words.count("{")
    numbers = [number for _, number, *_ in scaling.RELATIVES]
    assert all(re.fullmatch(r"\d{4}\.\d{5}", number) for number in numbers)
    assert [number[:2] for number in numbers] == sorted(number[:2] for number in numbers)
    with pytest.raises(KeyError):
        scaling.relatives({})
    assert names == set(scaling.counted())
    assert [row[0][:8] for row in scaling.relatives(scaling.counted(), "BLIP-2", "LLaVA")] == ["[**BLIP-", "[LLaVA]("]


def test_blip2_and_its_children_count_as_their_papers_and_code_say():
    """The paper's Table 2 has 108 M; InstructBLIP keeps the text branch of stage 1 and drops its head."""
    counts = scaling.counted()
    assert round(counts["stage2"] / 1e6) == 108
    assert counts["instruct"] == 161_825_280 + 23_834_880 + 32 * 768 + 2 * 1408 + 769 * 4096


def test_a_bar_is_the_sum_of_its_parts():
    figure = scaling.stacked({"one": {"a": 1.0, "b": 2.0}, "two": {"a": 4.0, "b": 0.5}}, "units", [(3, "three")])
    ends = {bar.get_x() + bar.get_width() for bar in figure.axes[0].patches}
    assert {3.0, 4.5} <= ends
    for drawn in (figure, scaling.spread_flow(), scaling.pair_matrices(),
                  scaling.gradient_lengths({"fresh": {"ours": {"image": 1.0, "caption": 0.5}}})):
        assert viz.png(drawn)


def test_gradients_are_compared_in_length_and_direction():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    ratios, cosines = scaling.against_true({"fresh": {"true": {"a": one, "b": one}, "half": {"a": one / 2, "b": one},
                                                      "across": {"a": other, "b": one}}})
    assert ratios["fresh"] == {"half": {"a": 0.5, "b": 1.0}, "across": {"a": 2.0, "b": 1.0}}
    assert cosines["fresh"] == {"half": 1.0, "across": 0.0}


def test_gradients_of_several_losses_are_added():
    layer = nn.Linear(2, 1, bias=False)
    found = scaling.gradients(layer, {"w": "weight"}, lambda: layer(torch.ones(2)).sum(),
                              lambda: layer(torch.ones(2)).sum())
    assert found["w"].tolist() == [[2.0, 2.0]]

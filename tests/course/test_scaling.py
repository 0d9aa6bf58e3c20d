"""What lesson 17 counts and looks up: multiply-adds, what layers keep, and the table of relatives."""

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


def test_frozen_layers_keep_less_and_the_model_stays_as_it_was():
    lm = OPT(TINY).requires_grad_(False)
    assert 0 < scaling.kept_by(lm, False) < scaling.kept_by(lm, True)
    assert not any(parameter.requires_grad for parameter in lm.parameters())


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


def test_a_bar_is_the_sum_of_its_parts():
    figure = scaling.stacked({"one": {"a": 1.0, "b": 2.0}, "two": {"a": 4.0, "b": 0.5}}, "units", [(3, "three")])
    ends = {bar.get_x() + bar.get_width() for bar in figure.axes[0].patches}
    assert {3.0, 4.5} <= ends
    for drawn in (figure, scaling.spread_flow(), scaling.pair_matrices(),
                  scaling.gradient_lengths({"fresh": {"ours": {"image": 1.0, "caption": 0.5}}})):
        assert viz.png(drawn)

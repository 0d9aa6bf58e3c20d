"""The figures of lesson 02: inside their paper, legible, and true to what they are given."""

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minblip2 import masks
from minblip2.course import mask_figures, viz

NAMES = ["q1", "q2", "a", "red", "star"]
MASK = masks.multimodal_causal(2, torch.ones(1, 3, dtype=torch.bool))[0, 0]
VALUES = MASK * 0.1 + torch.eye(5) * 10
FIGURES = {
    "three_uses": lambda: mask_figures.three_uses(),
    "dependence": lambda: mask_figures.dependence_maps({"a": MASK, "b": ~MASK}, {"a": {1: VALUES, 3: VALUES},
                                                                           "b": {1: VALUES, 3: VALUES}}, NAMES, 2),
    "leak": lambda: mask_figures.leak({1: VALUES, 2: VALUES + 1e-3}, NAMES, 2),
    "rows_of_words": lambda: mask_figures.rows_of_words(MASK, 2, NAMES[2:]),
    "drift": lambda: mask_figures.drift([3, 4], {"wrong": [0, 0.5], "right": [0, 0]}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_legible_and_inside_its_paper(name):
    figure = FIGURES[name]()
    viz.png(figure)  # the layout settles only in the second round
    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert width <= 9.4
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()) >= 8.5


def test_the_three_uses_are_those_of_the_masks():
    queries, words = 2, 3
    real = torch.ones(1, words, dtype=torch.bool)
    for (name, (to_text, to_queries, sees)), make in zip(
            mask_figures.USES.items(), (masks.unimodal, masks.bidirectional, masks.multimodal_causal), strict=True):
        mask = make(queries, real)[0, 0]
        assert (mask[queries:, :queries].all().item(), mask[:queries, queries:].any().item()) == (to_text, to_queries)
        assert ("before" in sees) == (not mask[queries, -1]), name


def test_exact_zeros_are_written_into_the_map():
    _, first, second = mask_figures.dependence_maps({"a": MASK}, {"a": {1: VALUES, 3: VALUES}}, NAMES, 2).axes[:3]
    for panel in (first, second):
        assert len([text for text in panel.texts if text.get_text() == "0"]) == (VALUES == 0).sum()


def test_the_frame_of_the_leak_holds_the_words():
    panel = mask_figures.leak({1: VALUES, 2: VALUES}, NAMES, 2).axes[0]
    box, = panel.patches
    assert box.get_x() == pytest.approx(1.58) and box.get_x() + box.get_width() == pytest.approx(4.42)


def test_what_is_shown_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(mask_figures, "show", lambda figure, alt: said.append(alt))
    mask_figures.show_three_uses()
    assert "only queries read the image" in said[0]

"""The figures of lesson 01: inside their paper, legible, and each with its alt text."""

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minblip2.course import attention_figures

FIGURES = {
    "flow": lambda: attention_figures.flow(),
    "saturation": lambda: attention_figures.saturation([4, 16], {"a": [(1, 0.2, 0.1)] * 2, "b": [(4, 0.9, 1e-5)] * 2}),
    "word_maps": lambda: attention_figures.word_maps(torch.rand(2, 3, 3), ["a", "red", "square"]),
    "curves_over_x": lambda: attention_figures.curves_over_x(torch.arange(3), {"f": torch.rand(3)}, "functions", "f"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_legible_and_inside_its_paper(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    assert width <= 9.4
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()) >= 9


def test_what_is_shown_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(attention_figures, "show", lambda figure, alt: said.append(alt))
    attention_figures.show_flow()
    attention_figures.show_saturation([4, 16], {"plain": [(2, 0.25, 0.5), (4, 0.5, 0.125)]})
    attention_figures.show_word_maps(torch.rand(2, 3, 3), ["a", "red", "square"], "drawn at random")
    assert "softmax over the keys" in said[0]
    assert "plain: spread of the scores from 2 to 4, largest weight from 0.25 to 0.5, gradient from 0.5" in said[1]
    assert "2 heads drawn at random" in said[2]


def test_the_root_keeps_softmax_healthy_at_any_width():
    plain, scaled = (attention_figures.softmax_health(256, 256**power) for power in (0, -0.5))
    assert abs(plain[0] / 16 - 1) < 0.1 and abs(scaled[0] - 1) < 0.1
    assert plain[1] > 2 * scaled[1] and plain[2] < scaled[2] / 10

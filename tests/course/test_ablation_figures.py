"""The forest plot of lesson 14 and its interval."""

import pytest

from minblip2.course.ablation_figures import forest, interval, over_seconds, written


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)


def test_bold_is_written_only_where_zero_is_excluded():
    assert written([9, 10, 11]) == "**+10.0 ± 2.5**" and written([-9, 0, 10]) == "+0.3 ± 23.6"


def test_forest_fills_a_diamond_only_where_zero_is_excluded():
    figure = forest({"sure": [[9, 10, 11]], "unsure": [[-9, 0, 10]]}, ["measure"])
    panel = figure.axes[0]
    diamonds = [line for line in panel.lines if line.get_marker() == "D"]
    assert [line.get_markerfacecolor() == line.get_color() for line in diamonds] == [False, True]  # from below
    assert [label.get_text() for label in panel.get_yticklabels()] == ["unsure", "sure"]


def test_panels_that_are_compared_have_one_scale():
    one, other = forest({"row": [[9, 10, 11], [-90, 0, 10]]}, ["one", "other"]).axes
    assert one.get_xlim() == other.get_xlim()


def test_better_and_worse_differ_in_more_than_colour():
    figure = forest({"better": [[9, 10, 11]], "worse": [[-9, -10, -11]], "unsure": [[-9, 0, 10]]}, ["measure"])
    signs = {round(line.get_ydata()[0]): line.get_marker() for line in figure.axes[0].lines
             if line.get_marker() in ("+", "_")}
    assert signs == {2: "+", 1: "_"}  # rows from below


def test_a_line_joins_the_means_and_every_run_is_a_dot():
    figure = over_seconds({"captions": {"one": {20.0: [1, 3], 80.0: [5, 7]}, "other": {80.0: [4, 8]}}})
    mean, dots, alone, _ = figure.axes[0].lines
    assert list(mean.get_xdata()) == [20, 80] and list(mean.get_ydata()) == [2, 6] and list(alone.get_ydata()) == [6]
    assert list(dots.get_xdata()) == [20, 20, 80, 80] and list(dots.get_ydata()) == [1, 3, 5, 7]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["20", "80"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "other"]

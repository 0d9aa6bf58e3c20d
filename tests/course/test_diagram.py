"""The figure of the whole lights what a lesson is about, and lets no label cross another's box."""

import pytest

from minblip2 import UserError
from minblip2.course import diagram


def lit(figure):
    """The labels that stand out."""
    return {text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"}


def test_parts_are_lit_by_name_and_by_group():
    assert lit(diagram.whole(["itc"])) == {"ITC"}
    assert lit(diagram.whole(["losses"])) == {"ITC", "ITM", "ITG"}
    assert len(lit(diagram.whole())) == len(diagram.BOXES)
    with pytest.raises(UserError, match="'vat' is no part of the diagram: there are image, vit, queries"):
        diagram.whole(["vat"])


def test_every_label_fits_into_its_box():
    figure = diagram.whole()
    figure.draw_without_rendering()
    panel = figure.axes[0]
    for x, y, width, height, label, _ in diagram.BOXES.values():
        text = next(one for one in panel.texts if one.get_text() == label)
        box = text.get_window_extent().transformed(panel.transData.inverted())
        assert x < box.x0 and box.x1 < x + width and y < box.y0 and box.y1 < y + height, label


def test_lesson_05_sees_a_feed_forward_for_each_side():
    def labels(figure):
        return [text.get_text() for text in figure.axes[0].texts].count("feed-forward")

    assert labels(diagram.whole()) == 1 and labels(diagram.whole(["qformer"], two_sides=True)) == 2

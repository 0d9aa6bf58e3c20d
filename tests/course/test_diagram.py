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
    assert lit(diagram.whole()) == {label for *_, label, _ in diagram.BOXES.values()}
    with pytest.raises(UserError, match="'vat' is no part of the diagram: there are image, vit, queries"):
        diagram.whole(["vat"])


def test_every_label_fits_into_its_box():
    figure = diagram.whole()
    figure.draw_without_rendering()
    panel = figure.axes[0]
    for x, y, width, height, label, _ in diagram.BOXES.values():
        found = [text.get_window_extent().transformed(panel.transData.inverted())
                 for text in panel.texts if text.get_text() == label]
        assert any(x < box.x0 and box.x1 < x + width and y < box.y0 and box.y1 < y + height for box in found), label


def test_queries_and_text_have_a_feed_forward_each():
    def lit_ones(*parts):
        texts = diagram.whole(parts).axes[0].texts
        return [text.get_fontweight() == "bold" for text in texts if text.get_text() == "feed-forward"]

    assert lit_ones("Q-Former") == lit_ones("stage 1") == [True, True]
    assert lit_ones("stage 2") == [True, False], "stage 2 runs no text through the Q-Former"


def test_the_legend_names_only_colours_that_are_shown():
    def legend(*parts):
        return next(text.get_text() for text in diagram.whole(parts).axes[0].texts if "dotted" in text.get_text())

    assert legend("vit") == "green: image; dotted: frozen"
    assert legend("self-attention") == "gold: queries, blue: text; dotted: frozen"
    assert legend("image", "queries", "text") == "green: image, gold: queries, blue: text; dotted: frozen"


def test_the_alt_text_says_which_parts_are_lit(monkeypatch):
    said = []
    monkeypatch.setattr(diagram, "show", lambda figure, alt: said.append(alt))
    for parts in ((), ("vit",), ("stage 1", "stage 2", "frozen")):
        diagram.here(*parts)
    assert "Lit" not in said[0] and said[1].endswith(" Lit: the image encoder.")
    assert said[2].endswith(" Lit: stage 1, stage 2 and the two frozen models.")

"""What every notebook opens with."""

import IPython.display
import pytest
import torch

from minblip2.course import lesson


@pytest.fixture
def page(monkeypatch):
    """What a notebook would show: each display once, updated in place."""
    shown = []

    class Handle:
        def __init__(self, place):
            self.place = place

        def update(self, thing):
            shown[self.place] = thing.data

    def display(thing, display_id=False):
        shown.append(thing.data)
        return Handle(len(shown) - 1) if display_id else None

    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_a_table_is_markdown(page):
    lesson.table(["a", "b"], [1, "two"])
    assert page == ["|    a | b    |\n| ---: | :--- |\n|    1 | two  |"]


def test_what_an_error_says_and_that_there_must_be_one():
    assert lesson.said_by(ValueError, int, "seven") == "invalid literal for int() with base 10: 'seven'"
    with pytest.raises(AssertionError, match="should have raised ValueError"):
        lesson.said_by(ValueError, int, "7")


def test_difference_is_relative():
    assert lesson.difference(torch.tensor([9.0, 96.0]), torch.tensor([10.0, 100.0])) == pytest.approx(0.04)
    assert lesson.apart(torch.tensor([9.0, 96.0]), torch.tensor([10.0, 100.0])) == "4e-02"
    assert lesson.apart(torch.ones(2), torch.ones(2)) == "none"


def test_the_minutes_at_the_top_are_those_of_this_run(monkeypatch, page):
    clock = iter((100.0, 142.4))
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: next(clock))
    minutes = lesson.Minutes("02_masks")
    assert int(page[0].split("**")[1].split()[0]) > 5 and "shown here" in page[0]
    minutes.stop()
    assert len(page) == 1 and "**42 seconds**" in page[0]

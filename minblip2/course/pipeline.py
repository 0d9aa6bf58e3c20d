"""A lesson's own diagram: boxes from left to right, what flows between them written below with its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from .. import UserError
from .viz import PAPER, QUIET, draw_arrow, draw_box


class Step(NamedTuple):
    """A box: what happens, what leaves it with its shape, and its colour; `frozen` draws a dotted border."""

    label: str
    leaves: str
    colour: str
    frozen: bool = False


def pipeline(*rows: Sequence[Step], width: float = 9.0) -> Figure:
    """Rows of boxes joined by arrows, the first row on top; below each box stands what leaves it.

    Raises UserError when there is no step to draw.
    """
    if not rows or not all(rows):
        raise UserError("a row of the diagram is empty: give at least one step for each row")
    high = 1.3
    figure = Figure(figsize=(width, high * len(rows)))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(-high * len(rows), 0))
    panel.axis("off")
    for number, row in enumerate(rows):
        pitch = width / len(row)
        wide, top = pitch - 0.32, -high * number - 0.12
        for place, step in enumerate(row):
            left = pitch * place + 0.16
            draw_box(panel, (left, top - 0.56, wide, 0.56), step.label, step.colour, tint=0.22, rounding=0.08,
                     dash=(0, (1, 1)) if step.frozen else "-", fontsize=9.5, fontweight="bold", linespacing=1.15)
            panel.text(left + wide / 2, top - 0.62, step.leaves, ha="center", va="top", fontsize=9.5, color=QUIET,
                       linespacing=1.2, bbox=dict(facecolor=PAPER, edgecolor="none", pad=0.5))
            if place:
                draw_arrow(panel, (left - 0.3, top - 0.28), (left - 0.02, top - 0.28), mutation_scale=10,
                           linewidth=1.2)
    return figure

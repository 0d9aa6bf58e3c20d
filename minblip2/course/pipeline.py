"""A lesson's own diagram: boxes from left to right, what flows between them written below with its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .. import UserError
from .viz import INK, PAPER, QUIET


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
    high = 1.2
    figure = Figure(figsize=(width, high * len(rows)))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(-high * len(rows), 0))
    panel.axis("off")
    for number, row in enumerate(rows):
        pitch = width / len(row)
        wide, top = pitch - 0.32, -high * number - 0.12
        for place, step in enumerate(row):
            left = pitch * place + 0.16
            for face, alpha, edge in ((step.colour, 0.22, "none"), ("none", 1, step.colour)):
                panel.add_patch(FancyBboxPatch((left, top - 0.56), wide, 0.56, facecolor=face, alpha=alpha,
                                               boxstyle="round,pad=0,rounding_size=0.08", edgecolor=edge, linewidth=1.5,
                                               linestyle=(0, (1, 1)) if step.frozen else "-"))
            panel.text(left + wide / 2, top - 0.28, step.label, ha="center", va="center", fontsize=9.5, color=INK,
                       fontweight="bold", linespacing=1.15)
            panel.text(left + wide / 2, top - 0.62, step.leaves, ha="center", va="top", fontsize=9, color=QUIET,
                       linespacing=1.2, bbox=dict(facecolor=PAPER, edgecolor="none", pad=0.5))
            if place:
                panel.add_patch(FancyArrowPatch((left - 0.3, top - 0.28), (left - 0.02, top - 0.28), arrowstyle="-|>",
                                                mutation_scale=10, color=QUIET, linewidth=1.2, shrinkA=0, shrinkB=0))
    return figure

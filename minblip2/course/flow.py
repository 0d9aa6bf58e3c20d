"""Diagrams of how data flow through what a lesson builds: boxes with shapes, and arrows between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .. import UserError
from .viz import IMAGE, PAPER, QUERY, QUIET, TEXT, draw_arrow, draw_box

Box = tuple[float, float, float, float, str, str | None]  # left, bottom, width, height, label, colour (None: grey)


def flow(boxes: Mapping[str, Box], arrows: Sequence[tuple[str, ...]], dotted: Sequence[str] = (),
         notes: Sequence[tuple[float, float, str]] = (), unit: float = 0.1) -> Figure:
    """Boxes and the arrows between them; one `unit` is a tenth of an inch, the figure is as large as it needs to be.

    An arrow is (from, to) or (from, to, what goes along it): between the sides that face each other. `dotted` boxes
    are frozen; notes are (x, y, text). Raises UserError for an arrow to a box that is not there.
    """
    for start, end, *_ in arrows:
        if start not in boxes or end not in boxes:
            raise UserError(f"there is no box for the arrow from {start!r} to {end!r}: there are {', '.join(boxes)}")
    wide = max(x + width for x, _, width, *_ in boxes.values()) + 1
    high = max([y + height for _, y, _, height, *_ in boxes.values()] + [y + 1 for _, y, _ in notes]) + 1
    figure = Figure(figsize=((wide + 1) * unit, (high + 1) * unit))
    panel = figure.add_axes((0, 0, 1, 1), xlim=(-1, wide), ylim=(-1, high), aspect="equal")
    panel.axis("off")
    for name, (*place, label, colour) in boxes.items():
        draw_box(panel, tuple(place), label, colour or PAPER, tint=0.22 if colour else 1, edge=colour or QUIET,
                 line=1.4, dash=(0, (1, 1)) if name in dotted else "-", zorder=(2, 2, 3), fontsize=8.5,
                 linespacing=1.25)
    for start, end, *what in arrows:
        here, there = _ends(boxes[start], boxes[end])
        draw_arrow(panel, here, there, zorder=1)
        if what:
            flat = here[1] == there[1]
            panel.text((here[0] + there[0]) / 2 + (0 if flat else 0.6), (here[1] + there[1]) / 2 + (0.5 if flat else 0),
                       what[0], ha="center" if flat else "left", va="bottom" if flat else "center", fontsize=8,
                       color=QUIET)
    for x, y, text in notes:
        panel.text(x, y, text, ha="left", va="center", fontsize=8.5, color=QUIET, linespacing=1.25)
    return figure


def _ends(one: Box, other: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where an arrow begins and ends: straight, where the two boxes overlap in one direction; else between centres."""
    (x, y, width, height), (to_x, to_y, to_width, to_height) = one[:4], other[:4]
    low, high = max(y, to_y), min(y + height, to_y + to_height)
    left, right = max(x, to_x), min(x + width, to_x + to_width)
    level = (low + high) / 2 if low < high else None
    column = (left + right) / 2 if left < right else None
    if column is not None and level is None:
        down = to_y < y
        return (column, y if down else y + height), (column, to_y + to_height if down else to_y)
    back = to_x < x
    here, there = (x if back else x + width), (to_x + to_width if back else to_x)
    return (here, level or y + height / 2), (there, level or to_y + to_height / 2)


def training_loop() -> Figure:
    """Lesson 09: one step of stage 1, from the cached features to the changed weights."""
    boxes: dict[str, Box] = {
        "cache": (0, 12, 16, 7, "image features\n(n v e), from the\nfrozen ViT, cached", IMAGE),
        "captions": (0, 2, 16, 6, "captions of the\ntraining images", TEXT),
        "batch": (22, 5, 16, 11, "batch(step)\nfeatures (b v e)\nids, mask (b t)\nimage ids (b)", None),
        "model": (44, 5, 13, 11, "Stage1\nthe Q-Former\nand its heads", QUERY),
        "itc": (63, 15, 7.5, 4, "ITC", QUERY), "itm": (63, 8.5, 7.5, 4, "ITM", QUERY),
        "itg": (63, 2, 7.5, 4, "ITG", QUERY),
        "sum": (77, 8.5, 13, 4, "weighted sum", None),
        "gradient": (77, 23, 13, 5, "backward:\ngradient g", None),
        "clip": (60, 23, 12, 5, "clip its\nlength at c", None),
        "step": (44, 23, 11, 5, "AdamW,\nrate η(step)", None)}
    arrows = (("cache", "batch"), ("captions", "batch"), ("batch", "model"), ("model", "itc"), ("model", "itm"),
              ("model", "itg"), ("itc", "sum"), ("itm", "sum"), ("itg", "sum"), ("sum", "gradient"),
              ("gradient", "clip"), ("clip", "step"), ("step", "model", "new weights"))
    return flow(boxes, arrows, dotted=("cache",))

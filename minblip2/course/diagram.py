"""BLIP-2 drawn whole, and where in it a lesson stands: the figure that opens every lesson."""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from .. import UserError
from .viz import IMAGE, INK, PAPER, QUERY, QUIET, TEXT, draw_arrow, draw_box, show

# name -> (left, bottom, width, height, what stands in the box, whose colour it has); one unit is a tenth of an inch
BOXES: dict[str, tuple[float, float, float, float, str, str]] = {
    "image": (0, 9, 9, 8, "image", IMAGE),
    "vit": (12, 8, 13, 10, "image encoder\n(ViT)\nfrozen", IMAGE),
    "queries": (31, 24.5, 13, 4, "learned queries", QUERY),
    "text": (47, 24.5, 13, 4, "caption", TEXT),
    "self-attention": (30, 18.5, 31, 4, "self-attention, under a mask", QUERY),
    "cross-attention": (30, 13, 15.5, 4, "cross-attention", QUERY),
    "feed-forward": (30, 7.5, 15.5, 4, "feed-forward", QUERY),
    "feed-forward of text": (47, 7.5, 14, 4, "feed-forward", TEXT),
    "itc": (31, 0, 8, 4, "ITC", QUERY),
    "itm": (41.5, 0, 8, 4, "ITM", QUERY),
    "itg": (52, 0, 8, 4, "ITG", QUERY),
    "projection": (67, 10, 10.5, 6, "linear\nprojection", QUERY),
    "lm": (80.5, 8, 14, 10, "language\nmodel (LLM)\nfrozen", TEXT),
    "answer": (98, 10, 11, 6, "caption,\nanswer", TEXT),
}
QFORMER = ("queries", "text", "self-attention", "cross-attention", "feed-forward", "feed-forward of text")
LOSSES = ("itc", "itm", "itg")
PARTS: dict[str, tuple[str, ...]] = {  # names for several boxes at once
    "attention": ("self-attention", "cross-attention"),
    "Q-Former": QFORMER,
    "losses": LOSSES,
    "stage 1": QFORMER + LOSSES,
    "stage 2": ("queries", "self-attention", "cross-attention", "feed-forward", "projection"),
    "frozen": ("vit", "lm"),
}
SHARED = "self-attention"  # queries and caption are in it together: half of it has the caption's colour
KINDS = {IMAGE: "green: image", QUERY: "gold: queries", TEXT: "blue: text"}  # what the legend says of a colour
SAID = {  # what the alt text calls a part, where its own name is not enough
    "vit": "the image encoder", "lm": "the language model", "answer": "what it writes",
    "itc": "the ITC loss", "itm": "the ITM loss", "itg": "the ITG loss", "losses": "the three losses of stage 1",
    "attention": "self-attention and cross-attention", "Q-Former": "the Q-Former", "frozen": "the two frozen models",
}
ARROWS = (("image", "vit"), ("vit", "cross-attention"), ("feed-forward", "projection"), ("projection", "lm"),
          ("lm", "answer"))
WIDE, HIGH = 110, 34


def _names(parts: Iterable[str]) -> set[str]:
    """The boxes that the parts stand for. Raises UserError for a part that is none."""
    parts = list(parts)
    unknown = [part for part in parts if part not in BOXES and part not in PARTS]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no part of the diagram: there are {', '.join([*BOXES, *PARTS])}")
    return {name for part in parts for name in PARTS.get(part, (part,))}


def _recolour_right_half(panel: Axes, place: tuple[float, float, float, float], colour: str) -> None:
    """Give the right half of the box that was drawn last another colour."""
    x, y, width, height = place
    for patch in panel.patches[-2:]:  # face and edge, as `draw_box` makes them
        half = FancyBboxPatch((x, y), width, height, boxstyle=patch.get_boxstyle())
        half.update_from(patch)
        half.set(**{"edgecolor" if patch.get_linewidth() else "facecolor": colour})
        panel.add_patch(half)
        for part, left in ((patch, x - 1), (half, x + width / 2)):
            part.set_clip_path(Rectangle((left, y - 1), width / 2 + 1, height + 2, transform=panel.transData))


def draw(panel: Axes, lit: Iterable[str] = tuple(BOXES)) -> None:
    """Draw BLIP-2 into a panel; boxes that are not `lit` are pale. Raises UserError for a part that is none."""
    lit = _names(lit)
    panel.set(xlim=(-1, WIDE), ylim=(-1.5, HIGH), aspect="equal")
    panel.axis("off")
    around = FancyBboxPatch((28, 6), 35, 24, boxstyle="round,pad=0,rounding_size=1", facecolor="none",
                            edgecolor=QUIET, linestyle=(0, (4, 3)), linewidth=0.9)
    panel.add_patch(around)
    panel.text(45.5, 32.3, "Q-Former, trained in both stages", ha="center", va="center", fontsize=8.5, color=INK)
    for name, (*place, label, colour) in BOXES.items():
        on = name in lit
        draw_box(panel, tuple(place), label, colour if on else PAPER, tint=0.25 if on else 1, zorder=(1, 2, 3),
                 edge=colour if on else "#BBBBBB", line=1.5 if on else 0.8, fontsize=8, linespacing=1.15,
                 dash="-" if name not in PARTS["frozen"] else (0, (1, 1)), color=INK if on else "#8A8A8A",
                 fontweight="bold" if on else "normal")
        if name == SHARED and on:
            _recolour_right_half(panel, tuple(place), TEXT)
    for start, end in ARROWS:
        x, y, width, height, *_ = BOXES[start]
        to_x, to_y, _, to_height, *_ = BOXES[end]
        level = to_y + to_height / 2 if start != "feed-forward" else y + height / 2
        if start == "feed-forward":  # below the text's box, and round the corner
            middle, corner, right = 64.0, to_y + to_height / 2, x + width
            below = (right + 0.75, level), (right + 0.75, 6.75), (middle, 6.75)
            panel.plot(*zip((right, level), *below, (middle, corner), strict=True), color=QUIET, linewidth=1,
                       linestyle="-", zorder=0)
            draw_arrow(panel, (middle, corner), (to_x, corner), mutation_scale=8, linewidth=1, zorder=0)
        else:
            draw_arrow(panel, (x + width, level), (to_x, level), mutation_scale=8, linewidth=1, zorder=0)
    for x, y, to in ((37.5, 24.5, 22.5), (53.5, 24.5, 22.5), (37.75, 18.5, 17), (37.75, 13, 11.5), (53.5, 18.5, 11.5),
                     *((x, 6, 4) for x in (35, 45.5, 56))):
        draw_arrow(panel, (x, y), (x, to), mutation_scale=8, linewidth=1, zorder=0)
    panel.text(29.3, 2, "stage 1:", ha="right", va="center", fontsize=8.5, color=INK)
    panel.text(72.25, 19, "stage 2:", ha="center", va="center", fontsize=8.5, color=INK)
    panel.text(72.25, 17.2, "also trained", ha="center", va="center", fontsize=7.5, color=QUIET)
    shown = {BOXES[name][5] for name in lit} | ({TEXT} if SHARED in lit else set())  # pale boxes have no colour
    kinds = ", ".join(kind for colour, kind in KINDS.items() if colour in shown)
    panel.text(WIDE - 1, 0.5, f"{kinds}; dotted: frozen", ha="right", va="center", fontsize=7.5, color=QUIET)


def whole(lit: Iterable[str] = tuple(BOXES)) -> Figure:
    """The figure of the whole, as `draw` draws it. Raises UserError for a part that is none."""
    figure = Figure(figsize=(9.2, 9.2 * (HIGH + 1.5) / (WIDE + 1)))
    draw(figure.add_axes((0, 0, 1, 1)), lit)
    return figure


def here(*lit: str) -> None:
    """Show the whole of BLIP-2 in a notebook with the parts of this lesson lit: "you are here".

    Parts are boxes ("vit", "queries", "itc", "projection", ...) or several at once ("Q-Former", "stage 1").
    Raises UserError for a part that is none.
    """
    parts = [SAID.get(part, part) for part in lit]
    what = f". Lit: {' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)}" if lit else ""
    figure = whole(lit or tuple(BOXES))
    show(figure, f"""BLIP-2 from left to right: an image goes through a frozen image encoder; the \
queries of the Q-Former read it by cross-attention and share self-attention with a caption, and each side has its
feed-forward; stage 1 trains the Q-Former with ITC, ITM and ITG; stage 2 projects its queries into a frozen language \
model, which writes a caption or an answer{what}.""".replace("\n", " "))

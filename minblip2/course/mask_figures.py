"""The figures of lesson 02: who sees whom, what depends on what, and what a forgotten mask does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from . import figures
from .viz import FORBIDDEN, IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG, draw_arrow, draw_box, show

USES = {  # name of a mask -> (from queries to text?, from text to queries?, what the text sees of itself)
    "uni-modal (ITC)": (False, False, "every word"),
    "bi-directional (ITM)": (True, True, "every word"),
    "multimodal causal (ITG)": (True, False, "itself and the\nwords before it"),
}
LEGEND = "green: the derivative is not zero; grey with a 0: exactly zero"


def three_uses() -> Figure:
    """One self-attention under three masks: arrows lead from what is seen to those who see it."""
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    for panel, (name, (to_text, to_queries, sees)) in zip(figure.subplots(1, 3), USES.items(), strict=True):
        panel.set(xlim=(0, 30), ylim=(0, 24), aspect="equal", title=name)
        panel.axis("off")
        for (x, y, text), colour in zip(((1, 11, "queries"), (18, 11, "text"), (1, 0.5, "image")),
                                        (QUERY, TEXT, IMAGE), strict=True):
            draw_box(panel, (x, y, 11, 5), text, colour, tint=0.2, line=1.4, opaque=True, fontsize=9.5)
        lines = [((6.5, 5.5), (6.5, 11), QUIET)]
        lines += [((12, 14.6), (18, 14.6), QUERY)] if to_text else []
        lines += [((18, 12.4), (12, 12.4), TEXT)] if to_queries else []
        for start, end, colour in lines:
            draw_arrow(panel, start, end, mutation_scale=13, color=colour, linewidth=2, shrinkA=1, shrinkB=1)
        panel.text(7.5, 8.2, "cross-attention", ha="left", va="center", fontsize=9, color=QUIET)
        panel.text(6.5, 17, "a query sees\nevery query", ha="center", va="bottom", fontsize=9, color=QUIET)
        panel.text(23.5, 17, f"a word sees\n{sees}", ha="center", va="bottom", fontsize=9, color=QUIET)
    return figure


def show_three_uses() -> None:
    """Display `three_uses`."""
    show(three_uses(), "The same self-attention under three masks. Uni-modal, for ITC: queries and text see only their "
         "own side. Bi-directional, for ITM: both see everything. Multimodal causal, for ITG: a word sees the "
         "queries, itself and the words before it; queries see no text. In all three, only queries read the image.")


def _frame(panel: Axes, names: Sequence[str], queries: int, title: str) -> None:
    """Names of rows and columns and a title above them, a thin grid, and lines between queries and words."""
    for line in (panel.axhline, panel.axvline):
        for edge in range(1, len(names)):
            line(edge - 0.5, color=PAPER, linewidth=1, linestyle="-", zorder=1.5)
        line(queries - 0.5, color=INK, linewidth=1.2, linestyle="-", zorder=2)
    panel.set_xticks(range(len(names)), names, rotation=90)
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)
    panel.xaxis.set_label_position("top")
    panel.set_xlabel(title, weight="bold")


def _derivatives(panel: Axes, values: Tensor) -> None:
    """Coloured where the derivative is not zero; exact zeros are grey and say 0."""
    panel.imshow(values > 0, cmap=ListedColormap([FORBIDDEN, IMAGE]), vmin=0, vmax=1)
    for row, column in (values == 0).nonzero().tolist():
        panel.text(column, row, "0", ha="center", va="center", fontsize=9, color=QUIET)


def _through(blocks: int) -> str:
    """The title of a map of derivatives."""
    return f"derivative through {blocks} block{'s' * (blocks > 1)}"


def dependence_maps(masks: Mapping[str, Tensor], maps: Mapping[str, Mapping[int, Tensor]], names: Sequence[str],
                    queries: int) -> Figure:
    """Each mask (s s) in a row of its own, beside the derivatives (s s) of outputs by inputs through some blocks.

    maps: name of a mask -> number of blocks -> derivatives.
    """
    blocks = len(next(iter(maps.values())))
    figure = Figure(figsize=(7.4, 2.2 * len(masks) + 0.9), layout="constrained")
    side = 1 + (torch.arange(len(names)) >= queries).int()  # 1: a query is looked at, 2: a word is
    for line, (name, mask) in zip(figure.subplots(len(masks), 1 + blocks, squeeze=False), masks.items(), strict=True):
        _frame(line[0], names, queries, "the mask")
        line[0].set_ylabel(name, weight="bold")
        line[0].imshow(mask * side, cmap=ListedColormap([FORBIDDEN, QUERY, TEXT]), vmin=0, vmax=2)
        for panel, (count, values) in zip(line[1:], maps[name].items(), strict=True):
            _frame(panel, names, queries, _through(count))
            _derivatives(panel, values)
        for panel in line:
            panel.label_outer()  # names and titles stand once, at the left and above the top row
    figure.supxlabel(LEGEND, fontsize=10)
    return figure


def leak(maps: Mapping[int, Tensor], names: Sequence[str], queries: int) -> Figure:
    """Derivatives (s s) under a leaky mask through some numbers of blocks, the words among themselves framed."""
    size = len(names) - queries
    figure = Figure(figsize=(7.4, 4.1), layout="constrained")
    for panel, (count, values) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        _frame(panel, names, queries, _through(count))
        _derivatives(panel, values)
        panel.add_patch(Rectangle((queries - 0.42, queries - 0.42), size - 0.16, size - 0.16, fill=False,
                                  edgecolor=WRONG, linewidth=2.5, zorder=5))
    figure.supxlabel(LEGEND, fontsize=10)
    return figure


def rows_of_words(mask: Tensor, queries: int, labels: Sequence[str]) -> Figure:
    """A mask (s s) with a frame around the rows of the words."""
    figure = figures.mask_grid({"the rows of the words": mask}, queries, labels)
    words = len(mask) - queries
    figure.axes[0].add_patch(Rectangle((-0.5, queries - 0.5), len(mask), words, fill=False, edgecolor=WRONG,
                                       linewidth=3, clip_on=False, zorder=5))
    return figure


def drift(lengths: Sequence[int], changes: Mapping[str, Sequence[float]]) -> Figure:
    """How much a caption's vector changes with the longest caption of its batch: the wrong way, then the right."""
    figure = Figure(figsize=(6.2, 3), layout="constrained")
    panel = figure.subplots()
    for (name, values), colour, marker in zip(changes.items(), (WRONG, TEXT), "Xo", strict=True):
        panel.plot(lengths, values, color=colour, marker=marker, linestyle="-", label=name)
    panel.set(xlabel="length of the longest caption in the batch", ylabel="relative change of [CLS]")
    panel.grid(axis="y")
    panel.legend()
    return figure

"""The figures of lesson 01 and its bonus notebook: how data flow through attention, and what its numbers do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from matplotlib.figure import Figure
from torch import Tensor

from .viz import FORBIDDEN, IMAGE, INK, QUERY, QUIET, as_array, draw_arrow, draw_box, show

# name -> (left, bottom, width, height, what stands in the box, its colour); one unit is a tenth of an inch
FLOW: dict[str, tuple[float, float, float, float, str, str]] = {
    "x": (1, 17, 12, 6, "x\n(b s e)", QUERY),
    "context": (1, 3, 12, 8, "context\n(b k e′),\nof any width e′", IMAGE),
    "q": (20, 17.5, 14, 5, "query (b h s d)", QUERY),
    "k": (20, 8.5, 14, 5, "key (b h k d)", IMAGE),
    "v": (20, 0.5, 14, 5, "value (b h k d)", IMAGE),
    "scores": (41, 12.5, 12, 6, "scores: q·k / √d\n(b h s k)", INK),
    "weights": (60, 12.5, 12, 6, "weights\n(b h s k)", INK),
    "mixture": (74, 3, 10, 6, "mixture\n(b h s d)", INK),
    "result": (91, 3, 8, 6, "result\n(b s e)", QUERY),
}
STEPS = (  # from, to, what is written over the arrow, and where
    ("x", "q", "linear", (16.5, 20.8)), ("context", "k", "linear", (16.5, 10.6)),
    ("context", "v", "linear", (16.5, 2.9)),
    ("q", "scores", "", None), ("k", "scores", "", None), ("scores", "weights", "softmax\nover k", (56.5, 17.6)),
    ("weights", "mixture", "", None), ("v", "mixture", "", None), ("mixture", "result", "linear", (87.5, 6.8)),
)


def flow() -> Figure:
    """How a layer of attention turns x (b s e) and what it reads (b k e) into a result (b s e)."""
    figure = Figure(figsize=(9.3, 2.65))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, 100), ylim=(-1.5, 27), aspect="equal")
    panel.axis("off")
    for *place, text, colour in FLOW.values():
        draw_box(panel, tuple(place), text, colour, tint=0.18, line=1.4, opaque=True, linespacing=1.2)
    for start, end, text, at in STEPS:
        x, y, width, height = FLOW[start][:4]
        to_x, to_y, to_width, to_height = FLOW[end][:4]
        if (start, end) == ("weights", "mixture"):
            draw_arrow(panel, (x + width, y + height / 2 - 1.5), (to_x + to_width / 2, to_y + to_height), zorder=0)
        else:
            draw_arrow(panel, (x + width, y + height / 2), (to_x, to_y + to_height / 2), zorder=0)
        if at:
            panel.text(*at, text, ha="center", va="bottom" if at[1] > 3 else "top", fontsize=9, color=QUIET,
                       linespacing=1.1)
    panel.text(47, 24.5, "a mask strikes out scores", ha="center", va="center", fontsize=9, color=INK)
    draw_arrow(panel, (47, 23.3), (47, 18.5), zorder=0)
    return figure


def show_flow() -> None:
    """Display how data flow through attention."""
    show(flow(), "How data flow through attention: linear maps make queries from x, and keys and values from the "
         "context; queries and keys give scores, of which a mask strikes out some; softmax over the keys makes them "
         "weights; the weights mix the values, and a last linear map gives the result.")


def softmax_health(d: int, scale: float, rows: int = 400, keys: int = 32) -> tuple[float, float, float]:
    """Spread of the scores q·k · scale, mean of the largest weight of a row, and median length of the gradient there.

    Queries and keys of width d have independent normal entries; the loss mixes the weights by random numbers.
    """
    generator = torch.Generator().manual_seed(d)
    q = torch.randn(rows, d, generator=generator)
    k = torch.randn(rows, keys, d, generator=generator)
    scores = (einsum(q, k, "b d, b k d -> b k") * scale).requires_grad_()
    weights = scores.softmax(dim=-1)
    (weights * torch.randn(rows, keys, generator=generator)).sum().backward()
    largest, gradient = weights.max(dim=-1).values, scores.grad.norm(dim=-1)
    return scores.std().item(), largest.mean().item(), gradient.median().item()


def saturation(widths: Sequence[int], runs: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """How softmax saturates: the spread of the scores, the largest weight, the gradient, against the width d.

    runs: name of a way to scale -> for each width the three numbers.
    """
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, numbers in runs.items():
        for panel, values in zip(panels, zip(*numbers, strict=True), strict=True):
            panel.plot(widths, values, label=name if panel is panels[0] else None, marker="o")
    panels[0].set(title="std of the scores", yscale="log")
    panels[0].set_yticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    panels[1].set(title="largest weight in a row (mean)", ylim=(0, 1.03))
    panels[2].set(title="gradient at the scores (median)", yscale="log")
    panels[2].yaxis.set_major_formatter(lambda height, _: f"{height:.0e}")
    for panel in panels:
        panel.set_xscale("log", base=4)
        panel.set_xticks(widths, widths)
        panel.minorticks_off()
        panel.set_xlabel("d, width of a head")
        panel.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=len(runs))
    return figure


def show_saturation(widths: Sequence[int], runs: Mapping[str, Sequence[tuple[float, float, float]]]) -> None:
    """Display `saturation`."""
    ends = "; ".join(f"{name}: " + ", ".join(f"{what} from {start:.2g} to {end:.2g}" for what, start, end in zip(
        ("spread of the scores", "largest weight", "gradient"), numbers[0], numbers[-1], strict=True))
        for name, numbers in runs.items())
    show(saturation(widths, runs), f"Three panels against the width d, from {widths[0]} to {widths[-1]}. {ends}.")


def word_maps(weights: Tensor, words: Sequence[str]) -> Figure:
    """Attention weights (h s k) of each head over the words of one text, on a common scale from 0 to 1."""
    figure = Figure(figsize=(8.8, 3.1), layout="constrained")
    panels = figure.subplots(1, len(weights), squeeze=False).flatten().tolist()
    for head, (panel, values) in enumerate(zip(panels, as_array(weights), strict=True)):
        drawn = panel.imshow(values, cmap="viridis", vmin=0, vmax=1)
        panel.set_title(f"head {head}")
        panel.set_xticks(range(len(words)), words, rotation=90)
        panel.set_yticks(range(len(words)), words if head == 0 else [""] * len(words))
        panel.tick_params(length=0)
    panels[0].set_ylabel("row looks at column")
    figure.colorbar(drawn, ax=panels, label="weight", shrink=0.8)
    return figure


def show_word_maps(weights: Tensor, words: Sequence[str], of: str) -> None:
    """Display `word_maps`; `of` says whose weights they are."""
    show(word_maps(weights, words), f"The attention weights of {len(weights)} heads {of} over the words of a caption: "
         "rows look at columns, and each row sums to 1.")


def curves_over_x(points: Tensor, lines: Mapping[str, Tensor], title: str, against: str) -> Figure:
    """Functions of one number, drawn over the same points: name -> values at the points.

    Beside them stands how far each lies from the one named `against`, so that near ones can be told apart.
    """
    figure = Figure(figsize=(8.8, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, values in lines.items():
        panels[0].plot(as_array(points), as_array(values), label=name)
        panels[1].plot(as_array(points), as_array(values - lines[against]))
    panels[0].set(title=title, ylabel="value")
    panels[1].set(title=f"difference from {against}", ylabel=f"value minus that of {against}")
    for panel in panels:
        panel.set_xlabel("x")
        panel.grid(color=FORBIDDEN)
    figure.legend(loc="outside right center")
    return figure

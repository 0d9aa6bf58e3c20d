"""Figures of lessons 06 to 08: how data flow through the three losses of stage 1, and what is measured of each."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .flow import Box, flow
from .viz import IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG, draw_picture

UNIT = 0.083  # inches: these three are as wide as a page


def itc_flow() -> Figure:
    """ITC: images and captions apart, all cosines, the largest over queries, temperature, softmax both ways."""
    boxes: dict[str, Box] = {
        "features": (0, 15, 14, 8, "image features,\nfrozen\n(b v image_width)", IMAGE),
        "queries": (19, 15, 16, 8, "Q-Former,\nqueries alone", QUERY),
        "vectors": (40, 15, 16, 8, "linear, length 1:\ng (b q embed_dim)", QUERY),
        "text": (0, 0, 14, 8, "captions\n[CLS] ...", TEXT),
        "encoder": (19, 0, 16, 8, "Q-Former,\ntext alone", TEXT),
        "vector": (40, 0, 16, 8, "[CLS], linear,\nlength 1:\nt (b embed_dim)", TEXT),
        "cosine": (61, 4, 13, 15, "all cosines\n(b n q)", None),
        "best": (78, 4, 13, 15, "largest over\nthe queries,\n÷ temperature\n(b n)", None),
        "loss": (95, 4, 14, 15, "cross-entropy\nof rows and\nof columns", None)}
    arrows = [("features", "queries"), ("queries", "vectors"), ("text", "encoder"), ("encoder", "vector"),
              ("vectors", "cosine"), ("vector", "cosine"), ("cosine", "best"), ("best", "loss")]
    return flow(boxes, arrows, notes=[(12, 11.5, "uni-modal mask: no arrow between the two rows")], unit=UNIT)


def itm_flow() -> Figure:
    """ITM: pairs by number, one fused pass, a yes or no from every query, the mean."""
    boxes: dict[str, Box] = {
        "image": (1, 17, 17, 8, "keys and values of b\nimages, picked: 3b", IMAGE),
        "text": (1, 3, 17, 8, "b captions,\npicked: 3b", TEXT),
        "fused": (26, 3, 20, 22, "Q-Former,\nqueries and words\nsee each other", None),
        "states": (54, 17, 15, 8, "query states\n(3b q e)", QUERY),
        "words": (54, 3, 15, 8, "word states,\nunused", TEXT),
        "head": (75, 17, 14, 8, "linear, 2 logits;\nmean over q", None),
        "loss": (95, 17, 14, 8, "cross-entropy:\nmatch or not", None)}
    arrows = [("image", "fused"), ("text", "fused"), ("fused", "states"), ("fused", "words"), ("states", "head"),
              ("head", "loss")]
    return flow(boxes, arrows, notes=[(28.5, 27, "bi-directional mask")], unit=UNIT)


def itg_flow() -> Figure:
    """ITG: the queries read first, the words are written on top of their cache, each state asked for the next word."""
    boxes: dict[str, Box] = {
        "image": (0, 17, 16, 8, "image features,\nfrozen\n(b v image_width)", IMAGE),
        "queries": (22, 17, 18, 8, "Q-Former,\nqueries alone", QUERY),
        "cache": (46, 17, 22, 8, "cache: keys and values\nof the queries", QUERY),
        "in": (0, 2, 16, 9, "goes in:\n[DEC] a red circle", TEXT),
        "text": (46, 2, 22, 9, "Q-Former, words:\neach sees the queries and\nthe words before it", TEXT),
        "head": (73.5, 2, 15, 9, "LM head\n(b t vocabulary)", TEXT),
        "out": (94, 2, 16, 9, "asked for:\na red circle [SEP]", TEXT)}
    arrows = [("image", "queries"), ("queries", "cache"), ("cache", "text"), ("in", "text"), ("text", "head"),
              ("head", "out")]
    return flow(boxes, arrows, notes=[(58.5, 12.7, "multimodal causal mask")], unit=UNIT)


def _queries(panel: Axes, values: Sequence[float] | Tensor, title: str, label: str = "") -> None:
    """A bar for each query; label: what its height is."""
    panel.bar(range(1, len(values) + 1), values, color=QUERY, zorder=2)
    panel.set(title=title, xlabel="query", ylabel=label, xticks=range(1, len(values) + 1))
    panel.grid(axis="y", zorder=0)
    panel.set_axisbelow(True)


def winners(wins: Tensor, each: Sequence[float], best: float, mean: float) -> Figure:
    """How often each query fits its image's own caption best, and how well each finds images alone, in percent."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    _queries(left, wins, "how often each query fits best", f"true pairs, of {int(wins.sum())}")
    _queries(right, each, "how well each query finds images alone", "found at rank 1, %")
    right.axhline(best, color=INK, linestyle="-", linewidth=1.4, label=f"all queries, the largest cosine: {best:.0f} %")
    right.axhline(mean, color=WRONG, linestyle="--", linewidth=1.4, label=f"all queries, the mean cosine: {mean:.0f} %")
    right.set(ylim=(0, 100))
    figure.legend(loc="outside lower right", ncols=2)
    return figure


def temperatures(row: Tensor, values: Sequence[float], log: Sequence[Mapping[str, float]]) -> Figure:
    """Softmax of one image's cosines (n) at several temperatures, best first, and the temperature over training."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    places, width = torch.arange(1, 7), 0.8 / len(values)
    for k, (value, colour) in enumerate(zip(values, (QUIET, QUERY, TEXT), strict=True)):
        shares = (row / value).softmax(dim=0).sort(descending=True).values[:6]
        left.bar(places + (k - 1) * width, shares, width=width, color=colour, hatch=("..", "//", "")[k],
                 edgecolor=PAPER, label=f"temperature {value:.2g}")
    left.set(title=f"one image chooses among {len(row)} captions", xlabel="caption, likeliest first",
             ylabel="probability")
    left.legend()
    right.plot([line["step"] for line in log], [line["temperature"] for line in log], color=TEXT, linestyle="-")
    right.set(title="the temperature in stage 1", xlabel="step", ylabel="temperature", ylim=(0, None))
    right.grid(axis="y")
    return figure


def against_batch_size(sizes: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Figure:
    """ITC against the number of candidates: ln B, a fresh model, a trained one, the floor."""
    figure = Figure(figsize=(7.4, 3.1), layout="constrained")
    panel = figure.subplots()
    looks = ((INK, "", "--"), (WRONG, "X", ""), (TEXT, "o", "-"), (QUIET, "", ":"))
    for (name, values), (colour, marker, line) in zip(curves.items(), looks, strict=True):
        panel.plot(sizes, values, color=colour, marker=marker, linestyle=line, label=name)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, sizes)
    panel.set(xlabel="batch size B", ylabel="ITC, nats")
    panel.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


def matrices(named: Mapping[str, Tensor], label: str = "probability in a row", numbered: bool = False,
             faint: Sequence[str] = ()) -> Figure:
    """Probabilities (b n) with which images pick captions, side by side on one scale, which `label` names.

    `numbered` panels have numbers on their axes, from 1, and leave the mean of the true pairs to their names.
    `faint` panels have a scale of their own, from zero to their largest, since on that of the others they are black.
    """
    figure = Figure(figsize=(9, 3.7 if numbered else 3.3), layout="constrained")
    others = []
    for panel, (name, matrix) in zip(figure.subplots(1, len(named)), named.items(), strict=True):
        drawn = panel.imshow(matrix, cmap="viridis", vmin=0, vmax=matrix.max() if name in faint else 1)
        if name in faint:
            figure.colorbar(drawn, ax=panel, shrink=0.7)
        else:
            others.append(panel)
        if numbered:
            panel.set(xlabel="caption", xticks=range(matrix.shape[1]), yticks=range(matrix.shape[0]))
            panel.set_xticklabels(range(1, matrix.shape[1] + 1), fontsize=8)
            panel.set_yticklabels(range(1, matrix.shape[0] + 1), fontsize=8)
        else:
            name = f"{name}\nmean of true pairs: {matrix.diagonal().mean():.2f}"
            panel.set(xlabel="caption", xticks=[], yticks=[])
        panel.set_title(name)
        panel.set_ylabel("image")
    figure.colorbar(others[-1].images[0], ax=others, shrink=0.7, label=label)
    return figure


def base_rate(curves: Mapping[str, Tensor], lines: Mapping[str, float], leaves: int) -> Figure:
    """Curves of stage 1, each beside a dashed line at what ignores the input, and a mark where ITM leaves its line.

    curves, lines: "title, unit" -> means of 25 steps, and the height of the line.
    """
    figure = Figure(figsize=(9.2, 2.9), layout="constrained")
    for panel, (title, values) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        panel.plot(values, color=TEXT, linestyle="-", label="stage 1, mean of 25 steps")
        panel.axhline(lines[title], color=INK, linestyle="--", linewidth=1.2, label="an answer that ignores the input")
        panel.axvline(leaves, color=WRONG, linestyle=":", linewidth=1.4, label="ITM leaves its line")
        name, unit = title.split(", ")
        panel.set(title=name, xlabel="step", ylabel=unit)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def wrong_images(pairs: Sequence[tuple[object, object, str, float]]) -> Figure:
    """Pairs (own image, likeliest wrong image, caption, probability): the own above, the wrong one below."""
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    for (own, other, caption, chance), panels in zip(pairs, figure.subplots(2, len(pairs)).T, strict=True):
        for panel, picture, colour, dash in ((panels[0], own, IMAGE, "-"), (panels[1], other, WRONG, ":")):
            draw_picture(panel, picture)
            panel.spines[:].set(visible=True, color=colour, linewidth=3, linestyle=dash)
        panels[0].set_title(textwrap.fill(f"✓ {caption}", 34), fontsize=8.5, fontweight="normal")
        panels[1].set_title(f"✗ drawn with probability {chance:.2f}", fontsize=8.5, fontweight="normal")
    return figure


def word_costs(words: Sequence[str], own: Tensor, other: Tensor) -> Figure:
    """−ln p of each word of a caption, with its own image and with another's."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panel, place = figure.subplots(), torch.arange(len(words))
    panel.bar(place - 0.2, own, width=0.4, color=IMAGE, label="with its own image")
    panel.bar(place + 0.2, other, width=0.4, color=WRONG, hatch="//", edgecolor=PAPER, label="with another image")
    panel.set_xticks(place, words)
    panel.set(ylabel="−ln p, nats", xlabel="the word asked for")
    panel.grid(axis="y")
    panel.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2)
    return figure

"""The figures of lesson 12: what depends on what in an encoder-decoder, buckets of distances, and cut captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from . import figures
from .flow import flow
from .viz import FORBIDDEN, IMAGE, INK, QUERY, TEXT


def two_halves() -> Figure:
    """Lesson 12: from image features and the two pieces of a caption to the loss."""
    boxes = {
        "features": (0, 19, 13, 6, "image features\n(b v i)", IMAGE),
        "bridge": (19, 19, 16, 6, "Q-Former, projection:\nsoft prompt (b q e)", QUERY),
        "prefix": (19, 9, 16, 6, "prefix (b t e)\n“a picture”", TEXT),
        "encoder": (43, 12.5, 15, 9, "T5 encoder\neverything sees\neverything", TEXT),
        "decoder": (70, 12.5, 15, 9, "T5 decoder\nsees all that is\ngiven, and back", TEXT),
        "rest": (70, 0.5, 15, 5.5, "[PAD] “of a red”\n(b t e)", TEXT),
        "loss": (91, 13.5, 13, 7, "loss of\n“of a red star”", None)}
    return flow(boxes, (("features", "bridge"), ("bridge", "encoder"), ("prefix", "encoder"),
                        ("encoder", "decoder", "memory"), ("rest", "decoder"), ("decoder", "loss")),
                dotted=("features", "prefix", "rest", "encoder", "decoder"))


def dependence(outputs: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Which outputs (1 s e) depend on which inputs (1 n e, in order): (s n), False where a derivative is exactly 0."""
    direction = torch.randn(outputs.shape[-1], generator=torch.Generator().manual_seed(1))
    lines = []
    for row in outputs[0]:
        slopes = torch.autograd.grad(row @ direction, inputs, retain_graph=True, allow_unused=True)
        lines.append(torch.cat([torch.zeros(some.shape[1], dtype=torch.bool) if slope is None else
                                (slope[0] != 0).any(dim=1) for slope, some in zip(slopes, inputs, strict=True)]))
    return torch.stack(lines)


def dependence_grids(grids: Mapping[str, Tensor], names: Sequence[str], kinds: Sequence[int]) -> Figure:
    """Dependences (s s) side by side; kinds of columns: 0 soft prompt, 1 words given, 2 words written."""
    palette = [QUERY, IMAGE, TEXT]
    figure = Figure(figsize=(8.8, 5), layout="constrained")
    for panel, (title, seen) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        for row, column in ((row, column) for row in range(len(names)) for column in range(len(names))):
            panel.fill_between([column - 0.46, column + 0.46], row - 0.46, row + 0.46, linewidth=0,
                               color=palette[kinds[column]] if seen[row, column] else FORBIDDEN)
        end = len(names) - 0.4
        panel.set(xlim=(-0.6, end), ylim=(end, -0.6), xticks=range(len(names)), yticks=range(len(names)),
                  xticklabels=names, yticklabels=names, title=title, ylabel="output", xlabel="depends on input",
                  aspect="equal")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    meanings = zip((FORBIDDEN, *palette), ("exactly zero", "soft prompt, given", "words, given", "words, written"),
                   strict=True)
    figure.legend(handles=[Patch(color=paint, label=label) for paint, label in meanings],
                  loc="outside lower center", ncols=4)
    return figure


def buckets(ahead: Tensor, found: Mapping[str, Tensor], max_distance: int) -> Figure:
    """The bucket of each distance (s), one panel for each title; dashed: the setting max_distance; small
    panels: the nearest twenty."""
    figure = Figure(figsize=(8.8, 3.6), layout="constrained")
    for panel, (name, bucket) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        panel.step(ahead, bucket, where="mid", color=TEXT, linewidth=1.6)
        for edge in (-max_distance, max_distance)[:1 + (bucket[-1] > 0)]:
            line = panel.axvline(edge, color=QUERY, linewidth=1.2, linestyle="--", label=f"max_distance {max_distance}")
        panel.set(title=name, xlabel="how far the key stands ahead of the query")
        near = ahead.abs() <= 20
        detail = panel.inset_axes((0.28, 0.6, 0.18, 0.34) if bucket[-1] > 0 else (0.62, 0.3, 0.35, 0.62))
        detail.step(ahead[near], bucket[near], where="mid", color=TEXT, linewidth=1.2)
        detail.set(xticks=(-20, 0, 20), yticks=range(0, int(bucket[near].max()) + 1, 8))
        detail.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("bucket")
    figure.legend(handles=[line], loc="outside lower center")
    return figure


def cuts(pieces: Sequence[tuple[Sequence[int], Sequence[int], float]], name: Callable[[int], str]) -> Figure:
    """Captions cut in two, one a line: ids for the encoder, ids for the decoder, how often this cut is drawn."""
    figure = Figure(figsize=(9, 0.5 + 0.55 * len(pieces)), layout="constrained")
    panel, longest = figure.subplots(), max(len(prefix) for prefix, _, _ in pieces)
    for line, (prefix, rest, share) in enumerate(pieces):
        for ids, colour, left in ((prefix, IMAGE, longest - len(prefix)), (rest, TEXT, longest + 0.6)):
            for place, index in enumerate(ids):
                panel.fill_between([left + place + 0.03, left + place + 0.97], line - 0.4, line + 0.4, color=colour,
                                   linewidth=0)
                panel.text(left + place + 0.5, line, name(index), ha="center", va="center", color="white", fontsize=8)
        panel.text(-0.3, line, f"{100 * share:.0f} % of draws", ha="right", va="center", color=INK)
    for x, half, colour, side in ((longest, "given to the encoder", IMAGE, "right"),
                                  (longest + 0.6, "written by the decoder", TEXT, "left")):
        panel.text(x, -0.62, half, color=colour, weight="bold", va="bottom", ha=side)
    widest = longest + 0.6 + max(len(rest) for _, rest, _ in pieces)
    panel.set(xlim=(-2.4, widest + 0.1), ylim=(len(pieces) - 0.4, -1.2), xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    return figure


def loss_curve(log: Sequence[Mapping[str, float]], mark: float, label: str) -> Figure:
    """The smoothed loss per word of one training, and a dashed line called `label` at the height `mark`."""
    figure = figures.curves(log, {"loss": "loss per word"}, smooth=15, chance={"loss": mark}, chance_label=label)
    figure.set_size_inches(6, 2.9)
    return figure

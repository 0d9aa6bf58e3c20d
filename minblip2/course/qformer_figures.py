"""Figures of lesson 05: a block of the Q-Former with what runs in it, the bottleneck, queries that part, parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .viz import IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG, draw_arrow, draw_picture, make_panels

# part -> (left, bottom, width, height) for each side, what stands in it; queries run above, text below
QUERIES, WORDS = "queries", "text"
PARTS = {
    "self_attention": ((2.1, 2.1, "self-\nattention,\nnorm"), (QUERIES, WORDS)),
    "cross_attention": ((4.8, 2.1, "cross-\nattention,\nnorm"), (QUERIES,)),
    "query_mlp": ((7.5, 2.6, "feed-forward\nof queries,\nnorm"), (QUERIES,)),
    "text_mlp": ((7.5, 2.6, "feed-forward\nof text,\nnorm"), (WORDS,)),
}
LEVEL, COLOUR = {QUERIES: 1.35, WORDS: 0.0}, {QUERIES: QUERY, WORDS: TEXT}
TALL, SHARED, ARROW = 1.05, "#D2D2D2", {"linewidth": 1.5, "zorder": 1}


def _tint(colour: str, share: float = 0.4) -> tuple[float, ...]:
    """A colour thinned on paper, opaque."""
    return tuple(share * a + (1 - share) * b for a, b in zip(to_rgb(colour), to_rgb(PAPER), strict=True))


def _box(panel: Axes, x: float, y: float, width: float, height: float, label: str, colour: str | None) -> None:
    """A part: of this colour, or dashed and pale when it rests."""
    panel.add_patch(Rectangle((x, y), width, height, facecolor=_tint(colour) if colour else PAPER, zorder=2,
                              edgecolor=INK if colour else "#AAAAAA", linewidth=1,
                              linestyle="-" if colour else (0, (3, 3))))
    panel.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8, zorder=3,
               linespacing=1.1, color=INK if colour else "#8A8A8A")


def draw_block(panel: Axes, running: Mapping[str, Iterable[str]], labels: Mapping[str, str], reads: bool = True
               ) -> None:
    """One block from left to right; running: part -> the sides ("queries", "text") that go through it.

    labels: what stands at the start of a side, under "image" at the arrow of keys and values, and under "norm" behind
    each part, if it is not "norm"; `reads`: whether the block has cross-attention at all.
    """
    sides = {side for some in running.values() for side in some}
    for side in (QUERIES, WORDS):
        if side not in sides:
            continue
        middle, last = LEVEL[side] + TALL / 2, 10.1
        panel.text(0.85, middle, labels[side], ha="center", va="center", fontsize=8)
        stops = [1.65, 2.1, 4.2, 4.8, 6.9, 7.5] if side == QUERIES and reads else [1.65, 2.1, 4.2, 7.5]
        for start, end in zip(stops[::2], stops[1::2], strict=True):
            draw_arrow(panel, (start, middle), (end, middle), color=COLOUR[side], **ARROW)
        draw_arrow(panel, (last, middle), (last + 0.45, middle), color=COLOUR[side], **ARROW)
        panel.text(last + 1.25, middle, labels[side], ha="center", va="center", fontsize=8)
    for part, ((x, width, label), owners) in PARTS.items():
        if part == "cross_attention" and not reads:
            continue
        going, label = set(running.get(part, ())), label.replace("norm", labels.get("norm", "norm"))
        if len(owners) == 2:  # grey, since it is shared; the half of a side that is absent is white
            middle, top = LEVEL[QUERIES] - 0.15, LEVEL[QUERIES] + TALL
            low, high = 0.0 if WORDS in going else middle, top if QUERIES in going else middle
            panel.add_patch(Rectangle((x, low), width, high - low, facecolor=SHARED, linewidth=0, zorder=2))
            panel.add_patch(Rectangle((x, 0), width, top, facecolor="none", edgecolor=INK, linewidth=1, zorder=3))
            panel.text(x + width / 2, (low + high) / 2, label, ha="center", va="center", fontsize=8, zorder=4)
        else:
            side, = owners
            _box(panel, x, LEVEL[side], width, TALL, label, COLOUR[side] if side in going else None)
    if "cross_attention" in running:
        x, width = PARTS["cross_attention"][0][:2]
        draw_arrow(panel, (x + width / 2, 3.0), (x + width / 2, LEVEL[QUERIES] + TALL), color=IMAGE, **ARROW)
        panel.text(x + width / 2 + 0.15, 2.92, labels["image"], ha="left", va="center", fontsize=8, color=INK)
    panel.set(xlim=(0, 12.2), ylim=(-0.15, 3.15))
    panel.axis("off")


def data_flow() -> Figure:
    """One block that reads the image, with the shapes of what goes through it."""
    figure = Figure(figsize=(9, 2.9))
    every = {part: owners for part, (_, owners) in PARTS.items()}
    panel, (x, width, _) = figure.add_axes((0, 0, 1, 1)), PARTS["cross_attention"][0]
    draw_block(panel, every, {QUERIES: "queries\n(b q e)", WORDS: "text\n(b t e)", "norm": "+, norm",
                              "image": "keys and values of the image (b h v d)"})
    panel.text(x + width / 2, LEVEL[QUERIES] - 0.13, "in every second block", ha="center", va="center", fontsize=8)
    return figure


def passes(running: Mapping[str, Mapping[str, Iterable[str]]]) -> Figure:
    """Passes through a block, two in a row; running: title -> what `draw_block` takes. Dashed parts rest."""
    figure, panels = make_panels(len(running), 2, 4.6, 2.1)
    for panel, (title, parts) in zip(panels, running.items(), strict=True):
        draw_block(panel, parts, {QUERIES: "queries", WORDS: "text", "image": "image"}, "does not" not in title)
        panel.set_title(title)
    return figure


def bottleneck(picture: object, before: Tensor, after: Tensor) -> Figure:
    """A picture, its frozen features (v i) and what the queries make of them (q e), cells of one size."""
    figure = Figure(figsize=(8.8, 2.3), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[60, before.shape[1], after.shape[1]])
    draw_picture(panels[0], picture)
    for panel, rows, colour in ((panels[1], before, IMAGE), (panels[2], after, QUERY)):
        drawn = panel.imshow(rows, cmap="PuOr", vmin=-2.5, vmax=2.5, extent=(0, rows.shape[1], -rows.shape[0], 0))
        panel.set(ylim=(-len(before), 0), xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.add_patch(Rectangle((0, -len(rows)), rows.shape[1], len(rows), fill=False, ec=colour, lw=2.5,
                                  clip_on=False))
    for panel, title in zip(panels, ("an image", f"frozen ViT: {before.shape[0]} patches × {before.shape[1]}",
                                     f"Q-Former: {after.shape[0]} queries × {after.shape[1]}"), strict=True):
        panel.set_anchor("N")
        panel.set_title(title)
    figure.colorbar(drawn, cax=panels[2].inset_axes((0.15, 0.42, 0.7, 0.07)), orientation="horizontal", extend="both",
                    label="value of an entry")
    return figure


def spreads(runs: Mapping[str, Sequence[float]]) -> Figure:
    """How far queries stand from their common mean while they train, one line for each start."""
    figure = Figure(figsize=(7.4, 3), layout="constrained")
    panel = figure.subplots()
    for (name, apart), colour, dash in zip(runs.items(), (QUERY, WRONG, TEXT), ("-", "--", "-."), strict=True):
        panel.plot(range(1, len(apart) + 1), apart, color=colour, linestyle=dash, label=name)
    panel.set(ylim=(-0.03, None), xlabel="step", title="distance of the queries from their mean,\nas a share of "
                                                       "their length")
    figure.legend(loc="outside right center")
    return figure


def ledger(whole: Mapping[str, int], branch: Mapping[str, int]) -> Figure:
    """Parameters by part, stage 1 above and stage 2 below, in millions."""
    colours = dict(zip(whole, ["#9A9A9A", QUERY, TEXT, IMAGE, "#56B4E9", "#CC79A7"], strict=True))
    figure = Figure(figsize=(8.8, 2.6), layout="constrained")
    panel = figure.subplots()
    for height, parts in enumerate((branch, whole)):
        left = 0.0
        for part, count in parts.items():
            panel.barh(height, count / 1e6, left=left, color=colours[part], ec=PAPER, label=part if height else None)
            if count > 5e6:
                panel.text(left + count / 2e6, height, f"{count / 1e6:.1f}", ha="center", va="center",
                           color="white" if colours[part] == TEXT else INK)
            left += count / 1e6
        panel.text(left + 1, height, f"{left:.1f}", va="center", weight="bold")
    panel.set(yticks=[0, 1], yticklabels=["stage 2", "stage 1"], xlabel="parameters, millions", xlim=(0, 205))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def races(logs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], key: str, blind: float) -> Figure:
    """`key` of the logs against steps, a colour for each name and a marker for each seed, of up to four.

    blind: height of the line of a model without the image.
    """
    figure = Figure(figsize=(7.4, 3), layout="constrained")
    panel = figure.subplots()
    for (name, runs), colour, dash in zip(logs.items(), (QUERY, TEXT), ("-", "--"), strict=True):
        for seed, log in enumerate(runs):
            panel.plot([entry["step"] for entry in log], [entry[key] for entry in log], color=colour, linestyle=dash,
                       linewidth=1.3, marker="os^D"[seed], markersize=4.5)
        panel.plot([], color=colour, linestyle=dash, label=name)
    for seed in range(len(runs)):
        panel.plot([], color=QUIET, linestyle="", marker="os^D"[seed], label=f"seed {seed}")
    panel.axhline(blind, color=QUIET, linestyle=":", label="a model without the image")
    panel.set(title=key, xlabel="step", ylabel="nats per word", ylim=(0, None))
    figure.legend(loc="outside right center")
    return figure

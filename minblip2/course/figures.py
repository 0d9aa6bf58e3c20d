"""The figures that lessons draw more than once: masks, attention maps, training curves, sheets of captions."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from .. import UserError
from .viz import (
    FORBIDDEN,
    IMAGE,
    INK,
    PAPER,
    QUERY,
    QUIET,
    TEXT,
    WRONG,
    as_array,
    draw_picture,
    label_line,
    make_panels,
)

NAMES = {"itc": "ITC", "itm": "ITM", "itg": "ITG", "itm_accuracy": "ITM accuracy"}  # what a log calls its numbers
UNITS = {**dict.fromkeys(("loss", "itc", "itm", "itg"), "nats"),
         **dict.fromkeys(("accuracy", "itm_accuracy"), "share right")}
TALLEST = 3  # times as tall as wide is a panel at most; a taller picture leaves room beside it


def mask_grid(masks: Mapping[str, Tensor], queries: int, text_labels: Sequence[str] | None = None) -> Figure:
    """Attention masks side by side, as in Figure 2 of the paper: rows look at columns, coloured where they may.

    masks: name -> (s s) boolean, True = may attend; the first `queries` of s are queries, the rest is text.
    """
    sizes = {name: tuple(mask.shape) for name, mask in masks.items()}
    size = next(iter(sizes.values()), (0,))[0]
    if not size or set(sizes.values()) != {(size, size)} or size < queries:
        raise UserError(f"the masks have shapes {sizes}: give square (s, s) masks of one size, s >= {queries} queries")
    labels = [f"q{index + 1}" for index in range(queries)]
    labels += text_labels or [f"t{index + 1}" for index in range(size - queries)]
    if len(labels) != size:
        raise UserError(f"there are {len(text_labels)} text labels for {size - queries} text tokens: give one for each")
    colour_of_key = np.array([to_rgb(QUERY)] * queries + [to_rgb(TEXT)] * (size - queries))
    figure, panels = make_panels(len(masks), 3, 3.1, 3.3 if len(masks) > 1 else 3.7)
    for panel, (name, mask) in zip(panels, masks.items(), strict=True):
        panel.imshow(np.where(as_array(mask).astype(bool)[..., None], colour_of_key, to_rgb(FORBIDDEN)))
        panel.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        panel.grid(which="minor", color=PAPER, linewidth=1.5 if size <= 24 else 0.5)
        panel.axhline(queries - 0.5, color=INK, linewidth=1.2, linestyle="-")
        panel.axvline(queries - 0.5, color=INK, linewidth=1.2, linestyle="-")
        panel.tick_params(which="both", length=0, labeltop=True, labelbottom=False)
        panel.spines[:].set_visible(False)
        if size <= 24:
            panel.set_xticks(range(size), labels, rotation=90)
            panel.set_yticks(range(size), labels)
        else:  # too many to name: name the two groups
            middles = [(queries - 1) / 2, (queries + size - 1) / 2]
            panel.set_xticks(middles, ["queries", "text"])
            panel.set_yticks(middles, ["queries", "text"], rotation=90, va="center")
        panel.set_xlabel(name, weight="bold")
        panel.set_ylabel("row looks at column")
    figure.legend(handles=[Patch(color=QUERY, label="may see a query"), Patch(color=TEXT, label="may see a text token"),
                           Patch(color=FORBIDDEN, label="forbidden")], loc="outside lower center",
                  ncols=3 if len(masks) > 1 else 1)
    return figure


def attention_maps(image: Image.Image | np.ndarray, maps: Mapping[str, Tensor],
                   boxes: Sequence[Sequence[float]] | None = None, notes: Sequence[str] | None = None) -> Figure:
    """The picture, then one panel per map laid over it, its maximum marked with a cross.

    image: PIL or (H W c) array; maps: label -> (gh gw), each coloured from 0 to its own maximum, which its title
    tells, and before it what `notes` say of each map; boxes (x, y, width, height) in pixels. The patches are drawn
    as they are, not smoothed, and the picture keeps its proportions.
    """
    picture = as_array(image)
    height, width = picture.shape[:2]
    figure, panels = make_panels(1 + len(maps), 4, 2.3, 2.3 * min(height / width, TALLEST) + 0.45)
    draw_picture(panels[0], picture)
    panels[0].set_title("picture")
    said = [f"{note}, " for note in notes] if notes else [""] * len(maps)
    for panel, (label, values), before in zip(panels[1:], maps.items(), said, strict=True):
        values = as_array(values)
        if values.ndim != 2:
            raise UserError(f"the map {label!r} has shape {values.shape}: give one (gh, gw) map per label")
        lay_over(panel, picture, values)
        panel.set_title(f"{textwrap.fill(label, 27)}\n{before}maximum {values.max():.2g}", fontsize=9.5)
    for panel in panels:
        for x, y, box_width, box_height in boxes or []:
            for colour, thickness in (("black", 3.5), ("white", 1.5)):  # two lines: seen on any ground
                panel.add_patch(Rectangle((x - 0.5, y - 0.5), box_width, box_height, fill=False, edgecolor=colour,
                                          linewidth=thickness))
    return figure


def lay_over(panel: Axes, image: object, values: object) -> None:
    """Draw a map (gh gw) over a picture, coloured from 0 to its maximum, which is marked with a cross."""
    picture, values = as_array(image), as_array(values)
    height, width = picture.shape[:2]
    draw_picture(panel, picture[..., :3].mean(axis=-1) if picture.ndim == 3 else picture)  # colour is attention only
    panel.imshow(values, cmap="viridis", alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=0)
    row, column = np.unravel_index(values.argmax(), values.shape)
    place = (column + 0.5) * width / values.shape[1] - 0.5, (row + 0.5) * height / values.shape[0] - 0.5
    panel.plot(*place, marker="X", markersize=10, color=WRONG, markeredgecolor="white", linestyle="")


def curves(records: Sequence[Mapping] | Mapping[str, Sequence[Mapping]],
           keys: Sequence[str] | Mapping[str, str] = ("loss", "itc", "itm", "itg"), smooth: int = 1,
           chance: Mapping[str, float] | None = None, chance_label: str | Mapping[str, str] = "chance",
           unit: str | None = None) -> Figure:
    """Training curves from the log, one panel per key, one line per run.

    records: the log's lines, each with "step", or name of run -> lines; keys: what to draw of them, or key -> title;
    `smooth`: each point is the mean of so many records around it, with the raw values pale behind; chance: key ->
    height of a dashed line that any curve must beat, called `chance_label`, or key -> what it is called; `unit` stands
    at every vertical axis (None: losses are in nats, accuracies shares, of other keys nothing is said).
    """
    runs = records if isinstance(records, Mapping) else {"": records}
    columns = 3 if len(keys) % 3 == 0 else 2
    figure, panels = make_panels(len(keys), columns, 8.8 / columns, 2.6)
    for panel, key in zip(panels, keys, strict=True):
        for name, lines in runs.items():
            points = np.array([(line["step"], line[key]) for line in lines if key in line], dtype=float).reshape(-1, 2)
            if not len(points):
                known = sorted({other for line in lines for other in line})
                raise UserError(f"no record of run {name!r} has {key!r}: choose keys among {', '.join(known)}")
            steps, values = points.T
            mean = [values[max(0, at - (smooth - 1) // 2):at + smooth // 2 + 1].mean() for at in range(len(values))]
            curve, = panel.plot(steps, mean, label=name, marker="o" if len(steps) == 1 else None)
            if smooth > 1:
                panel.plot(steps, values, color=curve.get_color(), alpha=0.25, linewidth=1, linestyle="-", zorder=1)
        if key in (chance or {}):
            panel.axhline(chance[key], color=INK, linewidth=1.2, linestyle=(0, (2, 2)))
            low, high = panel.get_ylim()
            panel.set_ylim(min(low, chance[key] - 0.2 * (high - low)), high)  # its label may stand below it
            label = chance_label if isinstance(chance_label, str) else chance_label[key]
            label_line(panel, chance[key], f"{label} {chance[key]:#.3g}".rstrip("."))
        panel.set_title(keys[key] if isinstance(keys, Mapping) else NAMES.get(key, key.replace("_", " ")))
        panel.set(xlabel="step", ylabel=UNITS.get(key, "") if unit is None else unit)
        panel.grid(axis="y")
    if len(runs) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def caption_sheet(images: Sequence[object], captions: Sequence[Sequence[str] | Mapping[str, str]]) -> Figure:
    """Pictures in rows of four with their captions below, the first caption dark, the others grey.

    A row is as high as its highest picture needs. images: PIL or (H W c) arrays; captions: for each, a list of texts or
    label -> text, as {"ours": ..., "true": ...}.
    """
    if not images or len(images) != len(captions):
        raise UserError(f"there are {len(images)} pictures and {len(captions)} sets of captions: give as many of each")
    columns = min(4, len(images))
    side, line, letters = 2.3, 0.165, 32  # inches, inches, letters that fit on a line at 9 pt
    blocks = [[textwrap.fill(re.sub("([✓✗]) ", "\\1\u00a0", text), letters) or "(empty)" for text in (
        [f"{label} {text}" if label in ("✓", "✗") else f"{label}: {text}" for label, text in texts.items()]
        if isinstance(texts, Mapping) else texts)]
        for texts in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    tall = [sum(block.count("\n") + 1.3 for block in texts) for texts in blocks]  # in lines
    heights = [line * (1 + max(tall[index] for index in row)) for row in rows]
    shapes = [as_array(image).shape for image in images]
    above = [side * (0.06 + 0.94 * max(min(1, shapes[index][0] / shapes[index][1]) for index in row)) for row in rows]
    total = sum(heights) + sum(above)
    figure = Figure(figsize=(side * columns, total))
    top = total
    for row, height, high in zip(rows, heights, above, strict=True):
        top -= high + height
        for column, index in enumerate(row):
            left, y = (column + 0.03) / columns, top + height
            place = (left, y / total, 0.94 / columns, (high - 0.04 * side) / total)
            draw_picture(figure.add_axes(place, anchor="S"), images[index])
            y -= 0.4 * line
            for number, block in enumerate(blocks[index]):
                for text in block.split("\n"):  # one by one: in one text, lines without tails stand closer
                    figure.text(left, y / total, text, fontsize=9, va="top", color=QUIET if number else INK)
                    y -= line
                y -= 0.3 * line
    return figure


def _gap_plane(images: Tensor, texts: Tensor) -> tuple[float, float, np.ndarray]:
    """Distance of the centres, mean distance within pairs, and all points (2n 2) in the plane of `modality_gap`."""
    both = torch.cat([images, texts])
    both = both - both.mean(dim=0)
    across = texts.mean(dim=0) - images.mean(dim=0)
    gap, within = across.norm(), (images - texts).norm(dim=1).mean()
    if gap < 1e-9:  # no difference of the centres: where both clouds vary most
        across = torch.linalg.svd(both, full_matrices=False)[2][0]
    across = across / across.norm()
    rest = both - torch.outer(both @ across, across)
    upwards = torch.linalg.svd(rest, full_matrices=False)[2][0]
    upwards = upwards * (-1 if (rest @ upwards)[0] < 0 else 1)  # a singular vector's sign is arbitrary
    return gap.item(), within.item(), torch.stack([both @ across, rest @ upwards], dim=1).numpy()


def modality_gap(clouds: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Images and their texts in one plane, each pair joined: across, the direction from centre to centre.

    clouds: name -> vectors of images and of texts (n e), row by row a pair; a panel each, all on one scale. Upwards is
    the direction, at a right angle to the first, in which both clouds vary most. Across, the centres keep their
    distance; the title has it, and the mean distance within pairs, both in the full space.
    """
    figure, panels = make_panels(len(clouds), 2, 4.6, 4.6)
    reach = 0.0
    for panel, (name, vectors) in zip(panels, clouds.items(), strict=True):
        shapes = [tuple(some.shape) for some in vectors]
        if len(set(shapes)) > 1 or len(shapes[0]) != 2 or min(shapes[0]) < 2:
            raise UserError(f"the vectors have shapes {shapes[0]} and {shapes[1]}: "
                            "give two equal (n, e) matrices with n >= 2 and e >= 2")
        gap, within, plane = _gap_plane(*(some.detach().double().cpu() for some in vectors))
        image_points, text_points = np.split(plane, 2)
        for pair in zip(image_points, text_points, strict=True):
            panel.plot(*zip(*pair, strict=True), color=QUIET, alpha=0.35, linewidth=0.8, linestyle="-", zorder=1)
        for points, colour, marker, label in ((image_points, IMAGE, "o", "image"), (text_points, TEXT, "^", "text")):
            panel.scatter(*points.T, color=colour, marker=marker, edgecolor="white", linewidth=0.6, s=42, label=label)
        panel.set_title(f"{name}\ncentres {gap:.2f} apart, pairs {within:.2f}")
        panel.set(xlabel="from the images' centre to the texts' centre", ylabel="direction of widest spread")
        reach = max(reach, 1.08 * np.abs(plane).max())
    for panel in panels:
        panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure

"""What lesson 13 draws and plays: walls of maps on one scale, the pointing game at scale, and maps put to the test."""

from __future__ import annotations

import math
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..attention import attention_weights
from ..data.scene_captions import phrase
from ..data.scenes import SEEN, SIDE, Scene, Thing
from ..evaluation.metrics import _inside
from ..stage1 import Stage1
from ..weights.retriever import Retriever
from .flow import Box
from .flow import flow as boxes_and_arrows
from .viz import IMAGE, INK, QUERY, QUIET, TEXT, WRONG, draw_arrow, draw_picture


@dataclass
class Asked:
    """Everything in a split that a phrase can ask for: its picture's row, its phrase, and the cells of its box (n v).

    `anything` (n v) are the cells of all things of the same picture, `chance` the share of cells in the box.
    """

    rows: Tensor
    things: list[Thing]
    phrases: list[str]
    boxes: Tensor
    anything: Tensor

    @classmethod
    def of(cls, truths: Sequence[Scene], grid: int) -> Asked:
        """All things of these scenes, on a grid of so many cells a side."""
        def cells(things: Sequence[Thing]) -> Tensor:
            return _inside([thing.box for thing in things], (SIDE, SIDE), (grid, grid)).flatten()

        pairs = [(row, thing) for row, scene in enumerate(truths) for thing in scene.things]
        covered = [cells(scene.things) for scene in truths]
        return cls(torch.tensor([row for row, _ in pairs]), [thing for _, thing in pairs],
                   [phrase(thing.colour, thing.shape) for _, thing in pairs],
                   torch.stack([cells([thing]) for _, thing in pairs]), torch.stack([covered[row] for row, _ in pairs]))

    @property
    def chance(self) -> float:
        """Percent of cells that lie in the box asked for."""
        return 100 * self.boxes.float().mean().item()

    def hits(self, heat: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Who wins the pointing game (n), for maps (n v): all cells that tie for the maximum are wanted ones."""
        return ((self.boxes if wanted is None else wanted) | (heat < heat.amax(dim=1, keepdim=True))).all(dim=1)

    def interval(self, hit: Tensor, draws: int = 1000) -> str:
        """Percent of hits (n), with a 95 % interval over *pictures* drawn again with replacement."""
        pictures = int(self.rows.max()) + 1
        ones = torch.zeros(pictures).index_add(0, self.rows, hit.float())
        counts = torch.bincount(self.rows, minlength=pictures)
        again = torch.randint(pictures, (draws, pictures), generator=torch.Generator().manual_seed(0))
        shares = 100 * ones[again].sum(dim=1) / counts[again].sum(dim=1)
        low, high = shares.quantile(torch.tensor([0.025, 0.975])).tolist()
        return f"{100 * hit.float().mean():.1f} % ({low:.1f} to {high:.1f})"


def in_batches(make: Callable[[Tensor, Tensor, Tensor], Tensor], retriever: Retriever, features: Tensor, rows: Tensor,
               texts: Sequence[str], some: int = 100) -> Tensor:
    """make(image, text_ids, text_mask) of every picture of `rows` with its text, as one tensor."""
    ids, mask = retriever.text_ids(texts)
    return torch.cat([make(features[part], ids[place], mask[place]) for part, place in
                      zip(rows.split(some), torch.arange(len(rows)).split(some), strict=True)])


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's correlation of maps (n v), row by row: (n)."""
    ranks = [heat.argsort(dim=1).argsort(dim=1).float() for heat in (one, other)]
    return F.cosine_similarity(*(some - some.mean(dim=1, keepdim=True) for some in ranks), dim=1)


def nudged_match(model: Stage1, reading: int, where: tuple[int, int, int, int], by: float, image: Tensor,
                 text_ids: Tensor, text_mask: Tensor) -> float:
    """The logits of "match", summed, when one attention weight `where` (b, h, q, v) of a reading is raised by `by`.

    A second implementation of the layer: the weight is raised after the softmax, its neighbours stay.
    """
    layer = model.qformer.cross_attentions[reading]

    def forward(x, mask=None, context=None, cache=None):
        query = rearrange(layer.query(x), "b s (h d) -> b h s d", h=layer.heads)
        weights = attention_weights(query, context[0]).clone()
        weights[where] += by
        mixed = einsum(weights, context[1], "b h s k, b h k d -> b h s d")
        return layer.out(rearrange(mixed, "b h s d -> b s (h d)"))

    layer.forward = forward  # hides the class's own
    try:
        with torch.no_grad():
            return model.itm_logits(model.image_kv(image), text_ids, text_mask)[:, 1].sum().item()
    finally:
        del layer.forward


def lacking(scene: Scene, seed: int) -> str:
    """The phrase for a colour and a shape that never stand together in this scene, drawn by the seed."""
    there = {(thing.colour, thing.shape) for thing in scene.things}
    return phrase(*random.Random(seed).choice([pair for pair in SEEN if pair not in there]))


def grey_out(image: Tensor, order: Tensor, count: int, nothing: Tensor) -> Tensor:
    """Features (b v e) with the first `count` tokens of `order` (b v) replaced by the feature `nothing` (e)."""
    cut = image.clone()
    cut[torch.arange(len(image))[:, None], order[:, :count]] = nothing
    return cut


def wall(image: object, shown: Tensor | Sequence[Tensor], titles: Sequence[str], columns: int = 8, side: float = 0.95,
         things: Sequence[Thing] = (), rows: Sequence[str] = (), units: Sequence[str] = ("weight",)) -> Figure:
    """Small maps (n gh gw) and the picture beside them, if there is one.

    `rows` are the names of the rows. `units` says at the colour bar what is drawn: one for all maps, which then have
    ONE scale, or one for each row, if rows show different things.
    """
    count, letters = math.ceil(len(titles) / columns), max(14, int(14.5 * side))
    titles = [textwrap.fill(title, letters) for title in titles]
    lines = 1 + max(title.count("\n") for title in titles)
    wide = 0 if image is None else min(count, 2)
    figure = Figure(figsize=((columns + wide) * side + 0.7 + 0.2 * bool(rows), count * (side + 0.08 + 0.16 * lines)),
                    layout="constrained")
    places = figure.add_gridspec(count, columns + wide)
    panels = [figure.add_subplot(places[k // columns, wide + k % columns]) for k in range(len(titles))]
    size = math.ceil(len(titles) / len(units)) if len(units) == 1 else columns  # maps that share a scale
    for first, unit in zip(range(0, len(titles), size), units, strict=True):
        group, top = panels[first:first + size], max(float(values.max()) for values in shown[first:first + size])
        for panel, values, title in zip(group, shown[first:first + size], titles[first:first + size], strict=True):
            drawing = panel.imshow(values, vmin=0, vmax=top, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5),
                                   interpolation="nearest")
            panel.set_title(title, fontsize=9, weight="normal")
        figure.colorbar(drawing, ax=group, label=unit, shrink=0.9)
    for panel, name in zip(panels[::columns], rows, strict=bool(rows)):
        panel.set_ylabel(name, fontsize=9)
    if wide:
        panels.append(figure.add_subplot(places[:, :wide]))
        draw_picture(panels[-1], image)
    for panel in panels:
        panel.set(xticks=[], yticks=[])
        for x, y, width, height in (thing.box for thing in things):
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="white", linewidth=1))
    return figure


def flow() -> Figure:
    """How the map of a phrase is made: a fused pass forward, gradients back, weight times positive gradient."""
    boxes: dict[str, Box] = {
        "image": (0, 13, 15, 7, "image features\n(b v i)", IMAGE), "phrase": (0, 2, 15, 7, "phrase\n(b t)", TEXT),
        "qformer": (25, 2, 22, 18, "Q-Former,\nfused pass:\nattention A\n(b h q v)\nin each reading", QUERY),
        "head": (67, 13, 21, 7, "ITM head:\nlogit “match” y", QUERY),
        "map": (67, 2, 21, 7, "map (b v)\nΣ A · relu(∂y/∂A)", IMAGE)}
    figure = boxes_and_arrows(boxes, (("image", "qformer"), ("phrase", "qformer"), ("qformer", "map", "A and ∂y/∂A")),
                              notes=((53, 19.2, "forward"), (54, 13.2, "∂y/∂A")))
    panel = figure.axes[0]
    draw_arrow(panel, (47, 17.7), (67, 17.7))
    draw_arrow(panel, (67, 14.7), (47, 14.7), linestyle=(0, (3, 2)))
    return figure


def deletion(fall: Mapping[str, Tensor], counts: Sequence[int]) -> Figure:
    """Score lost, mean and 95 % interval, against how many patches are greyed out; values (counts n) for each order."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panel = figure.subplots()
    for (name, values), colour, marker in zip(fall.items(), (IMAGE, WRONG, QUIET), "oXs", strict=True):
        panel.errorbar(range(len(counts)), values.mean(dim=1), 1.96 * values.std(dim=1) / values.shape[1] ** 0.5,
                       label=name, color=colour, marker=marker, capsize=3)
    panel.axhline(0, color=INK, linewidth=1, linestyle="-")
    panel.set(xlabel="patches greyed out", ylabel="score lost, mean (± 95 %)")
    panel.set_xticks(range(len(counts)), counts)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure

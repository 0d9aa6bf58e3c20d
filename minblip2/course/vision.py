"""What the lessons on the image encoder draw and measure: patches, labels, features as colours, linear probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..data.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene
from ..training.experts import NOTHING, PatchReader
from ..vit import ViT
from . import viz
from .figures import curves
from .pipeline import Step, pipeline

QUESTIONS = tuple(PatchReader.sizes)  # what the tiny ViT's patches are asked, in the order of their labels
NAMED = {"colour": list(COLOURS), "shape": SHAPES, "column": ("left", "middle", "right")}


def _bare(panel: Axes, title: str = "") -> None:
    """No ticks, a hairline frame, a small title."""
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set(visible=True, color="#AAAAAA", linewidth=0.7)
    panel.set_title(title, fontsize=9.5)


def encoder_figure() -> Figure:
    """The data flow of a vision transformer, with the shapes of the tiny one and of BLIP-2's ViT-g."""
    return pipeline([Step("image", "b 3 H W\ntiny: 3 × 64 × 64\nViT-g: 3 × 224 × 224", viz.IMAGE),
                     Step("cut into\npatches", "b v 3·p·p\nViT-g: 256 × 588", viz.IMAGE),
                     Step("one linear\nmap", "b v e\ntiny: a stem\nViT-g: 256 × 1408", viz.IMAGE),
                     Step("+ class token,\n+ positions", "b v e\ntiny: 64 × 128\nViT-g: 257 × 1408", viz.IMAGE),
                     Step("transformer\nblocks", "b v e\ntiny: 2 blocks\nViT-g: 39 blocks", viz.IMAGE),
                     Step("visual\ntokens", "b v e\nread by the\nQ-Former", viz.QUERY)])


def patch_figure(picture: object, patches: Tensor, patch: int) -> Figure:
    """A picture, and beside it its patches (v c·p1·p2), numbered in their order."""
    grid = round(len(patches) ** 0.5)
    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    whole = left.subplots()
    whole.imshow(picture)
    _bare(whole, "the picture")
    panels = right.subplots(grid, grid, gridspec_kw=dict(wspace=0.02, hspace=0.02))
    for number, panel in enumerate(panels.flat):
        square = rearrange(patches[number], "(c p1 p2) -> p1 p2 c", p1=patch, p2=patch)
        panel.imshow(viz.as_array(square), vmin=0, vmax=1)
        _bare(panel)
        panel.text(0, 0, number, fontsize=8, va="top", color="white", bbox=dict(facecolor=viz.INK, pad=1, lw=0))
    return figure


def label_figure(picture: object, scene: Scene, labels: np.ndarray, patch: int) -> Figure:
    """A scene three times, with the labels (gh gw 6) of its covered patches: colour, shape, column."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    edge = len(labels) - 0.5
    for panel, (kind, known) in zip(figure.subplots(1, 3), NAMED.items(), strict=True):
        values = labels[..., QUESTIONS.index(kind)]
        panel.imshow(viz.as_array(picture), extent=(-0.5, edge, edge, -0.5), alpha=0.75)
        for row, column in np.argwhere(values != NOTHING):
            panel.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="white", lw=1.3))
        for thing in scene.things:
            x, y, width, height = (length / patch for length in thing.box)
            label = values[int(y + height / 2), int(x + width / 2)]  # at the patch of its centre
            panel.text(x + width / 2 - 0.5, y + height / 2 - 0.5, known[int(label)], ha="center", va="center",
                       bbox=dict(facecolor="white", alpha=0.9, pad=1.5, lw=0))
        _bare(panel, kind)
    return figure


def principal_colours(vectors: Tensor, count: int) -> Tensor:
    """The three directions in which vectors (b v e) differ most, as red, green, blue: (b gh gw c) of the first `count`.

    The patches are those of a square grid; each direction is stretched from its 1st to its 99th percentile.
    """
    flat = rearrange(vectors, "b v e -> (b v) e")
    centre = flat.mean(dim=0)
    _, _, directions = torch.linalg.svd(flat[::7] - centre, full_matrices=False)
    values = (flat - centre) @ directions[:3].T
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)
    values = rearrange(((values - low) / (high - low)).clamp(0, 1), "(b v) c -> b v c", b=len(vectors))
    return rearrange(values[:count], "b (gh gw) c -> b gh gw c", gh=round(vectors.shape[1] ** 0.5))


def map_figure(pictures: Sequence[object], maps: Mapping[str, Sequence], wide: float = 9.0) -> Figure:
    """Pictures, a row each, and beside each its maps: title -> (b gh gw c) for the pictures in their order."""
    columns = 1 + len(maps)
    figure = Figure(figsize=(wide, wide / columns * len(pictures) + 0.45), layout="constrained")
    for row, panels in enumerate(figure.subplots(len(pictures), columns, squeeze=False)):
        shown = {"picture": pictures[row], **{title: painting[row] for title, painting in maps.items()}}
        for panel, (title, painting) in zip(panels, shown.items(), strict=True):
            panel.imshow(viz.as_array(painting))
            _bare(panel, title if row == 0 else "")
    return figure


def linear_probe(vectors: Tensor, labels: Tensor, kind: int, half: int, ridge: float = 0.1) -> float:
    """Share of covered patches whose label of this kind a linear map reads off frozen vectors.

    vectors (b v e), labels (b gh gw 6) long; the map is fitted by ridge regression on the covered patches of the first
    `half` pictures and judged on those of the others.
    """
    inputs, answers = F.pad(vectors, (0, 1), value=1.0), labels.flatten(1, 2)  # a constant 1 for the bias
    covered = answers[..., 0] != NOTHING
    (known, asked), (output, right) = ((some[:half][covered[:half]], some[half:][covered[half:]])
                                       for some in (inputs, answers[..., kind]))
    normal = known.T @ known + ridge * torch.eye(known.shape[1])
    readout = torch.linalg.solve(normal, known.T @ F.one_hot(output, int(answers[..., kind].max()) + 1).float())
    return ((asked @ readout).argmax(dim=1) == right).float().mean().item()


def probe_figure(read: Mapping[str, Mapping[str, float]], guess: Mapping[str, float]) -> Figure:
    """What a linear map reads off each layer: question -> layer -> share right, a panel each.

    guess: question -> share of the most frequent answer, the dashed line.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    layers = list(next(iter(read.values())))
    for panel, (question, shares), marker in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, read.items(),
                                                 "osD^vX", strict=True):
        panel.plot(range(len(layers)), [100 * shares[layer] for layer in layers], marker=marker, color=viz.IMAGE)
        line = panel.axhline(100 * guess[question], color=viz.INK, linewidth=1.2, linestyle=(0, (2, 2)))
        panel.set(title=question, ylim=(0, 106))
        panel.set_xticks(range(len(layers)), layers, rotation=35, ha="right")
        panel.grid(axis="y")
    figure.supylabel("right, of covered patches (%)", fontsize=10)
    figure.supxlabel("what the linear map reads", fontsize=10)
    figure.legend([line], ["always the most frequent answer"], loc="outside upper right")
    return figure


@torch.no_grad()
def share_read(heads: nn.ModuleDict, tokens: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of covered patches that trained heads read rightly off tokens (b v e): question -> share.

    labels (b gh gw 6) long.
    """
    patches = rearrange(tokens, "b (gh gw) e -> b gh gw e", gh=labels.shape[1])
    covered = labels[..., 0] != NOTHING
    return {question: (heads[question](patches).argmax(dim=-1) == labels[..., kind])[covered].float().mean().item()
            for kind, question in enumerate(QUESTIONS)}


def share_rows(shares: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows for a table: name -> question -> share, in per cent."""
    return [[name, *(f"{100 * share:.0f} %" for share in line.values())] for name, line in shares.items()]


@torch.no_grad()
def colours_read(heads: nn.ModuleDict, tokens: Tensor) -> np.ndarray:
    """Each patch painted in the colour that trained heads read there, on the ground that they read: (b gh gw c)."""
    found = {question: heads[question](tokens).argmax(dim=-1) for question in ("colour", "background")}
    ink = torch.tensor([*COLOURS.values(), (0, 0, 0)])[found["colour"]]
    ground = torch.tensor(list(BACKGROUNDS.values()))[found["background"]]
    nothing = (found["colour"] == len(COLOURS)).unsqueeze(-1)
    painted = torch.where(nothing, ground, ink)
    return rearrange(painted, "b (gh gw) c -> b gh gw c", gh=round(tokens.shape[1] ** 0.5)).numpy()


def _weights(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches a thing covers, and what each counts in `reading_losses`, both flat."""
    covered = (labels[..., 0] != NOTHING).flatten()
    return covered, torch.where(covered, 1.0, 0.15)


def blind_losses(labels: Tensor) -> dict[str, float]:
    """What a reader pays who sees nothing but has counted the answers: the entropy of each question's labels, in nats.

    labels (b gh gw 6); patches are weighted as in `reading_losses`.
    """
    _, weight = _weights(labels)
    losses = {}
    for kind, (question, classes) in enumerate(PatchReader.sizes.items()):
        answers = F.one_hot(labels[..., kind].long().flatten() % classes, classes).float()
        losses[question] = torch.special.entr(weight @ answers / weight.sum()).sum().item()
    return losses


def place_floor(labels: Tensor, question: str) -> float:
    """Loss of "row" or "column" for a reader who knows all but that: its entropy on covered patches, in nats."""
    covered, weight = _weights(labels)
    counts = torch.bincount(labels[..., QUESTIONS.index(question)].flatten()[covered].long()).float()
    return (covered.sum() / weight.sum() * torch.special.entr(counts / counts.sum()).sum()).item()


def commonest(labels: Tensor) -> dict[str, float]:
    """Share of covered patches that have the most frequent answer, by question; labels (b gh gw 6) long."""
    covered = labels[..., 0] != NOTHING
    return {question: (torch.bincount(labels[..., kind][covered]).max() / covered.sum()).item()
            for kind, question in enumerate(QUESTIONS)}


def two_runs_figure(logs: Mapping[str, Sequence[Mapping]], start: Mapping[str, float],
                    floor: Mapping[str, float]) -> Figure:
    """Colour, shape, row and column over two short trainings: dashed where it must start, solid the floors."""
    figure = curves(logs, ("colour", "shape", "row", "column"), smooth=9, chance=start, chance_label="ln K =",
                    unit="nats")
    for panel, (question, lowest) in zip(figure.axes[2:], floor.items(), strict=True):
        panel.axhline(lowest, color=viz.WRONG, linewidth=1.2, linestyle="-")
        panel.annotate(f"floor: all but the {question} known, {lowest:.2f}", (0, lowest), (4, -11), fontsize=9,
                       color=viz.WRONG, textcoords="offset points")
    return figure


def cost(model: nn.Module, run: Callable[[], object]) -> tuple[float, float]:
    """Parameters of a model in millions, and multiply-adds of one `run` of it in billions; on the meta device too."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return sum(weight.numel() for weight in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


@torch.no_grad()
def tapped(vit: ViT, images: Tensor) -> dict[str, Tensor]:
    """What a ViT without a class token makes of normalised pixels (b c H W), layer by layer: name -> (b v ...)."""
    patch = vit.config.patch_size
    grid = vit.patches(images)
    x = rearrange(grid, "b e gh gw -> b (gh gw) e")
    kept = {"pixels": rearrange(images, "b c (gh p1) (gw p2) -> b (gh gw) (c p1 p2)", p1=patch, p2=patch), "stem": x}
    x = kept["+ positions"] = vit.embedding_norm(x + vit.positions_for(*grid.shape[-2:]))
    for number, block in enumerate(vit.blocks, start=1):
        x = kept[f"block {number}"] = block(x)
    return {**kept, "final norm": vit.norm(x)}

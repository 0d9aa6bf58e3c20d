"""What lessons draw and count of training runs: the schedule, curves between chance and floor, what queries see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data.scenes import COLOURS, SHAPES, SIDE, Scene
from ..training.experts import patch_labels
from ..training.loop import TrainConfig
from .figures import NAMES
from .viz import IMAGE, INK, TEXT, make_panels


def schedule(rates: Sequence[float], config: TrainConfig) -> Figure:
    """The learning rate over the steps of a run, with the end of its warm-up marked."""
    figure, (panel,) = make_panels(1, 1, 6.6, 2.4)
    panel.plot(range(len(rates)), rates, color=TEXT, marker="", linestyle="-")
    panel.axvline(config.warmup - 1, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    panel.text(config.warmup - 0.3, 0.06 * max(rates), "end of the warm-up", ha="left", fontsize=9)
    panel.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.06 * max(rates)))
    return figure


def between(log: Sequence[Mapping[str, float]], chance: Mapping[str, float], floor: Mapping[str, float],
            smooth: int = 25) -> Figure:
    """Each loss of a log between its chance (dashed) and its floor (dotted), whose heights stand in the titles."""
    figure, panels = make_panels(len(chance), 3, 3.1, 2.9)
    steps = [line["step"] for line in log]
    for panel, name in zip(panels, chance, strict=True):
        values = np.array([line[name] for line in log])
        mean = np.array([values[max(0, at - smooth // 2):at + smooth // 2 + 1].mean() for at in range(len(values))])
        panel.plot(steps, values, color=TEXT, alpha=0.25, linewidth=0.8, linestyle="-")
        panel.plot(steps, mean, color=TEXT, linestyle="-", label=f"mean of {smooth} steps")
        panel.axhline(chance[name], color=INK, linewidth=1.4, linestyle=(0, (4, 2)), label="chance")
        panel.axhline(floor[name], color=IMAGE, linewidth=1.6, linestyle=(0, (1, 1)), label="floor")
        panel.set(xlabel="step", ylabel="nats", ylim=(floor[name] - 0.07 * chance[name], 1.15 * chance[name]),
                  title=f"{NAMES[name]}: chance {chance[name]:.3g}, floor {floor[name]:.3g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def milestones(log: Sequence[Mapping[str, float]], chance: Mapping[str, float],
               shares: Sequence[float] = (0.1, 0.5, 0.9), window: int = 50) -> dict[float, dict[str, int]]:
    """The step at which the mean of `window` steps has gone these shares of the way from chance to the run's end."""
    found: dict[float, dict[str, int]] = {share: {} for share in shares}
    for name, high in chance.items():
        values = np.array([line[name] for line in log])
        end = values[-2 * window:].mean()
        running = np.convolve(values, np.ones(window) / window, mode="valid")
        for share in shares:
            found[share][name] = window // 2 + int((running < high - share * (high - end)).argmax())
    return found


def profile(maps: Tensor, truths: Sequence[Scene], grid: tuple[int, int]) -> tuple[Tensor, list[str]]:
    """How many times its fair share of attention each query gives to patches of each kind: (q k), names of the kinds.

    maps (b q v) sum to 1 over the patches v of the scenes `truths`; a query that looks at all patches alike gets 1.
    """
    labels = torch.from_numpy(np.stack([patch_labels(truth, grid, SIDE) for truth in truths])).flatten(1, 2)
    kinds = {"any thing": labels[..., 0] >= 0, "background": labels[..., 0] < 0}
    kinds |= {name: labels[..., 1] == index for index, name in enumerate(SHAPES)}
    kinds |= {name: labels[..., 0] == index for index, name in enumerate(COLOURS)}
    found = [maps.shape[-1] * (maps * kind[:, None]).sum(dim=(0, 2)) / kind.sum() for kind in kinds.values()]
    return torch.stack(found, dim=1), list(kinds)


def profiles(values: Tensor, kinds: Sequence[str]) -> Figure:
    """A profile (q k) as a map, queries ordered by how much they look at things."""
    order = values[:, 0].argsort(descending=True)
    figure, (panel,) = make_panels(1, 1, 8.8, 4.3)
    drawn = panel.imshow(values[order], cmap="viridis", vmin=0, aspect="auto")
    panel.set_yticks(range(len(order)), [f"q{query + 1}" for query in order])
    panel.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    panel.set_ylabel("query, sorted by attention to things")
    first = 0
    for group, count in (("", 2), ("patches of one shape", len(SHAPES)), ("patches of one colour", len(COLOURS))):
        panel.text(first + count / 2 - 0.5, -0.7, group, ha="center", va="bottom")
        panel.axvline(first - 0.5, color="white", linewidth=2, linestyle="-")
        first += count
    figure.colorbar(drawn, label="attention, times its fair share")
    return figure

"""What lessons draw and count of training runs: the schedule, and curves between chance and floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from ..training.loop import TrainConfig
from .figures import NAMES
from .viz import IMAGE, INK, TEXT, WRONG, make_panels


def schedule(rates: Sequence[float], config: TrainConfig) -> Figure:
    """The learning rate over the steps of a run, with the end of its warm-up marked."""
    figure, (panel,) = make_panels(1, 1, 6.6, 2.4)
    panel.plot(range(len(rates)), rates, color=TEXT, marker="", linestyle="-")
    panel.axvline(config.warmup - 1, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    panel.text(config.warmup - 0.3, 0.06 * max(rates), "end of the warm-up", ha="left", fontsize=9)
    panel.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.06 * max(rates)))
    return figure


def between(log: Sequence[Mapping[str, float]], chance: Mapping[str, float], floor: Mapping[str, float],
            leaves: int, smooth: int = 25) -> Figure:
    """Each loss of a log between its chance (dashed) and its floor (dotted), whose heights stand in the titles.

    `leaves` is the step at which ITM has gone a tenth of its way (`milestones`): a vertical line.
    """
    figure, panels = make_panels(len(chance), 3, 3.1, 2.9)
    steps = [line["step"] for line in log]
    for panel, name in zip(panels, chance, strict=True):
        values = np.array([line[name] for line in log])
        mean = np.array([values[max(0, at - smooth // 2):at + smooth // 2 + 1].mean() for at in range(len(values))])
        panel.plot(steps, values, color=TEXT, alpha=0.25, linewidth=0.8, linestyle="-")
        panel.plot(steps, mean, color=TEXT, linestyle="-", label=f"mean of {smooth} steps")
        panel.axhline(chance[name], color=INK, linewidth=1.4, linestyle=(0, (4, 2)), label="chance")
        panel.axhline(floor[name], color=IMAGE, linewidth=1.6, linestyle=(0, (1, 1)), label="floor")
        panel.set(xlabel="step (logarithmic)", xscale="log", ylabel="nats",
                  ylim=(floor[name] - 0.07 * chance[name], 1.15 * chance[name]),
                  title=f"{NAMES[name]}: chance {chance[name]:.3g}, floor {floor[name]:.3g}")
        panel.axvline(leaves, color=WRONG, linewidth=1.4, linestyle="-.", label="a tenth of ITM's way down")
        panel.xaxis.set_major_formatter("{x:g}")
    known: dict[str, Artist] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        known |= zip(labels, handles, strict=True)
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4)
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

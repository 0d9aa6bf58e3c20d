"""The figures of lesson 14: the path of a number, differences of runs with their intervals, and runs of all lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .flow import Box, flow
from .viz import IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG, make_panels

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # 97.5 % quantile for the mean of so many values


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % interval, of two to six of them."""
    gaps = np.asarray(differences, dtype=float)
    return gaps.mean(), STUDENT[len(gaps)] * gaps.std(ddof=1) / len(gaps) ** 0.5


def written(differences: Sequence[float]) -> str:
    """Their mean and interval for a table, as "+1.5 ± 15.7"; in bold where the interval excludes zero."""
    mean, half = interval(differences)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def forest(rows: Mapping[str, Sequence[Sequence[float]]], titles: Sequence[str],
           against: str = "the base") -> Figure:
    """A forest plot: `rows` gives for each kind of run, and each of the `titles`, the differences within a seed.

    A dot is a seed, the line the 95 % interval of the mean; a diamond is filled where that excludes zero, and bears a
    plus if the row is better, a minus if it is worse. All panels have one scale.
    """
    figure = Figure(figsize=(9.2, 1.15 + 0.36 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(titles), sharex=True, sharey=True, squeeze=False)[0]
    for place, panel in enumerate(panels):
        panel.axvline(0, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        for height, differences in enumerate(some[place] for some in reversed(rows.values())):
            mean, half = interval(differences)
            sure = abs(mean) > half
            colour = (TEXT if mean > 0 else WRONG) if sure else QUIET
            panel.plot([mean - half, mean + half], [height, height], color=colour, linewidth=1.6, linestyle="-")
            panel.plot(mean, height, marker="D", markersize=8 if sure else 6, color=colour,
                       markerfacecolor=colour if sure else "white")
            if sure:
                panel.plot(mean, height, marker="+" if mean > 0 else "_", markersize=6, markeredgewidth=1.5,
                           color=PAPER)
            panel.plot(differences, [height + 0.27] * len(differences), marker="o", markersize=3.2, linestyle="",
                       color=colour, alpha=0.8)
        panel.set_title(titles[place], fontsize=9)
        panel.set_ylim(-0.5, len(rows) - 0.3)
    panels[0].set_yticks(range(len(rows)), list(rows)[::-1])
    figure.supxlabel(f"difference from {against}, in points (filled: better +, worse −)", fontsize=9)
    return figure


def over_seconds(panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]]) -> Figure:
    """What runs of several lengths came to: title of a panel -> kind of run -> seconds -> values of the seeds.

    Each dot is a run, a line joins the means; seconds stand on a logarithmic axis.
    """
    figure, axes = make_panels(len(panels), len(panels), 9.2 / len(panels), 3.0)
    for panel, (title, kinds) in zip(axes, panels.items(), strict=True):
        for name, runs in kinds.items():
            line, = panel.plot(list(runs), [np.mean(values) for values in runs.values()], label=name)
            panel.plot([seconds for seconds, values in runs.items() for _ in values],
                       [value for values in runs.values() for value in values], color=line.get_color(), marker="o",
                       markersize=3.5, linestyle="", alpha=0.7)
        lengths = sorted({seconds for runs in kinds.values() for seconds in runs})
        panel.set_xscale("log")
        panel.set_xticks(lengths, [f"{seconds:.0f}" for seconds in lengths])
        panel.minorticks_off()
        panel.set(title=title, xlabel="seconds, as planned (log)", ylabel="%")
        panel.grid(axis="y")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def path_of_a_number() -> Figure:
    """How a number of lesson 14 comes about: two recipes, a run of each under one seed, and their difference."""
    boxes: dict[str, Box] = {
        "base": (0, 10, 12, 5, "base recipe", None),
        "changed": (0, 0, 12, 5, "the recipe with\none change", QUERY),
        "base run": (23, 10, 13, 5, "base run", None),
        "changed run": (23, 0, 13, 5, "changed run", QUERY),
        "difference": (47, 4.5, 15, 6, "difference within\nthe seed: yₛ − bₛ", TEXT),
        "verdict": (71, 4, 18, 7, "mean ± interval:\nbetter, worse,\nor undecided", IMAGE)}
    arrows = (("base", "changed"), ("base", "base run", "train, seed s"), ("changed", "changed run", "train, seed s"),
              ("base run", "difference", "bₛ"), ("changed run", "difference", "yₛ"),
              ("difference", "verdict", "over seeds"))
    return flow(boxes, arrows)

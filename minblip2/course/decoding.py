"""What lesson 11 draws and counts: the loop of decoding, calls, nuclei, search trees, and claims that luck makes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..data.scene_captions import OPPOSITE, judge, parse
from ..data.scenes import BACKGROUNDS, SIZES, Scene, position_phrase
from ..evaluation.metrics import confidence_interval
from ..generation import top_p_filter
from .viz import (
    FORBIDDEN,
    IMAGE,
    INK,
    PAPER,
    QUERY,
    QUIET,
    TEXT,
    WRONG,
    draw_arrow,
    draw_box,
    draw_picture,
    make_panels,
)

Words = tuple[int, ...]
Candidate = tuple[float, Words]  # sum of log-probabilities, ids
POSITIONS = tuple(dict.fromkeys(position_phrase([row, column]) for row in ("top", "middle", "bottom")
                                for column in ("left", "middle", "right")))


def shares(captions: Sequence[str], truths: Sequence[Scene], key: str = "things") -> tuple[float, str, int]:
    """How many captions that make a claim of this kind are right: percent, with its 95 % interval as a text, and
    how many make one. Without any, percent is nan."""
    verdicts = [judge(caption, truth)[key] for caption, truth in zip(captions, truths, strict=True)]
    made = [verdict for verdict in verdicts if verdict is not None]
    low, high = confidence_interval(sum(made), len(made))
    share = 100 * sum(made) / len(made) if made else float("nan")
    return share, f"{share:.1f} % ({100 * low:.1f} to {100 * high:.1f})", len(made)


def marked(caption: str, truth: Scene) -> str:
    """The caption with a ✓ if it names exactly the things of the scene, else a ✗."""
    return f"{'✓' if judge(caption, truth)['things'] else '✗'} {caption}"


def by_luck(caption: str, kind: str, rng: random.Random) -> str:
    """The caption with every claim of a kind drawn anew: "positions", "background", "size" among all values there are,
    "relations" between the one that is told and its opposite."""
    pattern, values = {"positions": (r"(?:top|middle|bottom) (?:left|middle|right)|middle", POSITIONS),
                       "relations": ("left of|right of|above|below", ()),
                       "background": (rf"(?:{'|'.join(BACKGROUNDS)})(?= background)", tuple(BACKGROUNDS)),
                       "size": ("|".join(SIZES), tuple(SIZES))}[kind]
    return re.sub(rf"\b(?:{pattern})\b",
                  lambda found: rng.choice(values or (found[0], OPPOSITE[found[0]])), caption)


def judged_pairs(captions: Sequence[Sequence[str]], truths: Sequence[Scene], scores: Tensor) -> dict[str, list[bool]]:
    """Whether the right caption scores above a wrong one of the same image, for every such pair, by what is wrong.

    captions: several lists, each with one caption for each of the b images; scores (b n) of them.
    """
    kinds: dict[str, list[bool]] = {"right colours and shapes in wrong pairs": [], "something not in the image": []}
    for texts, truth, row in zip(zip(*captions, strict=True), truths, scores.tolist(), strict=True):
        score = dict(zip(texts, row, strict=True))
        right = [text for text in score if judge(text, truth)["things"]]
        there = [sorted(words) for words in zip(*((thing.colour, thing.shape) for thing in truth.things), strict=True)]
        for wrong in (text for text in score if text not in right):
            named = [sorted(map(str, words)) for words in zip(*parse(wrong).things, strict=True)]
            kinds[list(kinds)[named != there]] += [score[text] > score[wrong] for text in right]
    return kinds


def loop() -> Figure:
    """How a language model writes: what is given, one distribution, one decision, one word, and round again."""
    figure = Figure(figsize=(9.2, 2.75))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, 92), ylim=(0, 27.5))
    panel.axis("off")
    boxes = {"soft prompt (b q e)": (1, 18, 17, 5, QUERY), "text prompt (b t)": (1, 10, 17, 5, TEXT),
             "prefill": (23, 13, 11, 7, TEXT), "logits (b vocab)": (40, 13, 15, 7, TEXT),
             "decide": (61, 13, 11, 7, WRONG), "word (b)": (78, 13, 12, 7, TEXT), "step": (61, 1, 11, 6, TEXT),
             "cache: keys and values\nof all that was read": (23, 1, 24, 6, IMAGE)}
    for label, (*place, colour) in boxes.items():
        draw_box(panel, tuple(place), label, colour, weight="bold" if label == "decide" else "normal")
    for points in ([(18, 20.5), (23, 18)], [(18, 12.5), (23, 15)], [(34, 16.5), (40, 16.5)], [(55, 16.5), (61, 16.5)],
                   [(72, 16.5), (78, 16.5)], [(84, 13), (84, 4), (72, 4)], [(61, 4), (47, 4)], [(28, 13), (28, 7)],
                   [(64, 7), (64, 9.5), (51, 9.5), (51, 13)]):
        panel.plot(*zip(*points[:-1], strict=True), color=QUIET, linewidth=1, linestyle="-")
        draw_arrow(panel, points[-2], points[-1], linewidth=1,
                   arrowstyle="<|-|>" if points == [(61, 4), (47, 4)] else "-|>")
    panel.text(66.5, 22, "greedy, sampling, beam search:\nthis lesson", ha="center", va="bottom", fontsize=9,
               color=WRONG)
    panel.text(85, 9, "until ‹end›", fontsize=9, ha="left", va="center", color=QUIET)
    return figure


def _percent(share: float) -> str:
    """A probability in percent, as exact as a reader can use."""
    if share > 0.9995 or share < 1e-4:
        return "> 99.9 %" if share > 0.5 else "< 0.01 %"
    return f"{100 * share:.1f} %" if share > 0.099 else f"{100 * share:.2g} %"


def bars(panel: Axes, scores: Tensor, name: Callable[[int], str], top: int = 6) -> None:
    """The `top` likeliest words of logits (k), best on top: bars, and below half a percent only the numbers."""
    best, order = scores.softmax(dim=0).topk(top)
    seen, names = max(1, int((best > 0.005).sum())), [name(index) for index in order.tolist()]
    panel.barh(names[:seen], best[:seen], color=TEXT)
    for line, (word, share) in enumerate(zip(names, best.tolist(), strict=True)):
        text = _percent(share)
        if line < seen:
            inside = share > 0.6
            panel.text(share + (-0.02 if inside else 0.02), line, text, va="center", fontsize=8,
                       ha="right" if inside else "left", color="white" if inside else INK)
        else:
            panel.text(0.02, line, f"{word}  {text}", va="center", ha="left", fontsize=8, color=QUIET)
    panel.set(xlim=(0, 1), xlabel="probability", ylim=(top - 0.5, -0.5))


def first_words(image: object, scores: Mapping[str, Tensor], name: Callable[[int], str]) -> Figure:
    """An image, and for each title the likeliest next words of logits (k)."""
    figure, panels = make_panels(1 + len(scores), 4, 2.3, 2.7)
    draw_picture(panels[0], image)
    for panel, (title, values) in zip(panels[1:], scores.items(), strict=True):
        bars(panel, values, name)
        panel.set_title(title)
    return figure


def calls(shapes: Mapping[str, Sequence[tuple[int, int]]], queries: int) -> Figure:
    """Each call of a model as a bar: tokens computed (blue) and tokens that are only looked at (grey).

    shapes: title -> (tokens, keys) of each call; the first `queries` places are the soft prompt.
    """
    figure = Figure(figsize=(9.2, 3.3), layout="constrained")
    for panel, (title, pairs) in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes.items(),
                                       strict=True):
        for line, (tokens, keys) in enumerate(pairs):
            panel.barh(line, keys, color=FORBIDDEN, height=0.72)
            panel.barh(line, tokens, left=keys - tokens, color=TEXT, height=0.72)
        panel.axvline(queries, color=QUERY, linewidth=1.5, linestyle="--")
        panel.set_title(f"{title}: {sum(tokens for tokens, _ in pairs)} tokens computed")
        panel.set(xlabel="place in the sequence (dashed: end of the soft prompt)", ylabel="call of the model",
                  ylim=(len(pairs) - 0.4, -0.6))
    return figure


def endings(rows: Sequence[Sequence[int]], end: int, name: Callable[[int], str]) -> Figure:
    """Texts that were written together, a column for each step: the end of each in red, what fills it up on grey."""
    figure = Figure(figsize=(9.2, 0.32 * len(rows) + 0.7), layout="constrained")
    panel = figure.subplots()
    for line, ids in enumerate(rows):
        length = ids.index(end) + 1 if end in ids else len(ids)
        for place, index in enumerate(ids):
            last = place == length - 1
            panel.text(place, line, name(index), ha="center", va="center", fontsize=9,
                       color=WRONG if last else INK if place < length else "#767676",
                       weight="bold" if last else "normal")
        panel.barh(line, len(ids) - length, left=length - 0.5, color=FORBIDDEN, height=0.8)
    panel.set(xlim=(-0.7, len(rows[0]) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="step", ylabel="image",
              xticks=range(len(rows[0])), xticklabels=range(1, len(rows[0]) + 1),
              yticks=range(len(rows)), yticklabels=range(1, len(rows) + 1))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return figure


def nuclei(scores: Mapping[str, Tensor], top_p: float, name: Callable[[int], str]) -> tuple[Figure, list[int]]:
    """The twelve likeliest words of logits (k) for each title, the nucleus in blue, the sum so far; and the sizes."""
    figure, panels = make_panels(len(scores), 2, 4.55, 2.6)
    sizes = []
    for panel, (title, values) in zip(panels, scores.items(), strict=True):
        best, order = values.softmax(dim=0).topk(12)
        sizes.append(int(top_p_filter(values[None], top_p).isfinite().sum()))
        panel.bar([name(index) for index in order.tolist()], best,
                  color=[TEXT if rank < sizes[-1] else "#ABABAB" for rank in range(12)])
        panel.plot(range(12), best.cumsum(0), color=INK, marker=".", linestyle="-", linewidth=1)
        panel.axhline(top_p, color=WRONG, linewidth=1.2, linestyle="--")
        panel.set_xticks(range(12), panel.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor")
        panel.set_title(f"{title}: {sizes[-1]} kept")
        panel.set_ylim(0, 1.08)
    for panel in panels[::2]:
        panel.set_ylabel("probability; line: sum")
    return figure, sizes


def search_tree(notes: Sequence[Sequence[Candidate]], winner: Words, greedy: Sequence[Candidate], beams: int, end: int,
                name: Callable[[int], str], root: str, image: object) -> Figure:
    """A beam search: in each column the best candidates of a step with their scores, and what greedy writes below; on
    the left the image that the texts are about.

    notes: for each step its candidates, the best first; greedy: its beginnings with their scores, the shortest first.
    """
    columns = max(len(notes), len(greedy))
    width, start = min(9.4, 1.02 * columns + 2.4), -1.05  # inches; where the root stands
    figure = Figure(figsize=(width, 0.62 * (2 * beams + 1) + 0.75), layout="constrained")
    picture, panel = figure.subplots(1, 2, width_ratios=[1.25, width - 1.25])
    draw_picture(picture, image)
    picture.set_anchor("N")
    place = {(): (start, 0.0)}

    def cell(x: float, y: float, word: str, score: float, colour: str | None, bold: bool = False) -> None:
        panel.text(x, y, f"{word}\n{score:.2f}".replace("-", "−"), ha="center", va="center", fontsize=8.5,
                   color="white" if colour else QUIET, zorder=3, linespacing=1.1, weight="bold" if bold else "normal",
                   bbox=dict(boxstyle="round,pad=0.25", linewidth=0, facecolor=colour or FORBIDDEN))

    panel.text(start, 0, root, ha="center", va="center", fontsize=9, zorder=3,
               bbox=dict(facecolor=PAPER, edgecolor="none", pad=1.5))
    for length, best in enumerate(notes):
        running = [words for _, words in best if words[-1] != end][:beams] if best is not notes[-1] else []
        for rank, (score, words) in enumerate(best):
            colour = IMAGE if words[-1] == end and rank < beams else TEXT if words in running else None
            wins = words == winner[:length + 1]
            place[words] = (length, float(rank))
            panel.plot(*zip(place[words[:-1]], place[words], strict=True), color=colour or "#A0A0A0", zorder=1,
                       linewidth=3.2 if wins else 1, linestyle="-" if colour else ":")
            cell(length, rank, name(words[-1]), score, colour, wins)
    below = 2 * beams + 0.35
    panel.axhline(below - 0.62, color=QUIET, linewidth=0.8, linestyle="-")
    panel.text(start, below, "greedy", ha="center", va="center", fontsize=9, color=WRONG, weight="bold")
    for length, (score, words) in enumerate(greedy):
        cell(length, below, name(words[-1]), score, WRONG)
    panel.set(xlim=(-1.6, columns - 0.45), ylim=(below + 0.55, -0.6), xticks=range(columns), yticks=[],
              xticklabels=range(1, columns + 1), xlabel="step")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return figure

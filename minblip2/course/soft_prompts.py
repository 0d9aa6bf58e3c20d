"""What lesson 10 draws and measures: sequences with labels, and what each word costs with an image and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cycler, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from ..data.batches import Batch
from ..data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from ..data.tokenizer import Tokenizer
from ..lm.protocol import LanguageModel
from ..stage2 import Stage2
from ..training.stages import prompt_and_target
from . import figures, language
from .flow import Box, flow
from .viz import FORBIDDEN, IMAGE, INK, PAPER, QUERY, QUIET, TEXT, WRONG, draw_picture

KINDS: dict[str, Sequence[str]] = {
    "colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS), "size": tuple(SIZES),
    "place": ("top", "middle", "bottom", "left", "right", "above", "below")}  # words that tell of a scene


def stage2_flow() -> Figure:
    """Lesson 10: from image features to the loss of the words, and back."""
    boxes: dict[str, Box] = {
        "features": (0, 15, 14, 6, "image features\n(b v 1408)", IMAGE),
        "queries": (17, 15, 15, 6, "Q-Former, queries\nonly: (b q 768)", QUERY),
        "projection": (35, 15, 14, 6, "linear layer\n768 → e", QUERY),
        "prompt": (35, 7.5, 14, 5, "text prompt, as\nword vectors", TEXT),
        "text": (35, 0, 14, 5, "caption, as\nword vectors", TEXT),
        "sequence": (53, 0, 14, 21, "one sequence\n(b s e)\n\nsoft prompt\n\ntext prompt\n\ncaption", None),
        "lm": (71, 6, 12, 9, "language\nmodel\nfrozen", TEXT),
        "loss": (87, 7, 14, 7, "−ln p of each\ncaption word,\nmean", None)}
    arrows = (("features", "queries"), ("queries", "projection"), ("projection", "sequence"), ("prompt", "sequence"),
              ("text", "sequence"), ("sequence", "lm"), ("lm", "loss"))
    return flow(boxes, arrows, dotted=("lm", "features", "prompt", "text"))


def tape(tokens: Sequence[str], answers: Sequence[str], queries: int, is_real: Sequence[bool]) -> Figure:
    """A sequence as boxes: what goes in (upper row), and what is to be predicted at each position (lower row)."""
    figure = Figure(figsize=(9.2, 2.5), layout="constrained")
    panel = figure.subplots()
    for place, (token, answer, real) in enumerate(zip(tokens, answers, is_real, strict=True)):
        colour = FORBIDDEN if not real else QUERY if place < queries else PAPER
        for y, text, paint in ((1, token, colour), (0, answer, TEXT if answer else FORBIDDEN)):
            panel.add_patch(Rectangle((place, y), 1, 1, facecolor=paint, edgecolor=INK, linewidth=0.8))
            panel.text(place + 0.5, y + 0.5, text, rotation=90, ha="center", va="center", fontsize=9,
                       color="white" if answer and not y else INK)
    panel.set(xlim=(0, len(tokens)), ylim=(0, 2), xticks=[])
    panel.set_yticks([0.5, 1.5], ["predicted", "goes in"])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.legend(handles=[Patch(color=QUERY, label="soft prompt"), Patch(fc=PAPER, ec=INK, label="words"),
                           Patch(color=TEXT, label="supervised"), Patch(fc=FORBIDDEN, ec=INK, label="no label (−100)")],
                  loc="outside lower center", ncols=4)
    return figure


def short_runs(logs: Mapping[str, Sequence[Mapping]], baseline: float) -> Figure:
    """The loss per word of two runs, and a dashed line at the language model's loss without an image."""
    with rc_context({"axes.prop_cycle": cycler(color=[TEXT, QUERY], linestyle=["-", "-."])}):
        return figures.curves(logs, {"loss": "loss per word"}, 15, {"loss": baseline}, "no image:", "nats per word")


@torch.no_grad()
def per_word(model: Stage2, image_features: Tensor, texts: Sequence[str], tokenizer: Tokenizer
             ) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (b t), which of them are words (b t), and the loss of each word (b t), NaN elsewhere."""
    ids, mask = tokenizer.pad([tokenizer.encode(text) for text in texts])
    cut = prompt_and_target(Batch(image_features, ids, mask, torch.arange(len(ids))), tokenizer, "")
    loss = torch.full(cut[2].shape, torch.nan)
    logits = model(image_features, *cut).word_logits
    loss[cut[3]] = F.cross_entropy(logits, cut[2][cut[3]], reduction="none")
    return cut[2], cut[3], loss


@torch.no_grad()
def per_word_blind(lm: LanguageModel, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """The loss (b t) of each word for the language model alone, which is shown no image; NaN where there is no word."""
    losses, real, _ = language.word_losses(lm, tokenizer, [tokenizer.encode(text) for text in texts])
    return losses.masked_fill(~real, torch.nan)


@torch.no_grad()
def loss_in_order(model: Stage2, image_features: Tensor, texts: Sequence[str], tokenizer: Tokenizer,
                  order: Sequence[str]) -> float:
    """The mean loss of the texts' words after "image" (the soft prompt) and "start" (the start token) in this order."""
    start = torch.tensor([tokenizer.bos_ids]).expand(len(texts), -1)
    parts = {"image": model.soft_prompt(image_features), "start": model.lm.embed(start)}
    given = torch.cat([parts[name] for name in order], dim=1)
    return language.loss_after(model.lm, tokenizer, given, texts).item()


def kinds_of_words(ids: Tensor, real: Tensor, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Kind of word -> where it stands (b t), and where any other word does."""
    found = {name: real & torch.isin(ids, torch.tensor([tokenizer.token_ids(word)[0] for word in words]))
             for name, words in KINDS.items()}
    return found | {"any other": real & ~torch.stack(list(found.values())).any(dim=0)}


def word_bars(words: Sequence[str], losses: Mapping[str, Sequence[float]], images: Mapping[str, object]) -> Figure:
    """The loss of each word of one caption under three conditions (own, no, another image), beside the two images."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    places = figure.add_gridspec(len(images), 2, width_ratios=[1, 4.6])
    for row, (name, image) in enumerate(images.items()):
        picture = figure.add_subplot(places[row, 0])
        draw_picture(picture, image)
        picture.set_title(name, fontsize=9, weight="normal")
    panel = figure.add_subplot(places[:, 1])
    looks = ((IMAGE, ""), (FORBIDDEN, ""), (WRONG, "///"))
    for shift, ((name, values), (colour, hatch)) in enumerate(zip(losses.items(), looks, strict=True)):
        panel.bar(np.arange(len(words)) + 0.27 * (shift - 1), values, 0.25, color=colour, hatch=hatch, label=name,
                  edgecolor="white" if hatch else QUIET, linewidth=0.4)
    panel.set_xticks(range(len(words)), words, rotation=60, ha="right", rotation_mode="anchor")
    panel.set(ylabel="loss of the word, −ln p", xlabel="the caption, word by word")
    panel.set_axisbelow(True)
    panel.grid(axis="y")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def nearest_words(model: Stage2, image_features: Tensor) -> tuple[Tensor, Tensor]:
    """The word whose vector points most like each soft token, measured from the mean word: cosine, id (b q)."""
    with torch.no_grad():
        words = model.lm.embed(torch.arange(model.lm.vocab_size)).float()
        centre = words.mean(dim=0)
        soft = F.normalize(model.soft_prompt(image_features) - centre, dim=-1)
        return (soft @ F.normalize(words - centre, dim=-1).T).max(dim=-1)


def word_tile(panel: Axes, word: str, title: str) -> None:
    """A word in a box, painted in its colour if it names one."""
    paint = np.array(COLOURS.get(word, BACKGROUNDS.get(word, (252, 252, 252)))) / 255
    ink = INK if paint @ (0.3, 0.59, 0.11) > 0.45 else "white"  # as bright as an eye sees it
    panel.add_patch(Rectangle((0, 0), 1, 1, facecolor=paint, edgecolor="#AAAAAA", linewidth=0.8, clip_on=False))
    panel.text(0.5, 0.5, f"{title}\n{word}", ha="center", va="center", fontsize=9, color=ink, linespacing=1.15)
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    panel.axis("off")


def heard(images: Sequence[object], words: Sequence[Sequence[str]]) -> Figure:
    """Images, and beside each the words that its soft tokens are nearest to, in two rows."""
    figure, half = Figure(figsize=(9.2, 1.15 * len(images)), layout="constrained"), len(words[0]) // 2
    for image, some, part in zip(images, words, figure.subfigures(len(images), 1), strict=True):
        panels = part.add_gridspec(2, half + 1, width_ratios=[1.35, *[1] * half], hspace=0.02, wspace=0.02)
        draw_picture(part.add_subplot(panels[:, 0]), image)
        for query, word in enumerate(some):
            word_tile(part.add_subplot(panels[query // half, 1 + query % half]), word, f"q{query + 1}")
    return figure

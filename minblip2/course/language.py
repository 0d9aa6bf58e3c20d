"""What the lesson on the language model measures and draws: losses by place, soft prompts without a picture, labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.figure import Figure
from torch import Tensor

from .. import masks
from ..attention import KVCache
from ..data import scenes
from ..data.scenes import Scene
from ..data.tokenizer import Tokenizer
from ..evaluation.scene_scores import scene_accuracy
from ..generation import generate
from ..lm.opt import OPT
from ..lm.protocol import LanguageModel
from . import viz
from .flow import Box, flow


def decoder_figure() -> Figure:
    """The data flow of a decoder-only language model, and the place where vectors that are no words can enter."""
    boxes: dict[str, Box] = {
        "text": (0, 12, 11, 7, "text:\n“a red star”", viz.TEXT),
        "ids": (15, 12, 11, 7, "tokenizer:\nids (b t)", viz.TEXT),
        "table": (30, 12, 11, 7, "word table E", viz.TEXT), "vectors": (45, 12, 11, 7, "vectors\n(b t e)", None),
        "blocks": (60, 12, 14, 7, "+ positions,\nmasked blocks:\nstates h (b t e)", viz.TEXT),
        "logits": (78, 12, 13, 7, "word table Eᵀ:\nlogits (b t V)", viz.TEXT),
        "chances": (95, 12, 13, 7, "softmax:\nprobabilities of\nthe next word", viz.TEXT),
        "soft": (45, 1, 11, 6, "soft prompt\n(b q e)", viz.QUERY)}
    line = ["text", "ids", "table", "vectors", "blocks", "logits", "chances"]
    return flow(boxes, [*zip(line, line[1:], strict=False), ("soft", "vectors")], dotted=("table", "blocks", "logits"),
                notes=[(0, 4, "dotted: frozen in BLIP-2")], unit=0.083)


def states(model: LanguageModel, embeds: Tensor, mask: Tensor) -> Tensor:
    """States (b t e) of embeds (b t e) under a causal mask; mask (b t) is True where a token is no padding."""
    return model(embeds, masks.causal(mask), masks.token_positions(mask))


def row_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Ids of texts one after another: start, a text, end, the next text, end, ..."""
    return sum(([*tokenizer.token_ids(text), tokenizer.eos_id] for text in texts), [*tokenizer.bos_ids])


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Ids as the tokens that they stand for, one line for each text of a row."""
    return re.sub(r" (?=\[SEP\])", "\n    ", " ".join(tokenizer.backend.id_to_token(int(i)) for i in ids))


@torch.no_grad()
def word_losses(model: LanguageModel, tokenizer: Tokenizer, rows: Sequence[Sequence[int]]
                ) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each next word of rows of ids, whether it is real, and which text of its row it is in, from 1: (b t)."""
    ids, mask = tokenizer.pad(rows)
    logits = model.lm_logits(states(model, model.embed(ids), mask))
    losses = F.cross_entropy(rearrange(logits[:, :-1], "b t n -> b n t"), ids[:, 1:], reduction="none")
    return losses, mask[:, 1:], (ids[:, :-1] == tokenizer.eos_id).cumsum(dim=1)


def loss_by_place(model: OPT, tokenizer: Tokenizer, texts: Sequence[Sequence[str]], count: int) -> list[float]:
    """Mean loss of a word in the first text of a row, the second, ..., over rows of the first `count` texts of each."""
    losses, real, place = word_losses(model, tokenizer, [row_of(tokenizer, some[:count]) for some in texts])
    return [losses[real & (place == number)].mean().item() for number in range(1, count + 1)]


def loss_after(model: LanguageModel, tokenizer: Tokenizer, given: Tensor, texts: Sequence[str]) -> Tensor:
    """Mean loss of a word of each text, its end included, after vectors (b s e) of its own."""
    words, real = tokenizer.pad([[*tokenizer.token_ids(text), tokenizer.eos_id] for text in texts])
    hidden = model.teacher_forcing(given, torch.ones(given.shape[:2], dtype=torch.bool), model.embed(words), real)
    return F.cross_entropy(model.lm_logits(hidden[real]), words[real])


def prompted_loss(model: LanguageModel, tokenizer: Tokenizer, soft: Tensor, texts: Sequence[str]) -> Tensor:
    """Mean loss of a word of each text after its own soft prompt (b q e) and the start token."""
    start = model.embed(torch.tensor([tokenizer.bos_ids]).expand(len(texts), -1))
    return loss_after(model, tokenizer, torch.cat([soft, start], dim=1), texts)


@torch.no_grad()
def written(model: OPT, tokenizer: Tokenizer, contexts: Sequence[Sequence[int]], soft: Tensor | None = None,
            top_p: float | None = None, side: str = "left", seed: int = 0) -> list[str]:
    """What the model writes after ids and, before them, a soft prompt (b q e): greedily, or from the nucleus."""
    ids, mask = tokenizer.pad(contexts, side)
    embeds = model.embed(ids)
    if soft is not None:
        embeds, mask = torch.cat([soft, embeds], dim=1), F.pad(mask, (soft.shape[1], 0), value=True)
    return written_after(model, tokenizer, embeds, mask, top_p=top_p, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def written_after(lm: LanguageModel, tokenizer: Tokenizer, given: Tensor, given_mask: Tensor, **decoding) -> list[str]:
    """What a language model of either kind writes after vectors (b s e): greedily, unless `decoding` says otherwise."""
    cache = lm.new_cache()
    first, begun = lm.prefill(given, given_mask, cache)

    def step(ids: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        visible, position = rearrange(mask, "b k -> b 1 1 k"), masks.token_positions(mask)[:, -1:]
        return lm.lm_logits(lm(lm.embed(ids), visible, position, cache)[:, -1])

    ids = generate(step, lm.lm_logits(first), begun, cache, eos_id=tokenizer.eos_id,
                   decoder_start_ids=lm.decoder_start_ids, **decoding)
    return [tokenizer.decode(row) for row in ids]


def share_right(captions: Sequence[str], truths: Sequence[Scene]) -> float:
    """Share of captions that name exactly the things of their scene, as `scene_accuracy` finds."""
    return scene_accuracy(captions, truths)["things"] / 100


def lies(texts: Sequence[str], truths: Sequence[Scene]) -> list[tuple[str, str, str, str]]:
    """True colour, false colour, true text, and the text with one replaced by the other, of each scene that allows it.

    The true colour is that of the first thing and of no other; the scene has nothing of the false one.
    """
    found = []
    for text, scene in zip(texts, truths, strict=True):
        have = [thing.colour for thing in scene.things]
        if have.count(have[0]) == 1:
            false = next(colour for colour in scenes.COLOURS if colour not in have)
            found.append((have[0], false, text, re.sub(rf"\b{have[0]}\b", false, text)))
    return found


def slopes(model: OPT, ids: Tensor) -> Tensor:
    """Largest derivative of each state by each word's vector, (s k), for one row of ids (1 s)."""
    embeds = model.embed(ids).detach().clone().requires_grad_()
    hidden = states(model, embeds, torch.ones_like(ids, dtype=torch.bool))
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    rows = [torch.autograd.grad(row @ direction, embeds, retain_graph=True)[0][0] for row in hidden[0]]
    return reduce(torch.stack(rows).abs(), "s k e -> s k", "max")


def slope_figure(values: Tensor, tokens: Sequence[str]) -> Figure:
    """Derivatives (s k) on a scale of powers of ten; exact zeros are grey and say 0, a line follows the diagonal."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    panel = figure.subplots()
    drawn = panel.imshow(viz.as_array(values.log10().where(values > 0, torch.nan)), cmap="viridis")
    panel.set_facecolor(viz.FORBIDDEN)
    for row, column in (values == 0).nonzero().tolist():
        panel.text(column, row, "0", ha="center", va="center", fontsize=9, color=viz.QUIET)
    edge = [(0.5 + (step + 1) // 2, 0.5 + step // 2) for step in range(-1, 2 * len(tokens) - 2)]
    panel.plot(*zip(*edge, strict=True), color=viz.INK, linewidth=2.2)  # below it: a word and those before it
    panel.set_xticks(range(len(tokens)), tokens, rotation=90)
    panel.set_yticks(range(len(tokens)), tokens)
    panel.set(title="how much a state depends on a word", xlabel="word", ylabel="state at")
    figure.colorbar(drawn, ax=panel, shrink=0.8, label="log₁₀ of the derivative")
    return figure


def shift_figure(ids: Tensor, mask: Tensor, tokenizer: Tokenizer) -> Figure:
    """Padded rows as they are read, and below each token the next one, which it must predict."""
    figure = Figure(figsize=(8.8, 1.8 * len(ids)))
    panel = figure.add_axes((0.085, 0, 0.91, 1))
    for row in range(len(ids)):
        for place in range(ids.shape[1]):
            for line, at in ((2 * row, place), (2 * row + 1, place + 1)):
                if at == ids.shape[1]:
                    continue  # after the last token stands nothing to predict
                real = bool(mask[row, at])
                colour = viz.FORBIDDEN if not real else viz.QUERY if line % 2 else viz.TEXT
                panel.text(place, -line - 0.35 * row, tokenizer.backend.id_to_token(int(ids[row, at])), ha="center",
                           va="center", fontsize=10, color=viz.INK if line % 2 or not real else "white",
                           bbox=dict(boxstyle="round,pad=0.35", facecolor=colour, edgecolor="none"))
                if line % 2 and real:
                    panel.annotate("", (place, -line + 0.3 - 0.35 * row), (place, -line + 0.7 - 0.35 * row),
                                   arrowprops=dict(arrowstyle="->", color=viz.QUIET))
        for line, name in ((0, "reads"), (1, "predicts")):
            panel.text(-1.05, -2 * row - line - 0.35 * row, name, ha="center", va="center", color=viz.QUIET)
    panel.set(xlim=(-0.6, ids.shape[1] - 0.5), ylim=(-2.35 * len(ids) + 0.8, 0.5))
    panel.axis("off")
    return figure


def belief_figure(probabilities: Mapping[str, float]) -> Figure:
    """How likely each colour is as the next word, each bar in its colour; dashed: one in seven."""
    figure = Figure(figsize=(6.2, 2.6), layout="constrained")
    panel = figure.subplots()
    panel.bar(list(probabilities), list(probabilities.values()), edgecolor=viz.QUIET,
              color=[np.array(scenes.COLOURS[name]) / 255 for name in probabilities])
    panel.axhline(1 / 7, color=viz.INK, linewidth=1.2, linestyle=(0, (2, 2)))
    panel.set(ylabel="probability", title="a picture of a …   (dashed: one in seven)",
              ylim=(0, 1.15 * max(probabilities.values())))
    return figure

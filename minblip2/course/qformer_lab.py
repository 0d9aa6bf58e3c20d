"""Lesson 05: queries that share out patches, and races of small Q-Formers to name the one thing in a picture."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import LayerCache, MultiHeadAttention, attend
from ..data import scene_captions, scene_dataset, scenes
from ..qformer import QFormer, QFormerBlock, QFormerConfig
from ..stage1 import Stage1
from . import lesson
from .stage1_lab import Lab, fit

Module = TypeVar("Module", bound=nn.Module)
HELD_OUT = 200
OWNERS = {"self_": "shared self-attention", "cross_": "cross-attention", "query_": "queries and their feed-forward",
          "text_": "text's feed-forward", "lm_head": "LM head"}  # a part of a parameter's name -> whose it is
NAMING, FITTING = "ITG: loss per word", "ITC: right phrase first, %"


class OneThing(NamedTuple):
    """Frozen features (n v i) of scenes with one thing, which phrase names each (n), and all phrases (k t)."""

    images: Tensor
    kinds: Tensor
    phrases: Tensor
    mask: Tensor

    @property
    def blind(self) -> float:
        """Loss per word of a model that writes one of the phrases without looking."""
        return math.log(len(self.phrases)) / (self.phrases.shape[1] - 1)


def one_thing(lab: Lab) -> OneThing:
    """Training scenes that hold one thing, of a pair of colour and shape that training knows."""
    found = [(row, scenes.SEEN.index((thing.colour, thing.shape)))
             for row, truth in enumerate(scene_dataset.load_scenes(lesson.DATA, "train")) if len(truth.things) == 1
             for thing in truth.things if (thing.colour, thing.shape) in scenes.SEEN]
    rows, kinds = zip(*found, strict=True)
    return OneThing(lab.train_features[list(rows)].float(), torch.tensor(kinds),
                    *lab.encode([scene_captions.phrase(*pair) for pair in scenes.SEEN]))


def owner(name: str) -> str:
    """Which part of a Q-Former a parameter belongs to, by its name; the norm before the first block is "embeddings"."""
    return next((part for piece, part in OWNERS.items() if piece in name), "embeddings")


def ledger(model: QFormer) -> dict[str, int]:
    """How many parameters each part of a Q-Former has."""
    parts = dict.fromkeys([OWNERS["self_"], OWNERS["query_"], OWNERS["text_"], OWNERS["cross_"], "embeddings",
                           OWNERS["lm_head"]], 0)
    for name, parameter in model.named_parameters():
        parts[owner(name)] += parameter.numel()
    return parts


@torch.no_grad()
def randomised(module: Module, seed: int = 0) -> Module:
    """The module with every parameter random, biases and norms too, since zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.eval()


@torch.no_grad()
def what_runs(block: QFormerBlock, x: Tensor, num_queries: int, image: Tensor) -> dict[str, list[str]]:
    """Which sides go through each part of a block: found with hooks by the number of tokens that come out of it.

    x (b s e), whose first `num_queries` tokens are queries, of another number than words; image (b v image_width).
    """
    words, running = x.shape[1] - num_queries, {}
    sides = {num_queries: ["queries"], words: ["text"]}
    sides[x.shape[1]] = [side for count, (side,) in sides.items() if count]
    hooks = [part.register_forward_hook(lambda _, inputs, out, name=name: running.update({name: sides[out.shape[1]]}))
             for name, part in block.named_children()]
    reads = num_queries and block.cross_attention is not None
    block(x, num_queries, block.cross_attention.project(image) if reads else None, None, None)
    for hook in hooks:
        hook.remove()
    return running


class OneEach(nn.Module):
    """Self-attention in which queries and text have projections of their own, and meet in one softmax over all keys."""

    def __init__(self, of_queries: MultiHeadAttention, of_text: MultiHeadAttention):
        super().__init__()
        self.of_queries, self.of_text, self.queries = of_queries, of_text, 0

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """As `MultiHeadAttention`, of x (b s e), whose first `queries` tokens are queries."""
        sides = (self.of_queries, x[:, :self.queries]), (self.of_text, x[:, self.queries:])
        query = rearrange(torch.cat([layer.query(own) for layer, own in sides], dim=1), "b s (h d) -> b h s d",
                          h=self.of_text.heads)
        projected = [layer.project(own) for layer, own in sides]
        key, value = (torch.cat(both, dim=2) for both in zip(*projected, strict=True))
        if cache is not None:
            key, value = cache.append(key, value)
        mixed = rearrange(attend(query, key, value, mask), "b h s d -> b s (h d)")
        return torch.cat([self.of_queries.out(mixed[:, :self.queries]), self.of_text.out(mixed[:, self.queries:])], 1)


class OneEachBlock(QFormerBlock):
    """A block that tells its self-attention where the queries end."""

    def forward(self, x: Tensor, num_queries: int, image, mask, cache) -> Tensor:
        """As `QFormerBlock`."""
        self.self_attention.queries = num_queries
        return super().forward(x, num_queries, image, mask, cache)


def separate(model: Stage1) -> Stage1:
    """Give every block, in place, a second, fresh self-attention for the text."""
    for block in model.qformer.blocks:
        second = copy.deepcopy(block.self_attention).apply(model.qformer.initialise)
        block.self_attention, block.__class__ = OneEach(block.self_attention, second), OneEachBlock
    return model


def spread(queries: Tensor) -> float:
    """How far queries (b q e) stand from their common mean, as a share of their length."""
    return ((queries - queries.mean(dim=1, keepdim=True)).norm() / queries.norm()).item()


class Recall(nn.Module):
    """Four queries read patches of random numbers; then a reader for each patch asks the queries what is in it.

    Readers look at queries by attention, as words do, so nothing tells them which query is the third.
    """

    def __init__(self, patches: int, dropout: float = 0.0, numbers: int = 8, width: int = 24):
        super().__init__()
        self.former = QFormer(QFormerConfig(width=width, layers=1, heads=3, mlp_width=2 * width, num_queries=4,
                                            image_width=numbers + patches, vocab_size=2, max_positions=1,
                                            dropout=dropout, init_std=0.3))
        self.readers, self.look = nn.Embedding(patches, width), MultiHeadAttention(width, 3)
        self.tell = nn.Linear(width, numbers)

    def forward(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """What the readers tell (b v n) of content (b v n), and the states of the queries (b q e)."""
        place = torch.eye(content.shape[1]).expand(len(content), -1, -1)
        states = self.former(self.former.project_image(torch.cat([content, place], dim=2))).queries
        readers = self.readers.weight.expand(len(content), -1, -1)
        return self.tell(self.look(readers, context=self.look.project(states))), states


@torch.no_grad()
def _measure(data: OneThing, model: Stage1) -> dict[str, float]:
    """Both abilities on the images that are kept out of training."""
    images, kinds = data.images[-HELD_OUT:], data.kinds[-HELD_OUT:]
    cache, image_kv = model.qformer.new_cache(), model.image_kv(images)
    cosine = model.similarity(model.embed_image(image_kv, cache), model.embed_text(data.phrases, data.mask))
    _, logits = model.itg_loss(data.phrases[kinds], data.mask[kinds], cache)
    return {NAMING: F.cross_entropy(logits, data.phrases[kinds][:, 1:].flatten()).item(),
            FITTING: 100 * (cosine.argmax(dim=1) == kinds).float().mean().item()}


def race(data: OneThing, build: Callable[[int], Stage1], seeds: int, steps: int) -> list[list[dict[str, float]]]:
    """Train build(seed) on ITG and a little ITC, on the same batches whatever is built; a log for each seed."""
    logs = []
    for seed in range(seeds):
        model, draws, log = build(seed), torch.Generator().manual_seed(seed), []

        def loss(step: int, model=model, draws=draws, log=log) -> Tensor:
            if step and step % 15 == 0:
                log.append({"step": step, **_measure(data, model)})
            rows = torch.randint(len(data.images) - HELD_OUT, (32,), generator=draws)
            kinds = data.kinds[rows]
            cache, ids, mask = model.qformer.new_cache(), data.phrases[kinds], data.mask[kinds]
            images = model.embed_image(model.image_kv(data.images[rows]), cache)
            itc_logits = model.similarity(images, model.embed_text(ids, mask)) / model.temperature
            same = rearrange(kinds, "b -> b 1") == rearrange(kinds, "n -> 1 n")
            return model.itg_loss(ids, mask, cache)[0] + 0.3 * model.itc_loss(itc_logits, same)

        fit(model, loss, steps, rate=5e-3)
        log.append({"step": steps, **_measure(data, model)})
        logs.append(log)
    return logs


def verdicts(logs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> list[list[str]]:
    """Rows of a table: for two contestants, mean and spread over seeds, their difference, and whether it shows.

    A difference shows when it is larger than three standard errors of the paired differences.
    """
    rows = []
    for title, value, digits in (
            (f"{NAMING}, mean over the run", lambda log: statistics.mean(one[NAMING] for one in log), 2),
            (f"{FITTING}, at the end", lambda log: log[-1][FITTING], 1)):
        one, other = ([value(log) for log in runs] for runs in logs.values())
        gains = [b - a for a, b in zip(one, other, strict=True)]
        least = 3 * statistics.stdev(gains) / len(gains) ** 0.5
        rows.append([title, *(f"{statistics.mean(run):.{digits}f} ± {statistics.stdev(run):.{digits}f}"
                              for run in (one, other)), f"{statistics.mean(gains):+.{digits}f}", f"{least:.{digits}f}",
                     "yes" if abs(statistics.mean(gains)) > least else "no"])
    return rows

"""Answers to the exercises of lesson 12."""

import math

import torch
import torch.nn.functional as F

from minblip2.lm.t5 import RelativePositionBias, T5Config
from minblip2.stage2 import split_prefix

from . import Answers

# --- 12.1 -------------------------------------------------------------------------------------------------------------


def by_module(ahead, bidirectional, groups, max_distance):
    bias = RelativePositionBias(T5Config(buckets=groups, max_distance=max_distance, heads=1), bidirectional)
    return bias.bucket(torch.tensor(ahead)).item()


def by_edges(ahead, bidirectional, groups, max_distance):
    side = groups // 2 if bidirectional else groups
    exact, distance = side // 2, abs(ahead) if bidirectional else -min(0, ahead)
    edges = [exact * (max_distance / exact) ** (step / (side - exact)) for step in range(side - exact)]
    found = distance if distance < exact else exact - 1 + sum(distance >= edge for edge in edges)
    return found + side * (bidirectional and ahead > 0)


def grouped(rounding=int, most=-1, halved=True, far=None, of=lambda ahead, both: ahead):
    """The rule with a slip."""
    def group_of(ahead, bidirectional, groups, max_distance):
        ahead = of(ahead, bidirectional)
        side = groups // 2 if bidirectional and halved else groups
        distance, exact = abs(ahead) if bidirectional else max(0, -ahead), side // 2
        if distance >= exact:
            share = far(distance, exact,
                        max_distance) if far else math.log(distance / exact) / math.log(max_distance / exact)
            distance = min(exact + rounding(share * (side - exact)), side + most)
        return distance + (side if bidirectional and ahead > 0 else 0)
    return group_of


# --- 12.2 -------------------------------------------------------------------------------------------------------------


def teach_by_loop(text_ids, text_mask, start):
    rows = [[(start if t == 0 else row[t - 1], row[t] if real[t] else -100) for t in range(len(row))]
            for row, real in zip(text_ids.tolist(), text_mask.tolist(), strict=True)]
    return tuple(torch.tensor(rows).unbind(dim=2))


def teach_by_roll(text_ids, text_mask, start):
    inputs = text_ids.roll(1, dims=1)
    inputs[:, 0] = start
    return [inputs, torch.where(text_mask, text_ids, -100)]


def taught(inputs=lambda ids, mask, start: F.pad(ids[:, :-1], (1, 0), value=start),
           labels=lambda ids, mask, start: ids.masked_fill(~mask, -100)):
    """Inputs and labels with a slip."""
    return lambda *given: (inputs(*given), labels(*given))


def without_end(ids, mask, start):
    return ids.masked_fill(~F.pad(mask[:, 1:], (0, 1), value=False), -100)


def changing(text_ids, text_mask, start):
    text_ids[~text_mask] = -100
    return F.pad(text_ids[:, :-1], (1, 0), value=start).clamp(min=0), text_ids


# --- 12.3 -------------------------------------------------------------------------------------------------------------


def by_split_prefix(words, end, draw):
    """The module's, with a draw that is given."""
    ids, mask = torch.tensor([[*words, end]]), torch.ones(1, len(words) + 1, dtype=torch.bool)
    drawn, torch.rand = torch.rand, lambda *shape, **how: torch.full((1, 1), draw, dtype=torch.float64)
    try:
        prefix, given, rest, real = split_prefix(ids, mask, end)
    finally:
        torch.rand = drawn
    return prefix[given].tolist(), rest[real].tolist()


def by_choice(words, end, draw):
    if len(words) == 1:
        return [end], [*words, end]
    pairs = [(words[:place] + [end], words[place:] + [end]) for place in range(1, len(words) // 2 + 1)]
    return pairs[int(draw * len(pairs))]


def at(place, give=lambda words, p, end: ([*words[:p], end], [*words[p:], end])):
    """A cut at another place, or with other pieces."""
    return lambda words, end, draw: give(words, place(len(words), draw), end)


def right_place(n, draw):
    return min(1 + int(draw * (n // 2)), n // 2)


def popping(words, end, draw):
    rest = [words.pop() for _ in range(len(words) - right_place(len(words), draw))]
    return [*words, end], [*rest[::-1], end]


# --- 12.4 -------------------------------------------------------------------------------------------------------------


def by_ones(soft, words, text_mask):
    attention_mask = torch.cat([torch.ones(soft.shape[:2], dtype=torch.bool), text_mask], dim=1)
    return torch.cat([soft, words], dim=1), attention_mask, (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def by_counting(soft, words, text_mask):
    places = torch.zeros(len(soft), soft.shape[1] + words.shape[1], dtype=torch.long)
    attention_mask = F.pad(text_mask, (soft.shape[1], 0), value=True)
    for row in range(len(places)):
        places[row, attention_mask[row]] = torch.arange(int(attention_mask[row].sum())) + 7
    return [torch.cat([soft, words], dim=1), attention_mask, places]


def encoded(attention_mask=None, places=None, embeds=None):
    """What the encoder gets, with a slip in one of the three."""
    def input_of(soft, words, text_mask):
        right = by_ones(soft, words, text_mask)
        return tuple(make(soft, words, text_mask) if make else one
                     for make, one in zip((embeds, attention_mask, places), right, strict=True))
    return input_of


ANSWERS = {
    "group": Answers(
        [grouped(), by_module, by_edges],
        [(grouped(of=lambda ahead, both: -ahead), "sides are exchanged"),
         (grouped(of=lambda ahead, both: -abs(ahead)), "two sides apart"),
         (grouped(of=lambda ahead, both: ahead if both else -abs(ahead)), "looks back only"),
         (grouped(halved=False), "are numbered"),
         (grouped(far=lambda d, exact, max_distance: (d - exact) / (max_distance - exact)), "equally wide"),
         (grouped(rounding=round), "are rounded"), (grouped(rounding=math.ceil), ""),
         (grouped(most=9999), "last one of its side"), (grouped(most=0), ""),
         (grouped(most=-2), "last group is left out"),
         (grouped(far=lambda d, exact, max_distance: math.log(d) / math.log(max_distance)), ""),
         (lambda *given: float(by_edges(*given)), "whole numbers")]),
    "teach": Answers(
        [taught(), teach_by_loop, teach_by_roll],
        [(taught(inputs=lambda ids, mask, start: ids), "the very word"),
         (taught(inputs=lambda ids, mask, start: ids.roll(1, dims=1)), "in a circle"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids[:, 1:], (0, 1), value=start)), "start token"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids[:, 1:], (1, 0), value=start)), "the word before it"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids, (1, 0), value=start)), "asked for is"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids.masked_fill(~mask, -100)[:, :-1], (1, 0), value=start)),
          "no such word"),
         (taught(labels=lambda ids, mask, start: ids), "padding stays in the labels"),
         (taught(labels=lambda ids, mask, start: F.pad(ids.masked_fill(~mask, -100)[:, 1:], (0, 1), value=-100)),
          "word after next"),
         (taught(labels=lambda ids, mask, start: F.pad(ids[:, :-1], (1, 0), value=start)), "copies"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(ids == start, -100)), "has the id of padding"),
         (taught(labels=without_end), "never learned"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(~mask, -1)), "does the loss ignore"),
         (changing, "changed what it was given")]),
    "cut": Answers(
        [by_choice, by_split_prefix, at(right_place)],
        [(at(lambda n, draw: int(draw * (n // 2 + 1))), "but an end"),
         (at(lambda n, draw: 1 + int(draw * (n - 1))), ""), (at(lambda n, draw: 1 + round(draw * (n // 2))), ""),
         (at(lambda n, draw: 1 + int(draw * n)), ""),
         (at(lambda n, draw: max(min(1, n // 2), int(draw * n / 2))), "equally likely"),
         (at(lambda n, draw: max(min(1, n // 2), round(draw * (n // 2)))), "equally likely"),
         (at(lambda n, draw: 1 + int(draw * (n // 2))), "one word cannot be cut"),
         (at(right_place, lambda words, p, end: (words[:p], [*words[p:], end])), "encoder is given is not closed"),
         (at(right_place, lambda words, p, end: ([*words[:p], end], words[p:])), "learn to stop"),
         (at(right_place, lambda words, p, end: ([*words[:p], end], [*words, end])), "words come twice"),
         (at(right_place, lambda words, p, end: ([*words[:p], end], [*words[p + 1:], end])), "words are lost"),
         (at(right_place, lambda words, p, end: ([*words[p:], end], [*words[:p], end])), "exchanged"),
         (at(lambda n, draw: min(1, n // 2)), "are never made"), (popping, "changed the list")]),
    "encoder_input": Answers(
        [by_ones, by_counting, encoded()],
        [(encoded(attention_mask=lambda soft, words, mask: F.pad(mask, (soft.shape[1], 0))),
          "all pictures would get one"),
         (encoded(attention_mask=lambda soft, words, mask: mask), "asked for is (b s)"),
         (encoded(attention_mask=lambda soft, words, mask: F.pad(mask, (0, soft.shape[1]), value=True)), ""),
         (encoded(attention_mask=lambda soft, words,
                  mask: torch.ones(len(soft), soft.shape[1] + words.shape[1]).bool()),
          "padding may be seen"),
         (encoded(attention_mask=lambda soft, words, mask: F.pad(~mask, (soft.shape[1], 0), value=True)), "exchanged"),
         (encoded(attention_mask=lambda soft, words, mask: F.pad(mask, (soft.shape[1], 0), value=True).long()),
          "int64"),
         (encoded(embeds=lambda soft, words, mask: torch.cat([words, soft], dim=1)), "before the picture"),
         (encoded(embeds=lambda soft, words, mask: torch.cat([soft.detach(), words], dim=1)), "no gradient reaches"),
         (encoded(places=lambda soft, words, mask: torch.arange(
             soft.shape[1] + words.shape[1]).expand(len(soft), -1)), "counted as distance"),
         (encoded(places=lambda soft, words, mask: torch.cat([torch.arange(soft.shape[1]).expand(len(soft), -1),
                                                              mask.long().cumsum(dim=1) - 1], dim=1)), "same places"),
         (encoded(places=lambda soft, words, mask: F.pad(mask, (soft.shape[1], 0)).long().cumsum(dim=1)),
          "stands one further")]),
}

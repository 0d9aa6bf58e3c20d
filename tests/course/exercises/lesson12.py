"""Answers to the exercises of lesson 12."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from minblip2.lm.t5 import RelativePositionBias, T5Config
from minblip2.stage2 import split_prefix

from . import Answers

# --- 12.1 -------------------------------------------------------------------------------------------------------------


def by_module(ahead, bidirectional, buckets, max_distance):
    bias = RelativePositionBias(T5Config(buckets=buckets, max_distance=max_distance, heads=1), bidirectional)
    return bias.bucket(torch.tensor(ahead)).item()


def by_edges(ahead, bidirectional, buckets, max_distance):
    side = buckets // 2 if bidirectional else buckets
    exact, distance = side // 2, abs(ahead) if bidirectional else -min(0, ahead)
    edges = [exact * (max_distance / exact) ** (step / (side - exact)) for step in range(side - exact)]
    found = distance if distance < exact else exact - 1 + sum(distance >= edge for edge in edges)
    return found + side * (bidirectional and ahead > 0)


def bucketed(rounding=int, most=-1, halved=True, far=None, of=lambda ahead, both: ahead):
    """The rule with a slip."""
    def bucket_of(ahead, bidirectional, buckets, max_distance):
        ahead = of(ahead, bidirectional)
        side = buckets // 2 if bidirectional and halved else buckets
        distance, exact = abs(ahead) if bidirectional else max(0, -ahead), side // 2
        if distance >= exact:
            share = far(distance, exact,
                        max_distance) if far else math.log(distance / exact) / math.log(max_distance / exact)
            distance = min(exact + rounding(share * (side - exact)), side + most)
        return distance + (side if bidirectional and ahead > 0 else 0)
    return bucket_of


# --- 12.2 -------------------------------------------------------------------------------------------------------------


def teach_by_loop(text_ids, text_mask, start):
    rows = [[(start if t == 0 else row[t - 1], row[t] if real[t] else -100) for t in range(len(row))]
            for row, real in zip(text_ids.tolist(), text_mask.tolist(), strict=True)]
    return tuple(torch.tensor(rows).unbind(dim=2))


def teach_by_roll(text_ids, text_mask, start):
    inputs = text_ids.roll(1, dims=1)
    inputs[:, 0] = start
    return [inputs, torch.where(text_mask, text_ids, -100)]


def teach_by_places(text_ids, text_mask, start):
    """What is read at padding is anything."""
    inputs, labels = torch.full_like(text_ids, 3), torch.full_like(text_ids, -100)
    inputs[:, 0] = start
    for row, length in enumerate(text_mask.sum(dim=1).tolist()):
        inputs[row, 1:length], labels[row, :length] = text_ids[row, :length - 1], text_ids[row, :length]
    return inputs, labels


def by_name(ids, mask, start):
    """The mistake to look up by its id what stands before a word."""
    rows = []
    for row in ids.tolist():
        before = dict(reversed(list(zip(row, [start, *row], strict=False))))
        rows.append([before[one] for one in row])
    return torch.tensor(rows)


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


def by_word(words, end, draw):
    """The mistake to look for the place of a word, which may stand there twice."""
    place = words.index(words[right_place(len(words), draw)]) if len(words) > 1 else 0
    return [*words[:place], end], [*words[place:], end]


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


def by_padding(soft, words, text_mask):
    """Padding stands on the left, so it is taken off the places of the words."""
    b, q, t = *soft.shape[:2], words.shape[1]
    padding = (~text_mask).sum(dim=1, keepdim=True)
    places = torch.cat([torch.arange(q).expand(b, -1), torch.arange(q, q + t) - padding], dim=1)
    return torch.cat([soft, words], dim=1), torch.cat([torch.ones(b, q).bool(), text_mask], dim=1), places


def by_padding_in_front(soft, words, text_mask):
    """Or the soft prompt is moved up to the words; in 32 bits."""
    b, q, t = *soft.shape[:2], words.shape[1]
    padding = (~text_mask).sum(dim=1, keepdim=True)
    places = torch.cat([torch.arange(q) + padding, torch.arange(q, q + t).expand(b, -1)], dim=1).int()
    return torch.hstack([soft, words]), F.pad(text_mask.long(), (q, 0), value=1) == 1, places


def padding_of_the_first(soft, words, text_mask):
    """The mistake to take the padding of one text for that of all."""
    places = by_padding(soft, words, text_mask[:1].expand(len(text_mask), -1))[2]
    return *by_padding(soft, words, text_mask)[:2], places


def encoded(attention_mask=None, places=None, embeds=None):
    """What the encoder gets, with a slip in one of the three."""
    def input_of(soft, words, text_mask):
        right = by_ones(soft, words, text_mask)
        return tuple(make(soft, words, text_mask) if make else one
                     for make, one in zip((embeds, attention_mask, places), right, strict=True))
    return input_of


ANSWERS = {
    "bucket": Answers(
        [bucketed(), by_module, by_edges, lambda *given: np.int64(bucketed()(*given)),
         lambda *given: torch.tensor(by_edges(*given))],
        [(bucketed(of=lambda ahead, both: -ahead), "sides are exchanged"),
         (bucketed(of=lambda ahead, both: -abs(ahead)), "two sides apart"),
         (bucketed(of=lambda ahead, both: ahead if both else -abs(ahead)), "looks back only"),
         (bucketed(halved=False), "are numbered"),
         (bucketed(far=lambda d, exact, max_distance: (d - exact) / (max_distance - exact)), "equally wide"),
         (bucketed(rounding=round), "are rounded"), (bucketed(rounding=math.ceil), "rounded up"),
         (bucketed(most=9999), "last one of its side"), (bucketed(most=0), ""),
         (bucketed(most=-2), "last bucket is left out"),
         (bucketed(far=lambda d, exact, max_distance: math.log(d) / math.log(max_distance)), "both are to be divided"),
         (bucketed(far=lambda d, exact, max_distance: math.log2(d / exact) / 4), ""),
         (lambda *given: str(by_edges(*given)), "whole"),
         (lambda ahead, both, buckets, max_distance: bucketed()(ahead, both, 32, max_distance), ""),
         (lambda ahead, both, buckets, max_distance: bucketed()(ahead, both, buckets, 128), ""),
         (lambda ahead, both, buckets, max_distance: bucketed()(ahead, True, buckets, max_distance), "takes no part"),
         (lambda ahead, both, buckets,
          max_distance: bucketed()(max(-max_distance + 1, min(max_distance - 1, ahead)), both, buckets,
                                  max_distance) - (-ahead >= max_distance), "last bucket"),
         (lambda *given: float(by_edges(*given)), "whole numbers")]),
    "teach": Answers(
        [taught(), teach_by_loop, teach_by_roll, teach_by_places],
        [(taught(inputs=lambda ids, mask, start: ids), "the very word"),
         (taught(inputs=lambda ids, mask, start: ids.roll(1, dims=1)), "in a circle"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids[:, 1:], (0, 1), value=start)), "shifted the other way"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids[:, 1:], (1, 0), value=start)), "the word before it"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids, (1, 0), value=start)), "it should be"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids.masked_fill(~mask, -100)[:, :-1], (1, 0), value=start)),
          "no such word"),
         (taught(labels=lambda ids, mask, start: ids), "padding stays in the labels"),
         (taught(labels=lambda ids, mask, start: F.pad(ids.masked_fill(~mask, -100)[:, 1:], (0, 1), value=-100)),
          "word after next"),
         (taught(labels=lambda ids, mask, start: F.pad(ids[:, :-1], (1, 0), value=start)), "copies"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(ids == start, -100)), "recognised by its id"),
         (taught(labels=without_end), "never learned"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(~mask, -1)), "does the loss ignore"),
         (changing, "changed what it was given"), (taught(inputs=by_name), "the word before it"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(~mask | (ids == start), -100)), "id of padding"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(~mask | (ids == 0), -100)), "id is 0"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(~mask | (ids == 1), -100)), "never learned"),
         (taught(inputs=lambda ids, mask, start: F.pad(ids[:, :-1], (1, 0), value=0)), "the start token"),
         (taught(labels=lambda ids, mask, start: ids.masked_fill(~F.pad(mask[:, :-1], (1, 0), value=True), -100)),
          "the mask is shifted"), (lambda *given: [part.int() for part in taught()(*given)], "int"),
         (lambda *given: taught()(*given)[1], "two tensors")]),
    "cut": Answers(
        [by_choice, by_split_prefix, at(right_place), lambda *given: [tuple(part) for part in by_choice(*given)],
         lambda *given: [[np.int64(one) for one in part] for part in by_choice(*given)],
         at(lambda n, draw: n // 2 - int(draw * (n // 2)) if n > 1 else 0)],
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
         (at(lambda n, draw: min(1, n // 2)), "are never made"), (popping, "changed the list"),
         (at(lambda n, draw: random.randint(1, n // 2) if n > 1 else 0), ""), (by_word, ""),
         (lambda words, end, draw: at(right_place)(list(dict.fromkeys(words)), end, draw), "lost"),
         (lambda words, end, draw: at(right_place)([word for word in words if word], end, draw), ""),
         (at(lambda n, draw: 1 + int(draw * 3) if n > 1 else 0), ""), (lambda *given: str(given), "two lists"),
         (lambda *given: [list(map(float, part)) for part in by_choice(*given)], "whole numbers"),
         (lambda *given: [list(map(str, part)) for part in by_choice(*given)], "whole numbers")]),
    "encoder_input": Answers(
        [by_ones, by_counting, encoded(), by_padding, by_padding_in_front],
        [(encoded(attention_mask=lambda soft, words, mask: F.pad(mask, (soft.shape[1], 0))),
          "all pictures would get the same caption"),
         (encoded(attention_mask=lambda soft, words, mask: mask), "it should be (b s)"),
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
          "stands one further"),
         (padding_of_the_first, "further than the real token before it"),
         (encoded(embeds=lambda soft, words, mask: torch.cat([(soft + soft.detach()) / 2, words], dim=1)), "part of"),
         (encoded(embeds=lambda soft, words, mask: torch.cat([torch.cat([soft[:, :1].detach(), soft[:, 1:]], 1), words],
                                                             dim=1)), "part of the gradient"),
         (encoded(places=lambda soft, words, mask: F.pad(mask.long(), (soft.shape[1], 0), value=1).cumsum(1).float()),
          "whole numbers"),
         (encoded(attention_mask=lambda soft, words,
                  mask: F.pad(torch.ones_like(mask), (soft.shape[1], 0), value=True)),
          "padding may be seen"),
         (encoded(attention_mask=lambda soft, words, mask: F.pad(mask, (4, 0), value=True)), "")]),
}

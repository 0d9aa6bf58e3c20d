"""Checks of lesson 12: a distance's bucket, what a decoder reads and learns, the cut, and what the encoder is given."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor
from .slips import name_slip, slopes, telling, whole

# --- the bucket of a distance -----------------------------------------------------------------------------------------

Bucket = Callable[[int, bool, int, int], int]


def far_place(distance: int, buckets: int, max_distance: int) -> float:
    """Where a far distance lies among the buckets of one side, by its logarithm."""
    exact = buckets // 2
    return exact + math.log(max(1, distance) / exact) / math.log(max_distance / exact) * (buckets - exact)


def slow_bucket(ahead: int, bidirectional: bool, buckets: int, max_distance: int,
                rounding: Callable[[float], int] = math.floor, most: int = -1, linear: bool = False) -> int:
    """The bucket of a distance; what is given by name is a slip."""
    side = buckets // 2 if bidirectional else buckets
    distance = abs(ahead) if bidirectional else max(0, -ahead)
    far = far_place(distance, side, max_distance)
    if linear:
        far = side // 2 + (distance - side // 2) / (max_distance - side // 2) * (side - side // 2)
    bucket = distance if distance < side // 2 else min(rounding(far), side + most)
    return bucket + side * (bidirectional and ahead > 0)


BY_HAND = (0, 1, 2, 3, 5, 10, 40, 500)  # how far before the query, for 8 buckets on one side and `max_distance` 64


def on_paper(buckets_of: Callable[[], list[int]]) -> None:
    """Say which of the eight buckets that were worked out by hand are right."""
    try:
        output = buckets_of()
    except NotImplementedError:
        print("○ on paper: nothing yet")
        return
    if not isinstance(output, list | tuple) or len(output) != len(BY_HAND):
        print(f"✗ on paper: {output!r}; the exercise asks for {len(BY_HAND)} buckets")
        return
    wrong = [far for far, one in zip(BY_HAND, output, strict=True) if one != slow_bucket(-far, False, 8, 64)]
    print(f"{'✗' if wrong else '✓'} on paper: {len(BY_HAND) - len(wrong)} of {len(BY_HAND)}"
          + (f"; think again of {', '.join(map(str, wrong))}" if wrong else ""))


BUCKET_SLIPS: dict[str, Bucket] = {
    "the sides are exchanged: `ahead` is positive where the key stands after the query.":
        lambda ahead, *rest: slow_bucket(-ahead, *rest),
    "without `bidirectional` one looks back only: what stands ahead counts as distance 0, like the token itself.":
        lambda ahead, both, buckets, far: slow_bucket(ahead if both else -abs(ahead), both, buckets, far),
    "you do not tell the two sides apart: half of the buckets are for keys after the query.":
        lambda ahead, both, buckets, far: slow_bucket(-abs(ahead), both, buckets, far),
    "the buckets are not halved where both sides have to share them.":
        lambda ahead, both, buckets, far: slow_bucket(-abs(ahead), False, buckets, far) + buckets * (ahead > 0) if both
        else slow_bucket(ahead, both, buckets, far),
    "without `bidirectional` all buckets are for the one side that is looked at.":
        lambda ahead, both, buckets, far: slow_bucket(ahead if both else min(0, ahead), True, buckets, far),
    "`bidirectional` takes no part: without it, all buckets are for keys before the query.":
        lambda ahead, both, buckets, far: slow_bucket(ahead, True, buckets, far),
    "far buckets are equally wide in your function; they are to grow, in equal steps of the logarithm.":
        lambda *given: slow_bucket(*given, linear=True),
    "the places among the far buckets are rounded; a distance belongs to the last bucket that has begun.":
        lambda *given: slow_bucket(*given, rounding=round),
    "the places among the far buckets are rounded up; a distance belongs to the last bucket that has begun.":
        lambda *given: slow_bucket(*given, rounding=math.ceil),
    "on a side the logarithm of the distance is compared with that of `max_distance` alone: the far half begins where "
    "single steps end, so both are to be divided by that distance.": lambda ahead, both, buckets, far: min(
        (buckets // 2 if both else buckets) - 1, near_or(ahead, both, buckets, lambda distance, side: side // 2 + int(
            math.log(distance) / math.log(far) * (side - side // 2)))) + (buckets // 2) * (both and ahead > 0),
    "the last bucket is left out: a side with n buckets has the numbers 0 to n − 1.":
        lambda *given: slow_bucket(*given, most=-2),
    "the distance 0 is not ahead of anything: which side does the token itself belong to?":
        lambda ahead, both, buckets, far: slow_bucket(ahead, both, buckets, far) + buckets // 2 * (both and ahead == 0),
}


def near_or(ahead: int, both: bool, buckets: int, far: Callable[[int, int], int]) -> int:
    """The distance where it is near, and what a rule makes of it where it is far."""
    side, distance = buckets // 2 if both else buckets, abs(ahead) if both else max(0, -ahead)
    return distance if distance < side // 2 else far(distance, side)


def clear_places(bidirectional: bool, buckets: int, max_distance: int) -> list[int]:
    """How far ahead keys stand, without those whose bucket rounding could decide."""
    side = buckets // 2 if bidirectional else buckets
    places = [*range(-20, 21), *random.sample(range(-250, 250), 40), -max_distance, max_distance, 1 - max_distance,
              max_distance - 1, -900, 900]
    clear = []
    for ahead in places:
        place = far_place(abs(ahead), side, max_distance)
        exactly = abs(ahead) in (side // 2, max_distance)  # there the logarithms are 0 and 1
        if abs(ahead) < side // 2 or exactly or abs(place - round(place)) > 1e-4:
            clear.append(ahead)
    return clear


@exercise("12.1", "lesson 12, section 2, 'Distances instead of positions'")
def bucket(bucket_of: Bucket) -> None:
    """Near distances one by one, far ones in buckets that grow."""
    drawn = (random.choice((True, False)), random.choice((8, 12, 20)), random.randint(40, 90))
    draws, answers = [], []
    for rule in ((True, 32, 128), (False, 32, 128), (True, 16, 50), (False, 8, 64), drawn):
        at = f"with {rule[1]} buckets for {'both sides' if rule[0] else 'one side'} and max_distance {rule[2]}: "
        for ahead in clear_places(*rule):
            found = whole(bucket_of(ahead, *rule), f"{at}the bucket of {ahead}")
            beyond = (", and what is farther than `max_distance` shares the last one of its side"
                      if abs(ahead) >= rule[2] else "; how many of them are for each side?" if rule[0] else "")
            expect(0 <= found < rule[1], f"{at}{ahead} gets the bucket {found}; they are numbered 0 to "
                   f"{rule[1] - 1}{beyond}.".replace("?.", "?"))
            draws.append((ahead, *rule))
            answers.append(found)
    right = [slow_bucket(*draw) for draw in draws]
    if answers == right:
        return
    (ahead, bidirectional, buckets, max_distance), found = next(
        (draw, one) for draw, one, truth in zip(draws, answers, right, strict=True) if one != truth)
    at = (f"with {buckets} buckets for {'both sides' if bidirectional else 'one side'} and max_distance {max_distance}"
          f", {ahead} gets the bucket {found}: ")
    name_slip({at + meaning: slip for meaning, slip in BUCKET_SLIPS.items()}, draws, answers, right)
    side = buckets // 2 if bidirectional else buckets
    distance = abs(ahead) if bidirectional else max(0, -ahead)
    expect(distance >= side // 2, f"{at}half of the buckets of a side are for single steps, beginning with the "
           "distance 0. At which distance does this key count?")
    expect(distance < max_distance,
           f"{at}what stands as far as `max_distance`, or farther, is in the last bucket of its side.")
    expect(False, f"{at}a side's far half of buckets begins where single steps end, and reaches `max_distance` in "
           "equal steps of the logarithm. How far, as a share of this way, has the distance come?")


# --- what the decoder reads and learns --------------------------------------------------------------------------------


def read_before(ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """Inputs (b t): the start, and then all but the last."""
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def said_there(ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """Labels (b t)."""
    return ids.masked_fill(~mask, -100)


def later(labels: Tensor, last: int = -100) -> Tensor:
    """One place further to the left."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], last)], dim=1)


READ_SLIPS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "inputs are the texts themselves: at each place the decoder reads the very word that it is to say.":
        lambda ids, mask, start: ids,
    "the last word has come round to the front: roll shifts in a circle.":
        lambda ids, mask, start: ids.roll(1, dims=1),
    "inputs are shifted the other way: the decoder reads the word after the one that it is to say.":
        lambda ids, mask, start: later(ids, start),
    "after the start the first word is left out: each place is to hold the word before it.": lambda ids, mask, start:
        torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], dim=1),
}
TOLD_SLIPS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "padding stays in the labels: then the model learns to say it.": lambda ids, mask, start: ids,
    "both are shifted, so the model would learn to say the word after next.":
        lambda ids, mask, start: later(said_there(ids, mask, start)),
    "both are shifted, so the model would learn to say the word after next, and at the end the start token.":
        lambda ids, mask, start: later(ids, start),
    "labels are what is read at the same place: a model that copies would be perfect.": read_before,
    "labels are what is read at the same place: a model that copies would be perfect, and padding is ignored.":
        lambda ids, mask, start: read_before(ids, mask, start).masked_fill(~mask, -100),
    "a real token that has the id of padding is ignored as well: the mask tells padding, the id need not.":
        lambda ids, mask, start: said_there(ids, mask & (ids != start), start),
    "padding is recognised by its id, and where it has another one it is learned: the mask tells padding, the id need "
    "not.":
        lambda ids, mask, start: said_there(ids, ids != start, start),
    "a real token whose id is 0 is ignored as well: the mask tells padding, the id need not.":
        lambda ids, mask, start: said_there(ids, mask & (ids != 0), start),
    "the last word of a text is never learned; it is its end, and it must be, too.":
        lambda ids, mask, start: said_there(ids, later(mask.long(), 0).bool(), start),
    "where padding begins, it is learned once: the mask is shifted, and the labels are not.": lambda ids, mask, start:
        said_there(ids, torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1), start),
}


@exercise("12.2", "lesson 12, section 3")
def teach(teach_of: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Inputs one step behind the labels, and labels that ignore padding."""
    def make() -> list[tuple[Tensor, Tensor, int]]:
        """Texts in which words come twice, and in which the ids of the start, of padding and 0 are words."""
        drawn = []
        for b, t, other in ((3, 8, False), (1, 4, False), (4, 9, True), (2, 1, False), (3, 6, True)):
            start = random.randint(1, 9) if t != 4 else 0
            lengths = [t, *random.choices(range(1, t + 1), k=b - 1)]
            lengths[-1] = min(lengths[-1], max(1, t - 2)) if b > 1 else t
            mask = torch.arange(t) < torch.tensor(lengths)[:, None]
            ids = torch.randint(10, 16, (b, t))
            if t > 3:
                ids[0, 1:4] = torch.tensor([start, 0, int(ids[0, 1])])[torch.randperm(3)]
            ids[torch.arange(b), torch.tensor(lengths) - 1] = 1 if start != 1 else 16
            ids[:, 0] = torch.randperm(20)[:b] + 40
            drawn.append((ids.masked_fill(~mask, 17 if other else start), mask, start))
        return drawn

    draws = telling(make, said_there, TOLD_SLIPS)
    read, learned = [], []
    for ids, mask, start in draws:
        b, t = ids.shape
        given = ids.clone(), mask.clone()
        output = teach_of(ids, mask, start)
        expect(torch.equal(ids, given[0]) and torch.equal(mask, given[1]), "your function changed what it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 2,
               f"your function gives {type(output).__name__}; the exercise asks for two tensors, inputs and labels.")
        inputs, labels = (expect_tensor(part, (b, t), f"with ids (b t) = {(b, t)}: {what}", kind=torch.long)
                          for part, what in zip(output, ("inputs", "labels"), strict=True))
        expect(not bool((inputs < 0).any()), "the decoder is to read −100: there is no such word. The number is for "
               "the loss only.")
        read.append(torch.where(mask, inputs, 0))  # what is read at padding does not matter
        learned.append(labels)
    right = [torch.where(mask, read_before(ids, mask, start), 0) for ids, mask, start in draws]
    if not all(map(torch.equal, read, right)):
        name_slip({meaning: lambda ids, mask, start, slip=slip: torch.where(mask, slip(ids, mask, start), 0)
                   for meaning, slip in READ_SLIPS.items()}, draws, read, right)
        for (ids, mask, start), inputs in zip(draws, read, strict=True):
            expect(bool((inputs[:, 0] == start).all()), f"the decoder begins with {inputs[:, 0].tolist()}, and the "
                   f"start token is {start}.")
            for said, real, length in zip(inputs, ids, mask.sum(dim=1).tolist(), strict=True):
                said, real = said[:length].tolist(), real[:length].tolist()
                expect(said == [start, *real[:-1]], f"of the text {real} the decoder reads {said}: after the start, "
                       "each place is to hold the word before it.")
    right = [said_there(*draw) for draw in draws]
    if all(map(torch.equal, learned, right)):
        return
    name_slip(TOLD_SLIPS, draws, learned, right)
    for (ids, mask, _), labels in zip(draws, learned, strict=True):
        lost = mask & (labels == -100)
        expect(not bool(lost.any()), f"real tokens have the label −100 and are never learned, such as {ids[lost][:1]}: "
               "the mask tells what is real, and the last word of a text is its end, which must be learned, too.")
        expect(torch.equal(labels[mask], ids[mask]), "labels at real places are other ids than the texts'.")
        expect(bool((labels[~mask] == -100).all()), f"padding has the labels {labels[~mask].unique().tolist()}: which "
               "id does the loss ignore?")


# --- a caption in two pieces ------------------------------------------------------------------------------------------

Cut = Callable[[list[int], int, float], tuple[list[int], list[int]]]


@exercise("12.3", "lesson 12, section 4")
def cut(cut_of: Cut) -> None:
    """Cut from after the first word to the middle, each place equally likely, nothing lost."""
    for count in (2, 9, 6, 3, random.randint(12, 20), 1):
        end = random.randint(1 if count == 9 else 0, 5)
        words = [word for word in random.choices(range(30), k=3 * count + 9) if word != end][:count]  # some come twice
        if count > 2:
            words[1] = words[0]
        if end and count > 3:
            words[2] = 0
        if count > 1:
            words[-1] = 77  # the pieces exchanged are never the same text
        half = count // 2
        draws = [0.0, *((step + 0.5) / (20 * max(1, half)) for step in range(20 * max(1, half))), 1 - 1e-9]
        cuts: Counter[int] = Counter()
        for draw in draws:
            given = list(words)
            output = cut_of(given, end, draw)
            expect(given == words, "your function changed the list that it was given.")
            expect(isinstance(output, tuple | list) and len(output) == 2 and all(
                isinstance(part, tuple | list) for part in output),
                   f"your function gives {output!r}; the exercise asks for two lists.")
            prefix, rest = ([whole(one, "an id") for one in part] for part in output)
            at = f"of {words} with the draw {draw:.3g} and the end {end} you make {prefix} and {rest}: "
            expect(prefix[-1:] == [end], at + "what the encoder is given is not closed by an end.")
            expect(rest[-1:] == [end], at + "what is to be written is not closed by an end: the decoder would never "
                   "learn to stop.")
            both = prefix[:-1] + rest[:-1]
            expect(end not in both, at + "an end stands twice, or in the middle.")
            expect(both == words or rest[:-1] + prefix[:-1] != words, at + "the pieces are exchanged.")
            expect(len(both) <= count, at + "words come twice: what is given need not be written.")
            expect(len(both) >= count, at + "words are lost.")
            expect(both == words, at + "that is not the text any more: prefix first, then the rest.")
            place = len(prefix) - 1
            if count == 1:
                expect(place == 0, at + "a text of one word cannot be cut: it is to be written whole.")
                continue
            expect(place > 0, at + "nothing is given to the encoder but an end.")
            expect(place < count, at + "nothing is left to be written but an end.")
            expect(place <= half, f"{at}the cut may lie in the middle ({half} words of {count}), but not after it.")
            cuts[place] += 0.0 < draw < 1 - 1e-6
        twice = [[cut_of(list(words), end, draw) for draw in draws[1:-1:7]] for _ in range(2)]
        expect(twice[0] == twice[1], "the same draw gives another cut the second time: it is `draw` that decides, and "
               "nothing else.")
        if count > 1:
            never = sorted(set(range(1, half + 1)) - set(cuts))
            expect(not never, f"of {count} words, prefixes of {never} words are never made: the cut falls anywhere "
                   f"from after the first word to the middle, {half} words.")
            expect(max(cuts.values()) - min(cuts.values()) <= 2, f"of {count} words, draws that are spread evenly give "
                   f"prefixes of {sorted(cuts)} words {[cuts[place] for place in sorted(cuts)]} times: each is to be "
                   "equally likely.")


# --- what the encoder is given ----------------------------------------------------------------------------------------

Given = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@exercise("12.4", "lesson 12, section 2, 'Distances instead of positions', and section 7")
def encoder_input(input_of: Given) -> None:
    """Soft prompt and words, what of it may be seen, and places that padding does not take."""
    plain = True  # whether padding takes places in all draws
    apart: list[tuple[list[int], list[int], int]] = []
    for b, q, t, e in ((3, 4, 6, 5), (1, 2, 3, 4), (4, 3, 8, 2), (2, 5, 2, 3)):
        soft, words = torch.randn(b, q, e, requires_grad=True), torch.randn(b, t, e, requires_grad=True)
        lengths = [t, *random.sample(range(1, t), b - 1)] if b > 1 else [t - 1]
        random.shuffle(lengths)
        mask = torch.arange(t) >= t - torch.tensor(lengths)[:, None]  # padding on the left, between picture and words
        kept, before = mask.clone(), (soft.detach().clone(), words.detach().clone())
        output = input_of(soft, words, mask)
        expect(torch.equal(mask, kept) and torch.equal(soft, before[0]) and torch.equal(words, before[1]),
               "your function changed what it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives {type(output).__name__}; the exercise asks for three tensors: embeds, visible, "
               "places.")
        embeds = expect_tensor(output[0], (b, q + t, e), "embeds", "(b s e) with s = q + t")
        attention_mask = expect_tensor(output[1], (b, q + t), "visible", "(b s) with s = q + t", torch.bool)
        places = expect_tensor(output[2], (b, q + t), "places", "(b s) with s = q + t")
        expect(not places.is_floating_point() and places.dtype != torch.bool,
               f"places hold {places.dtype}; the exercise asks for whole numbers.")
        expect(not close(embeds, torch.cat([words, soft], dim=1)), "the words stand before the picture.")
        expect(close(embeds, torch.cat([soft, words], dim=1)), "embeds are not the soft prompt and then the words.")
        weights = torch.randn(b, q + t, e)
        (slope,) = slopes(embeds, [soft], weights)
        expect(bool(slope.any()), "no gradient reaches the soft prompt: then the bridge learns nothing.")
        expect(close(slope, weights[:, :q]), "part of the gradient does not reach the soft prompt.")
        expect(not bool((~attention_mask[:, :q]).all()),
               "no token may look at the picture: all pictures would get the same caption.")
        expect(bool(attention_mask[:, :q].all()), "some of the soft prompt is hidden: it has no padding.")
        expect(not bool(attention_mask.all()), "padding may be seen.")
        expect(not torch.equal(attention_mask[:, q:], ~kept), "what may be seen and what may not are exchanged.")
        expect(torch.equal(attention_mask[:, q:], kept), "the words that may be seen are not the real ones.")
        real = torch.cat([torch.ones(b, q, dtype=torch.bool), kept], dim=1)
        for row in range(b):
            steps = places[row][real[row]].tolist()
            counted = real[row].nonzero()[:, 0].tolist()
            plain &= [one - steps[0] for one in steps] == [one - counted[0] for one in counted]
            apart.append((kept[row].long().tolist(), steps, q))
    for shown, steps, q in apart:
        gaps = [after - one for one, after in pairwise(steps)]
        if all(gap == 1 for gap in gaps):
            continue
        said = f"with the mask {shown} the real tokens have the places {steps}"
        expect(not plain, f"{said}: padding is counted as distance, so a question would depend on its batch.")
        expect(all(gap == 1 for gap in gaps[:q - 1]), f"the soft prompt has the places {steps[:q]}: each token "
               "stands one further than the token before it.")
        beside = [own[first] == own[0] for _, own, first in apart if len(own) > first]
        expect(not all(beside), "the words have the same places as the picture: they come after "
               "it.")
        expect(False, f"{said}: each is to stand one further than the real token before it.")

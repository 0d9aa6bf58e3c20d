"""Checks of lesson 12: a distance's group, what a decoder reads and learns, the cut, and what the encoder is given."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor

# --- the group of a distance ------------------------------------------------------------------------------------------

Group = Callable[[int, bool, int, int], int]


def far_place(distance: int, groups: int, max_distance: int) -> float:
    """Where a far distance lies among the groups of one side, by its logarithm."""
    exact = groups // 2
    return exact + math.log(max(1, distance) / exact) / math.log(max_distance / exact) * (groups - exact)


def slow_group(ahead: int, bidirectional: bool, groups: int, max_distance: int,
               rounding: Callable[[float], int] = math.floor, most: int = -1, linear: bool = False) -> int:
    """The group of a distance; what is given by name is a slip."""
    side = groups // 2 if bidirectional else groups
    distance = abs(ahead) if bidirectional else max(0, -ahead)
    far = far_place(distance, side, max_distance)
    if linear:
        far = side // 2 + (distance - side // 2) / (max_distance - side // 2) * (side - side // 2)
    group = distance if distance < side // 2 else min(rounding(far + 1e-9), side + most)
    return group + side * (bidirectional and ahead > 0)


BY_HAND = (0, 1, 2, 3, 5, 10, 40, 500)  # how far before the query, for 8 groups on one side and `max_distance` 64


def on_paper(groups_of: Callable[[], list[int]]) -> None:
    """Say which of the eight groups that were worked out by hand are right."""
    try:
        output = groups_of()
    except NotImplementedError:
        print("○ on paper: nothing yet")
        return
    if not isinstance(output, list | tuple) or len(output) != len(BY_HAND):
        print(f"✗ on paper: {output!r}; asked for are {len(BY_HAND)} groups")
        return
    wrong = [far for far, one in zip(BY_HAND, output, strict=True) if one != slow_group(-far, False, 8, 64)]
    print(f"{'✗' if wrong else '✓'} on paper: {len(BY_HAND) - len(wrong)} of {len(BY_HAND)}"
          + (f"; think again of {', '.join(map(str, wrong))}" if wrong else ""))


GROUP_SLIPS: dict[str, Group] = {
    "the sides are exchanged: `ahead` is positive where the key stands after the query.":
        lambda ahead, *rest: slow_group(-ahead, *rest),
    "without `bidirectional` one looks back only: what stands ahead is not told apart from the token itself.":
        lambda ahead, both, groups, far: slow_group(ahead if both else -abs(ahead), both, groups, far),
    "you do not tell the two sides apart: half of the groups are for keys after the query.":
        lambda ahead, both, groups, far: slow_group(-abs(ahead), both, groups, far),
    "the groups are not halved where both sides have to share them.":
        lambda ahead, both, groups, far: slow_group(-abs(ahead), False, groups, far) + groups * (ahead > 0) if both
        else slow_group(ahead, both, groups, far),
    "without `bidirectional` all groups are for the one side that is looked at.":
        lambda ahead, both, groups, far: slow_group(ahead if both else min(0, ahead), True, groups, far),
    "far groups are equally wide in your function; they are to grow, in equal steps of the logarithm.":
        lambda *given: slow_group(*given, linear=True),
    "the places among the far groups are rounded; a distance belongs to the group that has begun last.":
        lambda *given: slow_group(*given, rounding=round),
    "the last group is left out: a side with n groups has the numbers 0 to n − 1.":
        lambda *given: slow_group(*given, most=-2),
    "the distance 0 is not ahead of anything: which side does the token itself belong to?":
        lambda ahead, both, groups, far: slow_group(ahead, both, groups, far) + groups // 2 * (both and ahead == 0),
}


@exercise("12.1", "lesson 12, section 2, Distances instead of positions")
def group(group_of: Group) -> None:
    """Near distances one by one, far ones in groups that grow."""
    drawn = (random.choice((True, False)), random.choice((8, 12, 20)), random.randint(40, 90))
    for bidirectional, groups, max_distance in ((True, 32, 128), (False, 32, 128), (True, 16, 50), (False, 8, 64),
                                                drawn):
        places = [*range(-20, 21), *random.sample(range(-250, 250), 40), -max_distance, max_distance, -900, 900]
        output = {ahead: group_of(ahead, bidirectional, groups, max_distance) for ahead in places}
        at = f"with {groups} groups for {'both sides' if bidirectional else 'one side'} and farthest {max_distance}: "
        for ahead, found in output.items():
            expect(isinstance(found, int) and not isinstance(found, bool),
                   f"{at}the group of {ahead} is {found!r}; groups have whole numbers.")
            expect(0 <= found < groups, f"{at}{ahead} gets the group {found}; they are numbered 0 to {groups - 1}, and "
                   "what is farther than `farthest` shares the last one of its side.")
        side = groups // 2 if bidirectional else groups
        wrong = []
        for ahead, found in output.items():
            place = far_place(abs(ahead), side, max_distance)
            edge = abs(place - round(place)) < 1e-4 and abs(ahead) >= side // 2  # here rounding may decide
            right = {slow_group(ahead, bidirectional, groups, max_distance)}
            if edge:
                right |= {min(right) - 1} if place <= side - 1 + 1e-4 else set()
            if found not in right:
                wrong.append(ahead)
        if not wrong:
            continue
        for meaning, slip in GROUP_SLIPS.items():
            missed = [ahead for ahead in places if output[ahead] != slip(ahead, bidirectional, groups, max_distance)]
            expect(len(missed) > 4, at + meaning)
        near = [ahead for ahead in wrong if abs(ahead) < side // 2 and (bidirectional or ahead < 0)]
        for ahead in near:
            expect(False, f"{at}{ahead} gets the group {output[ahead]}: half of the groups of a side are for single "
                   "steps, beginning with the distance 0.")
        expect(False, f"{at}{wrong[0]} gets the group {output[wrong[0]]}. A side's far half of groups begins where "
               "single steps end, and reaches `farthest` in equal steps of the logarithm.")


# --- what the decoder reads and learns --------------------------------------------------------------------------------


@exercise("12.2", "lesson 12, section 3")
def teach(teach_of: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Inputs one step behind the labels, and labels that ignore padding."""
    for b, t in ((3, 6), (1, 4), (4, 9), (2, 1)):
        start = random.randint(0, 9)
        lengths = [t, *random.choices(range(1, t + 1), k=b - 1)]
        mask = torch.arange(t) < torch.tensor(lengths)[:, None]
        ids = torch.randint(10, 40, (b, t))
        ids[:, 0], ids[~mask] = torch.randperm(20)[:b] + 40, start  # T5 starts with its padding
        if t > 3:
            ids[0, 2] = start  # the same id may stand for a token
        given = ids.clone(), mask.clone()
        output = teach_of(ids, mask, start)
        expect(torch.equal(ids, given[0]) and torch.equal(mask, given[1]), "your function changed what it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 2,
               f"your function gives {type(output).__name__}; asked for are two tensors, inputs and labels.")
        inputs, labels = (expect_tensor(part, (b, t), f"with ids (b t) = {(b, t)}: {what}", kind=torch.long)
                          for part, what in zip(output, ("inputs", "labels"), strict=True))
        wanted, ignored = given[0].masked_fill(~mask, -100), given[0]
        expect(not bool((inputs < 0).any()), "the decoder is to read −100: there is no such word. The number is for "
               "the loss only.")
        first = inputs[:, 0]
        expect(t == 1 or not torch.equal(inputs, given[0]) or torch.equal(first, torch.full_like(first, start)),
               "inputs are the texts themselves: at each place the decoder reads the very word that it is to say.")
        expect(not torch.equal(inputs, given[0].roll(1, dims=1)) or bool((first == start).all()), "the last word has "
               "come round to the front: roll shifts in a circle.")
        expect(bool((first == start).all()), "the decoder does not begin with the start token.")
        for row, length in enumerate(lengths):
            said, real = inputs[row, :length].tolist(), given[0][row, :length].tolist()
            expect(said == [start, *real[:-1]], f"of the text {real} the decoder reads {said}: after the start, each "
                   "place is to hold the word before it.")
        if torch.equal(labels, wanted):
            continue
        expect(not torch.equal(labels, ignored), "padding stays in the labels: then the model learns to say it.")
        moved = torch.cat([wanted[:, 1:], torch.full((b, 1), -100)], dim=1)
        shifted = torch.cat([given[0][:, 1:], torch.full((b, 1), start)], dim=1)
        expect(not any(torch.equal(labels, some) for some in (moved, shifted)), "both are shifted, so the model would "
               "learn to say the word after next.")
        expect(not torch.equal(labels, inputs) and not torch.equal(labels, inputs.masked_fill(~mask, -100)),
               "labels are what is read at the same place: a model that copies would be perfect.")
        expect(not torch.equal(labels, given[0].masked_fill(given[0] == start, -100)), "a real token that has the "
               "id of padding is ignored as well: the mask tells padding, the id need not.")
        real = labels[mask]
        expect(not bool((real == -100).any()), "a real token has the label −100 and is never learned; the last word "
               "of a text is its end, and it must be learned, too.")
        expect(torch.equal(real, given[0][mask]), "labels at real places are other ids than the texts'.")
        expect(False, f"padding has the labels {labels[~mask].unique().tolist()}: which id does the loss ignore?")


# --- a caption in two pieces ------------------------------------------------------------------------------------------

Cut = Callable[[list[int], int, float], tuple[list[int], list[int]]]


@exercise("12.3", "lesson 12, section 4")
def cut(cut_of: Cut) -> None:
    """Cut from after the first word to the middle, each place equally likely, nothing lost."""
    for count in (2, 9, 6, 3, random.randint(12, 20), 1):
        end = random.randint(0, 5)
        words = random.sample(range(10, 60), count)
        half = count // 2
        draws = [0.0, *((step + 0.5) / (20 * max(1, half)) for step in range(20 * max(1, half))), 1 - 1e-9]
        cuts: Counter[int] = Counter()
        for draw in draws:
            given = list(words)
            output = cut_of(given, end, draw)
            expect(given == words, "your function changed the list that it was given.")
            expect(isinstance(output, tuple | list) and len(output) == 2
                   and all(isinstance(part, list) for part in output),
                   f"your function gives {output!r}; asked for are two lists.")
            prefix, rest = output
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
        if count > 1:
            never = sorted(set(range(1, half + 1)) - set(cuts))
            expect(not never, f"of {count} words, prefixes of {never} words are never made: the cut falls anywhere "
                   f"from after the first word to the middle, {half} words.")
            expect(max(cuts.values()) - min(cuts.values()) <= 2, f"of {count} words, draws that are spread evenly give "
                   f"prefixes of {sorted(cuts)} words {[cuts[place] for place in sorted(cuts)]} times: each is to be "
                   "equally likely.")


# --- what the encoder is given ----------------------------------------------------------------------------------------

Given = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@exercise("12.4", "lesson 12, section 2, Distances instead of positions, and section 7")
def encoder_input(input_of: Given) -> None:
    """Soft prompt and words, what of it may be seen, and places that padding does not take."""
    for b, q, t, e in ((3, 4, 6, 5), (1, 2, 3, 4), (4, 3, 8, 2)):
        soft, words = torch.randn(b, q, e, requires_grad=True), torch.randn(b, t, e, requires_grad=True)
        mask = torch.rand(b, t) < 0.6
        mask[0, 0], mask[0, 1:] = False, True  # padding on the left, between picture and words
        mask[-1, -1] = b == 1  # and on the right
        kept = mask.clone()
        output = input_of(soft, words, mask)
        expect(torch.equal(mask, kept), "your function changed the mask that it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives {type(output).__name__}; asked for are three tensors: embeds, visible, places.")
        embeds = expect_tensor(output[0], (b, q + t, e), "embeds", "(b s e) with s = q + t")
        attention_mask = expect_tensor(output[1], (b, q + t), "visible", "(b s) with s = q + t", torch.bool)
        places = expect_tensor(output[2], (b, q + t), "places", "(b s) with s = q + t")
        expect(not places.is_floating_point() and places.dtype != torch.bool,
               f"places hold {places.dtype}; asked for are whole numbers.")
        expect(not close(embeds, torch.cat([words, soft], dim=1)), "the words stand before the picture.")
        expect(close(embeds, torch.cat([soft, words], dim=1)), "embeds are not the soft prompt and then the words.")
        learns = embeds.requires_grad and torch.autograd.grad(embeds.sum(), soft, allow_unused=True)[0] is not None
        expect(learns, "no gradient reaches the soft prompt: then the bridge learns nothing.")
        expect(not bool((~attention_mask[:, :q]).all()),
               "nobody may look at the picture: all pictures would get one caption.")
        expect(bool(attention_mask[:, :q].all()), "some of the soft prompt is hidden: it has no padding.")
        expect(not bool(attention_mask.all()), "padding may be seen.")
        expect(not torch.equal(attention_mask[:, q:], ~kept), "what may be seen and what may not is exchanged.")
        expect(torch.equal(attention_mask[:, q:], kept), "of the words, others may be seen than are real.")
        for row in range(b):
            steps = places[row][torch.cat([torch.ones(q, dtype=torch.bool), kept[row]])].tolist()
            apart = [later - earlier for earlier, later in pairwise(steps)]
            expect(all(step == 1 for step in apart[:q - 1]), f"the soft prompt has the places {steps[:q]}: each token "
                   "stands one further than the token before it.")
            expect(len(apart) < q or apart[q - 1] != 1 - q, "the words have the same places as the picture: they come "
                   "after it.")
            expect(all(step == 1 for step in apart), f"with the mask {kept[row].long().tolist()} the real tokens have "
                   f"the places {steps}: padding is counted as distance, so a question would depend on its batch.")

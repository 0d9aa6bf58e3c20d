"""Checks of lesson 10: soft prompt, labels, shifted loss, a frozen model, who predicts whom, and the own bridge."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from PIL.Image import Image
from torch import Tensor, nn

from minblip2.data.scene_captions import judge
from minblip2.data.scenes import Scene

from . import close, exercise, expect, expect_tensor

IGNORED = -100


# --- one sequence -----------------------------------------------------------------------------------------------------


@exercise("10.1", "lesson 10, sections 1, 2 and 12, 'Two precisions in one sequence'")
def sequence(join: Callable[[Tensor, nn.Linear, Tensor, Tensor], Tensor]) -> None:
    """[soft prompt ; prompt ; text], as wide as words and of their kind."""
    for b, given, kind in ((3, 2, torch.float32), (1, 0, torch.float32), (2, 3, torch.bfloat16)):
        q, t, narrow, wide = random.sample(range(4, 10), 4)
        projection, queries = nn.Linear(narrow, wide), torch.randn(b, q, narrow)
        prompt, text = torch.randn(b, given, wide).to(kind), torch.randn(b, t, wide).to(kind)
        before = queries.clone(), prompt.clone(), text.clone()
        output = join(queries, projection, prompt, text)
        if kind != torch.float32 and isinstance(output, Tensor):
            expect(output.dtype == kind,
                   f"words come in {kind} and the sequence is {output.dtype}: PyTorch has promoted "
                                       "it without a word, and the first layer of the frozen model will refuse it.")
        expect_tensor(output, (b, q + given + t, wide), "the sequence", "(b s e) with s = queries + prompt + text",
                      kind)
        expect(all(torch.equal(one, other) for one, other in zip(before, (queries, prompt, text), strict=True)),
               "your function changed what it was given.")
        soft = torch.stack([torch.stack([projection.weight @ one + projection.bias for one in row]) for row in queries])
        soft = soft.detach().to(kind)
        near = 1e-4 if kind == torch.float32 else 2e-2
        begins = output[:, :q].detach()
        expect(not close(output[:, -q:].detach(), soft, near)
               and not close(output[:, given:given + q].detach(), soft, near)
               or close(begins, soft, near), "the soft prompt does not stand in front: what comes before it cannot "
                                             "see it, since the language model is causal.")
        bare = soft - projection.bias.detach()
        expect(not close(begins, bare.to(kind), near), "the projection's bias takes no part.")
        unit = torch.nn.functional.normalize(soft, dim=-1)
        expect(not close(begins, unit, near), "the soft prompt is normalised: that is ITC's business, words of a "
                                              "language model are not all of one length.")
        expect(close(begins, soft, near), "the first positions are not the projected queries, in their order.")
        expect(torch.equal(output[:, q:].detach(), torch.cat([prompt, text], dim=1)), "behind the soft prompt there "
                                                                                    "should "
               "be the prompt and then the text, as they came.")
        expect(output.requires_grad, "no gradient reaches the projection, which is what stage 2 adds and trains.")
        slope, = torch.autograd.grad(output.float().sum(), projection.weight, allow_unused=True)
        expect(slope is not None and bool(slope.any()), "no gradient reaches the projection.")


# --- what is learned of it --------------------------------------------------------------------------------------------


def words(b: int, t: int, end: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids and mask (b t) of texts that end in `end`, of different lengths, padded with `end`, as many are."""
    ids, mask = torch.full((b, t), end), torch.zeros(b, t, dtype=torch.bool)
    for row in range(b):
        length = t if row == 0 else random.randint(2, t - 1)
        place = slice(0, length) if side == "right" else slice(t - length, t)
        ids[row, place], mask[row, place] = torch.randint(end + 1, 50, (length,)), True
        if side == "right":
            ids[row, length - 1] = end
    return ids, mask


@exercise("10.2", "lesson 10, sections 2 and 12, 'A loss on the prompt'")
def labels(labels_of: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """-100 for what has no right answer or is given; the words of the text at their own places."""
    for b, p in ((3, 4), (1, 2), (2, 0)):
        queries, t, end = random.randint(2, 5), random.randint(5, 8), random.randint(1, 4)
        prompt, prompt_mask = words(b, p, end, "left") if p else (torch.empty(b, 0).long(), torch.empty(b, 0).bool())
        text, text_mask = words(b, t, end)
        given = [tensor.clone() for tensor in (prompt, prompt_mask, text, text_mask)]
        output = expect_tensor(labels_of(queries, prompt, prompt_mask, text, text_mask), (b, queries + p + t),
                               "the labels",
                               "(b s) with s = queries + prompt + text", torch.long)
        expect(all(torch.equal(one, other) for one, other in zip(given, (prompt, prompt_mask, text, text_mask),
                                                                 strict=True)), "your function changed its input.")
        soft, asked, answer = output[:, :queries], output[:, queries:queries + p], output[:, queries + p:]
        wanted = torch.tensor([[int(one) if real else IGNORED for one, real in zip(row, marks, strict=True)]
                               for row, marks in zip(text, text_mask, strict=True)])
        if torch.equal(answer, wanted):
            expect(bool((soft == IGNORED).all()), "the soft prompt has labels: a query is no word, so there is no "
                   "right answer.")
            expect(bool((asked == IGNORED).all()), "the prompt is learned, though it is given: the loss then looks "
                                                   "better "
                   "than it is, and part of each gradient goes into what is the same for all pictures.")
            continue
        right, short = wanted != IGNORED, torch.where(text == end, IGNORED, wanted)
        expect(not torch.equal(answer, text), "padding has labels: the model would learn to write it.")
        expect(not torch.equal(answer, short), "the end of a text has no label, so that the model never learns to "
                                               "stop: "
               "padding was told by its id, and here the end has the same one. Only the mask knows.")
        last = torch.where(right.roll(-1, 1) & right, wanted, IGNORED)
        expect(not torch.equal(answer, last), "the last token of a text has no label: the model never learns to stop.")
        moved = torch.cat([output[:, :1] * 0 + IGNORED, output[:, :-1]], dim=1)[:, queries + p:]
        expect(not torch.equal(moved, wanted), "the labels are one place too early: here they stand at their words' "
                                               "own places, and the loss does the shift. Both would shift twice.")
        early = torch.cat([wanted[:, 1:], torch.full((b, 1), IGNORED)], dim=1)
        expect(not torch.equal(answer, early), "you have shifted already, and the first word of each text is lost with "
               "it: the shift is the business of the loss. Here each word stands at its own place.")
        expect(not bool((answer[right] == IGNORED).any()), "some word of a text has no label.")
        expect(not bool((answer[~right] != IGNORED).any()), "padding has labels; torch's cross-entropy skips -100 and "
               "nothing else.")
        expect(False, "the labels of the text are not its ids at their places.")


def slow_loss(logits: Tensor, targets: Tensor, shift: int = 1, each: str = "word") -> float:
    """The mean surprise, in loops: position i is asked for the label of i + shift."""
    paid: list[list[float]] = []
    for row, output in zip(logits.double().tolist(), targets.tolist(), strict=True):
        paid.append([])
        for place, numbers in enumerate(row):
            if 0 <= place + shift < len(output) and output[place + shift] != IGNORED:
                top = max(numbers)
                total = top + math.log(sum(math.exp(x - top) for x in numbers))
                paid[-1].append(total - numbers[output[place + shift]])
    flat = [x for row in paid for x in row]
    return {"word": sum(flat) / max(1, len(flat)), "sum": sum(flat),
            "row": sum(sum(row) / max(1, len(row)) for row in paid) / len(paid),
            "place": sum(flat) / max(1, targets.numel()), "place less one": sum(flat) / (
                targets.numel() - len(targets) or 1)}[each]


@exercise("10.3", "lesson 10, sections 2 and 12, 'Labels that are not shifted'")
def shifted_loss(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Position i predicts the token at i + 1; the mean over supervised words."""
    slips = {"nothing is shifted: position i is asked for its own token, and learns to repeat what it sees.": (0,),
             "that is shifted twice: each position is asked for the token after the next.": (2,),
             "that is shifted the wrong way: each position is asked for the token before it.": (-1,),
             "the words are added up: asked for is their mean.": (1, "sum"),
             "each caption counts alike, however long: asked for is the mean over words.": (1, "row"),
             "the mean is taken over all positions, also those that are not supervised.": (1, "place")}
    for b in (3, 1):
        while True:  # until each slip shows as itself; of one caption the mean over captions is the mean over words
            s, n = random.randint(7, 10), random.randint(4, 9)
            logits, targets = 3 * torch.randn(b, s, n), torch.full((b, s), IGNORED)
            for row in range(b):
                first, length = random.randint(2, 3), 2 + row
                targets[row, first:first + length] = torch.randint(n, (length,))
            right = slow_loss(logits, targets)
            found = sorted([right, *(slow_loss(logits, targets, *slip) for slip in slips.values()
                                     if b > 1 or "row" not in slip)])
            if not any(math.isclose(*two, rel_tol=0.01) for two in pairwise(found)):
                break
        given = logits.clone(), targets.clone()
        output = expect_tensor(loss_of(logits, targets), (), "the loss")
        expect(torch.equal(given[0], logits) and torch.equal(given[1], targets), "your function changed its input.")
        if math.isclose(output.item(), right, rel_tol=1e-4):
            continue
        for meaning, slip in slips.items():
            expect(not math.isclose(output.item(), slow_loss(logits, targets, *slip), rel_tol=1e-4), meaning)
        expect(not math.isclose(output.item(), slow_loss(logits, targets, 1, "place less one"), rel_tol=1e-4),
               "the mean is taken over all positions, also those that are not supervised.")
        expect(False,
               f"your loss is {output.item():.4f}, that of the loops {right:.4f}. Which logits meet which label?")
    logits = torch.randn(2, 6, 5, requires_grad=True)
    targets = torch.full((2, 6), IGNORED)
    targets[:, 3] = 1
    output = loss_of(logits, targets)
    expect(output.requires_grad, "no gradient flows from the loss.")
    slope, = torch.autograd.grad(output, logits)
    touched = slope.abs().sum(dim=(0, 2)) > 0
    expect(touched.tolist() == [False, False, True, False, False, False],
           "only the position before a supervised word should feel the loss.")


# --- frozen and deaf --------------------------------------------------------------------------------------------------


@exercise("10.4", "lesson 10, sections 3 and 12, 'A frozen model that drops out'")
def lm_logits(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Through a frozen model the gradient passes, and leaves nothing behind."""
    for b, s in ((2, 3), (1, 1)):
        e = random.randint(6, 9)
        lm = nn.Sequential(nn.Linear(e, 4 * e), nn.GELU(), nn.Dropout(0.5), nn.Linear(4 * e, e)).train()
        embeds = torch.randn(b, s, e, requires_grad=True)
        before = {name: value.clone() for name, value in lm.state_dict().items()}
        output = expect_tensor(run(lm, embeds), (b, s, e), "the result", "(b s e)")
        inner = torch.nn.functional.gelu(embeds @ lm[0].weight.T + lm[0].bias) @ lm[3].weight.T + lm[3].bias
        again = run(lm, embeds)
        expect(torch.equal(output, again), "the same sequence gives other states the second time: the frozen model's "
               "dropout is on.")
        expect(close(output, inner), "the result is not what the language model makes of the sequence.")
        expect(output.requires_grad, "the wire is cut: the result does not know where it comes from, so that neither "
               "queries nor projection hear of the loss. Not to train a model is one thing, to forget what it did "
               "another.")
        output.square().sum().backward()
        expect(embeds.grad is not None, "the wire is cut: no gradient comes out below the language model.")
        asked, = torch.autograd.grad(inner.square().sum(), embeds)
        expect(close(embeds.grad, asked), "the gradient that comes out below is not that of the language model: part "
                                          "of its way leads past the model.")
        moved = [name for name, weight in lm.named_parameters() if weight.grad is not None]
        expect(not moved, f"{len(moved)} weights of the language model have collected a gradient: it is to be frozen, "
                          "and an optimiser that is given them would move them.")
        expect(all(torch.equal(before[name], value) for name, value in lm.state_dict().items()),
               "a weight of the language model has changed.")


# --- who predicts whom ------------------------------------------------------------------------------------------------


@exercise("10.5", "lesson 10, section 2")
def places(predict: Callable[[int, int, int], tuple[int, int, int]]) -> None:
    """Length, the position that predicts the first word, and how many positions are paid for."""
    drawn = [(random.randint(5, 40), random.randint(2, 9), random.randint(3, 20)) for _ in range(4)]
    for queries, given, written in [(32, 1, 8), *drawn]:
        output = predict(queries, given, written)
        expect(isinstance(output, tuple | list) and len(output) == 3
               and all(isinstance(one, int | float) for one in output),
               f"your function gives {output!r}; asked for are three numbers: length, first and paid.")
        length, first, paid = output
        said = f"with {queries} queries, {given} given tokens and {written} to be written"
        lengths = {given + written: "queries take places, too.", queries + written: "what is given takes places, too.",
                   queries + given + written + 2: "start and end are counted already.",
                   queries + given + written + 1: "start and end are counted already."}
        expect(length == queries + given + written, f"{said} you count {length:g} positions: " + lengths.get(
            int(length), "soft prompt, what is given, what is to be written."))
        firsts = {queries + given: "that is where the first word stands: who predicts it?",
                  queries - 1: "the last query is not the last thing that is given.",
                  queries: "that is the first token behind the soft prompt: more may be given.",
                  given - 1: "the soft prompt stands in front."}
        expect(first == queries + given - 1, f"{said} you say that position {first:g} predicts the first word: "
               + firsts.get(int(first), "positions are counted from 0, and each predicts the next."))
        counts = {written - 1: "the first word is predicted too, from what is given; and the end as well.",
                  written + 1: "the end is counted already, and nothing comes after it.",
                  written + given: "what is given is not paid for.", length - 1: "what is given is not paid for.",
                  length: "neither soft prompt nor what is given is paid for."}
        expect(paid == written, f"{said} you let {paid:g} positions be paid for: " + counts.get(
            int(paid), "which tokens have a label?"))


# --- the own bridge ---------------------------------------------------------------------------------------------------

Caption = Callable[[Sequence[Image]], list[str]]
ENOUGH = 0.10  # by so much more often a caption has to be right about its own picture than about another's
LONG = 27  # words; every true caption is shorter


def share(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """How many captions name exactly the things that are in their scene."""
    return sum(bool(judge(caption, scene)["things"]) for caption, scene in zip(captions, scenes, strict=True)) / len(
        captions)


def stutters(caption: str) -> bool:
    """Whether a word follows itself twice."""
    words = caption.split()
    return any(one == two == three for (one, two), (_, three) in pairwise(pairwise(words)))


@exercise("10.6", "lesson 10, sections 4 to 6, and lesson 08, section 4")
def own_bridge(bridge_of: Callable[[], Caption]) -> None:
    """A bridge of the learner's pieces says what is in pictures that it has never seen, and not what is in others."""
    from own import exam  # which itself builds on the checks

    images, scenes, _ = exam()
    caption = bridge_of()
    expect(callable(caption), f"your function gives {'None' if caption is None else f'a {type(caption).__name__}'}; "
           "asked for is what captions pictures: own.captioner makes it of a trained stage 2.")
    output = caption(images)
    expect(isinstance(output, list | tuple) and len(output) == len(images)
           and all(isinstance(one, str) for one in output),
           f"of {len(images)} pictures should come as many captions, each a text.")
    n = len(output)
    empty, stuck = sum(not one.split() for one in output), sum(map(stutters, output))
    endless, kinds = sum(len(one.split()) >= LONG for one in output), len(set(output))
    expect(empty < n / 2, f"{empty} of {n} captions are empty: the end is said before any word. Which word is the "
           "first that the loss asks for, and who predicts it (10.2, 10.3, 10.5)?")
    expect(stuck < n / 2, f"{stuck} of {n} captions say one word again and again: so does a model that was taught to "
           "repeat what it reads. Is a label shifted exactly once, in stage 1 (08.3) and in stage 2 (10.3)?")
    expect(endless < n / 2, f"{endless} of {n} captions come to no end: has the end a label (10.2)?")
    expect(kinds > n / 20, f"{n} pictures get {kinds} different captions: nothing of the picture arrives. Do the "
           "queries read it (05.1), does the prompt stand in front (10.1), and does the gradient come back through the "
           "language model (10.4)?")
    right = share(output, scenes)
    other = sum(share([*output[by:], *output[:by]], scenes) for by in range(1, 6)) / 5
    seen = (f"{right:.0%} of your captions name exactly what is in their picture, and {other:.0%} what is in another "
            "one")
    expect(right > other + ENOUGH / 4, f"{seen}: fluent, and blind. Does stage 2 begin with the stage 1 that you have "
           "trained, and did the losses of both fall?")
    expect(right > other + ENOUGH, f"{seen}: it has begun to see. More steps, or another rate, will open its eyes.")

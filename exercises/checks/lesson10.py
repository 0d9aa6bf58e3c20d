"""Checks of lesson 10: soft prompt, labels, shifted loss, a frozen model, who predicts whom, and the own bridge."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import torch
from PIL.Image import Image
from torch import Tensor, nn

from minblip2.data.scene_captions import judge
from minblip2.data.scenes import Scene

from . import Wrong, close, exercise, expect, expect_tensor
from .slips import agree, name_slip, parts, quantity, slopes, telling

IGNORED = -100


# --- one sequence -----------------------------------------------------------------------------------------------------


NEAR = {torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest value; for the others 1e-4


@exercise("10.1", "lesson 10, sections 1 and 2")
def sequence(join: Callable[[Tensor, nn.Linear, Tensor, Tensor], Tensor]) -> None:
    """[soft prompt ; prompt ; text], as wide as words and of their kind."""
    for b, given, kind in ((3, 2, torch.float32), (1, 0, torch.float32), (2, 0, torch.bfloat16),
                           (2, 3, torch.bfloat16), (2, 1, torch.float16), (3, 4, torch.float64)):
        q, t, narrow, wide = *random.sample(range(4, 10), 2), *random.sample(range(20, 40), 2)
        projection, queries = nn.Linear(narrow, wide), torch.randn(b, q, narrow, requires_grad=True)
        prompt, text = torch.randn(b, given, wide).to(kind), torch.randn(b, t, wide).to(kind)
        before = queries.detach().clone(), prompt.clone(), text.clone()
        output = join(queries, projection, prompt, text)
        if kind != torch.float32 and isinstance(output, Tensor) and output.dtype == torch.promote_types(
                kind, torch.float32) != kind:
            raise Wrong(f"words come in {kind} and the sequence is {output.dtype}: PyTorch has promoted it silently, "
                        "and the first layer of the frozen model will refuse it.")
        expect_tensor(output, (b, q + given + t, wide), "the sequence", "(b s e) with s = queries + prompt + text",
                      kind)
        expect(all(torch.equal(one, other) for one, other in zip(before, (queries, prompt, text), strict=True)),
               "your function changed what it was given.")
        expect(projection.weight.dtype == torch.float32, "your function has turned the projection into "
               f"{projection.weight.dtype}: it is trained, and small steps are lost in a dtype that coarse.")
        exact = torch.stack([torch.stack([projection.weight @ one + projection.bias for one in row])
                             for row in queries])
        soft = exact.detach().to(kind)
        near = NEAR.get(kind, 1e-4)
        begins = output[:, :q].detach()
        expect(not close(output[:, -q:].detach(), soft, near)
               and not close(output[:, given:given + q].detach(), soft, near)
               or close(begins, soft, near), "the soft prompt does not stand in front: what comes before it cannot "
                                             "see it, since the language model is causal.")
        bare = soft - projection.bias.detach()
        expect(not close(begins, bare.to(kind), near), "the projection's bias takes no part.")
        unit = torch.nn.functional.normalize(soft, dim=-1)
        expect(not close(begins, unit, near), "the soft prompt is normalised: only ITC does that, word vectors of a "
                                              "language model are not all of one length.")
        expect(close(begins, soft, near), "the first positions are not the projected queries, in their order.")
        if kind in NEAR:
            same = float((begins == soft).double().mean())
            expect(same > 0.9, f"words come in {kind}, and {1 - same:.0%} of the soft prompt's numbers are rounded "
                   "differently from the projection's own result: is something rounded before it is projected?")
        expect(torch.equal(output[:, q:].detach(), torch.cat([prompt, text], dim=1)), "behind the soft prompt there "
               "should be the prompt and then the text, as they came.")
        expect(output.requires_grad, "no gradient reaches the projection, which is what stage 2 adds and trains.")
        inputs, weights = [projection.weight, projection.bias, queries], torch.randn(b, q, wide)
        wanted, found = slopes(exact, inputs, weights), slopes(output[:, :q].float(), inputs, weights)
        expect(bool(found[0].any()) and bool(found[1].any()), "no gradient reaches the projection, weights and bias: "
               "it is what stage 2 adds and trains.")
        expect(bool(found[2].any()), "no gradient reaches the queries: the Q-Former below would learn nothing in "
               "stage 2. Was something detached?")
        expect(all(close(one, other, max(near, 1e-3)) for one, other in zip(found, wanted, strict=True)),
               "the sequence is right, but the gradient that reaches the queries or the projection is not that of the "
               "projection: does some part of the way not let it through?")


# --- what is learned of it --------------------------------------------------------------------------------------------


def words(b: int, t: int, end: int, side: str = "right", pad: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask (b t) of texts that end in `end`, of different lengths, padded with `pad`, or with `end`.

    The same numbers, that of the end and 0, occur among the words, and words come twice.
    """
    ids, mask = torch.full((b, t), end if pad is None else pad), torch.zeros(b, t, dtype=torch.bool)
    for row in range(b):
        length = t if row == 0 else random.randint(2, t - 1)
        place = slice(0, length) if side == "right" else slice(t - length, t)
        ids[row, place], mask[row, place] = torch.randint(0, 30, (length,)), True
        ids[row, place.start] += 30_000
        if length > 4:
            inside = torch.randperm(length - 2)[:2] + 1 + place.start
            ids[row, inside] = torch.tensor([end, 0])
        if side == "right":
            ids[row, length - 1] = end
    return ids, mask


def whole_labels(queries: int, prompt: Tensor, prompt_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """What is asked for, in loops."""
    before = [IGNORED] * (queries + prompt.shape[1])
    return torch.tensor([before + [int(one) if real else IGNORED for one, real in zip(row, marks, strict=True)]
                         for row, marks in zip(text, text_mask, strict=True)])


def with_text(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A slip in the labels of the text: change(text, text_mask, right labels)."""
    def labels_of(queries: int, prompt: Tensor, prompt_mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        made = whole_labels(queries, prompt, prompt_mask, text, text_mask)
        place = queries + prompt.shape[1]
        return torch.cat([made[:, :place], change(text, text_mask, made[:, place:])], dim=1)
    return labels_of


def earlier(labels: Tensor) -> Tensor:
    """Labels one place further to the left."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


LABEL_SLIPS = {
    "padding has labels: the model would learn to write it.": with_text(lambda text, mask, right: text),
    "the end of a text has no label, so that the model never learns to stop: padding was recognised by its id, and "
    "here the end has the same one. Only the mask tells.": with_text(
        lambda text, mask, right: text.masked_fill(text == text[0, -1], IGNORED)),
    "every token with the id of the end has no label, and so the model never learns to stop.": with_text(
        lambda text, mask, right: right.masked_fill(text == text[0, -1], IGNORED)),
    "words whose id is 0 have no label: padding is recognised by its id, but only the mask tells.": with_text(
        lambda text, mask, right: right.masked_fill(text == 0, IGNORED)),
    "the last token of a text has no label: the model never learns to stop.": with_text(
        lambda text, mask, right: right.masked_fill(earlier(right) == IGNORED, IGNORED)),
    "the labels are one place too early: here they stand at their words' own places, and the loss does the shift. Both "
    "would shift twice.": lambda *given: earlier(whole_labels(*given)),
    "you have shifted already, and the first word of each text is lost with it: the shift is the business of the loss. "
    "Here each word stands at its own place.": with_text(lambda text, mask, right: earlier(right)),
}


@exercise("10.2", "lesson 10, section 3")
def labels(labels_of: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """-100 for what has no right answer or is given; the words of the text at their own places."""
    def make() -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Prompts of several lengths and none, texts padded with their end, with 0 and with something else."""
        drawn = []
        for b, p, pad in ((3, 4, None), (1, 2, None), (2, 0, None), (3, 5, 0), (2, 3, 7)):
            queries, t, end = random.randint(2, 5), random.randint(5, 8), random.randint(1, 4)
            prompt = words(b, p, end, "left", pad) if p else (torch.empty(b, 0).long(), torch.empty(b, 0).bool())
            if p == 5:  # as where all batches are padded to one length: no prompt fills its row
                prompt = [torch.nn.functional.pad(part, (1, 0)) for part in prompt]
            drawn.append((queries, *prompt, *words(b, t, end, "left" if pad == 7 else "right", pad)))
        return drawn

    draws = telling(make, whole_labels, LABEL_SLIPS)
    answers, right = [], [whole_labels(*draw) for draw in draws]
    for queries, *given in draws:
        before = [tensor.clone() for tensor in given]
        answers.append(expect_tensor(labels_of(queries, *given), right[len(answers)].shape, "the labels",
                                     "(b s) with s = queries + prompt + text", torch.long))
        expect(all(torch.equal(one, other) for one, other in zip(before, given, strict=True)),
               "your function changed its input.")
    if all(map(torch.equal, answers, right)):
        return
    name_slip(LABEL_SLIPS, draws, answers, right)
    for (queries, prompt, _, text, mask), output, wanted in zip(draws, answers, right, strict=True):
        place = queries + prompt.shape[1]
        soft, asked, answer, truth = output[:, :queries], output[:, queries:place], output[:, place:], wanted[:, place:]
        if torch.equal(answer, truth):
            expect(bool((soft == IGNORED).all()), "the soft prompt has labels: a query is not a word, so there is no "
                   "right answer.")
            expect(bool((asked == IGNORED).all()), "the prompt is learned, though it is given: the loss then looks "
                   "better than it is, and part of each gradient goes into what is the same for all pictures.")
            continue
        expect(not bool((answer[mask] == IGNORED).any()), "words of a text have no label, such as the id "
               f"{int(text[mask][answer[mask] == IGNORED][:1].sum())}: the mask tells whether a place has one.")
        expect(not bool((answer[~mask] != IGNORED).any()), f"padding has the labels {answer[~mask].unique().tolist()}; "
               "torch's cross-entropy skips -100 and nothing else.")
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
            "not free": sum(flat) / max(1, sum(x > 1e-7 for x in flat)),
            "row": sum(sum(row) / max(1, len(row)) for row in paid) / len(paid),
            "place": sum(flat) / max(1, targets.numel()), "place less one": sum(flat) / (
                targets.numel() - len(targets) or 1)}[each]


def reshaped(logits: Tensor, targets: Tensor) -> float:
    """The axes are renamed where they should be exchanged."""
    b, s, n = logits.shape
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].reshape(b, n, s - 1), targets[:, 1:]))


Paid = Callable[[Tensor, Tensor], float | None]
SHIFT_SLIPS: dict[str, Paid] = {
    "nothing is shifted: position i is asked for its own token, and learns to repeat what it sees.":
        lambda logits, targets: slow_loss(logits, targets, 0),
    "that is shifted twice: each position is asked for the token after the next.":
        lambda logits, targets: slow_loss(logits, targets, 2),
    "that is shifted the wrong way: each position is asked for the token before it.":
        lambda logits, targets: slow_loss(logits, targets, -1),
    "the words are added up: the exercise asks for their "
    "mean.": lambda logits, targets: slow_loss(logits, targets, 1, "sum"),
    "each caption counts alike, however long: the exercise asks for the mean over words.":
        lambda logits, targets: slow_loss(logits, targets, 1, "row"),
    "the mean is taken over all positions, also those that are not supervised.":
        lambda logits, targets: slow_loss(logits, targets, 1, "place"),
    "the mean is taken over all positions but one, also those that are not supervised.":
        lambda logits, targets: slow_loss(logits, targets, 1, "place less one"),
    "the words are added up and divided by the number of captions: a long caption pays for its length.":
        lambda logits, targets: slow_loss(logits, targets, 1, "sum") / len(targets),
    "the word with the id 0 is not asked for: a label is left out where it is −100, not where it is 0.":
        lambda logits, targets: slow_loss(logits, targets.masked_fill(targets == 0, IGNORED)),
    "the axes of the logits are only renamed: reshape keeps the numbers in their order, and the vocabulary has to come "
    "to axis 1.": reshaped,
    "softmax was applied twice: cross-entropy takes logits, and makes probabilities of them itself.":
        lambda logits, targets: slow_loss(logits.softmax(dim=2), targets),
    "a word that is foreseen with certainty costs 0, and counts all the same: which places are supervised is said by "
    "the labels, not by the losses.": lambda logits, targets: slow_loss(logits, targets, 1, "not free"),
    "a surprise is not negative: the logarithm of a probability is, so its sign has to be flipped.":
        lambda logits, targets: -slow_loss(logits, targets),
}


def supervised(b: int, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (b s n) and targets (b s) with one stretch in each caption, a gap in it, and the word 0 among them."""
    s, n = random.randint(9, 12), random.randint(4, 8)
    logits, targets = scale * torch.randn(b, s, n), torch.full((b, s), IGNORED)
    for row in range(b):
        first, length = random.randint(2, 3), 3 + row
        targets[row, first:first + length] = torch.randint(n, (length,))
        targets[row, first + 1:first + 3] = torch.tensor([0, random.randint(1, n - 1)])
        if scale > 100:  # a word that is foreseen with certainty costs nothing
            logits[row, first - 1, targets[row, first]] += 20 * scale
    if b > 1:
        targets[0, -2:] = torch.randint(n, (2,))  # behind a gap, up to the last place
    return logits, targets


@exercise("10.3", "lesson 10, sections 3 and 8, 'Labels that are not shifted'")
def shifted_loss(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Position i predicts the token at i + 1; the mean over supervised words."""
    draws = telling(lambda: [supervised(3, 3.0), supervised(1, 3.0), supervised(2, 1.0), supervised(2, 300.0)],
                    slow_loss, SHIFT_SLIPS, 1e-2)
    answers, right = [], [slow_loss(*draw) for draw in draws]
    for logits, targets in draws:
        given = logits.clone(), targets.clone()
        output = loss_of(logits, targets)
        if isinstance(output, Tensor) and output.ndim == 0 and not bool(output.isfinite()):
            raise Wrong(f"where logits are as large as {logits.max():.0f} your loss is {output.item()}: has an "
                        "exponential overflowed, or was the logarithm of a vanished probability taken?")
        answers.append(expect_tensor(output, (), "the loss", kind=torch.float32).item())
        expect(torch.equal(given[0], logits) and torch.equal(given[1], targets), "your function changed its input.")
    if not agree(answers, right):
        name_slip(SHIFT_SLIPS, draws, answers, right)
        (logits, _), number, truth = next(one for one in zip(draws, answers, right, strict=True) if not agree(*one[1:]))
        expect(False, f"with logits up to {logits.max():.0f} your loss is {number:.4f}, that of the loops {truth:.4f}. "
               "Which logits meet which label?")
    logits, targets = torch.randn(3, 7, 5, requires_grad=True), torch.full((3, 7), IGNORED)
    targets[:2, 3], targets[0, 5] = 1, 2  # the last caption has nothing to learn
    output = loss_of(logits, targets)
    expect(output.requires_grad, "no gradient flows from the loss.")
    expect(bool(output.isfinite()), "where one caption of three has no supervised word your loss is "
           f"{output.item():.4g}: the mean is over all supervised words, whichever caption they stand in.")
    (slope,) = slopes(output, [logits])
    touched = slope.abs().sum(dim=2) > 0
    expect(torch.equal(touched, (targets != IGNORED).roll(-1, dims=1)), "only the positions before supervised words "
           "should get a gradient from the loss, and each of them should.")
    (wanted,) = slopes(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:]), [logits])
    expect(close(slope, wanted), "the loss is right, but its gradient is not: does some part of it not let the "
           "gradient through?")


# --- frozen and deaf --------------------------------------------------------------------------------------------------


class Part(nn.Module):
    """A block of a small language model: a norm, attention to itself, a layer of its own, dropout that is no module."""

    def __init__(self, e: int):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(e), nn.Linear(e, 2 * e), nn.Linear(2 * e, e)
        self.gain = nn.Parameter(torch.rand(e) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(b s e) -> (b s e)."""
        inside = torch.nn.functional.dropout(self.inner(self.norm(x)).tanh(), 0.4, self.training)
        return x + self.gain * self.outer(inside)


class Nested(nn.Module):
    """A small language model whose parts stand in a list, whose dropout is no module, and which has weights itself."""

    def __init__(self, e: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(8, e))
        self.blocks, self.head = nn.ModuleList(Part(e) for _ in range(2)), nn.Linear(e, e)

    def forward(self, embeds: Tensor) -> Tensor:
        """(b s e) -> (b s e)."""
        x = embeds + self.places[:embeds.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(torch.nn.functional.dropout(x, 0.3, self.training))


def flat(e: int) -> nn.Module:
    """The model of the exercise's first cell."""
    return nn.Sequential(nn.Linear(e, 4 * e), nn.GELU(), nn.Dropout(0.5), nn.Linear(4 * e, e))


@exercise("10.4", "lesson 10, sections 4 and 8, 'A frozen model that drops out'")
def lm_logits(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Through a frozen model the gradient passes, and leaves nothing behind."""
    for kind, b, s, training in ((flat, 2, 3, True), (Nested, 2, 4, True), (flat, 1, 1, False), (Nested, 3, 2, True)):
        e = random.randint(6, 9)
        lm = kind(e).train(training)
        embeds, own = torch.randn(b, s, e, requires_grad=True), copy.deepcopy(lm).eval()
        before = {name: value.clone() for name, value in lm.state_dict().items()}
        below = embeds * 1.0  # what comes from a projection has a history itself
        output = expect_tensor(run(lm, below), (b, s, e), "the result", "(b s e)")
        lm.train(training)  # as whoever trains the bridge does before each step
        again = run(lm, below)
        expect(torch.equal(output, again), "the same sequence gives other states the second time, after `.train()` was "
               "called on the bridge and so on the model: is its dropout on?")
        inner = own(embeds)
        expect(close(output, inner), "the result is not what the language model makes of the sequence, in "
               "evaluation mode.")
        expect(output.requires_grad, "the graph is cut: the result has no history, so that neither queries nor "
               "projection get a gradient from the loss. Not training a model is one thing, not recording what it did "
               "is another.")
        output.square().sum().backward()
        expect(embeds.grad is not None, "the graph is cut: no gradient comes out below the language model.")
        asked, = torch.autograd.grad(inner.square().sum(), embeds)
        expect(close(embeds.grad, asked), "the gradient that comes out below is not that of the language model: part "
                                          "of its way leads past the model, or is cut.")
        moved = [name for name, weight in lm.named_parameters() if weight.grad is not None]
        expect(not moved, f"{len(moved)} weights of the language model have collected a gradient, such as {moved[:1]}: "
                          "it is to be frozen, and an optimiser that is given them would move them.")
        expect(all(torch.equal(before[name], value) for name, value in lm.state_dict().items()),
               "a weight of the language model has changed.")


# --- who predicts whom ------------------------------------------------------------------------------------------------


Count = Callable[[int, int, int], int]
LENGTH_SLIPS: dict[str, Count] = {
    "queries take places, too.": lambda q, given, written: given + written,
    "what is given takes places, too.": lambda q, given, written: q + written,
    "what is to be written takes places, too.": lambda q, given, written: q + given,
    "start and end are counted already.": lambda q, given, written: q + given + written + 2,
    "start and end are counted already: is one of them counted twice?":
        lambda q, given, written: q + given + written + 1,
    "the last token has a place, too, though it predicts nothing.": lambda q, given, written: q + given + written - 1,
}
FIRST_SLIPS: dict[str, Count] = {
    "that is where the first word stands: which position predicts it?": lambda q, given, written: q + given,
    "that is where the second word stands: which position predicts the first?": lambda q, given, written: q + given + 1,
    "the last query is not the last thing that is given.": lambda q, given, written: q - 1,
    "that is the first token behind the soft prompt: more may be given.": lambda q, given, written: q,
    "the soft prompt stands in front.": lambda q, given, written: given - 1,
    "the soft prompt stands in front, and which position predicts the first word?": lambda q, given, written: given,
    "that is one place too early: each position predicts the next.": lambda q, given, written: q + given - 2,
}
PAID_SLIPS: dict[str, Count] = {
    "the first word is predicted too, from what is given; and the end as well.":
        lambda q, given, written: written - 1,
    "the end is counted already, and nothing comes after it.": lambda q, given, written: written + 1,
    "what is given is not paid for.": lambda q, given, written: written + given,
    "what is given is not paid for, its second token no more than its first.":
        lambda q, given, written: written + given - 1,
    "neither soft prompt nor what is given is paid for.": lambda q, given, written: q + given + written,
    "what is given is not paid for, though each position but the last predicts something.":
        lambda q, given, written: q + given + written - 1,
}


@exercise("10.5", "lesson 10, section 3")
def places(predict: Callable[[int, int, int], tuple[int, int, int]]) -> None:
    """Length, the position that predicts the first word, and how many positions are paid for."""
    rules: list[tuple[Count, dict[str, Count], str, str]] = [
        (lambda q, given, written: q + given + written, LENGTH_SLIPS, "you count {:g} positions: ",
         "soft prompt, what is given, what is to be written."),
        (lambda q, given, written: q + given - 1, FIRST_SLIPS, "you say that position {:g} predicts the first word: ",
         "positions are counted from 0, and each predicts the next."),
        (lambda q, given, written: written, PAID_SLIPS, "you count {:g} positions that are paid for: ",
         "which tokens have a label?")]
    while True:
        drawn = [(random.randint(5, 40), random.randint(2, 9), random.randint(3, 20)) for _ in range(5)]
        draws = [(32, 1, 8), *drawn]
        made = [[[slip(*draw) for draw in draws] for slip in (rule, *slips.values())] for rule, slips, *_ in rules]
        if all(one != other for some in made for one, other in combinations(some, 2)):
            break
    answers = []
    for draw in draws:
        output = parts(predict(*draw), 3, "three numbers: length, first and paid")
        answers.append([quantity(one, what) for one, what in zip(
            output, ("the length", "the position", "the number of positions"), strict=True)])
    for output, (rule, slips, said, question) in zip(zip(*answers, strict=True), rules, strict=True):
        right = [rule(*draw) for draw in draws]
        for (queries, given, written), one, truth in zip(draws, output, right, strict=True):
            if one != truth:
                at = f"with {queries} queries, {given} given tokens and {written} to be written " + said.format(one)
                name_slip({at + meaning: slip for meaning, slip in slips.items()}, draws, output, right)
                expect(False, at + question)


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


FALLEN, JUDGED = 0.9, 50  # a loss that was trained for so many steps should have come below this part of its beginning


def captions_of(caption: Caption, images: Sequence[Image]) -> Sequence[str]:
    """What a captioner says of pictures, if it is one."""
    kind = "None" if caption is None else f"a {type(caption).__name__}"
    expect(callable(caption) and not isinstance(caption, nn.Module), f"your function gives {kind}; the exercise asks "
           "for a captioner: own.captioner makes one from a trained stage 2.")
    output = caption(images)
    expect(isinstance(output, list | tuple) and len(output) == len(images)
           and all(isinstance(one, str) for one in output),
           f"{len(images)} pictures should give as many captions, each a text.")
    return output


def stays_up(losses: Sequence[float]) -> str:
    """Where a loss began and where it ended, if it has not fallen though there was time to; else nothing."""
    few = max(1, min(20, len(losses) // 5))
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    return (f"begins at {first:.2f} and ends, {len(losses)} steps later, at {last:.2f}"
            if len(losses) >= JUDGED and last > FALLEN * first else "")


@exercise("10.6", "lesson 10, section 5, and lesson 08, section 5")
def own_bridge(bridge_of: Callable[[], Caption]) -> None:
    """A bridge of the learner's pieces says what is in pictures that it has never seen, and not what is in others."""
    import own  # which itself builds on the checks

    images, scenes, _ = own.exam()
    with own.rehearsal():  # seconds, before anything is trained for minutes
        captions_of(bridge_of(), images[:2])
    own.LOSSES.clear()
    caption = bridge_of()
    for stage, losses in own.LOSSES.items():
        up = stays_up(losses)
        expect(not up, f"the loss of {stage} {up}: it has hardly fallen, so there is nothing yet that captions could "
               "tell. Is the peak rate far too low or too high, or does no gradient reach what should learn?")
    output = captions_of(caption, images)
    n = len(output)
    empty, stuck = sum(not one.split() for one in output), sum(map(stutters, output))
    endless, kinds = sum(len(one.split()) >= LONG for one in output), len(set(output))
    expect(empty < n / 2, f"{empty} of {n} captions are empty: the end is said before any word. Which word is the "
           "first that the loss asks for, and which position predicts it (10.2, 10.3, 10.5)?")
    expect(stuck < n / 2, f"{stuck} of {n} captions say one word again and again: so does a model that was taught to "
           "repeat what it reads. Is a label shifted exactly once, in stage 1 (08.3) and in stage 2 (10.3)?")
    expect(endless < n / 2, f"{endless} of {n} captions never end: does the end have a label (10.2)?")
    expect(kinds > n / 20, f"{n} pictures get {kinds} different captions: nothing of the picture arrives. Do the "
           "queries read it (05.1), does the prompt stand in front (10.1), and does the gradient come back through the "
           "language model (10.4)?")
    right = share(output, scenes)
    other = sum(share([*output[by:], *output[:by]], scenes) for by in range(1, 6)) / 5
    seen = (f"{right:.0%} of your captions name exactly what is in their picture, and {other:.0%} what is in another "
            "one")
    expect(right > other + ENOUGH / 4, f"{seen}: fluent, and blind. Does stage 2 begin with the stage 1 that you have "
           "trained, and did the losses of both fall?")
    expect(right > other + ENOUGH, f"{seen}: it has begun to see. Train for more steps, or with another rate.")

"""Checks of lesson 11: the nucleus, what a cache saves, a step of beam search, a text's score, and rows that end."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor

# --- the nucleus ------------------------------------------------------------------------------------------------------

FORBIDDEN = -1e8  # nothing that a model says is as low


def slow_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    """The likeliest tokens, one after another, until they hold enough."""
    kept, held = set(), 0.0
    for index in sorted(range(len(probabilities)), key=lambda index: -probabilities[index]):
        kept.add(index)
        held += probabilities[index]
        if held >= top_p:
            break
    return kept


def clear_scores(n: int, k: int, top_p: float) -> Tensor:
    """Random scores (n k) without a sum of probabilities that rounding could push over top_p; the last row is sure."""
    while True:
        scores = 2 * torch.randn(n, k)
        scores[-1, random.randrange(k)] += 20
        sums = scores.double().softmax(dim=1).sort(dim=1, descending=True).values.cumsum(dim=1)
        if ((sums - top_p).abs() > 1e-4).all():
            return scores


@exercise("11.1", "lesson 11, sections 4 and 10")
def nucleus(nucleus_of: Callable[[Tensor, float], Tensor]) -> None:
    """The smallest set that holds enough, the token that crosses the line included."""
    sizes = (4, 7, 0.9), (1, 5, 0.6), (3, 12, 0.4), (5, 6, random.uniform(0.55, 0.95)), (2, 4, 1e-3)
    drawn = [(clear_scores(n, k, top_p), top_p) for n, k, top_p in sizes]
    # Two tokens hold 0.7, and the third is more than what they hold too much: whoever stops late takes it as well.
    for scores, top_p in [*drawn, (torch.tensor([0.2, 0.4, 0.3, 0.1]).log()[torch.randperm(4)][None], 0.6)]:
        n, k = scores.shape
        given = scores.clone()
        output = expect_tensor(nucleus_of(scores, top_p), (n, k), "the result", "(n k)")
        expect(torch.equal(scores, given), "your function changed the scores that it was given.")
        expect(bool((output > FORBIDDEN).any(dim=1).all()), f"with top_p = {top_p:.3g} a row is left with nothing to "
               "draw from. Where a model is sure, one token alone crosses the line: what becomes of it?")
        expect(not bool((output > FORBIDDEN).all()) or bool((output == 0).any()),
               "all tokens stay, in rows with a clear favourite, too.")
        for row, said, probabilities in zip(given, output, given.double().softmax(dim=1).tolist(), strict=True):
            right = slow_nucleus(probabilities, top_p)
            kept = set((said > FORBIDDEN).nonzero()[:, 0].tolist())
            ordered = sorted((round(p, 3) for p in probabilities), reverse=True)
            at = f"with top_p = {top_p:.3g} and the probabilities {ordered}"
            if kept == right:
                inside = torch.tensor(sorted(right))
                expect(close(said[inside], row[inside]), "the tokens that stay have other scores than before: softmax "
                       "makes probabilities later; here it is only decided who takes part.")
                continue
            outside = torch.tensor(sorted(set(range(k)) - right), dtype=torch.long)
            expect(len(kept) < k or not bool((said[outside] == 0).all()), "what is outside has the score 0: that is no "
                   "ban, since e⁰ = 1. Which score does softmax turn into a probability of 0?")
            expect(kept != set(range(k)) - right, "kept is what should go, and gone is what should be kept.")
            best = sorted(range(k), key=lambda index: -probabilities[index])
            expect(kept != set(best[:len(right) - 1]), f"{at} {len(kept)} are kept, and they hold less than top_p: the "
                   "token that crosses the line is missing.")
            expect(kept != set(best[:len(right) + 1]), f"{at} {len(kept)} are kept, though one fewer holds top_p as "
                   "well: asked for is the smallest set.")
            expect(len(kept) != len(right), f"{at} as many tokens are kept as should be, but others: is what you found "
                   "out about the sorted tokens brought back to their own places?")
            worst = best[::-1]
            expect(kept != slow_kept(worst, probabilities, top_p), "you begin with the unlikeliest tokens.")
            expect(kept != {index for index in best if probabilities[index] >= 1 - top_p},
                   "you keep what is likelier than 1 − top_p: it is the sum that counts, not each token alone.")
            expect(False, f"{at} {len(kept)} tokens are kept; asked for are the {len(right)} likeliest, which together "
                   "hold top_p, and hold less when any is taken away.")
    scores = clear_scores(3, 6, 0.0)
    expect(torch.equal((nucleus_of(scores, 0.0) > FORBIDDEN).sum(dim=1), torch.ones(3, dtype=torch.long)),
           "with top_p = 0 not one token stays, as it should: the likeliest always does.")


def slow_kept(order: list[int], probabilities: list[float], top_p: float) -> set[int]:
    """The tokens in this order until they hold enough."""
    sums = list(itertools.accumulate(probabilities[index] for index in order))
    return set(order[:1 + sum(held < top_p for held in sums)])


# --- what a cache saves -----------------------------------------------------------------------------------------------


@exercise("11.2", "lesson 11, section 2")
def tokens_computed(predict: Callable[[int, int], tuple[int, int]]) -> None:
    """How many tokens go through the model, without a cache and with one."""
    for prompt, written in [*(telling_lengths() for _ in range(4)), (32, 1), (1, 2)]:
        said = f"with {prompt} tokens given and {written} written"
        output = predict(prompt, written)
        expect(isinstance(output, tuple | list) and len(output) == 2,
               f"your function gives {output!r}; asked for are two numbers, without a cache and with one.")
        right, kept, slow, fast = counts(prompt, written)
        without, cached = (float(number) for number in output)
        if (without, cached) == (right, kept):
            continue
        expect((without, cached) != (kept, right), "the two are exchanged: first without a cache, then with one.")
        why = slow.get(without, "how long is the sequence at the first call, at the second, at the last? Add them up.")
        expect(without == right, f"{said} you count {without:g} without a cache: {why}")
        why = fast.get(cached, "which tokens go through the model once, and which never?")
        expect(False, f"{said} you count {cached:g} with a cache: {why}")


def counts(prompt: int, written: int) -> tuple[int, int, dict[int, str], dict[int, str]]:
    """Tokens without a cache and with one, and what a slip in either would count: number -> what is wrong with it."""
    calls = [prompt + line for line in range(written)]  # how long the sequence is at each call
    right, kept = sum(calls), prompt + written - 1
    slow = [(right + prompt + written, "there is one call too many: when the last word is written, is the model "
                                       "asked again?"),
            (right + written, "what is in the sequence at the first call? Nothing has been written yet."),
            (written * (prompt + written), "the sequence does not have its full length from the first call on."),
            (written * prompt, "the words that are written are read as well."),
            (right - written * prompt, "the given tokens go through the model in every call, too."),
            (prompt + right - written * prompt, "without a cache the given tokens are computed anew in every call."),
            (kept, "that is what it costs with a cache.")]
    fast = [(kept + 1, "is the last word ever read? Nobody asks for a word after it."),
            (written, "the given tokens have to be read once, too."),
            (written - 1, "the given tokens have to be read once, too."),
            (prompt, "each word that is written, but for the last, is read as well: its key is wanted later."),
            (right, "that is what it costs without one.")]
    # Where two slips count the same, the first one is named.
    return right, kept, dict(reversed(slow)), dict(reversed(fast))


def telling_lengths() -> tuple[int, int]:
    """Numbers of tokens given and written at which no two slips count the same."""
    while True:
        lengths = random.randint(3, 60), random.randint(3, 40)
        right, kept, slow, fast = counts(*lengths)
        if len(slow.keys() | {right}) == 8 and len(fast.keys() | {kept}) == 6:
            return lengths


# --- a step of beam search --------------------------------------------------------------------------------------------


def slow_step(log_p: list[list[float]], scores: list[float], beams: int) -> list[tuple[float, int, int]]:
    """The best of all beginnings that are one token longer: score, parent, token."""
    longer = [(scores[parent] + row[token], parent, token)
              for parent, row in enumerate(log_p) for token in range(len(row))]
    return sorted(longer, reverse=True)[:beams]


def telling_beams(n: int, k: int, beams: int) -> tuple[Tensor, Tensor]:
    """log_p (n k) and scores (n) for which the usual slips choose other beginnings."""
    while True:
        log_p = (1.5 * torch.randn(n, k)).log_softmax(dim=1)
        scores = -2 * torch.rand(n) if n > 1 else torch.zeros(1)
        numbers = log_p.tolist(), scores.tolist()
        right = slow_step(*numbers, beams)
        chosen, checkpointed_forward = ({one[1:] for one in some}
                                        for some in (right, slow_step(numbers[0], [0.0] * n, beams)))
        several = beams < 3 or all(1 < len({parent for parent, _ in some}) < beams
                                   for some in (chosen, checkpointed_forward))
        levels = sorted(one[0] for one in slow_step(*numbers, beams + 1))
        apart = min(b - a for a, b in itertools.pairwise(levels)) > 1e-3
        if apart and (n == 1 or (several and chosen != checkpointed_forward)):
            return log_p, scores


@exercise("11.3", "lesson 11, section 5")
def beam_step(step_of: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """The best of all beams times all tokens."""
    for n, k, beams in ((3, 6, 3), (1, 5, 3), (4, 9, 4), (3, 8, 4), (2, 7, 1)):
        log_p, scores = telling_beams(n, k, beams)
        given = log_p.clone(), scores.clone()
        output = step_of(log_p, scores, beams)
        expect(torch.equal(log_p, given[0]) and torch.equal(scores, given[1]),
               "your function changed what it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives {type(output).__name__}; asked for are three tensors: scores, parents, tokens.")
        for part, what in zip(output, ("the scores", "the parents", "the tokens"), strict=True):
            expect_tensor(part, (beams,), f"with {n} beams so far, {k} tokens and {beams} to keep, {what}")
        for part, what in zip(output[1:], ("parents", "tokens"), strict=True):
            expect(not part.is_floating_point(), f"the {what} hold {part.dtype}; indices are whole numbers.")
        said, parents, tokens = (part.tolist() for part in output)
        right = slow_step(log_p.tolist(), scores.tolist(), beams)
        expect(all(0 <= parent < n for parent in parents) and all(0 <= token < k for token in tokens),
               f"there are {n} beams and {k} tokens, and your parents are {parents}, your tokens {tokens}: an index "
               "into all beginnings in a row has to be taken apart, into a beam and a token.")
        truth = [scores[parent].item() + log_p[parent, token].item()
                 for parent, token in zip(parents, tokens, strict=True)]
        alone = [log_p[parent, token].item() for parent, token in zip(parents, tokens, strict=True)]
        if not alike(said, truth):
            expect(not alike(said, alone), "your scores are those of the new tokens alone: what the beams had before "
                   "is forgotten.")
            expect(not alike(said, [math.exp(x) for x in truth]), "you give probabilities; asked for are their logs.")
            expect(not alike(said, [one for one, _, _ in right]), "the scores are right, but not those of the "
                   "beginnings that you name by parent and token: was the index taken apart by the right number?")
            expect(False, "the score of a beginning is what its parent had and what its token adds; yours is another.")
        chosen, best = list(zip(parents, tokens, strict=True)), [one[1:] for one in right]
        expect(len(set(chosen)) == beams, "one and the same beginning is kept twice.")
        if set(chosen) == set(best):
            expect(chosen == best, "the right beginnings are kept, but not in order: the best comes first.")
            continue
        longer = [one[1:] for one in slow_step(log_p.tolist(), [0.0] * n, beams)]
        expect(set(chosen) != set(longer), "the scores that you give are right, but the choice was made by the new "
               "tokens alone: what the beams had before counts.")
        expect(n == 1 or len(set(parents)) < beams or beams == 1, "you keep one continuation of each beam: two of the "
               "same beam may both be better than the best of another.")
        expect(n == 1 or len(set(parents)) > 1 or beams == 1, "all that you keep goes on from one beam: the others "
               "have continuations, too.")
        expect(False, f"you keep (parent, token) {chosen}; of all {n} × {k} beginnings others have higher scores.")


def alike(some: list[float], others: list[float]) -> bool:
    """Whether these numbers agree but for rounding."""
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5) for one, other in zip(some, others, strict=True))


# --- the score of a text ----------------------------------------------------------------------------------------------


TEXT_SLIPS: dict[str, Callable[[list[float], float, int], float]] = {  # of log_p, penalty, and padded length
    "that is the sum: the length takes no part.": lambda some, power, width: sum(some),
    "that is the mean, whatever the penalty is.": lambda some, power, width: sum(some) / len(some),
    "you multiply by the power of the length: then long texts lose twice.":
        lambda some, power, width: sum(some) * len(some) ** power,
    "the length is multiplied by the penalty; asked for is a power of it.":
        lambda some, power, width: sum(some) / (len(some) * power if power else 1),
    "the penalty is the exponent, the length what is raised; you have exchanged them.":
        lambda some, power, width: sum(some) / (power ** len(some) if power else 1),
    "the penalty is subtracted: in this form it divides.": lambda some, power, width: sum(some) - power * len(some),
    "the end is a token like others, it is counted in the length.":
        lambda some, power, width: sum(some) / max(1, len(some) - 1) ** power,
    "the length is that of the padded row: padding is no part of a text.":
        lambda some, power, width: sum(some) / width ** power,
    "that is the form of Wu et al., with (5 + length) / 6; transformers', and the house's, is simpler.":
        lambda some, power, width: sum(some) / ((5 + len(some)) / 6) ** power,
    "you have put the sum into the power as well.": lambda some, power, width: -abs(sum(some) / len(some)) ** power,
}


@exercise("11.4", "lesson 11, sections 5 and 7")
def text_scores(scores_of: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Log-probability, divided by a power of the length."""
    powers = [random.uniform(0.3, 0.8), random.uniform(1.2, 2.0), 0.0, 1.0, random.uniform(-1.5, -0.5), 0.0]
    for b, t, power in zip((4, 3, 5, 3, 4, 1), (7, 12, 6, 9, 5, 1), powers, strict=True):
        lengths = [t, *random.choices(range(2, t), k=b - 1)] if t > 1 else [1]
        mask = torch.arange(t) < torch.tensor(lengths)[:, None]
        log_p = -3 * torch.rand(b, t) - 0.1  # padding has numbers as well: nobody promised zeros
        given = log_p.clone(), mask.clone()
        output = expect_tensor(scores_of(log_p, mask, power), (b,), "the scores", "(b)")
        expect(torch.equal(log_p, given[0]) and torch.equal(mask, given[1]), "your function changed what it was given.")
        some = [row[:length] for row, length in zip(log_p.tolist(), lengths, strict=True)]
        right = [sum(row) / len(row) ** power for row in some]
        if close(output, torch.tensor(right)):
            continue
        at = f"with length_penalty {power:.3g}: "
        for meaning, make in TEXT_SLIPS.items():
            expect(not close(output, torch.tensor([make(row, power, t) for row in some])), at + meaning)
        padded = torch.tensor([sum(row) / n**power for row, n in zip(log_p.tolist(), lengths, strict=True)])
        everything = torch.tensor([sum(row) / t**power for row in log_p.tolist()])
        expect(not close(output, padded) and not close(output, everything), "what stands at the places of padding is "
               "added: it is no part of the text.")
        expect(False, f"{at}for a text with the log-probabilities {[round(x, 2) for x in some[-1]]} you give "
               f"{output[-1].item():.3f}, and it should be {right[-1]:.3f}.")
    one, power = torch.full((1, 4), -0.7), 1.0
    output = scores_of(one.double(), torch.ones(1, 4, dtype=torch.bool), power)
    expect(output.dtype == torch.float64, "numbers of float64 give another kind: take the kind that comes in.")


# --- rows that end ----------------------------------------------------------------------------------------------------


class Told:
    """A model that knows by heart what it says: row after row, also after the end."""

    def __init__(self, lengths: list[int], end: int, vocabulary: int, longest: int):
        self.eos_id, self.vocab_size, self.longest = end, vocabulary, longest
        words = [index for index in range(vocabulary) if index != end]
        self.plan = [random.choices(words, k=longest + 2) for _ in lengths]
        for row, length in zip(self.plan, lengths, strict=True):
            row[length:length + 1] = [end]  # what comes after it is babble

    def __call__(self, ids: Tensor) -> Tensor:
        expect_tensor(ids, (len(self.plan), ids.shape[1]), "what you feed the model", "(b t)")
        expect(ids.shape[1] < self.longest, f"with max_length {self.longest} the model is asked for a word when "
               f"{ids.shape[1]} are written.")
        expect(bool(((ids >= 0) & (ids < self.vocab_size)).all()), "the model is fed ids that are no words of it.")
        place = torch.tensor([row[ids.shape[1]] for row in self.plan])
        return torch.nn.functional.one_hot(place, self.vocab_size).float() * 5 + torch.rand(len(place), self.vocab_size)

    def texts(self) -> list[list[int]]:
        """What is to be written, each row closed and filled with the end."""
        ends = [row.index(self.eos_id) if self.eos_id in row else self.longest for row in self.plan]
        width = min(self.longest, max(ends) + 1)
        return [[*row[:length], *[self.eos_id] * width][:width] for row, length in zip(self.plan, ends, strict=True)]


@exercise("11.5", "lesson 11, section 3")
def write(write_of: Callable[[Callable[[Tensor], Tensor], int, int, int], Tensor]) -> None:
    """A row that has ended stays ended, and the others go on."""
    for lengths, longest in (([2, 6, 4], 12), ([5, 1], 9), ([0, 3, 3, 7], 8), ([4], 10), ([9, 9], 5), ([2, 9], 6)):
        end = random.randrange(6)
        model = Told(lengths, end, 6, longest)
        right = model.texts()
        output = write_of(model, len(lengths), end, longest)
        expect_tensor(output, what="the result")
        expect(output.ndim == 2 and len(output) == len(lengths),
               f"the result has the shape {tuple(output.shape)}; asked for "
               f"are {len(lengths)} rows (b t).")
        expect(not output.is_floating_point(), f"the result holds {output.dtype}; ids are whole numbers.")
        said = output.tolist()
        at = f"with {len(lengths)} texts of {lengths} words and max_length {longest}"
        expect(said[0][:1] == right[0][:1], f"{at} the first word of the first text is {right[0][0]}, and you write "
               f"{said[0][:1]}: is it the likeliest token?")
        for row, ids in enumerate(said):
            if end in ids:
                ended = ids.index(end) + 1
                after = ids[ended:]
                expect(not any(token != end for token in after) or after == model.plan[row][ended:len(ids)],
                       f"{at} an ended row goes on with the ids {after}; it is to be filled with the end token.")
                expect(set(after) <= {end},
                       f"{at} row {row + 1} writes on after its end: it is over, whatever the model says.")
        width = len(right[0])
        if len(said[0]) < width:
            expect(not any(end in ids for ids in said), f"{at} all stop when the first has ended: the others have not "
                   "finished.")
            expect(False, f"{at} only {len(said[0])} words are written.")
        expect(len(said[0]) == width, f"{at} {len(said[0])} words are written, where {width} would do: do you stop "
               "when every row has ended, at whatever step it did?")
        for ids, whole in zip(said, right, strict=True):
            expect(ids == whole, f"{at} the model says {whole} and you write {ids}: is it the likeliest token?")

"""Checks of lesson 11: what a cache saves, rows that end, the nucleus, a step of beam search, and a text's score."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import Wrong, close, exercise, expect, expect_tensor
from .slips import agree, name_slip, parts, quantity, telling

# --- what a cache saves -----------------------------------------------------------------------------------------------


@exercise("11.1", "lesson 11, section 2")
def tokens_computed(predict: Callable[[int, int], tuple[int, int]]) -> None:
    """How many tokens go through the model, without a cache and with one."""
    draws = [*(telling_lengths() for _ in range(4)), (32, 1), (1, 2)]
    asked = "two numbers, without a cache and with one"
    answers = [[quantity(one, "each number") for one in parts(predict(*draw), 2, asked)] for draw in draws]
    known = [counts(*draw) for draw in draws]
    right = [[float(without), float(cached)] for without, cached, _, _ in known]
    if answers == right:
        return
    expect(answers != [two[::-1] for two in right], "the two are exchanged: first without a cache, then with one.")
    for side, name, question in (
            (0, "without", "how long is the sequence at the first call, at the second, at the last? Add them up."),
            (1, "with", "which tokens go through the model once, and which never?")):
        output, truth = [two[side] for two in answers], [two[side] for two in right]
        if output == truth:
            continue
        (prompt, written), number = next((draw, one) for draw, one, two in zip(draws, output, truth, strict=True)
                                         if one != two)
        said = f"with {prompt} tokens given and {written} written you count {number:g} {name} a cache: "
        # The slips in one order for all draws: at the lengths that tell nothing two of them may count the same.
        slips = {said + meaning: (lambda *draw, side=side, place=place: counts(*draw)[2 + side][place][0])
                 for place, (_, meaning) in enumerate(known[0][2 + side])}
        name_slip(slips, draws, output, truth)
        expect(False, said + question)


def counts(prompt: int, written: int) -> tuple[int, int, list[tuple[int, str]], list[tuple[int, str]]]:
    """Tokens without a cache and with one, and what a slip in either would count, and what is wrong with it."""
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
    fast = [(kept + 1, "is the last word ever read? No word is predicted after it."),
            (written, "the given tokens have to be read once, too."),
            (written - 1, "the given tokens have to be read once, too, though the last word never is."),
            (prompt, "each word that is written, but for the last, is read as well: its key is wanted later."),
            (right, "that is what it costs without one.")]
    return right, kept, slow, fast


def telling_lengths() -> tuple[int, int]:
    """Numbers of tokens given and written at which no two slips count the same."""
    while True:
        lengths = random.randint(3, 60), random.randint(3, 40)
        right, kept, slow, fast = counts(*lengths)
        if len({right, *dict(slow)}) == 8 and len({kept, *dict(fast)}) == 6:
            return lengths


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
        expect_tensor(ids, what="what you feed the model")
        expect(ids.ndim == 2 and len(ids) == len(self.plan), "what you feed the model has the shape "
               f"{tuple(ids.shape)}; the exercise asks for (b t) with b = {len(self.plan)}.")
        expect(not ids.is_floating_point(), f"what you feed the model holds {ids.dtype}; ids are whole numbers, and an "
               "embedding refuses others.")
        place = ids.shape[1]
        expect(place <= self.longest, f"with max_length {self.longest} the model is asked for a word when {place} are "
               "written.")
        expect(bool(((ids >= 0) & (ids < self.vocab_size)).all()), "the model is fed ids that are no words of it.")
        for row, said in zip(self.plan, ids.tolist(), strict=True):
            expect(self.eos_id in row[:place] or said == row[:place],
                   f"a text that has not ended is fed as {said}, and "
                   f"the model has said {row[:place]}: each next word is the likeliest token after all before it.")
        said = torch.tensor([row[place] for row in self.plan])
        # Logits of any sign, and so close to each other that whoever draws by chance does not say the same.
        noise = 0.9 * torch.rand(len(said), self.vocab_size)
        return torch.nn.functional.one_hot(said, self.vocab_size).float() + noise - 5

    def texts(self) -> list[list[int]]:
        """What is to be written, each row closed and filled with the end."""
        ends = [row.index(self.eos_id) if self.eos_id in row else self.longest for row in self.plan]
        width = min(self.longest, max(ends) + 1)
        return [[*row[:length], *[self.eos_id] * width][:width] for row, length in zip(self.plan, ends, strict=True)]


@exercise("11.2", "lesson 11, section 3")
def write(write_of: Callable[[Callable[[Tensor], Tensor], int, int, int], Tensor]) -> None:
    """A row that has ended stays ended, and the others go on."""
    ends = random.sample(range(6), 6)  # each number is the end once
    cases = (([2, 6, 4], 12), ([5, 1], 9), ([0, 3, 3, 7], 8), ([4], 10), ([9, 9], 5), ([2, 9], 6))
    for end, (lengths, longest) in zip(ends, cases, strict=True):
        model = Told(lengths, end, 6, longest)
        right = model.texts()
        output = write_of(model, len(lengths), end, longest)
        expect_tensor(output, what="the result")
        expect(output.ndim == 2 and len(output) == len(lengths),
               f"the result has the shape {tuple(output.shape)}; the exercise asks for {len(lengths)} rows (b t).")
        expect(not output.is_floating_point() and output.dtype != torch.bool,
               f"the result holds {output.dtype}; ids are "
               "whole numbers.")
        said = output.tolist()
        at = f"with {len(lengths)} texts of {lengths} words, the end {end} and max_length {longest}"
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
        expect(len(said[0]) <= longest, f"{at} {len(said[0])} words are written, more than max_length.")
        if len(said[0]) < width:
            first = min(lengths) + 1
            expect(len(said[0]) != first, f"{at} {first} words are written: all stop when the first has ended, "
                   "and the others have not finished.")
            expect(False, f"{at} only {len(said[0])} words are written.")
        expect(len(said[0]) == width, f"{at} {len(said[0])} words are written, where {width} would do: do you stop "
               "when every row has ended, at whatever step it did?")
        for ids, whole in zip(said, right, strict=True):
            expect(ids == whole, f"{at} the model says {whole} and you write {ids}: is it the likeliest token?")


# --- the nucleus ------------------------------------------------------------------------------------------------------


def stays(scores: Tensor) -> Tensor:
    """Which tokens (n k) may be drawn: softmax gives the others nothing, whichever low score they have."""
    return scores.detach().double().softmax(dim=1) > 1e-60


def kept_rows(scores: Tensor) -> list[set[int]]:
    """The tokens of each row that may be drawn."""
    return [set(row.nonzero()[:, 0].tolist()) for row in stays(scores)]


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
    """Random scores (n k) without a sum of probabilities that rounding could push over top_p; one row is sure."""
    while True:
        scores = 2 * torch.randn(n, k)
        if n > 1:
            scores[-1, random.randrange(k)] += 20
        sums = scores.double().softmax(dim=1).sort(dim=1, descending=True).values.cumsum(dim=1)
        if ((sums[:, :-1] - top_p).abs() > 1e-4).all():
            return scores


def row_sets(choose: Callable[[list[float], float], set[int]]) -> Callable[[Tensor, float], list[set[int]]]:
    """What is kept of each row, by a rule for probabilities."""
    return lambda scores, top_p: [choose(row, top_p) for row in scores.double().softmax(dim=1).tolist()]


def likeliest(probabilities: list[float], count: int) -> set[int]:
    """So many of the likeliest tokens."""
    return set(sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[:max(0, count)])


def slow_kept(order: list[int], probabilities: list[float], top_p: float) -> set[int]:
    """The tokens in this order until they hold enough."""
    sums = list(itertools.accumulate(probabilities[index] for index in order))
    return set(order[:1 + sum(held < top_p for held in sums[:-1])])


right_sets = row_sets(slow_nucleus)
NUCLEUS_SLIPS: dict[str, Callable[[Tensor, float], list[set[int]]]] = {
    "what should go is kept, and what should be kept is gone.": row_sets(
        lambda p, top_p: set(range(len(p))) - slow_nucleus(p, top_p)),
    "the kept tokens hold less than top_p: the token that crosses the line is missing.": row_sets(
        lambda p, top_p: likeliest(p, max(1, len(slow_nucleus(p, top_p)) - 1))),
    "one fewer holds top_p as well: the exercise asks for the smallest set.": row_sets(
        lambda p, top_p: likeliest(p, len(slow_nucleus(p, top_p)) + 1)),
    "as many tokens are kept as should be, but those that come first: is your choice among the sorted tokens brought "
    "back to their original order?": row_sets(lambda p, top_p: set(range(len(slow_nucleus(p, top_p))))),
    "as many tokens are kept as should be, but others: the order was applied to the sorted choice a second time, where "
    "it has to be undone. scatter writes to the places that `order` names, gather reads from them.": row_sets(
        lambda p, top_p: {place for place, index in enumerate(sorted(range(len(p)), key=lambda index: -p[index]))
                          if index < len(slow_nucleus(p, top_p))}),
    "you begin with the unlikeliest tokens.": row_sets(
        lambda p, top_p: slow_kept(sorted(range(len(p)), key=lambda index: p[index]), p, top_p)),
    "you go through the tokens in the order of their numbers: which of them should be taken first?": row_sets(
        lambda p, top_p: slow_kept(list(range(len(p))), p, top_p)),
    "you keep what is likelier than 1 − top_p: it is the sum that counts, not each token alone.": row_sets(
        lambda p, top_p: {index for index, one in enumerate(p) if one >= 1 - top_p}),
    "you keep what is likelier than top_p: it is the sum that counts, not each token alone.": row_sets(
        lambda p, top_p: {index for index, one in enumerate(p) if one >= top_p}),
    "only the likeliest token of each row is kept, whatever top_p is.": row_sets(lambda p, top_p: likeliest(p, 1)),
    "all tokens stay, in rows with a clear favourite, too.": row_sets(lambda p, top_p: set(range(len(p)))),
    "all rows get the set of the first one: each has its own.":
        lambda scores, top_p: [right_sets(scores, top_p)[0]] * len(scores),
}


@exercise("11.3", "lesson 11, section 4")
def nucleus(nucleus_of: Callable[[Tensor, float], Tensor]) -> None:
    """The smallest set that holds enough, the token that crosses the line included."""
    def make() -> list[tuple[Tensor, float]]:
        """Rows of several lengths, bounds low and high, and scores far from zero."""
        sizes = ((4, 7, 0.9, 0), (1, 5, 0.6, 0), (3, 12, 0.4, 100), (5, 6, random.uniform(0.55, 0.95), 0),
                 (2, 4, 1e-3, 0), (3, 9, 0.7, -100))
        drawn = [(clear_scores(n, k, top_p) + offset, top_p) for n, k, top_p, offset in sizes]
        # Two tokens hold 0.7, and the third is more than what they hold too much: whoever stops late takes it as well.
        even = torch.linspace(1.0, 1.6, 12)[torch.randperm(12)][None].log()  # none holds much
        return [*drawn, (even, 0.05), (torch.tensor([0.21, 0.42, 0.28, 0.09]).log()[torch.randperm(4)][None], 0.6)]

    draws = telling(make, right_sets, NUCLEUS_SLIPS)
    answers, right, same = [], [right_sets(*draw) for draw in draws], True
    for scores, top_p in draws:
        n, k = scores.shape
        given = scores.clone()
        output = nucleus_of(scores, top_p)
        large = isinstance(output, Tensor) and output.shape == (n, k) and bool(output.isnan().any())
        expect(not large or abs(float(scores.mean())) < 50, f"where scores are about {scores.mean():.0f} your result "
               "holds nan: is e to such a power still finite? Only differences of scores count.")
        expect_tensor(output, (n, k), "the result", "(n k)", scores.dtype)
        expect(torch.equal(scores, given), "your function changed the scores that it was given.")
        kept = kept_rows(output)
        zeros = all(bool((said[[i for i in range(k) if i not in wanted]] == 0).all())
                    for said, wanted in zip(output, right[len(answers)], strict=True))
        expect(kept == right[len(answers)] or not zeros or any(len(some) < k for some in kept), "tokens outside have "
               "the score 0: that does not exclude them, since e⁰ = 1. Which score does softmax turn into a "
               "probability of 0?")
        expect(all(kept), f"with top_p = {top_p:.3g} a row is left with nothing to draw from. Where a model is sure, "
               "one token alone crosses the line: what becomes of it?")
        if kept == right[len(answers)]:
            inside = stays(output)
            same &= close(output[inside], given[inside])
        answers.append(kept)
    if answers != right:
        (scores, top_p), row, kept, wanted = next(
            (draw, row, some[row], truth[row]) for draw, some, truth in zip(draws, answers, right, strict=True)
            for row in range(len(some)) if some[row] != truth[row])
        ordered = sorted((round(p, 3) for p in scores[row].double().softmax(dim=0).tolist()), reverse=True)
        at = f"with top_p = {top_p:.3g} and the probabilities {ordered} {len(kept)} are kept: "
        name_slip({at + meaning: slip for meaning, slip in NUCLEUS_SLIPS.items()}, draws, answers, right)
        lower = nucleus_of(scores - scores.mean(), top_p)
        calm = kept_rows(lower) == right_sets(scores, top_p)
        expect(not calm, f"{at}where all scores are lower by {scores.mean():.0f} your function keeps the right ones, "
               "and only differences of scores count: is the exponential of such scores still a number?")
        (alone,) = kept_rows(nucleus_of(scores[row:row + 1], top_p))
        expect(alone == kept, f"{at}of the same row alone you keep {len(alone)}: along which axis do your "
               "probabilities sum to one, and are tokens sorted?")
        expect(int(scores[row].argmax()) in kept, f"{at}the likeliest token is not among them: from which end of the "
               "sorted tokens do you begin?")
        expect(False, f"{at}the exercise asks for the {len(wanted)} likeliest, which together hold top_p, and hold "
               "less when any is taken away.")
    expect(same, "the tokens that stay have other scores than before: softmax makes probabilities later; here you only "
           "decide which tokens stay.")
    expect(kept_rows(nucleus_of(torch.tensor([[2.0, 1.0, 0.0]]) - 3e4, 0.5)) == [{0}], "scores may be any numbers: "
           "where all are about -30,000, tokens outside come back. Which score is below every other?")
    expect({len(row) for row in kept_rows(nucleus_of(torch.zeros(2, 8), 0.5))} <= {4, 8}, "of 8 tokens that are "
           "equally likely 4 hold 0.5, and you keep neither 4 nor all that tie: is more than top_p asked for where "
           "top_p is enough?")
    for top_p, meaning in ((0.0, "the likeliest token, and only that one, stays even then"),
                           (1.0, "all of them together hold 1, and no smaller set does")):
        scores = torch.randn(3, 6)
        scores[range(3), torch.randint(6, (3,))] -= 5  # some token holds hardly anything
        kept = stays(nucleus_of(scores, top_p))
        count = 1 if top_p == 0 else 6
        wrong = [int(one) for one in kept.sum(dim=1) if int(one) != count]
        expect(not wrong, f"with top_p = {top_p:g} a row of 6 tokens keeps {wrong[:1]}, and the exercise asks "
               f"for {count}: {meaning}.")
        expect(top_p > 0 or torch.equal(kept, scores == scores.amax(dim=1, keepdim=True)), "with top_p = 0 one token "
               "stays, and it is not the likeliest.")


# --- a step of beam search --------------------------------------------------------------------------------------------


def slow_step(log_p: list[list[float]], scores: list[float], beams: int) -> list[tuple[float, int, int]]:
    """The best of all beginnings that are one token longer: score, parent, token."""
    longer = [(scores[parent] + row[token], parent, token)
              for parent, row in enumerate(log_p) for token in range(len(row))]
    return sorted(longer, reverse=True)[:beams]


def telling_beams(n: int, k: int, beams: int, ahead: bool) -> tuple[Tensor, Tensor]:
    """log_p (n k) and scores (n) without near ties; all that is best is of one beam where that one is far `ahead`."""
    while True:
        log_p = (1.5 * torch.randn(n, k)).log_softmax(dim=1)
        scores = -2 * torch.rand(n) if n > 1 else torch.zeros(1)
        if ahead:
            scores -= 30 * (torch.arange(n) != random.randrange(n))
        if k > beams + 2:
            log_p[torch.arange(n), torch.randint(k, (n,))] = -torch.inf  # a token that may not come here
        best = [one for one in slow_step(log_p.tolist(), scores.tolist(), beams + 1) if one[0] > -math.inf]
        levels = sorted(one[0] for one in best)
        parents = {parent for _, parent, _ in best[:beams]}
        several = ahead or n == 1 or beams < 3 or 1 < len(parents) < beams
        if len(levels) > beams and min(b - a for a, b in itertools.pairwise(levels)) > 1e-3 and several:
            return log_p, scores


def pairs_of(step: Sequence[tuple[float, int, int]]) -> list[list[int]]:
    """Parents and tokens of what a step keeps, in its order."""
    return [list(one[1:]) for one in step]


def fewer(most: int) -> Callable[[Tensor, Tensor, int], list[list[int]]]:
    """The best of the `most` best continuations of each beam."""
    def rule(log_p: Tensor, scores: Tensor, beams: int) -> list[list[int]] | None:
        longer = [one for parent in range(len(log_p)) for one in sorted(
            [(float(scores[parent] + value), parent, token) for token, value in enumerate(log_p[parent])],
            reverse=True)[:most]]
        return pairs_of(sorted(longer, reverse=True)[:beams]) if len(longer) >= beams else None
    return rule


def from_best(log_p: Tensor, scores: Tensor, beams: int) -> list[list[int]]:
    """Only the best beam goes on."""
    best = int(scores.argmax())
    return [[best, token] for token in log_p[best].argsort(descending=True)[:beams].tolist()]


def right_pairs(log_p: Tensor, scores: Tensor, beams: int) -> list[list[int]]:
    """What is asked for."""
    return pairs_of(slow_step(log_p.tolist(), scores.tolist(), beams))


BEAM_SLIPS: dict[str, Callable[[Tensor, Tensor, int], list[list[int]] | None]] = {
    "the right beginnings are kept, but not in order: the best comes first.": lambda *draw: right_pairs(*draw)[::-1],
    "the choice was made by the new tokens alone: what the beams had before counts.":
        lambda log_p, scores, beams: right_pairs(log_p, torch.zeros_like(scores), beams),
    "you keep one continuation of each beam: two of the same beam may both be better than the best of another.":
        fewer(1),
    "you keep two continuations of each beam at most: more of the same beam may be better than the best of another.":
        fewer(2),
    "all that you keep goes on from the best beam: the others have continuations, too.": from_best,
}


@exercise("11.4", "lesson 11, section 5")
def beam_step(step_of: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    """The best of all beams times all tokens."""
    sizes = ((3, 6, 3, False), (1, 5, 3, False), (4, 9, 4, False), (3, 8, 4, True), (2, 7, 1, False), (4, 7, 3, True),
             (3, 10, 5, False))

    def make() -> list[tuple[Tensor, Tensor, int]]:
        """Beams close to each other, and some of which one is far ahead of the others."""
        drawn = [(*telling_beams(n, k, beams, ahead), beams) for n, k, beams, ahead in sizes]
        log_p, scores, beams = drawn[-1]
        return [*drawn[:-1], (log_p, scores - 200, beams)]  # as of a long text: no float32 is e^-200

    draws = telling(make, right_pairs, BEAM_SLIPS)
    answers, levels, right = [], [], [right_pairs(*draw) for draw in draws]
    for log_p, scores, beams in draws:
        n, k = log_p.shape
        given = log_p.clone(), scores.clone()
        output = step_of(log_p, scores, beams)
        expect(torch.equal(log_p, given[0]) and torch.equal(scores, given[1]),
               "your function changed what it was given.")
        expect(isinstance(output, tuple | list) and len(output) == 3,
               f"your function gives {type(output).__name__}; the exercise asks for three tensors: scores, parents, "
               "tokens.")
        for part, what in zip(output, ("the scores", "the parents", "the tokens"), strict=True):
            expect_tensor(part, (beams,), f"with {n} beams so far, {k} tokens and {beams} to keep, {what}")
        for part, what in zip(output[1:], ("parents", "tokens"), strict=True):
            expect(not part.is_floating_point() and part.dtype != torch.bool, f"the {what} hold {part.dtype}; indices "
                   "are whole numbers.")
        said, parents, tokens = (part.tolist() for part in output)
        expect([[token, parent] for parent, token in zip(parents, tokens, strict=True)] == right[len(answers)] or
               all(0 <= parent < n for parent in parents) and all(0 <= token < k for token in tokens),
               f"there are {n} beams and {k} tokens, and your parents are {parents}, your tokens {tokens}: an index "
               "into all beginnings in a row has to be taken apart, into a beam and a token.")
        answers.append([list(pair) for pair in zip(parents, tokens, strict=True)])
        levels.append(said)

    def scored(rule: Callable[[float, float], float]) -> list[list[float]]:
        """What a rule for (score, log_p) makes of the beginnings that the learner names."""
        return [[rule(float(scores[parent]), float(log_p[parent, token])) for parent, token in pairs]
                for (log_p, scores, _), pairs in zip(draws, answers, strict=True)]

    def all_alike(others: list[list[float]]) -> bool:
        """Whether these are the learner's scores, in all draws."""
        return all(map(alike, levels, others))

    turned = [[pair[::-1] for pair in pairs] for pairs in answers]
    expect(answers == right or turned != right, "parents and tokens are exchanged: first the beams that are extended, "
           "then the new tokens.")
    truth = scored(lambda score, log_p: score + log_p)
    strange = [not all(map(math.isfinite, said)) for said in levels]
    expect(not strange[-1] or any(strange[:-1]), f"where the beams' scores are about {draws[-1][1].mean():.0f} you "
           f"give {levels[-1]}: what is e to such a power in float32? Log-probabilities are added.")
    if not all_alike(truth):
        best = [[one[0] for one in slow_step(log_p.tolist(), scores.tolist(), beams)] for log_p, scores, beams in draws]
        expect(not all_alike(scored(lambda score, log_p: log_p)), "your scores are those of the new tokens alone: what "
               "the beams had before is forgotten.")
        expect(not all_alike(scored(lambda score, log_p: score)), "your scores are those that the beams had before: "
               "what the new token adds is forgotten.")
        expect(not all_alike([[math.exp(x) for x in row] for row in truth]), "you give probabilities; the exercise "
               "asks for their logs.")
        expect(not all_alike(best), "the scores are right, but not those of the beginnings that you name by parent and "
               "token: was the index taken apart by the right number?")
        expect(False, "the score of a beginning is what its parent had and what its token adds; yours is another.")
    expect(all(len(set(map(tuple, pairs))) == len(pairs) for pairs in answers), "one and the same beginning is kept "
           "twice.")
    if answers == right:
        return
    name_slip(BEAM_SLIPS, draws, answers, right)
    differ = [(draw[0], *pairs) for draw, *pairs in zip(draws, answers, right, strict=True)
              if sorted(pairs[0]) != sorted(pairs[1])]
    expect(bool(differ), "the right beginnings are kept, but not in order: the best comes first.")
    log_p, chosen, wanted = differ[0]
    missing = next(pair for pair in wanted if pair not in chosen)
    expect(False, f"you keep (parent, token) {list(map(tuple, chosen))}; of all {log_p.shape[0]} × {log_p.shape[1]} "
           f"beginnings others have higher scores, such as {tuple(missing)}: by what do you choose, and how many of "
           "one beam do you look at?")


def alike(some: list[float], others: list[float]) -> bool:
    """Whether these numbers agree but for rounding."""
    return all(one == other or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
               for one, other in zip(some, others, strict=True))


# --- the score of a text ----------------------------------------------------------------------------------------------


TEXT_SLIPS: dict[str, Callable[[list[float], float, int], float]] = {  # of log_p, penalty, and padded length
    "that is the sum: the length takes no part.": lambda some, power, width: sum(some),
    "that is the mean, whatever the penalty is.": lambda some, power, width: sum(some) / len(some),
    "you multiply by the power of the length: then long texts lose twice.":
        lambda some, power, width: sum(some) * len(some) ** power,
    "the length is multiplied by the penalty; the exercise asks for a power of it.":
        lambda some, power, width: sum(some) / (len(some) * power) if power else -math.inf,
    "the penalty is the exponent, the length what is raised; you have exchanged them.":
        lambda some, power, width: sum(some) / power ** len(some) if power else -math.inf,
    "the penalty is subtracted: in this form it divides.": lambda some, power, width: sum(some) - power * len(some),
    "the end is a token like others, it is counted in the length.":
        lambda some, power, width: sum(some) / max(1, len(some) - 1) ** power,
    "the end is a token like others, it is counted in the length: yours is too short by one.":
        lambda some, power, width: math.copysign(math.inf, power) * -1 if len(some) == 1 and power > 0 else -0.0 if len(
            some) == 1 and power < 0 else sum(some) / (len(some) - 1 or 1) ** power,
    "the length is that of the padded row: padding is no part of a text.":
        lambda some, power, width: sum(some) / width ** power,
    "that is the form of Wu et al., with (5 + length) / 6; that of transformers and of this course is simpler.":
        lambda some, power, width: sum(some) / ((5 + len(some)) / 6) ** power,
    "you have put the sum into the power as well.": lambda some, power, width: -abs(sum(some) / len(some)) ** power,
    "the sign is flipped: a log-probability is negative, and the likelier text has the higher score.":
        lambda some, power, width: -sum(some) / len(some) ** power,
    "that is the largest of its tokens' log-probabilities, and all of them count.":
        lambda some, power, width: max(some) / len(some) ** power,
}


def of_rows(make: Callable[[list[float], float, int], float]) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A slip for texts, from one for what is real of a text."""
    return lambda log_p, mask, power: torch.tensor([
        make(row[real].tolist(), power, len(row)) for row, real in zip(log_p.double(), mask, strict=True)])


def with_padding(width: bool) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A slip that adds what stands at padding."""
    def scores_of(log_p: Tensor, mask: Tensor, power: float) -> Tensor | None:
        length = log_p.shape[1] if width else mask.sum(dim=1).double()
        return log_p.double().sum(dim=1) / length**power if bool(log_p.isfinite().all()) else None
    return scores_of


right_scores = of_rows(lambda some, power, width: sum(some) / len(some) ** power)
SCORE_SLIPS = {
    "what stands at the places of padding is added: it is no part of the text.": with_padding(False),
    "what stands at the places of padding is added, and counted in the length: it is no part of the text.":
        with_padding(True),
    **{meaning: of_rows(make) for meaning, make in TEXT_SLIPS.items()}}
ANYTHING = -math.inf, math.nan, 1e4, math.inf


@exercise("11.5", "lesson 11, section 7")
def text_scores(scores_of: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Log-probability, divided by a power of the length."""
    def make() -> list[tuple[Tensor, Tensor, float]]:
        """Texts of several lengths; numbers at padding are such as tokens have."""
        powers = [random.uniform(0.3, 0.8), random.uniform(1.2, 2.0), 0.0, 1.0, random.uniform(-1.5, -0.5), 0.0]
        drawn = []
        for b, t, power in zip((4, 3, 5, 3, 4, 1), (7, 12, 6, 9, 5, 1), powers, strict=True):
            lengths = [t, *random.choices(range(1, t), k=b - 1)] if t > 1 else [1]
            mask = torch.arange(t) < torch.tensor(random.sample(lengths, b))[:, None]
            if t == 12:
                mask = mask[:, torch.randperm(t)]  # nobody said on which side padding is
            drawn.append((-3 * torch.rand(b, t) - 0.1, mask, power))  # nobody promised zeros
        return drawn

    draws = telling(make, right_scores, SCORE_SLIPS)
    answers, right = [], [right_scores(*draw) for draw in draws]
    for log_p, mask, power in draws:
        given = log_p.clone(), mask.clone()
        output = scores_of(log_p, mask, power)
        expect(not (isinstance(output, Tensor) and bool(output.isnan().any())), f"with length_penalty {power:.3g} "
               "there is nan among your scores: what is raised to a power, and is it negative?")
        answers.append(expect_tensor(output, (len(mask),), "the scores", "(b)", log_p.dtype))
        expect(torch.equal(log_p, given[0]) and torch.equal(mask, given[1]), "your function changed what it was given.")
    if not all(map(agree, answers, right)):
        (log_p, mask, power), output, truth = next(
            one for one in zip(draws, answers, right, strict=True) if not agree(*one[1:]))
        at = f"with length_penalty {power:.3g}: "
        name_slip({at + meaning: slip for meaning, slip in SCORE_SLIPS.items()}, draws, answers, right)
        row = int((output.detach().double() - truth).abs().nan_to_num(nan=1e9).argmax())
        some = [round(x, 2) for x in log_p[row][mask[row]].tolist()]
        expect(False, f"{at}for a text with the log-probabilities {some} you give {output[row].item():.5g}, and it "
               f"should be {truth[row].item():.5g}.")
    for anything in ANYTHING:
        log_p, mask = -3 * torch.rand(3, 6) - 0.1, torch.arange(6) < torch.tensor([[6], [2], [4]])
        log_p[~mask] = anything
        output, truth = scores_of(log_p, mask, 0.7), right_scores(log_p, mask, 0.7)
        if isinstance(output, Tensor) and output.shape == (3,) and not agree(output, truth):
            said, wanted = ([round(x, 3) for x in some.tolist()] for some in (output, truth))
            raise Wrong(f"where log_p is {anything:g} at the places of padding, which may hold anything, you give "
                        f"{said}, and should give {wanted}: what is 0 times such a number?")
        expect_tensor(output, (3,), "the scores", "(b)")
    log_p, mask = torch.full((2, 40), -4.0), torch.ones(2, 40, dtype=torch.bool)
    expect(agree(scores_of(log_p, mask, 1.0), right_scores(log_p, mask, 1.0)), "of a text of 40 tokens, each with the "
           "log-probability -4, your score is wrong: the product of so many probabilities is 0 in float32. Logarithms "
           "are added.")
    one, power = torch.full((1, 4), -0.7), 1.0
    output = scores_of(one.double(), torch.ones(1, 4, dtype=torch.bool), power)
    expect(output.dtype == torch.float64, f"numbers of float64 give {output.dtype}: keep the dtype that comes in.")

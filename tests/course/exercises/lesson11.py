"""Answers to the exercises of lesson 11."""

import numpy as np
import torch
import torch.nn.functional as F

from minblip2 import generation

from . import Answers

# --- 11.1 -------------------------------------------------------------------------------------------------------------


def by_counting(prompt, written):
    slow = fast = 0
    for call in range(written):
        slow += prompt + call
        fast += prompt if call == 0 else 1
    return slow, fast


def by_formula(prompt, written):
    return [written * prompt + written * (written - 1) // 2, prompt + written - 1]


# --- 11.2 -------------------------------------------------------------------------------------------------------------


def write_by_rows(next_logits, rows, end, max_length):
    texts = [[] for _ in range(rows)]
    while len(texts[0]) < max_length and not all(end in text for text in texts):
        token = next_logits(torch.tensor(texts, dtype=torch.long)).argmax(dim=1).tolist()
        texts = [[*text, end if end in text else one] for text, one in zip(texts, token, strict=True)]
    return torch.tensor(texts)


def write_by_sample(next_logits, rows, end, max_length):
    ids = [torch.empty(rows, 0, dtype=torch.long)]

    def go_on(token, mask, cache):
        ids[0] = torch.cat([ids[0], token], dim=1)
        return next_logits(ids[0])
    return generation.greedy_or_sample(go_on, next_logits(ids[0]), torch.ones(rows, 1).bool(), generation.KVCache(1),
                                       eos_id=end, max_length=max_length)


def write_in_a_buffer(next_logits, rows, end, max_length):
    ids = torch.full((rows, max_length), end)
    for place in range(max_length):
        going = ~(ids[:, :place] == end).any(dim=1)
        if not going.any():
            return ids[:, :place]
        ids[going, place] = next_logits(ids[:, :place]).argmax(dim=1)[going]
    return ids


def write_ahead(next_logits, rows, end, max_length):
    """The model is asked once more than its words are wanted."""
    ids, finished = torch.empty(rows, 0, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
    logits = next_logits(ids)
    while ids.shape[1] < max_length and not finished.all():
        token = torch.where(finished, end, logits.argmax(dim=1))
        finished |= token == end
        ids = torch.cat([ids, token[:, None]], dim=1)
        logits = next_logits(ids)
    return ids


def written(stops=lambda finished, token, end: finished.all(), fill=lambda end: end, keep=True, pick=torch.argmax,
            more=0):
    """A loop with a slip."""
    def write_of(next_logits, rows, end, max_length):
        ids, finished = torch.empty(rows, 0, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)
        while ids.shape[1] < max_length + more:
            token = pick(next_logits(ids), dim=1)
            token = token.masked_fill(finished, fill(end)) if keep else token
            finished = finished | (token == end)
            ids = torch.cat([ids, token[:, None]], dim=1)
            if stops(finished, token, end):
                break
        return ids
    return write_of


# --- 11.3 -------------------------------------------------------------------------------------------------------------


def nucleus_by_loop(scores, top_p):
    kept = torch.full_like(scores, -torch.inf)
    for row, probabilities in enumerate(scores.softmax(dim=1)):
        held = 0.0
        for index in probabilities.argsort(descending=True).tolist():
            kept[row, index] = scores[row, index]
            held += probabilities[index].item()
            if held >= top_p:
                break
    return kept


def nucleus_by_pairs(scores, top_p):
    p = scores.softmax(dim=1)
    before = ((p[:, None] > p[..., None]) * p[:, None]).sum(dim=2)  # what is likelier than each token
    out = (before >= top_p) & (p < p.amax(dim=1, keepdim=True))
    return scores.masked_fill(out, -1e9)


def nucleus_by_searching(scores, top_p):
    """How many are needed, and then a bound for the scores."""
    ordered = scores.sort(dim=1, descending=True).values
    count = torch.searchsorted(ordered.softmax(dim=1).cumsum(dim=1)[:, :-1].contiguous(), torch.full((len(scores), 1),
                                                                                                    top_p))
    return scores.where(scores >= ordered.gather(1, count), -torch.inf)


def wrong_axis(scores, top_p):
    ordered, order = scores.sort(dim=1, descending=True)
    probability = ordered.softmax(dim=0)
    outside = probability.cumsum(dim=1) - probability >= top_p
    outside[:, 0] = False
    return scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)


def of_the_first_row(scores, top_p):
    return scores.masked_fill(generation.top_p_filter(scores, top_p)[:1] == -torch.inf, -torch.inf)


def by_naive_exp(scores, top_p):
    ordered, order = scores.sort(dim=1, descending=True)
    probability = ordered.exp() / ordered.exp().sum(dim=1, keepdim=True)
    outside = probability.cumsum(dim=1) - probability >= top_p
    outside[:, 0] = False
    return scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)


def unsorted(scores, top_p):
    probability = scores.softmax(dim=1)
    outside = probability.cumsum(dim=1) - probability >= top_p
    outside[:, 0] = False
    return scores.masked_fill(outside, -torch.inf)


def cut(rule, back=True, fill=-torch.inf):
    """A nucleus with a slip: rule(sums, probabilities, top_p) says what goes."""
    def nucleus_of(scores, top_p):
        ordered, order = scores.sort(dim=1, descending=True)
        probability = ordered.softmax(dim=1)
        outside = rule(probability.cumsum(dim=1), probability, top_p)
        return scores.masked_fill(outside.scatter(1, order, outside) if back else outside, fill)
    return nucleus_of


def without_top(sums, p, top_p):
    return sums - p >= top_p


def one_short(sums, p, top_p):
    outside = sums > top_p
    outside[:, 0] = False
    return outside


def first_stays(sums, p, top_p):
    outside = sums - p >= top_p
    outside[:, 0] = False
    return outside


def in_place(scores, top_p):
    return scores.copy_(generation.top_p_filter(scores, top_p))


def unlikeliest(scores, top_p):
    return torch.where(generation.top_p_filter(-scores, top_p) > -torch.inf, scores, -torch.inf)


# --- 11.4 -------------------------------------------------------------------------------------------------------------


def by_sorting(log_p, scores, beams):
    longer = [(scores[n] + log_p[n, k], n, k) for n in range(len(log_p)) for k in range(log_p.shape[1])]
    best = sorted(longer, key=lambda one: -one[0])[:beams]
    return torch.stack([one[0] for one in best]), *(torch.tensor([one[i] for one in best]) for i in (1, 2))


def by_each_beam(log_p, scores, beams):
    values, tokens = log_p.topk(min(beams, log_p.shape[1]), dim=1)  # more than `beams` of one beam are never kept
    best, place = (values + scores[:, None]).flatten().topk(beams)
    return best, place // values.shape[1], tokens.flatten()[place]


def step(longer=lambda log_p, scores: log_p + scores[:, None], apart=lambda place, n, k: (place // k, place % k)):
    """A step with a slip."""
    def step_of(log_p, scores, beams):
        best, place = longer(log_p, scores).flatten().topk(beams)
        return best, *apart(place, *log_p.shape)
    return step_of


def by_unravelling(log_p, scores, beams):
    longer = torch.einsum("nk,n->nk", torch.ones_like(log_p), scores) + log_p
    best = longer.flatten().argsort(descending=True)[:beams]
    parents, tokens = torch.unravel_index(best, longer.shape)
    return longer[parents, tokens], parents.int(), tokens.int()


def some_of_each(most):
    """The mistake to look at so many continuations of each beam only."""
    def step_of(log_p, scores, beams):
        values, tokens = log_p.topk(max(most, -(-beams // len(log_p))), dim=1)
        best, place = (values + scores[:, None]).flatten().topk(beams)
        return best, place // values.shape[1], tokens.flatten()[place]
    return step_of


def added_probabilities(log_p, scores, beams):
    place = (log_p.exp() + scores.exp()[:, None]).flatten().topk(beams).indices
    return (log_p + scores[:, None]).flatten()[place], place // log_p.shape[1], place % log_p.shape[1]


def worst(log_p, scores, beams):
    best, parents, tokens = step()(-log_p.clamp(min=-50), -scores, beams)
    return (log_p + scores[:, None])[parents, tokens], parents, tokens


def one_child_each(log_p, scores, beams):
    best, token = (log_p + scores[:, None]).max(dim=1)
    best, token = F.pad(best, (0, max(0, beams - len(best))), value=-99.0), F.pad(token, (0, beams))
    best, parent = best.topk(beams)
    return best, parent.clamp(max=len(scores) - 1), token[parent]


def of_the_best(log_p, scores, beams):
    best, token = (log_p + scores[:, None])[scores.argmax()].topk(beams)
    return best, scores.argmax().expand(beams), token


def by_new_tokens(log_p, scores, beams):
    place = log_p.flatten().topk(beams).indices
    return (log_p + scores[:, None]).flatten()[place], place // log_p.shape[1], place % log_p.shape[1]


def turned(answer):
    return lambda *given: tuple(part.flip(0) for part in answer(*given))


# --- 11.5 -------------------------------------------------------------------------------------------------------------


def by_rows(log_p, mask, length_penalty):
    return torch.stack([row[real].sum() / real.sum() ** length_penalty for row, real in zip(log_p, mask, strict=True)])


def by_where(log_p, mask, length_penalty):
    return torch.where(mask, log_p, 0).sum(dim=1) * mask.sum(dim=1).to(log_p.dtype).pow(-length_penalty)


def by_means(log_p, mask, length_penalty):
    """The mean of what is real, and what the length's power makes of it."""
    length = mask.sum(dim=1)
    return log_p.masked_fill(~mask, torch.nan).nanmean(dim=1) * length.double().pow(1 - length_penalty).to(log_p.dtype)


def scored(make):
    """Another use of sum, length, penalty and width."""
    return lambda log_p, mask, power: make(log_p.masked_fill(~mask, 0).sum(dim=1), mask.sum(dim=1), power,
                                           log_p.shape[1])


def changing(log_p, mask, power):
    log_p[~mask] = 0
    return by_rows(log_p, mask, power)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def nucleus_by_level(scores, top_p):
    """The score of the last token that stays, and all that are as high."""
    ordered = scores.softmax(dim=-1).sort(dim=-1, descending=True).values
    last = (ordered.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return torch.where(scores.softmax(dim=-1) >= ordered.gather(1, last), scores, -torch.inf)


def write_by_lists(next_logits, rows, end, max_length):
    said = [[] for _ in range(rows)]
    while len(said[0]) < max_length and not all(end in row for row in said):
        logits = next_logits(torch.tensor(said, dtype=torch.long).reshape(rows, -1))
        for row, one in zip(said, logits, strict=True):
            row.append(end if end in row else int(one.argmax()))
    return torch.tensor(said)


def filled_with_nothing(next_logits, rows, end, max_length):
    """The mistake to fill ended rows with 0."""
    ids = write_by_lists(next_logits, rows, end, max_length)
    return ids.masked_fill((ids == end).cumsum(dim=1) - (ids == end).long() > 0, 0)


def written_as_floats(next_logits, rows, end, max_length):
    ids, done = torch.empty(rows, 0), torch.zeros(rows, dtype=torch.bool)
    while ids.shape[1] < max_length and not done.all():
        token = next_logits(ids).argmax(dim=1).masked_fill(done, end)
        done |= token == end
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids.long()


def by_products(log_p, scores, beams):
    """The mistake to multiply probabilities, which vanish in a long text."""
    best, place = (log_p.exp() * scores.exp()[:, None]).flatten().topk(beams)
    return best.log(), place // log_p.shape[1], place % log_p.shape[1]


ANSWERS = {
    "tokens_computed": Answers(
        [by_counting, by_formula, lambda p, w: np.array(by_counting(p, w)),
         lambda p, w: torch.tensor(by_counting(p, w)), lambda p, w: (np.int64(by_counting(p, w)[0]), float(p + w - 1))],
        [(lambda p, w: (w * p + w * (w + 1) // 2, p + w - 1), "Nothing has been written yet"),
         (lambda p, w: (w * (p + w), p + w - 1), "full length"), (lambda p, w: (w * p, p + w - 1), "are read as well"),
         (lambda p, w: (by_formula(p, w)[0] + p + w, p + w - 1), "one call too many"),
         (lambda p, w: (by_formula(p, w)[0], p + w), "last word ever read"),
         (lambda p, w: (by_formula(p, w)[0], w), "read once"),
         (lambda p, w: (by_formula(p, w)[0], p), "its key is wanted later"),
         (lambda p, w: (p + w - 1, by_formula(p, w)[0]), "exchanged"),
         (lambda p, w: by_formula(p, w)[0], "two numbers"),
         (lambda p, w: (by_formula(p, w)[0] - w * p, p + w - 1), "in every call, too"),
         (lambda p, w: (by_formula(p, w)[0] - w * p + p, p + w - 1), "computed anew"),
         (lambda p, w: (by_formula(p, w)[0], by_formula(p, w)[0]), "costs without one"),
         (lambda p, w: (by_formula(p, w)[0], w - 1), "read once"), (lambda p, w: (p * w * w, p + w - 1), "Add them up"),
         (lambda p, w: tuple(map(str, by_formula(p, w))), "one number")]),
    "write": Answers(
        [write_by_lists,
         write_by_rows, write_by_sample, write_in_a_buffer, write_ahead],
        [(written_as_floats, "ids are whole numbers"),
         (filled_with_nothing, "filled with the end token"),
         (written(keep=False), "writes on after its end"),
         (written(keep=False, stops=lambda finished, token, end: (token == end).all()), "writes on after its end"),
         (written(stops=lambda finished, token, end: finished.any()), "first has ended"),
         (written(stops=lambda finished, token, end: False), "every row has ended"),
         (written(fill=lambda end: 7), "no words of it"),
         (written(fill=lambda end: (end + 1) % 6), "filled with the end token"),
         (written(pick=torch.argmin), "likeliest"),
         (written(more=1), "max_length"), (written(stops=lambda finished, token, end: True), "words are written"),
         (written(pick=lambda logits, dim: torch.multinomial(logits.softmax(dim), 1)[:, 0]), "likeliest"),
         (written(pick=lambda logits, dim: (logits > 0).long().argmax(dim)), "likeliest"),
         (lambda next_logits, rows, end, longest: written()(next_logits, rows, 0, longest), ""),
         (lambda next_logits, rows, end, longest: written()(next_logits, rows, end, longest - 1), "words are written"),
         (lambda next_logits, rows, end, longest: written()(lambda ids: next_logits(ids[:, -1:]), rows, end, longest),
          ""),
         (lambda *given: written()(*given).float(), "whole numbers"), (lambda *given: written()(*given)[:1], "rows")]),
    "nucleus": Answers(
        [nucleus_by_level,
         generation.top_p_filter, nucleus_by_loop, nucleus_by_pairs, nucleus_by_searching],
        [(lambda scores, top_p: generation.top_p_filter(scores, top_p).clamp(min=-1e4), "below every other"),
         (lambda scores, top_p: nucleus_by_loop(scores, max(top_p, 0.3)), ""),
         (lambda scores, top_p: nucleus_by_loop(scores.double(), top_p), "float64"),
         (cut(lambda sums, p, top_p: sums > top_p), "left with nothing"),
         (cut(one_short), "crosses the line is missing"),
         (cut(lambda sums, p, top_p: sums - 2 * p >= top_p), "exercise asks for"),
         (cut(lambda sums, p, top_p: F.pad((sums >= top_p)[:, :-1], (2, 0))[:, :-1]), "smallest set"),
         (cut(first_stays, back=False), "their original order"), (cut(first_stays, fill=0.0), "e⁰ = 1"),
         (cut(without_top), "only that one, stays even then"), (wrong_axis, "of the same row alone"),
         (of_the_first_row, "the set of the first one"), (by_naive_exp, "exponential"), (unsorted, "taken first"),
         (lambda scores, top_p: scores.masked_fill(scores < scores.amax(dim=1, keepdim=True), -torch.inf), "whatever"),
         (lambda scores, top_p: generation.top_p_filter(scores, min(top_p, 0.95)), "all of them together"),
         (lambda scores, top_p: scores.masked_fill(scores < scores.topk(2, dim=1).values[:, 1:], -torch.inf), ""),
         (lambda scores, top_p: generation.top_p_filter(scores, 0.9), ""), (in_place, "changed the scores"),
         (lambda scores, top_p: generation.top_p_filter(scores, top_p).log_softmax(dim=1), "other scores than before"),
         (lambda scores, top_p: generation.top_p_filter(scores, top_p).softmax(dim=1), "e⁰ = 1"),
         (unlikeliest, "from which end"), (lambda scores, top_p: scores, "all tokens stay"),
         (lambda scores, top_p: scores.masked_fill(scores.softmax(dim=1) < 1 - top_p, -torch.inf), ""),
         (lambda scores, top_p: scores.masked_fill((scores.softmax(1) < top_p) & (scores < scores.amax(1, True)),
                                                   -torch.inf), ""),
         (lambda scores, top_p: scores.masked_fill(generation.top_p_filter(scores, top_p) > -torch.inf, -torch.inf),
          "what should be kept is gone")]),
    "beam_step": Answers(
        [step(), by_sorting, by_each_beam, by_unravelling],
        [(by_products, "what is e to such a power"),
         (step(longer=lambda log_p, scores: log_p), "is forgotten"),
         (step(apart=lambda place, n, k: (place // n, place % n)), "taken apart"),
         (step(apart=lambda place, n, k: (place % k, place // k)), "are exchanged"),
         (step(apart=lambda place, n, k: (place % n, place // n % k)), "taken apart"),
         (step(longer=lambda log_p, scores: (log_p + scores[:, None]).exp()), "asks for their logs"),
         (step(longer=lambda log_p, scores: log_p * scores[:, None]), "yours is another"),
         (one_child_each, "yours is another"), (some_of_each(1), "one continuation of each beam"),
         (of_the_best, "goes on from the best beam"),
         (by_new_tokens, "by the new tokens alone"),
         (turned(step()), "not in order"), (lambda *given: step()(*given)[:2], "three tensors"),
         (lambda *given: tuple(part.float() for part in step()(*given)), "whole numbers"),
         (some_of_each(2), "two continuations of each beam at most"), (some_of_each(3), "how many of one beam"),
         (lambda log_p, scores, beams: step()(-log_p, -scores, beams), "yours is another"),
         (step(longer=lambda log_p, scores: scores[:, None].expand_as(log_p)), "the new token adds is forgotten"),
         (lambda log_p, scores, beams: (scores[step()(log_p, scores, beams)[1]], *step()(log_p, scores, beams)[1:]),
          "the new token adds is forgotten"), (added_probabilities, "have higher scores"),
         (worst, "have higher scores")]),
    "text_scores": Answers(
        [by_rows, by_where, by_means, lambda log_p, mask, power: torch.tensor(
            [sum(row[real].tolist()) / int(real.sum()) ** power for row, real in zip(log_p, mask, strict=True)],
            dtype=log_p.dtype)],
        [(lambda *given: by_where(*given).double(), "float64"),
         (scored(lambda total, length, power, width: total), "takes no part"),
         (scored(lambda total, length, power, width: total / length), "whatever the penalty"),
         (scored(lambda total, length, power, width: total * length**power), "lose twice"),
         (scored(lambda total, length, power, width: total / (length * power)), "a power of it"),
         (scored(lambda total, length, power, width: total / power**length), "exchanged"),
         (scored(lambda total, length, power, width: total - power * length), "subtracted"),
         (scored(lambda total, length, power, width: total / (length - 1).clamp(min=1) ** power),
          "counted in the length"),
         (scored(lambda total, length, power, width: total / width**power), "padded row"),
         (scored(lambda total, length, power, width: total / ((5 + length) / 6) ** power), "Wu et al."),
         (lambda log_p, mask, power: log_p.sum(dim=1) / mask.sum(dim=1) ** power, "places of padding"),
         (lambda log_p, mask, power: log_p.sum(dim=1) / log_p.shape[1] ** power, "places of padding"),
         (changing, "changed what it was given"),
         (lambda log_p, mask, power: by_rows(log_p.float(), mask, power), "float64"),
         (lambda log_p, mask, power: (log_p * mask).sum(dim=1) / mask.sum(dim=1) ** power, "0 times such a number"),
         (lambda log_p, mask, power: by_rows(log_p.nan_to_num(), mask | (log_p != log_p), power), "0 times"),
         (lambda log_p, mask, power: by_rows(log_p, log_p != 0, power), "places of padding"),
         (lambda *given: -by_rows(*given), "the sign is flipped"), (lambda *given: by_rows(*given) - 0.01, "should be"),
         (lambda *given: by_rows(*given)[:, None], "(b)")]),
}

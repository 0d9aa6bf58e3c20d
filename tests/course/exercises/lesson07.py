"""Answers to the exercises of lesson 07."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from minblip2.stage1 import Stage1

from . import Answers

# --- 07.1 -------------------------------------------------------------------------------------------------------------


def mean_of_answers(states, queries, head):
    return head(states[:, :queries]).mean(dim=1)


def answer_of_mean(states, queries, head):
    return F.linear(states[:, :queries].mean(dim=1), head.weight, head.bias)


def one_by_one(states, queries, head):
    return sum(head(states[:, place]) for place in range(queries)) / queries


def by_einsum(states, queries, head):
    return torch.einsum("bqe,ne->bn", states[:, :queries], head.weight) / queries + head.bias


def by_weights(states, queries, head):
    """The head asks everybody, and words count nothing."""
    shares = (torch.arange(states.shape[1]) < queries).float() / queries
    return (head(states) * shares[:, None]).sum(dim=1)


def half_detached(states, queries, head):
    said = mean_of_answers(states, queries, head)
    return (said + said.detach()) / 2


def in_place_states(states, queries, head):
    with torch.no_grad():
        states[:, queries:] = 0
    return mean_of_answers(states, queries, head)


# --- 07.2 -------------------------------------------------------------------------------------------------------------


def rate(wrong):
    p = 1 / (1 + wrong)
    return p, -sum(share * math.log(share) for share in (p, 1 - p) if share), max(p, 1 - p)


def rate_by_torch(wrong):
    labels = torch.tensor([1.0] + [0.0] * wrong, dtype=torch.float64)
    p = labels.mean()
    return p, F.binary_cross_entropy(p.expand_as(labels), labels), max(p, 1 - p)


def rated(said=None, loss=None, accuracy=None):
    """The three numbers, some of them made otherwise from p."""
    def predict(wrong):
        right, p = rate(wrong), 1 / (1 + wrong)
        return tuple(slip(p, wrong) if slip else number
                     for slip, number in zip((said, loss, accuracy), right, strict=True))
    return predict


# --- 07.3 -------------------------------------------------------------------------------------------------------------


def by_stage1(similarity, same_image):
    return Stage1.sample_negatives(None, similarity, same_image)


def by_gumbel(similarity, same_image):
    """The largest of logits to which Gumbel noise was added is a draw from their softmax."""
    if bool(same_image.all()):
        raise ValueError("one image only")
    noisy = [(side - torch.log(-torch.log(torch.rand_like(side)))).masked_fill(same_image, -math.inf)
             for side in (similarity.T, similarity)]
    return noisy[0].argmax(dim=1), noisy[1].argmax(dim=1)


def by_loop(similarity, same_image):
    sides = []
    for matrix in (similarity.T, similarity):
        chosen = []
        for row, same in zip(matrix, same_image, strict=True):
            others = (~same).nonzero()[:, 0]
            if not len(others):
                raise ValueError("no other image in this batch")
            chosen.append(others[torch.multinomial(row[others].softmax(dim=0), 1)])
        sides.append(torch.cat(chosen))
    return sides


def by_large_number(similarity, same_image):
    assert_some(same_image)
    return tuple(torch.multinomial((side - 1e4 * same_image).softmax(dim=1), 1)[:, 0]
                 for side in (similarity.T, similarity))


def assert_some(same_image):
    if same_image.all():
        raise ValueError("no negatives")


def draws(out=lambda same: same, scores=lambda side: side, sides=lambda s: (s.T, s), look=True,
          pick=lambda weights: torch.multinomial(weights, 1)[:, 0]):
    """Negatives with a slip."""
    def draw(similarity, same_image):
        if look:
            assert_some(same_image)
        return tuple(pick(scores(side).masked_fill(out(same_image), -math.inf).softmax(dim=1))
                     for side in sides(similarity))
    return draw


def late(similarity, same_image):
    assert_some(same_image)
    return tuple(torch.multinomial(side.softmax(dim=1).masked_fill(same_image, 0), 1)[:, 0]
                 for side in (similarity.T, similarity))


def floored(similarity, same_image):
    """LAVIS has added a small number to every probability at one time."""
    assert_some(same_image)
    return tuple(torch.multinomial((side.softmax(dim=1) + 1e-4).masked_fill(same_image, 0), 1)[:, 0]
                 for side in (similarity.T, similarity))


def finite(similarity, same_image, lowest=-1e9):
    return tuple(torch.multinomial(side.masked_fill(same_image, lowest).softmax(dim=1), 1)[:, 0]
                 for side in (similarity.T, similarity))


def filled_with(lowest):
    """Softmax over all, after forbidden logits were replaced by a number."""
    def draw(similarity, same_image):
        assert_some(same_image)
        return finite(similarity, same_image, lowest)
    return draw


def by_exp_in_double(similarity, same_image):
    """Exponentials as they come: float64 has more of them, and not all."""
    assert_some(same_image)
    grown = similarity.double().exp().masked_fill(same_image, 0)
    return torch.multinomial(grown.T, 1)[:, 0], torch.multinomial(grown, 1)[:, 0]


def by_categorical(similarity, same_image):
    assert_some(same_image)
    return [torch.distributions.Categorical(logits=side.masked_fill(same_image, -math.inf)).sample()
            for side in (similarity.t(), similarity)]


def by_choices(similarity, same_image):
    """Python's own draws, from exponentials whose largest is 1."""
    assert_some(same_image)
    sides = []
    for side in (similarity.T, similarity):
        chosen = []
        for row, same in zip(side.tolist(), same_image.tolist(), strict=True):
            places = [place for place, one in enumerate(same) if not one]
            most = max(row[place] for place in places)
            chosen += random.choices(places, [math.exp(row[place] - most) for place in places])
        sides.append(torch.tensor(chosen))
    return sides[0], sides[1]


def wrong_axis(similarity, same_image):
    """Softmax down the columns, draws along the rows."""
    assert_some(same_image)
    likes = similarity.masked_fill(same_image, -math.inf)
    return tuple(torch.multinomial((side.softmax(dim=0) + 1e-30).masked_fill(same_image, 0), 1)[:, 0]
                 for side in (likes.T, likes))


def wrong_axis_after(similarity, same_image):
    """One matrix of probabilities for both sides: rows of it for the texts, columns of it for the images."""
    assert_some(same_image)
    shares = similarity.masked_fill(same_image, -math.inf).softmax(dim=1) + 1e-30
    shares = shares.masked_fill(same_image, 0)
    return torch.multinomial(shares.T, 1)[:, 0], torch.multinomial(shares, 1)[:, 0]


def top_three(similarity, same_image):
    """The mistake to draw evenly from the most similar ones."""
    assert_some(same_image)
    sides = []
    for side in (similarity.T, similarity):
        chosen = []
        for row, same in zip(side, same_image, strict=True):
            best = row.masked_fill(same, -math.inf).argsort(descending=True)[:min(3, int((~same).sum()))]
            chosen.append(random.choice(best.tolist()))
        sides.append(torch.tensor(chosen))
    return tuple(sides)


def one_draw_for_both(similarity, same_image):
    images, _ = by_stage1(similarity, same_image)
    return images, images


def by_naive_exp(similarity, same_image):
    assert_some(same_image)
    grown = similarity.exp().masked_fill(same_image, 0)
    return torch.multinomial(grown.T, 1)[:, 0], torch.multinomial(grown, 1)[:, 0]


def by_common_largest(similarity, same_image):
    """Minus the largest of all: too much for rows that are far below it."""
    assert_some(same_image)
    grown = (similarity - similarity.masked_fill(same_image, -math.inf).max()).exp().masked_fill(same_image, 0)
    return torch.multinomial(grown.T, 1)[:, 0], torch.multinomial(grown, 1)[:, 0]


def in_place(similarity, same_image):
    similarity.masked_fill_(same_image, -math.inf)
    return by_stage1(similarity, same_image)


# --- 07.4 -------------------------------------------------------------------------------------------------------------


def by_blocks(wrong_image, wrong_text):
    own = torch.arange(len(wrong_image))
    return torch.cat([own, wrong_image, own]), torch.cat([own, own, wrong_text]), (torch.arange(3 * len(own))
                                                                                  < len(own)).long()


def by_stack(wrong_image, wrong_text):
    b = len(wrong_image)
    images, texts = torch.arange(b).repeat(3, 1), torch.arange(b).repeat(3, 1)
    images[1], texts[2] = wrong_image, wrong_text
    return images.flatten(), texts.flatten(), torch.tensor([1] * b + [0] * 2 * b)


def by_lists(wrong_image, wrong_text):
    own, n = list(range(len(wrong_image))), len(wrong_image)
    return (torch.tensor(own + wrong_image.tolist() + own), torch.tensor(own + own + wrong_text.tolist()),
            torch.tensor([1] * n + [0] * n + [0] * n))


def triple(change):
    return lambda wrong_image, wrong_text: change(*by_blocks(wrong_image, wrong_text))


def both_wrong(wrong_image, wrong_text):
    own = torch.arange(len(wrong_image))
    return (torch.cat([own, wrong_image, wrong_image]), torch.cat([own, wrong_text, wrong_text]),
            by_blocks(wrong_image, wrong_text)[2])


def side_by_side(images, texts, labels):
    order = torch.arange(len(images)).view(3, -1).T.flatten()
    return images[order], texts[order], labels[order]


def third_first(images, texts, labels):
    b = len(images) // 3
    order = torch.cat([torch.arange(b), torch.arange(2 * b, 3 * b), torch.arange(b, 2 * b)])
    return images[order], texts[order], labels


def by_inverse(wrong_image, wrong_text):
    """The mistake to turn one side's draws round for the other."""
    return by_blocks(wrong_image, wrong_image.argsort())


# --- 07.5 -------------------------------------------------------------------------------------------------------------


def by_topk(cosine, match, k):
    order = cosine.argsort(descending=True)
    first = cosine.topk(min(k, len(cosine))).indices
    again = (match(first) + cosine[first]).argsort(descending=True)
    return torch.cat([first[again], order[len(first):]])


def by_sorted(cosine, match, k):
    order = sorted(range(len(cosine)), key=lambda place: -cosine[place].item())
    total = {place: (match(place) + cosine[place]).item() for place in order[:k]}
    return torch.tensor(sorted(order[:k], key=lambda place: -total[place]) + order[k:])


def by_lift(cosine, match, k):
    first, total = cosine.argsort(descending=True)[:k], cosine - 100
    return total.scatter(0, first, cosine[first] + match(first)).argsort(descending=True)


def by_sinking(cosine, match, k):
    """The mistake to take away so much that close cosines become equal."""
    first, total = cosine.topk(min(k, len(cosine))).indices, cosine - 1e4
    total[first] = match(first) + cosine[first]
    return total.argsort(descending=True)


def by_infinity(cosine, match, k):
    """Minus infinity for the others, and ITC's order for those."""
    order = cosine.argsort(descending=True)
    total = torch.full_like(cosine, -math.inf)
    total[order[:k]] = match(order[:k]) + cosine[order[:k]]
    return torch.cat([total.argsort(descending=True)[:len(order[:k])], order[k:]])


def ranked(score=lambda logit, cosine: logit + cosine, join=lambda first, again, rest: torch.cat([first[again], rest]),
           descending=True):
    """Re-ranking with a slip."""
    def rank(cosine, match, k):
        order = cosine.argsort(descending=True)
        first, rest = order[:k], order[k:]
        return join(first, score(match(first), cosine[first]).argsort(descending=descending), rest)
    return rank


def all_of_them(cosine, match, k):
    return (cosine + match(torch.arange(len(cosine)))).argsort(descending=True)


def misplaced(cosine, match, k):
    first = cosine.argsort(descending=True)[:k]
    again = (match(first) + cosine[:k]).argsort(descending=True)
    return torch.cat([first[again], cosine.argsort(descending=True)[k:]])


def by_boolean(cosine, match, k):
    first = cosine >= cosine.sort().values[-min(k, len(cosine))]
    return torch.where(first, match(first).mean() + 100, cosine).argsort(descending=True)


def unclamped(cosine, match, k):
    first = cosine.topk(k).indices
    return torch.cat([first[(match(first) + cosine[first]).argsort(descending=True)],
                      cosine.argsort(descending=True)[k:]])


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def by_numpy(similarity, same_image):
    assert_some(same_image)

    def drawn(likes):
        shares = likes.masked_fill(same_image, -torch.inf).double().softmax(dim=1).numpy()
        return torch.tensor([np.random.choice(len(row), p=row / row.sum()) for row in shares])

    return drawn(similarity.T), drawn(similarity)


def with_one_noise(similarity, same_image):
    """The mistake to draw one noise for all rows."""
    assert_some(same_image)
    noise = -torch.rand(len(similarity)).log().neg().log()
    likes = similarity.masked_fill(same_image, -torch.inf)
    return (likes.T + noise).argmax(dim=1), (likes + noise).argmax(dim=1)


def lifted(cosine, match, k):
    """The mistake to trust that three is more than any logit can take away."""
    first = cosine.topk(min(k, len(cosine))).indices
    scores = cosine.clone()
    scores[first] += match(first) + 3
    return scores.argsort(descending=True)


def asked_one_by_one(cosine, match, k):
    order = sorted(range(len(cosine)), key=lambda i: -cosine[i].item())
    scores = {i: (match(torch.tensor([i]))[0] + cosine[i]).item() for i in order[:k]}
    return torch.tensor(sorted(scores, key=lambda i: -scores[i]) + order[k:])


ANSWERS = {
    "match_logits": Answers(
        [mean_of_answers, answer_of_mean, one_by_one, by_einsum, by_weights],
        [(lambda states, queries, head: head(states[:, :queries]).clamp(-3, 3).mean(dim=1), ""),
         (lambda *given: mean_of_answers(*given).double(), "float64"),
         (lambda states, queries, head: head(states[:, queries]), "states of words"),
         (lambda states, queries, head: head(states).mean(dim=1), "states of words"),
         (lambda states, queries, head: head(states[:, -queries:]).mean(dim=1), "states of words"),
         (lambda states, queries, head: head(states[:, 0]), "only the first query"),
         (lambda states, queries, head: head(states[:, :queries]).sum(dim=1), "are added"),
         (lambda states, queries, head: head(states[:, :queries]).softmax(dim=-1).mean(dim=1), "average probabilities"),
         (lambda *given: mean_of_answers(*given).softmax(dim=1), "asks for logits"),
         (lambda *given: mean_of_answers(*given).log_softmax(dim=1), "logarithms"),
         (lambda states, queries, head: head(states[:, :queries]).amax(dim=1), "counts in ITC"),
         (lambda states, queries, head: states[:, :queries].mean(dim=1) @ head.weight.T, "bias is missing"),
         (lambda states, queries, head: head(states[:, :queries]), "(b 2)"),
         (lambda *given: mean_of_answers(*given).flip(1), "exchanged"),
         (lambda *given: mean_of_answers(*given).detach(), "no gradient"),
         (lambda states, queries, head: head(states[:, queries - 1]), "every query counts"),
         (lambda *given: 2 * mean_of_answers(*given) + 1, "differ from those of the loop"),
         (lambda states, queries, head: mean_of_answers(states.detach(), queries, head), "get no gradient"),
         (lambda states, queries, head: F.linear(states[:, :queries].mean(dim=1), head.weight.detach(), head.bias),
          "weights get no gradient"),
         (lambda states, queries, head: F.linear(states[:, :queries].mean(dim=1), head.weight, head.bias.detach()),
          "biases get no gradient"),
         (lambda states, queries, head: head(torch.cat([states[:, :1], states[:, 1:queries].detach()], dim=1)).mean(1),
          "some query gets no gradient"),
         (half_detached, "another gradient"),
         (lambda states, queries, head: head(states[:, :queries]).log_softmax(dim=2).mean(dim=1), "logarithms"),
         (lambda states, queries, head: head(states[:, :4]).mean(dim=1), "states of words"),
         (lambda states, queries, head: head(states[:, :min(queries, 4)]).mean(dim=1), "every query counts"),
         (lambda states, queries, head: (head(states[:, :queries]) * torch.arange(1, queries + 1)[:, None]).mean(dim=1),
          "have no order"),
         (in_place_states, "changed the states")]),
    "base_rate": Answers(
        [rate, rate_by_torch, lambda wrong: list(rate(wrong)), lambda wrong: torch.tensor(rate(wrong)),
         lambda wrong: tuple(np.float32(one) for one in rate(wrong)), lambda wrong: np.array(rate(wrong))],
        [(rated(said=lambda p, wrong: 1 / max(1, wrong)), "ratio of true pairs to wrong ones"),
         (rated(said=lambda p, wrong: 1 - p), "share of wrong pairs"),
         (rated(said=lambda p, wrong: 0.5), "as many wrong"),
         (rated(loss=lambda p, wrong: -math.log(p)), "true pairs alone"),
         (rated(loss=lambda p, wrong: math.log(2)), "says one half"),
         (rated(loss=lambda p, wrong: -(math.log(p) + math.log(1 - p)) / 2), "count half"),
         (rated(loss=lambda p, wrong: -math.log(p) - wrong * math.log(1 - p)), "mean over pairs"),
         (rated(loss=lambda p, wrong: rate(wrong)[1] / math.log(2)), "bits"),
         (rated(loss=lambda p, wrong: -p * math.log(p) - (1 - p) * math.log(1 - p)), "goes to 0"),
         (rated(accuracy=lambda p, wrong: p), "always says match"), (rated(accuracy=lambda p, wrong: 0.5), "a coin"),
         (rated(accuracy=lambda p, wrong: p * p + (1 - p) ** 2), "by chance"),
         (lambda wrong: rate(wrong)[1], "three numbers"), (lambda wrong: tuple(map(str, rate(wrong))), "one number"),
         (rated(loss=lambda p, wrong: -(1 - p) * math.log(p) - (p * math.log(1 - p) if wrong else 0)), "exchanged"),
         (rated(loss=lambda p, wrong: -rate(wrong)[1]), "not negative"),
         (rated(loss=lambda p, wrong: 0.6365), "what does a true pair pay"),
         (rated(accuracy=lambda p, wrong: 1 - p), "never says match"),
         (lambda wrong: tuple(torch.tensor([p := torch.tensor(1 / (1 + wrong)), -p * p.log() - (1 - p) * (1 - p).log(),
                                            max(p, 1 - p)])), "nan"),
         (rated(accuracy=lambda p, wrong: min(p, 1 - p)), "share of wrong answers")]),
    "sample_negatives": Answers(
        [by_numpy,
         by_stage1, by_gumbel, by_loop, by_large_number, by_categorical, by_choices, filled_with(-1e9),
         filled_with(torch.finfo(torch.float32).min)],
        [(with_one_noise, "one and the same"),
         (filled_with(-10.0), "below every logit"), (filled_with(-50.0), "below every logit"),
         (filled_with(-1e3), "below every logit"), (filled_with(-1e4), "below every logit"),
         (by_exp_in_double, "more than 0"),
         (draws(scores=lambda side: 1.4 * side), "too much"),
         (draws(scores=lambda side: 0.7 * side), "counts for too little"),
         (draws(out=torch.zeros_like), "a true pair was drawn"),
         (draws(out=lambda same: torch.eye(len(same), dtype=torch.bool)), "another caption"),
         (late, "once there are probabilities"), (floored, "similarity plays no part"),
         (draws(sides=lambda s: (s, s.T)), "exchanged"), (draws(sides=lambda s: (s, s)), "drawn from the rows"),
         (draws(sides=lambda s: (s.T, s.T)), "drawn from the columns"),
         (draws(scores=torch.zeros_like), "similarity plays no part"),
         (draws(scores=lambda side: side.softmax(dim=1)), "similarity plays no part"),
         (draws(scores=lambda side: -side), "the less similar"),
         (draws(scores=lambda side: side / 0.2), "too much"),
         (draws(pick=lambda weights: weights.argmax(dim=1)), "draws gave the same"),
         (finite, "each of them is true"), (draws(look=False), "by accident"),
         (wrong_axis, "along which axis"), (wrong_axis_after, "along which axis"), (by_naive_exp, "exponential"),
         (by_common_largest, "share one largest"), (draws(scores=torch.square), "may be negative"),
         (draws(scores=torch.abs), "half of the"), (draws(scores=torch.relu), "half of the"),
         (top_three, "too much"),
         (one_draw_for_both, ""), (draws(scores=lambda side: side * 0.07), "similarity"),
         (draws(scores=lambda side: side - side.mean(dim=0, keepdim=True)), "along which axis"),
         (in_place, "changed what it was given"),
         (lambda *given: by_stage1(*given)[0], "asks for two tensors"),
         (draws(pick=lambda weights: torch.multinomial(weights, 1)), "(b)")]),
    "match_triple": Answers(
        [lambda image, text: [*by_blocks(image, text)[:2], torch.eq(*by_blocks(image, text)[:2]).long()],
         by_blocks, by_stack, by_lists, lambda image, text: tuple(torch.from_numpy(part.numpy()) for part in by_blocks(
            image, text))],
        [(triple(lambda images, texts, labels: (images.int(), texts.int(), labels.int())), "int32"),
         (triple(lambda images, texts, labels: (images, texts, 1 - labels)), "other way round"),
         (both_wrong, "only the image is wrong"), (triple(side_by_side), "blocks"),
         (triple(third_first), "exchange these two"),
         (lambda wrong_image, wrong_text: by_blocks(wrong_text, wrong_image), "in each other's place"),
         (triple(lambda images, texts, labels: (images, texts, labels.float())), "int64"),
         (triple(lambda images, texts, labels: (images, texts, labels.roll(len(labels) // 3))), "beside their pairs"),
         (triple(lambda images, texts, labels: (images, texts, torch.ones_like(labels))), "say match"),
         (triple(lambda images, texts, labels: (images.flip(0), texts.flip(0), labels.flip(0))), "do not stand first"),
         (triple(lambda images, texts, labels: (images, texts)), "three tensors"),
         (triple(lambda images, texts, labels: tuple(part[:len(part) // 3 * 2] for part in (images, texts, labels))),
          "(3b)"),
         (triple(lambda images, texts, labels: (texts, images, labels)), "images and texts are exchanged"),
         (by_inverse, "wrong_text"), (lambda image, text: by_blocks(image.sort().values, text), "`wrong_image` was"),
         (lambda image, text: by_blocks(image, text[image]), "`wrong_text` was"),
         (lambda image, text: by_blocks(image, image), "`wrong_text` was")]),
    "rerank": Answers(
        [asked_one_by_one,
         by_topk, by_sorted, by_infinity],
        [(lifted, ""), (by_lift, "however little"), (by_sinking, "ITC"),
         (all_of_them, "it is expensive"), (unclamped, "only fewer"),
         (lambda cosine, match, k: cosine.argsort(descending=True), "nothing has been re-ranked"),
         (lambda *given: by_topk(*given).flip(0), "the order is reversed"),
         (ranked(score=lambda logit, cosine: logit), "only the match counts"),
         (ranked(score=lambda logit, cosine: logit.sigmoid() + cosine), "made a probability"),
         (ranked(descending=False), "first k are reversed"),
         (ranked(join=lambda first, again, rest: torch.cat([again, rest])), "by their ranks among themselves"),
         (ranked(join=lambda first, again, rest: first[again]), "still have their place"),
         (ranked(join=lambda first, again, rest: torch.cat([first[again], rest.sort().values])), "out of order"),
         (ranked(join=lambda first, again, rest: torch.cat([rest, first[again]])), "come first"),
         (ranked(score=lambda logit, cosine: logit * cosine), "multiplied"),
         (ranked(score=lambda logit, cosine: logit - cosine), "subtracted"),
         (ranked(score=lambda logit, cosine: 2 * logit + cosine), "logit plus cosine"), (misplaced, "of another one"),
         (ranked(join=lambda first, again, rest: torch.cat([first[again], rest.flip(0)])), "too, the most similar"),
         (lambda cosine, match, k: by_topk(-cosine, match, k), "others than the k most similar"),
         (lambda cosine, match, k: by_topk(cosine, match, min(k, 4)), "others than the k most similar"),
         (by_boolean, "numbers of candidates")]),
}

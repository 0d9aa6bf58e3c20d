"""Answers to the exercises of lesson 09."""

import copy
import functools
import math
import types

import numpy as np
import torch
import torch.nn.functional as F

from minblip2.evaluation import metrics
from minblip2.training.loop import TrainConfig, learning_rate

from . import Answers


def rate_of(after, ramp=lambda step, warmup: (step + 1) / warmup):
    """A schedule: `ramp` while it warms up, then after(share, floor), which begins at share 0."""
    def rate(step, steps, warmup, peak, floor):
        return peak * (ramp(step, warmup) if step < warmup else after((step - warmup) / (steps - warmup), floor))
    return rate


def cosine(share, floor):
    return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2


def warm_one_longer(step, steps, warmup, peak, floor):
    return peak * (step + 1) / max(warmup, 1) if step <= warmup else rate_of(cosine)(step, steps, warmup, peak, floor)


def of_the_module(step, steps, warmup, peak, floor):
    return learning_rate(step, TrainConfig(steps, learning_rate=peak, warmup=warmup, min_lr_ratio=floor))


def from_step_0(step, steps, warmup, peak, floor):
    return peak * ((step + 1) / warmup if step < warmup else cosine(step / steps, floor))


def too_long(step, steps, warmup, peak, floor):
    return peak * ((step + 1) / warmup if step < warmup else cosine((step - warmup) / steps, floor))


def one_short(step, steps, warmup, peak, floor):
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * ((step + 1) / warmup if step < warmup else cosine(share, floor))


def one_ahead(step, steps, warmup, peak, floor):
    return peak * ((step + 1) / warmup if step < warmup else cosine((step + 1 - warmup) / (steps - warmup), floor))


def floor_is_a_rate(step, steps, warmup, peak, floor):
    return rate_of(cosine)(step, steps, warmup, peak, floor / peak) if step >= warmup else peak * (step + 1) / warmup


def always_divides(step, steps, warmup, peak, floor):
    share, ramp = (step - warmup) / (steps - warmup), (step + 1) / warmup
    return peak * (ramp if step < warmup else cosine(share, floor))


def mixed_units(step, steps, warmup, peak, floor):
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * floor + (peak - floor) * cosine((step - warmup) / (steps - warmup), 0)


def warm_and_fall(step, steps, warmup, peak, floor):
    return peak * min(1, (step + 1) / max(1, warmup)) * cosine(step / steps, floor)


def own_of(similarity, owner):
    return torch.arange(len(similarity))[:, None] == owner


def of_metrics(similarity, owner, k):
    return metrics.recall_at_k(similarity, own_of(similarity, owner), (k,))[k] / 100


def by_counting(similarity, owner, k):
    found = 0
    for image, row in enumerate(similarity):
        own = [score.item() for score, of in zip(row, owner.tolist(), strict=True) if of == image]
        wrong = row[owner != image]
        found += bool(own) and int((wrong >= max(own)).sum()) < k
    return found / len(similarity)


def by_ranking(similarity, owner, k):
    """Wrong captions are put in front, and the ranking is stable."""
    own = own_of(similarity, owner)
    found = 0
    for row, mine in zip(similarity.tolist(), own.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j, row=row, mine=mine: (-row[j], mine[j]))
        first_own = next((place for place, j in enumerate(order) if mine[j]), k)
        found += sum(not mine[j] for j in order[:first_own]) < k and any(mine)
    return found / len(similarity)


def first_only(similarity, owner, k):
    """Of each picture's captions, where the first stands among the wrong ones."""
    found = 0
    for image, row in enumerate(similarity):
        own = (owner == image).nonzero().flatten().tolist()
        found += bool(own) and int((row[owner != image] >= row[own[0]]).sum()) < k
    return found / len(similarity)


def with_topk(count):
    """Mistakes that rank; count(own among the first (b k), own (b n)) gives the share."""
    def recall(similarity, owner, k):
        own = own_of(similarity, owner)
        best = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
        return float(count(own.gather(1, best), own))
    return recall


def by_one_hot(similarity, owner, k):
    own = F.one_hot(owner, len(similarity)).T.bool()
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return float((((similarity >= best) & ~own).sum(dim=1).lt(k) & own.any(dim=1)).double().mean())


def k_below_all(similarity, owner, k):
    """The mistake to take one place too few, for fear of topk."""
    return by_one_hot(similarity, owner, min(k, similarity.shape[1] - 1))


def short_topk(similarity, owner, k):
    own = own_of(similarity, owner)
    return own.gather(1, similarity.topk(k, dim=1).indices).any(dim=1).float().mean().item()


def ties_for_us(similarity, owner, k):
    own = own_of(similarity, owner)
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return (((~own & (similarity > best)).sum(dim=1) < k) & own.any(dim=1)).float().mean().item()


def ties_with_brothers(similarity, owner, k):
    own = own_of(similarity, owner)
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return (((similarity >= best).sum(dim=1) <= k) & own.any(dim=1)).float().mean().item()


def lowered(amount):
    """The mistake to decide ties by a small number, which is not small beside every difference."""
    def recall(similarity, owner, k):
        own = own_of(similarity, owner)
        best = (similarity - amount * own).topk(min(k, similarity.shape[1]), dim=1).indices
        return own.gather(1, best).any(dim=1).float().mean().item()
    return recall


def filled_with(value):
    def recall(similarity, owner, k):
        own = own_of(similarity, owner)
        best = similarity.masked_fill(~own, value).amax(dim=1, keepdim=True)
        return (((~own & (similarity >= best)).sum(dim=1) < k) & own.any(dim=1)).float().mean().item()
    return recall


def nobody_is_found(similarity, owner, k):
    own = own_of(similarity, owner)
    best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return ((~own & ~(similarity < best)).sum(dim=1) < k).float().mean().item()


def other_way(similarity, owner, k):
    best = similarity.topk(min(k, len(similarity)), dim=0).indices
    return (best == owner).any(dim=0).float().mean().item()


def filled(similarity, owner, k):
    similarity.masked_fill_(torch.zeros_like(similarity, dtype=torch.bool), 0).add_(1)
    return of_metrics(similarity, owner, k)


def with_method(module):
    module.train = types.MethodType(lambda self, mode=True: self, module)
    for part in module.modules():
        part.training = False
    for weight in module.parameters():
        weight.requires_grad = False
    return module


def with_class(module):
    """A class of its own for this one object."""
    own = type(module.__class__.__name__, (module.__class__,), {"train": lambda self, mode=True: self})
    module.requires_grad_(False).eval()
    module.__class__ = own
    return module


def with_lambda(module):
    module.eval().requires_grad_(False).train = lambda mode=True: module
    return module


def own_weights_only(module):
    for weight in module.parameters(recurse=False):
        weight.requires_grad = False
    module.train = lambda mode=True: module
    return nn_eval(module)


def nn_eval(module):
    torch.nn.Module.train(module, False)
    return module


def of_class(module):
    """The mistake to change the class where one module is meant."""
    module.requires_grad_(False).eval()
    type(module).train = lambda self, mode=True: self
    return module


def mode_only_outside(module):
    module.requires_grad_(False).eval()
    module.training = False
    return module


def returns_none(module):
    module.requires_grad_(False).eval()
    module.train = lambda mode=True: None
    return module


def cut(module):
    with_lambda(module)
    inner = module.forward
    module.forward = lambda x: torch.no_grad()(inner)(x)
    return module


def with_partial(module):
    """Everybody below it, too, stays as it is."""
    for part in module.requires_grad_(False).eval().modules():
        part.train = functools.partial(lambda part, mode=True: part, part)
    return module


def of_every_class(module):
    for part in module.requires_grad_(False).eval().modules():
        type(part).train = lambda self, mode=True: self
    return module


def of_all_modules(module):
    module.requires_grad_(False).eval()
    torch.nn.Module.train = lambda self, mode=True: self
    return module


def of_parts(module):
    module.requires_grad_(False).eval()
    module.train = lambda mode=True: module
    torch.nn.Linear.train = lambda self, mode=True: self
    return module


def dropout_only(module):
    module.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout | torch.nn.BatchNorm1d):
            part.eval()
    module.train = lambda mode=True: module
    return module


def children_only(module):
    for child in module.requires_grad_(False).children():
        child.eval()
    module.train = lambda mode=True: module
    return module


def scaled_gradient(module):
    with_lambda(module).register_full_backward_hook(lambda module, inward, outward: (2 * inward[0],))
    return module


def half_cut(module):
    inner = with_lambda(module).forward
    module.forward = lambda x: inner((x + x.detach()) / 2)
    return module


def by_hook(module):
    module.requires_grad_(False).eval().register_forward_pre_hook(lambda module, given: module.eval() and None)
    return module


def replaced_first(module):
    module.train = lambda mode=True: module
    return module.requires_grad_(False).eval()


def replaced_in_the_class(module):
    type(module).train = lambda self, mode=True: self
    return module.requires_grad_(False).eval()


def always_with_a_mode(module):
    module.requires_grad_(False).eval()
    module.train = lambda mode: module
    return module


def never_with_a_mode(module):
    module.requires_grad_(False).eval()
    module.train = lambda: module
    return module


def root_only(module):
    module.requires_grad_(False)
    module.training = False
    module.train = lambda mode=True: module
    return module


def itc_is(line):
    return lambda pairs, batch, times: (pairs // (batch * times), line(batch, times), batch - 1)


def steps_are(count):
    return lambda pairs, batch, times: (count(pairs, batch, times), math.log(batch), batch - 1)


def wrong_are(count):
    return lambda pairs, batch, times: (pairs // batch // times, math.log(batch), count(pairs, batch, times))


def mean(name, lines):
    return sum(line[name] for line in lines) / len(lines)


def by_shares(log, batch, first=12, last=30):
    """By how far each loss has gone, and by accuracy; averaged over so many lines."""
    chance, begin, end = math.log(batch), log[:first], log[-last:]
    if mean("itc", begin) < 0.55 * chance:
        return "finished"
    grammar = mean("itg", end) < mean("itg", begin) / 2
    if mean("itc", end) > 0.75 * chance:
        return "mispaired" if grammar else "too fast"
    return "healthy" if mean("itm_accuracy", end) > 0.8 else "wait"


def by_table(log, batch):
    chance, begin, end = math.log(batch), log[:21], log[-21:]
    met, output = mean("itm", end) < 0.3, mean("itc", end) < 0.7 * chance
    return {(True, True): "finished" if mean("itm", begin) < 0.3 else "healthy", (False, True): "wait"}.get(
        (met, output), "too fast" if mean("itg", end) > 3 * mean("itg", begin) / 4 else "mispaired")


def bounded(itc=None, itg=None):
    """The mistake to compare a loss with one number for all batches and vocabularies."""
    def name_of(log, batch):
        begin, end = log[:10], log[-20:]
        bound = itc or 0.75 * math.log(batch)
        if mean("itc", begin) < bound and mean("itm", begin) < 0.5:
            return "finished"
        if mean("itc", end) > bound:
            return "mispaired" if mean("itg", end) < (itg or mean("itg", begin) / 2) else "too fast"
        return "wait" if mean("itm", end) > 0.6 else "healthy"
    return name_of


def mistaking(one, other):
    """The mistake to take one kind for another."""
    return lambda log, batch: other if (name := by_shares(log, batch)) == one else name


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def as_a_square(step, steps, warmup, peak, floor):
    if step < warmup:
        return np.float64(peak) * (step + 1) / warmup
    return torch.tensor(peak * (floor + (1 - floor) * math.cos(math.pi / 2 * (step - warmup) / (steps - warmup)) ** 2))


def of_two_captions(similarity, owner, k):
    """The mistake to count on two captions of each picture."""
    own = own_of(similarity, owner)
    two = own.long().topk(2, dim=1).indices
    best = similarity.gather(1, two).amax(dim=1, keepdim=True)
    return ((((similarity >= best) & ~own).sum(dim=1) < k) & own.any(dim=1)).float().mean().item()


def eval_gives_nothing(module):
    with_lambda(module).eval = lambda: None
    return module


def by_medians(log, batch):
    """A median is a mean as well."""
    def middle(name, lines):
        return float(np.median([line[name] for line in lines]))

    begin, end, chance = log[:10], log[-30:], math.log(batch)
    if middle("itc", begin) < 0.6 * chance:
        return "finished"
    if middle("itc", end) > 0.75 * chance:
        return "mispaired" if middle("itg", end) < 0.6 * middle("itg", begin) else "too fast"
    return "healthy" if middle("itm_accuracy", end) > 0.75 else "wait"


def sorts_the_log(log, batch):
    """The mistake to order the lines of the log that was given."""
    name = by_shares(list(log), batch)
    log.sort(key=lambda line: line["itc"])
    return name


ANSWERS = {
    "rate": Answers(
        [rate_of(cosine), of_the_module,
         rate_of(lambda share, floor: 1 - (1 - floor) * math.sin(math.pi * share / 2) ** 2),
         lambda *given: np.float32(rate_of(cosine)(*given)), lambda *given: torch.tensor(rate_of(cosine)(*given)),
         lambda *given: np.array(rate_of(cosine)(*given)), as_a_square],
        [(lambda *given: round(rate_of(cosine)(*given), 5), ""),
         (rate_of(cosine, lambda step, warmup: step / warmup), "wasted"),
         (rate_of(cosine, lambda step, warmup: 1.0), "where is the warm-up"),
         (rate_of(cosine, lambda step, warmup: (step + 1) / (warmup + 1)), "it should be there"),
         (rate_of(cosine, lambda step, warmup: ((step + 1) / warmup) ** 2), "in equal steps"),
         (warm_one_longer, "one step too long"),
         (warm_and_fall, "in equal steps"), (from_step_0, "since step 0"), (too_long, "stretched over all steps"),
         (rate_of(lambda share, floor: cosine(2 * share, floor)), "rises again"),
         (rate_of(lambda share, floor: cosine(share, 0)), "falls to zero"),
         (rate_of(lambda share, floor: max(floor, cosine(share, 0))), "cut off at the floor"),
         (rate_of(lambda share, floor: floor + cosine(share, 0)), "begins above its peak"),
         (rate_of(lambda share, floor: floor + (1 - floor) * math.cos(math.pi * share / 2)), "quarter of a cosine"),
         (one_short, "one step too short"), (one_ahead, "one step ahead"),
         (rate_of(lambda share, floor: 1 - (1 - floor) * share), "straight line"), (floor_is_a_rate, "not a rate"),
         (rate_of(lambda share, floor: floor + (1 - floor) * (1 - share) ** 3), "the end of the fall are right"),
         (rate_of(lambda share, floor: (1 - floor) * cosine(share, 0)), "the floor is not added"),
         (rate_of(lambda share, floor: floor + (1 - floor) * math.cos(math.pi * share)), "lifted and halved"),
         (rate_of(lambda share, floor: 1 + floor - cosine(share, floor)), "it rises where it should fall"),
         (rate_of(lambda share, floor: floor + (1 - floor) * (1 + math.cos(share)) / 2), "half a cosine is over at π"),
         (rate_of(lambda share, floor: 0.9 * cosine(share, floor)), "make 1 there"),
         (rate_of(lambda share, floor: cosine(share**2, floor)), "the end of the fall are right"),
         (rate_of(lambda share, floor: cosine(0.9 * share, floor)), "come to rest"),
         (rate_of(lambda share, floor: cosine(share, floor or 0.1)), ""), (always_divides, "divide by"),
         (mixed_units, "subtracted from the peak"),
         (lambda *given: str(rate_of(cosine)(*given)), "one number"),
         (lambda *given: torch.tensor([rate_of(cosine)(*given)]), "one number")]),
    "recall": Answers(
        [of_metrics, by_counting, by_ranking, by_one_hot, lambda *given: np.float32(of_metrics(*given)),
         lambda *given: torch.tensor(by_counting(*given))],
        [(of_two_captions, ""), (lowered(1e-4), ""), (lowered(1e-6), "-2,000 each"),
         (filled_with(-100), "may be any numbers"), (k_below_all, "the last of them"),
         (short_topk, "The first"), (ties_for_us, "not to the model's credit"), (nobody_is_found, "without captions"),
         (with_topk(lambda found, own: 100 * found.any(dim=1).float().mean()), "percent"),
         (with_topk(lambda found, own: found.any(dim=1).sum()), "added up"),
         (with_topk(lambda found, own: (found.sum(dim=1) == own.sum(dim=1)).float().mean()), "one of them is enough"),
         (with_topk(lambda found, own: found.sum() / own.sum()), "captions are counted"),
         (with_topk(lambda found, own: found.float().mean()), "how many of the first K"),
         (lambda similarity, owner, k: of_metrics(-similarity, owner, k), "least similar"),
         (lambda similarity, owner, k: of_metrics(similarity, torch.arange(len(owner)), k), "taken for the pair"),
         (first_only, "only the picture's first caption"),
         (other_way, "the other way"), (filled, "changed what it was given"),
         (ties_with_brothers, "tie with each other"), (filled_with(0), "filled with 0"),
         (lambda similarity, owner, k: of_metrics(similarity, owner, k + 1), "one too many"),
         (lambda similarity, owner, k: of_metrics(similarity, owner, max(1, k - 1)), "one too few"),
         (lambda similarity, owner, k: of_metrics(similarity, owner, 1), "Recall@1"),
         (lambda similarity, owner, k: of_metrics(similarity, owner, 5), "you say"),
         (lambda similarity, owner, k: of_metrics(similarity.clamp(min=0), owner, k), ""),
         (lambda similarity, owner, k: of_metrics(similarity.abs(), owner, k), "you say"),
         (lambda similarity, owner, k: of_metrics(similarity.softmax(dim=0), owner, k), "you say"),
         (lambda similarity, owner, k: str(of_metrics(similarity, owner, k)), "one number"),
         (lambda similarity, owner, k: of_metrics(similarity, owner, k) >= 0.5, "one number")]),
    "freeze": Answers(
        [with_method, with_class, with_lambda, with_partial],
        [(eval_gives_nothing, "module = module.eval()"),
         (lambda module: module.eval(), "still require a gradient"), (own_weights_only, "every submodule"),
         (lambda module: module.requires_grad_(False), "in training mode"), (root_only, "the part"),
         (mode_only_outside, "in training mode again"), (returns_none, "still give back the module"),
         (lambda module: with_lambda(copy.deepcopy(module)), "something else"), (of_class, "changed the class"),
         (lambda module: with_lambda(module) and None, "gives back None"), (cut, "cut graph"),
         (replaced_first, "where `train` is replaced first"), (replaced_in_the_class, "changed the class"),
         (always_with_a_mode, "without an argument"), (never_with_a_mode, "hands its mode on"),
         (of_every_class, "changed the class"), (of_all_modules, "changed the class"), (of_parts, "changed the class"),
         (dropout_only, "in training mode"), (scaled_gradient, "is not its own"), (half_cut, "is not its own"),
         (by_hook, "in training mode again"), (children_only, "in training mode"),
         (lambda module: with_lambda(module).double(), "other dtypes")]),
    "accumulated": Answers(
        [lambda pairs, batch, times: (pairs // (batch * times), math.log(batch), batch - 1),
         lambda pairs, batch, times: [pairs // batch // times, torch.tensor(batch).log().item(), float(batch - 1)],
         lambda pairs, batch, times: np.array([pairs // batch // times, np.log(batch), batch - 1]),
         lambda pairs, batch, times: (np.int64(pairs // batch // times), np.float32(np.log(batch)),
                                      torch.tensor(batch - 1))],
        [(lambda pairs, batch, times: (round(pairs / (batch * times)), math.log(batch), batch - 1), ""),
         (itc_is(lambda batch, times: math.log(batch * times)), "never candidates"),
         (itc_is(lambda batch, times: math.log(batch) / times), "the loss stays the same"),
         (itc_is(lambda batch, times: math.log2(batch)), "in bits"),
         (steps_are(lambda pairs, batch, times: pairs // batch), "how many make one step"),
         (steps_are(lambda pairs, batch, times: pairs / batch / times), "is not a step"),
         (steps_are(lambda pairs, batch, times: math.ceil(pairs / batch / times)), "only whole ones"),
         (wrong_are(lambda pairs, batch, times: batch * times - 1), "inside one batch"),
         (wrong_are(lambda pairs, batch, times: pairs - 1), "not from all the data"),
         (wrong_are(lambda pairs, batch, times: batch), "own picture"),
         (lambda pairs, batch, times: math.log(batch), "three numbers"),
         (itc_is(lambda batch, times: 1 / batch), "what does it pay"),
         (itc_is(lambda batch, times: math.log(batch - 1)), "own picture is among"),
         (itc_is(lambda batch, times: times * math.log(batch)), "not added up"),
         (itc_is(lambda batch, times: 3.4657), "among how many candidates"),
         (steps_are(lambda pairs, batch, times: pairs // batch * times), "rarer"),
         (steps_are(lambda pairs, batch, times: math.ceil(pairs / batch) // times), "last batch would be short"),
         (steps_are(lambda pairs, batch, times: math.ceil(pairs // batch / times)), "short of batches"),
         (wrong_are(lambda pairs, batch, times: pairs), "from the batch"),
         (wrong_are(lambda pairs, batch, times: batch * times), "own picture is none"),
         (lambda *given: tuple(map(str, (given[0] // given[1] // given[2], math.log(given[1]), given[1] - 1))),
          "one number")]),
    "diagnose": Answers(
        [by_medians,
         by_shares, by_table],
        [(sorts_the_log, "changed the log"),
         (mistaking("wait", "mispaired"), "cannot fall"), (mistaking("mispaired", "wait"), "cannot fall"),
         (mistaking("too fast", "mispaired"), "grammar"), (mistaking("mispaired", "healthy"), "blind model"),
         (mistaking("finished", "healthy"), "And at the beginning"), (mistaking("healthy", "wait"), "stood still"),
         (lambda log, batch: by_shares(log, batch, last=1), "a single line is off"),
         (lambda log, batch: by_shares(log, batch, first=1, last=1), "average some"),
         (mistaking("wait", "too fast"), "Do the other two move"), (lambda log, batch: "stuck", "the answers are"),
         (lambda log, batch: "healthy" if log[-1]["loss"] < log[0]["loss"] else "too fast", "is '"),
         *[(bounded(itc=bound), "is '") for bound in (1.0, 2.0, 3.0)],
         *[(bounded(itg=bound), "is '") for bound in (2.0, 3.0, 4.0)],
         (lambda log, batch: by_shares(log[:300], batch), "is '"),
         (lambda log, batch: by_shares(log, 32), "is '"),
         (mistaking("finished", "wait"), "at the beginning"), (mistaking("mispaired", "finished"), "compare ITC"),
         (mistaking("too fast", "healthy"), "does any of them stay")]),
}

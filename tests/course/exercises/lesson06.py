"""Answers to the exercises of lesson 06."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum

from minblip2.stage1 import Stage1

from . import Answers

# --- 06.1 -------------------------------------------------------------------------------------------------------------


def by_matmul(image, text):
    return (image @ text.T).max(dim=1).values


def by_loop(image, text):
    return torch.stack([torch.stack([(image @ one).max() for one in text]) for image in image])


def of_queries(make):
    """A similarity that does something else with the cosines (b n q)."""
    return lambda image, text: make(torch.einsum("bqe,ne->bnq", image, text))


def from_zero(image, text):
    """The mistake to begin the search for the largest at 0."""
    best = torch.zeros(len(image), len(text))
    for query in image.unbind(dim=1):
        best = torch.maximum(best, query @ text.T)
    return best


def by_cosine(image, text):
    return F.cosine_similarity(image[:, None], text[None, :, None], dim=-1).amax(dim=2)


def by_top(image, text):
    return torch.topk(torch.tensordot(image, text, dims=([2], [1])), 1, dim=1).values[:, 0]


def half_cut(image, text):
    return (by_matmul(image, text) + by_matmul(image.detach(), text)) / 2


# --- 06.2 -------------------------------------------------------------------------------------------------------------


def by_stage1(cosine, same_image, temperature, label_smoothing):
    holder = type("Holder", (), {"label_smoothing": label_smoothing})
    return Stage1.itc_loss(holder, cosine / temperature, same_image)


def by_entropy(cosine, same_image, temperature, label_smoothing):
    b = len(cosine)
    target = (1 - label_smoothing) * same_image / same_image.sum(dim=1, keepdim=True) + label_smoothing / b
    logits = cosine / temperature
    return -(target * (logits.log_softmax(dim=1) + logits.T.log_softmax(dim=1))).sum() / (2 * b)


def by_rows(cosine, same_image, temperature, label_smoothing):
    total = 0
    for i in range(len(cosine)):
        target = same_image[i] / same_image[i].sum()
        for row in (cosine[i], cosine[:, i]):
            log_p = (row / temperature).log_softmax(dim=0)
            total = total - (1 - label_smoothing) * (target * log_p).sum() - label_smoothing * log_p.mean()
    return total / (2 * len(cosine))


def itc(scale=torch.div, target=None, both=True, share=None, mean=0.5, prepare=lambda logits: logits, smooth=True):
    """The loss with a slip."""
    def loss_of(cosine, same_image, temperature, label_smoothing):
        logits = scale(cosine, temperature)
        wanted = target(same_image) if target else same_image / same_image.sum(dim=1, keepdim=True)
        smoothing = label_smoothing if smooth else 0.0
        if share:
            wanted, smoothing = (1 - smoothing) * wanted + share(same_image, smoothing), 0.0
        sides = [F.cross_entropy(prepare(side), wanted, label_smoothing=smoothing) for side in (logits, logits.T)]
        return mean * sum(sides) if both else sides[0]
    return loss_of


def naive(cosine, same_image, temperature, label_smoothing):
    grown = (cosine / temperature).exp()
    target = same_image / same_image.sum(dim=1, keepdim=True) * (1 - label_smoothing) + label_smoothing / len(cosine)
    return -sum((target * (part / part.sum(dim=1, keepdim=True)).log()).sum() for part in (grown, grown.T)) / (
        2 * len(cosine))


def changing(cosine, same_image, temperature, label_smoothing):
    cosine /= temperature
    return by_entropy(cosine, same_image, 1.0, label_smoothing)


def one_side_cut(cosine, same_image, temperature, label_smoothing):
    """Right numbers; the sentences' direction teaches nobody."""
    return (itc(both=False)(cosine, same_image, temperature, label_smoothing)
            + itc(both=False)(cosine.T.detach(), same_image, temperature.detach(), label_smoothing)) / 2


def temperature_half_cut(cosine, same_image, temperature, label_smoothing):
    logits, still = cosine / temperature, cosine / temperature.detach()
    target = same_image / same_image.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target, label_smoothing=label_smoothing)
            + F.cross_entropy(still.T, target, label_smoothing=label_smoothing)) / 2


def ten_percent(cosine, same_image, temperature, label_smoothing):
    """The mistake to take a smoothing of 0 for none given."""
    return by_entropy(cosine, same_image, temperature, label_smoothing or 0.1)


def with_divergence(cosine, same_image, temperature, label_smoothing):
    """The mistake to take the divergence from the target, which leaves its entropy out."""
    b = len(cosine)
    target = (1 - label_smoothing) * same_image / same_image.sum(dim=1, keepdim=True) + label_smoothing / b
    logits = cosine / temperature
    return sum(F.kl_div(side.log_softmax(dim=1), target, reduction="batchmean") for side in (logits, logits.T)) / 2


def with_a_little(cosine, same_image, temperature, label_smoothing):
    """The mistake to add something inside the logarithm."""
    b, logits = len(cosine), cosine / temperature
    target = (1 - label_smoothing) * same_image / same_image.sum(dim=1, keepdim=True) + label_smoothing / b
    return -sum((target * (side.softmax(dim=1) + 1e-8).log()).sum() for side in (logits, logits.T)) / (2 * b)


def by_logsumexp(cosine, same_image, temperature, label_smoothing):
    logits = cosine / temperature
    target = torch.where(same_image, (1 - label_smoothing) / same_image.sum(dim=1, keepdim=True), 0.0)
    target = target + label_smoothing / len(cosine)
    rows, columns = logits.logsumexp(dim=1, keepdim=True) - logits, logits.logsumexp(dim=0, keepdim=True) - logits
    return ((target * rows).sum(dim=1).mean() + (target * columns).sum(dim=0).mean()) / 2


# --- 06.3 -------------------------------------------------------------------------------------------------------------


def by_list(batch, smoothing):
    target = [1 - smoothing + smoothing / batch] + [smoothing / batch] * (batch - 1)
    return math.log(batch), sum(-p * math.log(p) for p in target if p)


def by_torch(batch, smoothing):
    target = torch.full((batch,), smoothing / batch, dtype=torch.float64)
    target[0] += 1 - smoothing
    return torch.tensor(float(batch), dtype=torch.float64).log().item(), torch.special.entr(target).sum().item()


def by_single(batch, smoothing):
    """In float32, number by number."""
    target = torch.full((batch,), smoothing / batch)
    target[0] += 1 - smoothing
    return torch.tensor(batch).float().log(), torch.distributions.Categorical(target).entropy()


def with_nan(batch, smoothing):
    target = torch.full((batch,), smoothing / batch)
    target[0] += 1 - smoothing
    return math.log(batch), -(target * target.log()).sum().item()


def floor(make):
    return lambda batch, smoothing: (math.log(batch), make(batch, smoothing))


def without_right_share(batch, smoothing):
    other = smoothing / (batch - 1)
    return -(1 - smoothing) * math.log(1 - smoothing) - (batch - 1) * other * math.log(other)


def at_zero(batch, smoothing):
    right, share = 1 - smoothing + smoothing / batch, smoothing / batch
    return -right * math.log(right) - (batch - 1) * share * math.log(share)


# --- 06.4 -------------------------------------------------------------------------------------------------------------


def probe(image, text, temperature, shaped=True):
    """Name the bug by comparing with what each bug would answer to this input."""
    def name_of(logits_of):
        output, cosines = logits_of(image, text, temperature), image @ text.T
        if shaped and output.shape != (len(image), len(text)):
            return "swapped"
        best, first = cosines.amax(dim=1), cosines[:, 0]
        answers = {"right": best / temperature, "multiplied": best * temperature, "first query": first / temperature,
                   "swapped": best.T / temperature}
        return next((name for name, answer in answers.items()
                     if answer.shape == output.shape and torch.allclose(answer, output, atol=1e-5)), "no idea")
    return name_of


def by_hand(logits_of):
    logits = logits_of(torch.eye(4)[None, :2], torch.eye(4)[1:], 0.5)
    if logits.shape != (1, 3):
        return "swapped"
    return {2.0: "right", 0.5: "multiplied", 0.0: "first query"}[logits[0, 0].item()]


def by_shape_only(logits_of):
    return "swapped" if logits_of(torch.ones(1, 1, 2), torch.ones(3, 2), 1.0).shape[0] == 3 else "right"


def taken_for_each_other(logits_of):
    return {"multiplied": "first query", "first query": "multiplied"}.get(output := by_hand(logits_of), output)


SOME = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0.6, 0.8]]])

def lucky(box):
    """The mistake to leave to chance whether the first query wins."""
    image, text = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((1, 2, 3), (2, 3)))
    return probe(image, text, 0.1)(box)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def by_distance(image, text):
    return 1 - torch.cdist(image, text[None]).square().amin(dim=1) / 2


def by_place(image, text):
    """The winner's place first, then its cosine."""
    cosines = einsum(image, text, "b q e, n e -> b n q")
    return cosines.gather(2, cosines.argmax(dim=2, keepdim=True)).squeeze(2)


def one_winner(image, text):
    """The mistake to let one query speak to all sentences."""
    cosines = einsum(image, text, "b q e, n e -> b n q")
    winner = cosines.amax(dim=1).argmax(dim=-1)
    return cosines[torch.arange(len(image)), :, winner]


def by_divergence(cosine, same_image, temperature, label_smoothing):
    """The divergence from the target, and the target's own entropy on top."""
    target = (1 - label_smoothing) * same_image / same_image.sum(dim=1, keepdim=True) + label_smoothing / len(cosine)
    logits, entropy = cosine / temperature, -torch.special.xlogy(target, target).sum(dim=1).mean()
    return entropy + sum(F.kl_div(side.log_softmax(dim=1), target, reduction="batchmean")
                         for side in (logits, logits.T)) / 2


def all_captions_together(cosine, same_image, temperature, label_smoothing):
    """The mistake to ask for any of a picture's captions, not for each with its share."""
    logits = cosine / temperature
    return -sum((side.softmax(dim=1) * same_image).sum(dim=1).log().mean() for side in (logits, logits.T)) / 2


def cut_off(most):
    return lambda cosine, same, temperature, smoothing: by_entropy(cosine, same, temperature.clamp(max=most), smoothing)


def first_caption(cosine, same_image, temperature, label_smoothing):
    wanted, logits = same_image.float().argmax(dim=1), cosine / temperature
    return (F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)
            + F.cross_entropy(logits.T, wanted, label_smoothing=label_smoothing)) / 2


def with_a_little_more(batch, smoothing):
    target = torch.full((batch,), smoothing / batch, dtype=torch.float64)
    target[0] += 1 - smoothing
    return -(target * (target + 1e-6).log()).sum().item()


def at_one(logits_of):
    """The mistake to look at the temperature 1."""
    logits = logits_of(torch.eye(3)[None, :2], torch.eye(3), 1.0)
    return "swapped" if len(logits) == 3 else "first query" if logits[0, 1] == 0 else "right"


ANSWERS = {
    "similarity": Answers(
        [by_distance,
         by_place,
         lambda image, text: torch.stack([(one @ text.T).max(dim=0).values for one in image]),
         Stage1.similarity, by_matmul, by_loop, by_cosine, by_top,
         lambda image, text: (image.flatten(0, 1) @ text.T).unflatten(0, image.shape[:2]).amax(dim=1)],
        [(one_winner, "which query counts"), (lambda image, text: (image @ text.T).max(dim=1), "take the values"),
         (of_queries(lambda cosines: cosines.amax(dim=2).clamp(-0.95, 0.95)), ""),
         (of_queries(lambda cosines: (200 * cosines).logsumexp(dim=2) / 200), ""),
         (lambda image, text: image[:, 0] @ text.T, "first query"), (lambda image, text: image[:, -1] @ text.T, "last"),
         (of_queries(lambda cosines: cosines.mean(dim=2)), "mean over the queries"),
         (of_queries(lambda cosines: cosines.sum(dim=2)), "sum over the queries"),
         (of_queries(lambda cosines: cosines.amin(dim=2)), "fits worst"),
         (of_queries(lambda cosines: cosines.abs().amax(dim=2)), "without its sign"),
         (from_zero, "taken for zero"),
         (of_queries(lambda cosines: cosines.amax(dim=2).clamp(min=0)), "taken for zero"),
         (half_cut, "part of the way cut off"), (lambda image, text: by_matmul(image.detach(), text), "the pictures"),
         (of_queries(lambda cosines: 1 - cosines.amax(dim=2)), "a distance"),
         (of_queries(lambda cosines: cosines.sort(dim=2).values[..., -2:][..., 0]), "second best"),
         (of_queries(lambda cosines: cosines.amax(dim=1)), "(b n)"),
         (of_queries(lambda cosines: F.dropout(cosines.amax(dim=2), 0.1)), "two different results"),
         (of_queries(lambda cosines: cosines.amax(dim=2).T), "exchanged"),
         (of_queries(lambda cosines: cosines), "it should be (b n)"),
         (of_queries(lambda cosines: cosines.amax(dim=2).detach()), "no gradient flows"),
         (lambda image, text: by_matmul(image, text.detach()), "reaches the sentences"),
         (of_queries(lambda cosines: cosines.amax(dim=2).softmax(dim=1)), "your numbers differ"),
         (lambda image, text: by_matmul(image.float(), text.float()), "float64"),
         (lambda image, text: by_matmul(image - image.mean(dim=1, keepdim=True), text), "your numbers differ")]),
    "itc_loss": Answers(
        [by_divergence,
         by_stage1, by_entropy, by_rows, by_logsumexp],
        [(lambda *given: by_entropy(*given[:3], 0.1), "the same for every label_smoothing"),
         (all_captions_together, "label_smoothing"), (cut_off(0.5), "is cut off"), (cut_off(1.0), "is cut off"),
         (first_caption, "has several"),
         (lambda cosine, *given: by_entropy(cosine.double(), *given), "float64"),
         (lambda *given: (by_entropy(*given) + by_entropy(given[0].detach(), *given[1:])) / 2, "part of the way"),
         (itc(scale=torch.mul), "cannot leave ln B"), (itc(scale=lambda cosine, _: cosine), "takes no part"),
         (itc(scale=lambda cosine, temperature: cosine / temperature**2), "twice"),
         (itc(both=False), "only pictures pick"),
         (lambda cosine, *rest: itc(both=False)(cosine.T, *rest), "only sentences pick"),
         (itc(mean=1.0), "are added"),
         (itc(target=lambda same: torch.eye(len(same))), "counts as a wrong answer"),
         (itc(target=lambda same: same.float()), "more than one"), (itc(smooth=False), "nothing is smoothed"),
         (itc(share=lambda same, smoothing: ~same * smoothing / (~same).sum(dim=1, keepdim=True).clamp(min=1)),
          "wrong candidates only"),
         (itc(share=lambda same, smoothing: (1 - torch.eye(len(same))) * smoothing / max(1, len(same) - 1)),
          "all but the diagonal"),
         (itc(prepare=lambda logits: logits.softmax(dim=1)), "you give it probabilities"),
         (itc(scale=lambda cosine, temperature: (cosine / temperature).softmax(dim=1)), "you have transposed"),
         (itc(scale=lambda cosine, temperature: cosine * temperature.exp()), "CLIP's log-scale"),
         (itc(smooth=False, both=False), "two slips at once: only pictures pick among sentences"),
         (itc(scale=lambda cosine, _: cosine, mean=1.0), "And: the two directions are added"),
         (one_side_cut, "part of the way cut off"), (temperature_half_cut, "part of the way cut off"),
         (ten_percent, "0 is a smoothing"), (with_divergence, "own entropy"), (with_a_little, "added to them"),
         (lambda *given: by_stage1(given[0].detach(), *given[1:]), "no gradient flows"),
         (lambda cosine, same, *rest: by_stage1(cosine, torch.eye(len(same)).bool(), *rest), "counts as a wrong"),
         (lambda cosine, same, temperature, smoothing: by_stage1(cosine, same, 0.07, smoothing), "none of the usual"),
         (naive, "overflowed"), (changing, "changed what it was given"),
         (lambda cosine, same, temperature, smoothing: by_stage1(cosine, same, temperature.item(), smoothing),
          "temperature gets no gradient"),
         (lambda *given: by_stage1(*given).detach(), "no gradient flows"),
         (lambda cosine, *rest: len(cosine) * by_stage1(cosine, *rest), "rows are added"),
         (lambda *given: by_stage1(*given) + 1, "none of the usual slips")]),
    "start_and_floor": Answers(
        [by_list, by_torch, lambda batch, smoothing: [math.log(batch), by_list(batch, smoothing)[1]],
         lambda batch, smoothing: tuple(map(np.float32, by_list(batch, smoothing))), by_single,
         lambda batch, smoothing: np.array(by_list(batch, smoothing)),
         lambda batch, smoothing: torch.tensor(by_list(batch, smoothing))],
        [(floor(with_a_little_more), "candidate by candidate"),
         (lambda batch, smoothing: tuple(round(one, 2) for one in by_list(batch, smoothing)), ""),
         (floor(lambda batch, smoothing: 0.0), "not sure itself"),
         (floor(lambda batch, smoothing: smoothing), "not a loss"),
         (floor(lambda batch, smoothing: -math.log(1 - smoothing)), "were it all of the target"),
         (floor(without_right_share), "gets its share of it"), (floor(at_zero), "adds nothing"),
         (floor(lambda batch, smoothing: by_list(batch, smoothing)[1] / math.log(2)), "bits"),
         (lambda batch, smoothing: (math.log2(batch), by_list(batch, smoothing)[1]), "bits"),
         (lambda batch, smoothing: (float(batch), by_list(batch, smoothing)[1]), "how many candidates"),
         (lambda batch, smoothing: by_list(batch, smoothing)[::-1], "exchanged"),
         (lambda batch, smoothing: math.log(batch), "two numbers"), (with_nan, "adds nothing"),
         (floor(lambda batch, smoothing: -by_list(batch, smoothing)[1]), "never negative"),
         (lambda batch, smoothing: (math.log(max(1, batch - 1)), by_list(batch, smoothing)[1]), "the right one among"),
         (lambda batch, smoothing: ((1 - smoothing) * math.log(batch), by_list(batch, smoothing)[1]),
          "changes the target"),
         (lambda batch, smoothing: (math.log(batch), 0.6365), "candidate by candidate"),
         (floor(lambda batch, smoothing: by_list(batch, 0.1)[1]), "candidate by candidate"),
         (lambda batch, smoothing: ("3.4", "0.6"), "should be a number"),
         (floor(lambda batch, smoothing: 0.1 + by_list(batch, smoothing)[1]), "entropy of its target")]),
    "which_bug": Answers(
        [lambda box: np.str_(by_hand(box)),
         lambda box: by_hand(lambda image, text, temperature: box(temperature=temperature, text=text, image=image)),
         by_hand, probe(SOME, torch.eye(3), 0.1),
         lambda box: probe(torch.randn(4, 30, 8), torch.randn(6, 8), 0.07)(box)],
        [(at_one, "At 1 both answer alike"),
         (lambda box: "right", "passes for right"), (lambda box: "broken", "the answers are"),
         (probe(SOME, torch.eye(3), 1.0), "multiplies by the temperature"),
         (probe(SOME[:, :1], torch.eye(3), 0.1), "first query only"),
         (probe(torch.eye(2)[:, None].repeat(1, 2, 1) + torch.tensor([[0.0, 0], [0.5, 0.5]]), torch.eye(2), 0.1, False),
          "rows are sentences"),
         (taken_for_each_other, "What would each of them answer"), (lucky, "first query only"),
         (lambda box: None, "the answers are"),
         (lambda box: "multiplied", ""),
         (lambda box: by_hand(lambda image, *rest: box(image[0], *rest)), "you fed it the shapes"),
         (by_shape_only, "passes for right"),
         (lambda box: "multiplied", "")]),
}

"""Answers to the exercises of lesson 06."""

import math

import torch
import torch.nn.functional as F

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


# --- 06.3 -------------------------------------------------------------------------------------------------------------


def by_list(batch, smoothing):
    target = [1 - smoothing + smoothing / batch] + [smoothing / batch] * (batch - 1)
    return math.log(batch), sum(-p * math.log(p) for p in target if p)


def by_torch(batch, smoothing):
    target = torch.full((batch,), smoothing / batch, dtype=torch.float64)
    target[0] += 1 - smoothing
    return torch.tensor(float(batch), dtype=torch.float64).log().item(), torch.special.entr(target).sum().item()


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

ANSWERS = {
    "similarity": Answers(
        [Stage1.similarity, by_matmul, by_loop,
         lambda image, text: (image.flatten(0, 1) @ text.T).unflatten(0, image.shape[:2]).amax(dim=1)],
        [(lambda image, text: image[:, 0] @ text.T, "first query"), (lambda image, text: image[:, -1] @ text.T, "last"),
         (of_queries(lambda cosines: cosines.mean(dim=2)), "mean over the queries"),
         (of_queries(lambda cosines: cosines.sum(dim=2)), "sum over the queries"),
         (of_queries(lambda cosines: cosines.amin(dim=2)), "fits worst"),
         (of_queries(lambda cosines: cosines.abs().amax(dim=2)), "without its sign"),
         (of_queries(lambda cosines: cosines.amax(dim=2).T), "exchanged"),
         (of_queries(lambda cosines: cosines), "asked for is (b n)"),
         (of_queries(lambda cosines: cosines.amax(dim=2).detach()), "no gradient flows"),
         (lambda image, text: by_matmul(image, text.detach()), "reaches the sentences"),
         (of_queries(lambda cosines: cosines.amax(dim=2).softmax(dim=1)), "the numbers are others"),
         (lambda image, text: by_matmul(image.float(), text.float()), "float64"),
         (lambda image, text: by_matmul(image - image.mean(dim=1, keepdim=True), text), "the numbers are others")]),
    "itc_loss": Answers(
        [by_stage1, by_entropy, by_rows],
        [(itc(scale=torch.mul), "cannot leave ln B"), (itc(scale=lambda cosine, _: cosine), "takes no part"),
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
         (itc(scale=lambda cosine, temperature: (cosine / temperature).softmax(dim=1)), "you have turned"),
         (itc(scale=lambda cosine, temperature: cosine * temperature.exp()), "CLIP's log-scale"),
         (itc(smooth=False, both=False), "two slips at once: only pictures pick among sentences"),
         (itc(scale=lambda cosine, _: cosine, mean=1.0), "And: the two directions are added"),
         (naive, "overflowed"), (changing, "changed what it was given"),
         (lambda cosine, same, temperature, smoothing: by_stage1(cosine, same, temperature.item(), smoothing),
          "temperature gets no gradient"),
         (lambda *given: by_stage1(*given).detach(), "no gradient flows"),
         (lambda cosine, *rest: len(cosine) * by_stage1(cosine, *rest), "rows are added"),
         (lambda *given: by_stage1(*given) + 1, "none of the usual slips")]),
    "start_and_floor": Answers(
        [by_list, by_torch, lambda batch, smoothing: [math.log(batch), by_list(batch, smoothing)[1]]],
        [(floor(lambda batch, smoothing: 0.0), "not sure itself"),
         (floor(lambda batch, smoothing: smoothing), "not a loss"),
         (floor(lambda batch, smoothing: -math.log(1 - smoothing)), "were it all of the target"),
         (floor(without_right_share), "gets its share of it"), (floor(at_zero), "takes no part"),
         (floor(lambda batch, smoothing: by_list(batch, smoothing)[1] / math.log(2)), "bits"),
         (lambda batch, smoothing: (math.log2(batch), by_list(batch, smoothing)[1]), "bits"),
         (lambda batch, smoothing: (float(batch), by_list(batch, smoothing)[1]), "how many candidates"),
         (lambda batch, smoothing: by_list(batch, smoothing)[::-1], "exchanged"),
         (lambda batch, smoothing: math.log(batch), "two numbers"),
         (floor(lambda batch, smoothing: 0.1 + by_list(batch, smoothing)[1]), "entropy of its target")]),
    "which_bug": Answers(
        [by_hand, probe(SOME, torch.eye(3), 0.1),
         lambda box: probe(torch.randn(4, 30, 8), torch.randn(6, 8), 0.07)(box)],
        [(lambda box: "right", "passes for right"), (lambda box: "broken", "the answers are"),
         (probe(SOME, torch.eye(3), 1.0), "multiplies by the temperature"),
         (probe(SOME[:, :1], torch.eye(3), 0.1), "first query only"),
         (probe(torch.eye(2)[:, None].repeat(1, 2, 1) + torch.tensor([[0.0, 0], [0.5, 0.5]]), torch.eye(2), 0.1, False),
          "rows are sentences"),
         (taken_for_each_other, "for each other"),
         (lambda box: by_hand(lambda image, *rest: box(image[0], *rest)), "you fed it the shapes"),
         (by_shape_only, "passes for right"),
         (lambda box: "multiplied", "")]),
}

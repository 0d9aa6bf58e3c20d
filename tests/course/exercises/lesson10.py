"""Answers to the exercises of lesson 10."""

import copy

import einops
import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

import own

from . import Answers

IGNORED = -100


def joined(queries, projection, prompt, text):
    return torch.cat([projection(queries).to(text.dtype), prompt, text], dim=1)


def joined_by_places(queries, projection, prompt, text):
    q, p = queries.shape[1], prompt.shape[1]
    result = text.new_zeros(len(text), q + p + text.shape[1], text.shape[2])
    result[:, :q] = torch.einsum("bqi,oi->bqo", queries, projection.weight) + projection.bias
    result[:, q:q + p], result[:, q + p:] = prompt, text
    return result


def by_einops(queries, projection, prompt, text):
    soft = F.linear(queries, projection.weight, projection.bias).type_as(text)
    return einops.pack([soft, prompt, text], "b * e")[0]


def with_soft(change):
    """Mistakes in the soft prompt: change(queries, projection)."""
    return lambda queries, projection, prompt, text: torch.cat(
        [change(queries, projection).to(text.dtype), prompt, text], dim=1)


def in_order(order):
    def join(queries, projection, prompt, text):
        parts = {"soft": projection(queries).to(text.dtype), "prompt": prompt, "text": text}
        return torch.cat([parts[name] for name in order.split()], dim=1)
    return join


def labelled(queries, prompt, prompt_mask, text, text_mask):
    return F.pad(text.masked_fill(~text_mask, IGNORED), (queries + prompt.shape[1], 0), value=IGNORED)


def labelled_by_loops(queries, prompt, prompt_mask, text, text_mask):
    before = [IGNORED] * (queries + prompt.shape[1])
    return torch.tensor([before + [int(one) if real else IGNORED for one, real in zip(row, marks, strict=True)]
                         for row, marks in zip(text, text_mask, strict=True)])


def with_text(change):
    """Mistakes in the text's labels: change(text, text_mask)."""
    return lambda queries, prompt, prompt_mask, text, text_mask: F.pad(
        change(text, text_mask), (queries + prompt.shape[1], 0), value=IGNORED)


def prompt_too(queries, prompt, prompt_mask, text, text_mask):
    ids, mask = torch.cat([prompt, text], dim=1), torch.cat([prompt_mask, text_mask], dim=1)
    return F.pad(ids.masked_fill(~mask, IGNORED), (queries, 0), value=IGNORED)


def soft_too(queries, *given):
    made = labelled(queries, *given)
    made[:, :queries] = 0
    return made


def end_by_id(text, mask):
    return text.masked_fill(text == text[0, -1], IGNORED)


def until_first_end(text, mask):
    """The mistake to take what stands behind the first end for padding."""
    ended = (text == text[0, -1]).long().cumsum(dim=1)
    return text.masked_fill(~mask | (ended - (text == text[0, -1]).long() > 0), IGNORED)


def labels_in_place(queries, prompt, prompt_mask, text, text_mask):
    text[~text_mask] = IGNORED
    return labelled(queries, prompt, prompt_mask, text, text_mask)


def labelled_by_where(queries, prompt, prompt_mask, text, text_mask):
    nothing = text.new_full((len(text), queries + prompt.shape[1]), IGNORED)
    return torch.hstack([nothing, torch.where(text_mask, text, IGNORED)])


def no_last(text, mask):
    return text.masked_fill(~(mask & F.pad(mask[:, 1:], (0, 1))), IGNORED)


def shifted_text(text, mask):
    return F.pad(text.masked_fill(~mask, IGNORED)[:, 1:], (0, 1), value=IGNORED)


def shifted_already(*given):
    return F.pad(labelled(*given)[:, 1:], (0, 1), value=IGNORED)


def shifted(logits, targets):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED)


def shifted_by_gather(logits, targets):
    asked = targets[:, 1:]
    chance = logits[:, :-1].log_softmax(dim=-1).gather(2, asked.clamp_min(0)[..., None])[..., 0]
    return -chance[asked != IGNORED].mean()


def by(shift):
    def loss(logits, targets):
        s = targets.shape[1]
        kept = logits[:, :s - shift] if shift >= 0 else logits[:, -shift:]
        asked = targets[:, shift:] if shift >= 0 else targets[:, :shift]
        return F.cross_entropy(kept.transpose(1, 2), asked)
    return loss


def per_caption(logits, targets):
    return torch.stack([shifted(logits[i:i + 1], targets[i:i + 1]) for i in range(len(logits))]).mean()


def summed(logits, targets):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="sum")


def naive(logits, targets):
    asked, chance = targets[:, 1:], logits[:, :-1].exp()
    own = (chance / chance.sum(dim=-1, keepdim=True)).gather(2, asked.clamp_min(0)[..., None])[..., 0]
    return -own.log()[asked != IGNORED].mean()


def naive_with_floor(logits, targets):
    asked = targets[:, 1:]
    own = logits[:, :-1].softmax(dim=-1).gather(2, asked.clamp_min(0)[..., None])[..., 0]
    return -(own + 1e-9).log()[asked != IGNORED].mean()


def skips_empty(logits, targets):
    """Right for all words, were there not a division by the words of each caption on the way."""
    asked = targets[:, 1:] != IGNORED
    paid = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").sum(dim=1)
    counts = asked.sum(dim=1)
    return (paid / counts * counts).sum() / counts.sum()


def every_place(logits, targets):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none").mean()


def frozen(lm, embeds):
    return lm.requires_grad_(False).eval()(embeds)


def with_detached_weights(lm, embeds):
    lm.eval()
    return functional_call(lm, {name: weight.detach() for name, weight in lm.named_parameters()}, (embeds,))


def frozen_copy(lm, embeds):
    return copy.deepcopy(lm).eval().requires_grad_(False)(embeds)


def frozen_for_a_while(lm, embeds):
    mode = lm.training
    for part in lm.parameters():
        part.requires_grad = False
    states = lm.train(False)(embeds)
    lm.train(mode)
    return states


def own_weights_only(lm, embeds):
    for weight in (weight for part in (lm, *lm.children()) for weight in part.parameters(recurse=False)):
        weight.requires_grad = False
    return lm.eval()(embeds)


def dropout_only(lm, embeds):
    for part in lm.requires_grad_(False).modules():
        if isinstance(part, torch.nn.Dropout):
            part.eval()
    return lm(embeds)


def linear_only(lm, embeds):
    for part in lm.eval().modules():
        if isinstance(part, torch.nn.Linear):
            part.requires_grad_(False)
    return lm(embeds)


def once(lm, embeds):
    """The mistake to freeze at the first call only."""
    if any(weight.requires_grad for weight in lm.parameters()):
        lm.requires_grad_(False).eval()
    return lm(embeds)


def layer_by_layer(lm, embeds):
    for layer in lm.requires_grad_(False).eval():
        embeds = layer(embeds)
    return embeds


def under_no_grad(lm, embeds):
    with torch.no_grad():
        return lm.eval()(embeds)


def straight_through(lm, embeds):
    with torch.no_grad():
        states = lm.eval()(embeds)
    return embeds + (states - embeds).detach()


def answers(length=lambda q, p, t: q + p + t, first=lambda q, p, t: q + p - 1, paid=lambda q, p, t: t):
    return lambda q, p, t: (length(q, p, t), first(q, p, t), paid(q, p, t))


# --- 10.6: bridges that need no training, because they look up what is in the pictures -------------------------------


def says(make):
    """A bridge that says make(scene, its number) of each picture of the exam."""
    def caption(images):
        place = {id(image): number for number, image in enumerate(own.exam()[0])}
        numbers = [place[id(image)] for image in images]
        return [make(own.exam()[1][number], number) for number in numbers]
    return lambda: caption


def plain(scene, number=0):
    return "a picture of " + " and ".join(f"a {thing.colour} {thing.shape}" for thing in scene.things)


def of_another(scene, number):
    return plain(own.exam()[1][(number + 40) % own.EXAM])


def every(nth, caption=of_another):
    """Right for one picture in so many, something else for the others."""
    return lambda scene, number: plain(scene) if number % nth == 0 else caption(scene, number)


def as_written(scene, number):
    return own.exam()[2][number]


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def forgets_an_empty_prompt(queries, projection, prompt, text):
    """The mistake to look after the kind of numbers only where there is a prompt."""
    return joined(queries, projection, prompt, text) if prompt.shape[1] else torch.cat([projection(queries), text], 1)


def turns_the_projection(queries, projection, prompt, text):
    projection.to(text.dtype)
    return torch.cat([projection(queries.to(text.dtype)), prompt, text], dim=1)


def into_a_buffer(queries, projection, prompt, text):
    soft = projection(queries)
    whole = torch.empty(len(text), soft.shape[1] + prompt.shape[1] + text.shape[1], text.shape[2], dtype=text.dtype)
    whole[:, :soft.shape[1]] = soft
    whole[:, soft.shape[1]:] = torch.cat([prompt, text], dim=1)
    return whole


def without_the_certain(logits, targets):
    """The mistake to read off the losses which places are supervised."""
    each = F.cross_entropy(logits[:, :-1].mT, targets[:, 1:], reduction="none")
    return each[each > 0].mean()


ANSWERS = {
    "sequence": Answers(
        [into_a_buffer,
         joined, joined_by_places, by_einops],
        [(forgets_an_empty_prompt, "promoted"),
         (turns_the_projection, "small steps are lost"),
         (in_order("prompt soft text"), "in front"), (in_order("prompt text soft"), "in front"),
         (in_order("soft text prompt"), "as they came"), (in_order("soft text"), "queries + prompt + text"),
         (lambda queries, projection, prompt, text: torch.cat([projection(queries), prompt, text], dim=1), "promoted"),
         (with_soft(lambda queries, projection: queries @ projection.weight.T), "bias"),
         (with_soft(lambda queries, projection: F.normalize(projection(queries), dim=-1)), "normalised"),
         (with_soft(lambda queries, projection: projection(queries).detach()), "no gradient"),
         (with_soft(lambda queries, projection: projection(queries).relu()), "not the projected queries"),
         (with_soft(lambda queries, projection: projection(queries.detach())), "reaches the queries"),
         (with_soft(lambda queries, projection: F.linear(queries, projection.weight.detach(), projection.bias)),
          "weights and bias"),
         (with_soft(lambda queries, projection: F.linear(queries, projection.weight, projection.bias.detach())),
          "weights and bias"),
         (with_soft(lambda queries, projection: projection((queries + queries.detach()) / 2)),
          "that of the projection"),
         (with_soft(lambda queries, projection: projection(torch.cat([queries[:, :1].detach(), queries[:, 1:]], 1))),
          "that of the projection"),
         (lambda queries, projection, prompt, text: torch.cat([F.linear(*(
             part.to(text.dtype) for part in (queries, projection.weight, projection.bias))), prompt, text], dim=1),
          "rounded"),
         (lambda queries, projection, prompt, text: torch.cat([
             projection(queries.to(text.dtype).float()).to(text.dtype), prompt, text], dim=1), "rounded"),
         (lambda *given: joined(*given).bfloat16(), "torch.bfloat16"), (in_order("soft prompt"), "queries + prompt"),
         (with_soft(lambda queries, projection: projection(queries).flip(1)), "in their order")]),
    "labels": Answers(
        [lambda *given: torch.from_numpy(labelled(*given).numpy().copy()),
         labelled, labelled_by_loops, labelled_by_where],
        [(lambda *given: labelled(*given).int(), "int32"),
         (prompt_too, "though it is given"), (soft_too, "not a word"),
         (with_text(lambda text, mask: text), "padding has"),
         (with_text(end_by_id), "by its id"), (with_text(no_last), "never learns to stop"),
         (shifted_already, "shift twice"), (with_text(shifted_text), "you have shifted already"),
         (lambda *given: labelled(*given).float(), "torch.int64"),
         (with_text(lambda text, mask: text.masked_fill(~mask, 0)), "nothing else"),
         (with_text(lambda text, mask: text.masked_fill(~mask | (text == 0), IGNORED)), "id is 0"),
         (with_text(lambda text, mask: text.masked_fill(text == 0, IGNORED)), "have no label"),
         (with_text(lambda text, mask: text.masked_fill(~mask | (text == text[0, -1]), IGNORED)),
          "never learns to stop"),
         (with_text(until_first_end), "have no label"), (with_text(lambda text, mask: text.masked_fill(~mask, -1)),
                                                         "nothing else"),
         (lambda queries, *given: labelled(32, *given), "queries + prompt + text"),
         (lambda *given: labelled(*given)[:, 1:], "queries + prompt + text"), (labels_in_place, "changed its input")]),
    "shifted_loss": Answers(
        [lambda logits, targets: F.nll_loss(logits[:, :-1].flatten(0, 1).log_softmax(1), targets[:, 1:].flatten()),
         shifted, shifted_by_gather, by(1)],
        [(without_the_certain, "counts all the same"),
         (lambda logits, targets: shifted(logits.double(), targets), "float64"),
         (lambda logits, targets: shifted(logits.clamp(-50, 50), targets), "Which logits meet"),
         (by(0), "repeat what it sees"), (by(2), "shifted twice"), (by(-1), "wrong way"), (per_caption, "however long"),
         (summed, "added up"), (every_place, "not supervised"),
         (lambda logits, targets: shifted(logits.detach(), targets), "no gradient"),
         (naive, "exponential"), (naive_with_floor, "logits up to"),
         (lambda logits, targets: shifted(logits, targets.masked_fill(targets == 0, IGNORED)), "id 0 is not asked"),
         (lambda *given: (shifted(*given) + shifted(*given).detach()) / 2, "its gradient is not"),
         (lambda logits, targets: shifted(torch.cat([logits[:1], logits[1:].detach()]), targets), "each of them"),
         (lambda logits, targets: F.cross_entropy(logits[:, :-1].reshape(len(logits), logits.shape[2], -1),
                                                  targets[:, 1:]), "only renamed"),
         (lambda logits, targets: shifted(logits.softmax(dim=-1), targets), "applied twice"),
         (lambda logits, targets: -shifted(logits, targets), "not negative"),
         (lambda logits, targets: summed(logits, targets) / len(logits), "pays for its length"),
         (skips_empty, "supervised word")]),
    "lm_logits": Answers(
        [frozen, with_detached_weights, frozen_copy, frozen_for_a_while],
        [(lambda lm, embeds: (frozen(lm, embeds) + frozen(lm, embeds.detach())) / 2, "that of the language model"),
         (under_no_grad, "graph is cut"), (lambda lm, embeds: frozen(lm, embeds.detach()), "graph is cut"),
         (lambda lm, embeds: frozen(lm, embeds).detach(), "graph is cut"),
         (lambda lm, embeds: lm.eval()(embeds), "collected a gradient"),
         (lambda lm, embeds: lm.requires_grad_(False)(embeds), "dropout"), (straight_through, "leads past"),
         (lambda lm, embeds: embeds, "not what the language model makes"),
         (own_weights_only, "collected a gradient"), (dropout_only, "dropout"), (linear_only, "collected a gradient"),
         (lambda lm, embeds: frozen(lm, (embeds + embeds.detach()) / 2), "or is cut"), (once, "dropout"),
         (layer_by_layer, "")]),
    "places": Answers(
        [answers(), lambda queries, given, written: [written + queries + given, given + (queries - 1), written],
         lambda *given: np.array(answers()(*given)), lambda *given: tuple(map(np.int64, answers()(*given))),
         lambda *given: torch.tensor(answers()(*given))],
        [(answers(length=lambda q, p, t: p + t), "take places"), (answers(first=lambda q, p, t: q - 1), "last query"),
         (answers(first=lambda q, p, t: q + p), "position predicts it"),
         (answers(paid=lambda q, p, t: t - 1), "as well"),
         (answers(paid=lambda q, p, t: q + p + t - 1), "is not paid for"),
         (answers(length=lambda q, p, t: q + p + t + 2), "counted already"),
         (answers(length=lambda q, p, t: 32 + p + t), "what is to be written"),
         (answers(first=lambda q, p, t: q), "more may be given"), (answers(first=lambda q, p, t: 32), "counted from 0"),
         (answers(first=lambda q, p, t: q + p - 2), "too early"),
         (answers(paid=lambda q, p, t: t + p), "is not paid for"),
         (answers(paid=lambda q, p, t: t + 1), "nothing comes after it"),
         (lambda *given: tuple(map(str, answers()(*given))), "one number"), (lambda *given: answers()(*given)[:2],
                                                                             "three numbers")]),
    "own_bridge": Answers(
        [says(as_written), says(every(3)), lambda: lambda images: tuple(says(plain)()(images))],
        [(says(lambda scene, number: ""), "the end is said before"),
         (says(lambda scene, number: "a red red red red circle"), "taught to repeat"),
         (says(lambda scene, number: " and ".join([plain(scene)] * 9)), "never end"),
         (says(lambda scene, number: "a picture of a red circle"), "nothing of the picture arrives"),
         (says(of_another), "fluent, and blind"), (says(every(14)), "it has begun to see"),
         (lambda: says(plain)()(own.exam()[0]), "gives a list"),
         (lambda: lambda images: says(plain)()(images[:9]), "as many captions"),
         (lambda: lambda images: [None] * len(images), "each a text")]),
}

"""Answers to the exercises of lesson 04."""

import math

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.models import WordPiece

from minblip2 import masks
from minblip2.lm import llama

from . import Answers

# --- wordpiece --------------------------------------------------------------------------------------------------------


def pieces_of(word, vocabulary, mark="##", longest=True, partial=False, loose=False):
    """The pieces of a word, rightly or with one of the usual slips."""
    pieces, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1) if longest else range(start + 1, len(word) + 1)
        marks = [mark] if start else ["", "##"] if loose else [""]
        found = next(((m, end) for end in ends for m in marks if m + word[start:end] in vocabulary), None)
        if found is None:
            return [*pieces, "[UNK]"] if partial else ["[UNK]"]
        pieces.append(found[0] + word[start:found[1]])
        start = found[1]
    return pieces


def framed(cut):
    """An answer from a function that cuts one word."""
    def encode(caption, vocabulary):
        pieces = [piece for word in caption.split() for piece in cut(word, vocabulary)]
        return [vocabulary[piece] for piece in ["[CLS]", *pieces, "[SEP]"]]
    return encode


def recursive(word, vocabulary, mark=""):
    """Longest match as a recursion."""
    for end in range(len(word), 0, -1):
        if mark + word[:end] in vocabulary:
            rest = recursive(word[end:], vocabulary, "##") if end < len(word) else []
            return ["[UNK]"] if rest == ["[UNK]"] else [mark + word[:end], *rest]
    return ["[UNK]"]


def by_library(caption, vocabulary):
    backend = tokenizers.Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return [vocabulary["[CLS]"], *backend.encode(caption).ids, vocabulary["[SEP]"]]


def going_back(word, vocabulary, mark=""):
    """The mistake to search for any cut that works."""
    if not word:
        return []
    for end in range(len(word), 0, -1):
        if mark + word[:end] in vocabulary:
            rest = going_back(word[end:], vocabulary, "##")
            if rest != ["[UNK]"]:
                return [mark + word[:end], *rest]
    return ["[UNK]"]


def from_the_right(word, vocabulary):
    pieces, end = [], len(word)
    while end:
        starts = [start for start in range(end) if ("##" if start else "") + word[start:end] in vocabulary]
        if not starts:
            return ["[UNK]"]
        pieces.insert(0, ("##" if starts[0] else "") + word[starts[0]:end])
        end = starts[0]
    return pieces


def dropped(word, vocabulary):
    found = pieces_of(word, vocabulary)
    return [] if found == ["[UNK]"] else found


def frame_per_word(caption, vocabulary):
    right = framed(pieces_of)
    return [i for word in caption.split() for i in right(word, vocabulary)]


def unknown_is_zero(caption, vocabulary):
    pieces = [piece for word in caption.split() for piece in pieces_of(word, vocabulary)]
    return [vocabulary["[CLS]"], *(0 if piece == "[UNK]" else vocabulary[piece] for piece in pieces),
            vocabulary["[SEP]"]]


def by_truth(caption, vocabulary):
    """The mistake to ask whether an id is true, not whether there is one."""
    known = {piece: i for piece, i in vocabulary.items() if i}
    pieces = [piece for word in caption.split() for piece in pieces_of(word, known)]
    return [vocabulary[piece] for piece in ["[CLS]", *pieces, "[SEP]"]]


def of_first_vocabulary():
    """The mistake to keep what became of a word, whatever the vocabulary."""
    kept = {}

    def encode(caption, vocabulary):
        if "[CLS]" not in kept or caption.split() and not any(caption.split()[0][:1] in piece for piece in kept):
            kept.update(vocabulary)
        return framed(pieces_of)(caption, kept)
    return encode


def whole(word, vocabulary):
    return [word if word in vocabulary else "[UNK]"]


# --- turned -----------------------------------------------------------------------------------------------------------


def by_rotate(x, positions, theta):
    return llama.apply_rope(x, *llama.rotary(positions, x.shape[-1], theta))


def by_complex(x, positions, theta):
    first, second = x.double().chunk(2, dim=-1)
    half = first.shape[-1]
    angles = positions[:, None, :, None].double() * theta ** -(torch.arange(half).double() / half)
    arrows = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([arrows.real, arrows.imag], dim=-1).to(x.dtype)


def by_matrix(x, positions, theta):
    d = x.shape[-1]
    plane = torch.zeros(*positions.shape, d, d)
    for n in range(d // 2):
        angle, m = positions * theta ** (-2 * n / d), n + d // 2
        plane[..., n, n] = plane[..., m, m] = angle.cos()
        plane[..., m, n], plane[..., n, m] = angle.sin(), -angle.sin()
    return torch.einsum("bsij,bhsj->bhsi", plane, x.float()).to(x.dtype)


def turning(step=2.0, sign=1.0, grow=-1.0, equal=False, place=None, stretch=False, add=False, coarse=False):
    """Rotary positions with one of the usual slips."""
    def turn(x, positions, theta):
        half = x.shape[-1] // 2
        speeds = theta ** (grow * step * torch.arange(half) / x.shape[-1])
        speeds = torch.ones_like(speeds) if equal else speeds
        positions = place(positions) if place else positions
        kind = x.dtype if coarse else torch.float32
        angles = positions[:, None, :, None].to(kind) * speeds.to(kind)
        cos, sin = angles.cos(), sign * angles.sin()
        first, second = x.chunk(2, dim=-1)
        if stretch:
            return torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
        if add:
            return (x + torch.cat([cos - 1, sin], dim=-1)).to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return turn


def neighbours(x, positions, theta):
    mixed = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
    first, second = by_rotate(mixed, positions, theta).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


def without_heads(x, positions, theta):
    """The mistake to let angles (b s d) meet x (b h s d) without an axis for the heads."""
    half = x.shape[-1] // 2
    angles = positions[..., None].float() * theta ** (-2 * torch.arange(half) / x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()],
                     dim=-1).to(x.dtype)


def slowest_first(x, positions, theta):
    half = x.shape[-1] // 2
    order = torch.arange(half).flip(0)
    order = torch.cat([order, order + half])
    return by_rotate(x[..., order], positions, theta)[..., order]


# --- next_word_loss ---------------------------------------------------------------------------------------------------


def by_selection(logits, ids, mask):
    real = mask[:, 1:]
    return F.cross_entropy(logits[:, :-1][real], ids[:, 1:][real])


def by_ignoring(logits, ids, mask):
    labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels)


def by_gather(logits, ids, mask):
    chance = logits.log_softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return -(chance * mask[:, 1:]).sum() / mask[:, 1:].sum()


def by_loop(logits, ids, mask):
    found = [logits[i, p].logsumexp(0) - logits[i, p, ids[i, p + 1]]
             for i in range(len(ids)) for p in range(ids.shape[1] - 1) if mask[i, p + 1]]
    return sum(found) / len(found)


def shifted(by):
    def loss(logits, ids, mask):
        if by < 0:
            return F.cross_entropy(logits[:, -by:][mask[:, -by:]], ids[:, :by][mask[:, -by:]])
        t = ids.shape[1] - by
        return F.cross_entropy(logits[:, :t][mask[:, by:]], ids[:, by:][mask[:, by:]])
    return loss


def of_means(logits, ids, mask):
    return torch.stack([by_selection(*(part[[i]] for part in (logits, ids, mask))) for i in range(len(ids))]).mean()


def over_the_rectangle(logits, ids, mask):
    return by_gather(logits, ids, mask) * mask[:, 1:].sum() / mask[:, 1:].numel()


def mask_of_the_asked(logits, ids, mask):
    real = mask[:, :-1]
    return F.cross_entropy(logits[:, :-1][real], ids[:, 1:][real])


def by_id(logits, ids, mask):
    return by_selection(logits, ids, mask & (ids != ids[0, -1]))


def circular(logits, ids, mask):
    return F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, dims=1).flatten())


def in_place(logits, ids, mask):
    ids[~mask] = -100
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])


def mean_probability(logits, ids, mask):
    real = mask[:, 1:]
    return 1 - logits.softmax(-1)[:, :-1][real].gather(1, ids[:, 1:][real][:, None]).mean()


def by_name(logits, ids, mask):
    """The mistake to look the next word up by name: a word that comes again has two."""
    rows = [row[:int(real.sum())].tolist() for row, real in zip(ids, mask, strict=True)]
    found = [F.cross_entropy(logits[i, p], torch.tensor(row[row.index(word) + 1])) for i, row in enumerate(rows)
             for p, word in enumerate(row[:-1])]
    return torch.stack(found).mean()


def ignoring(which):
    def loss(logits, ids, mask):
        labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels.masked_fill(labels == which, -100))
    return loss


def up_to_the_end(logits, ids, mask):
    """The mistake to stop a text at its first end."""
    end = ids[0, -1]
    ended = (ids == end).long().cumsum(dim=1) - (ids == end).long() > 0
    return by_selection(logits, ids, ~ended)


def half_cut(logits, ids, mask):
    return by_selection(logits, ids, mask) / 2 + by_selection(logits.detach(), ids, mask) / 2


def by_probability(logits, ids, mask):
    chance = logits.softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return -chance[mask[:, 1:]].log().mean()


# --- at_the_start -----------------------------------------------------------------------------------------------------


def by_drawing(vocabulary, width, std):
    """Logits drawn at random, many times."""
    logits = torch.randn(100, vocabulary) * std * math.sqrt(width)
    loss = logits.logsumexp(dim=1).mean().item()
    return loss, math.exp(loss)


def starting(loss_of, perplexity_of=math.exp):
    def predict(vocabulary, width, std):
        loss = loss_of(math.log(vocabulary), std * math.sqrt(width))
        return loss, perplexity_of(loss)
    return predict


# --- write_on ---------------------------------------------------------------------------------------------------------


def filled(prompts, pad, left):
    """Ids and mask of prompts padded on one side."""
    length = max(map(len, prompts))
    rows = [[pad] * (length - len(row)) + row if left else row + [pad] * (length - len(row)) for row in prompts]
    real = [[False] * (length - len(row)) + [True] * len(row) for row in prompts]
    return torch.tensor(rows), torch.tensor(real if left else [row[::-1] for row in real])


def writing(left=True, by_id=False, blind=False, feed=True, see_own=True, scrambled=False, newest=False, whole=False):
    """Greedy writing on padded prompts, rightly or with one of the usual slips."""
    def write(model, prompts, pad, steps):
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if scrambled else range(len(prompts))
        ids, attention_mask = filled([prompts[i] for i in order], pad, left)
        if blind:
            attention_mask = torch.ones_like(attention_mask)
        start, written = ids.shape[1], []
        for _ in range(steps):
            attention_mask = ids != pad if by_id else attention_mask
            hidden = model(model.embed(ids), masks.causal(attention_mask), masks.token_positions(attention_mask))
            last = attention_mask.long().cumsum(1).argmax(1) if newest else torch.full((len(ids),), ids.shape[1] - 1)
            words = model.lm_logits(hidden[torch.arange(len(ids)), last]).argmax(-1)
            written.append(words)
            if feed:
                ids = torch.cat([ids, words[:, None]], dim=1)
                attention_mask = F.pad(attention_mask, (0, 1), value=see_own)
        return ids if whole else torch.stack(written, dim=1) if not feed else ids[:, start:]
    return write


def one_by_one(model, prompts, pad, steps):
    return torch.cat([writing()(model, [row], pad, steps) for row in prompts])


def with_cache(model, prompts, pad, steps):
    ids, attention_mask = filled(prompts, pad, left=False)
    cache, written = model.new_cache(), []
    state, attention_mask = model.prefill(model.embed(ids), attention_mask, cache)
    for _ in range(steps):
        written.append(model.lm_logits(state).argmax(-1))
        attention_mask = F.pad(attention_mask, (0, 1), value=True)
        positions = masks.token_positions(attention_mask)[:, -1:]
        state = model(model.embed(written[-1][:, None]), attention_mask[:, None, None], positions, cache)[:, -1]
    return torch.stack(written, dim=1)


def mask_on_the_other_side(model, prompts, pad, steps):
    ids, _ = filled(prompts, pad, left=True)
    _, attention_mask = filled(prompts, pad, left=False)
    start = ids.shape[1]
    for _ in range(steps):
        hidden = model(model.embed(ids), masks.causal(attention_mask), masks.token_positions(attention_mask))
        words = model.lm_logits(hidden[:, -1]).argmax(-1)
        ids, attention_mask = torch.cat([ids, words[:, None]], dim=1), F.pad(attention_mask, (0, 1), value=True)
    return ids[:, start:]


def changes_the_prompts(model, prompts, pad, steps):
    result = writing()(model, prompts, pad, steps)
    for row, more in zip(prompts, result.tolist(), strict=True):
        row.extend(more)
    return result


def filled_with(own):
    """The mistake to pad with an id of one's own, and to know padding by it."""
    return lambda model, prompts, pad, steps: writing(by_id=True)(model, prompts, own, steps)


def written_by_id(model, prompts, pad, steps):
    """The mistake to know padding among what is written by its id."""
    ids, attention_mask = filled(prompts, pad, left=True)
    start = ids.shape[1]
    for _ in range(steps):
        hidden = model(model.embed(ids), masks.causal(attention_mask), masks.token_positions(attention_mask))
        words = model.lm_logits(hidden[:, -1]).argmax(-1)
        ids, attention_mask = torch.cat([ids, words[:, None]],
                                        dim=1), torch.cat([attention_mask, words[:, None] != pad], dim=1)
    return ids[:, start:]


def four_steps(model, prompts, pad, steps):
    return writing()(model, prompts, pad, 4)


def stops_at_pad(model, prompts, pad, steps):
    words = writing()(model, prompts, pad, steps)
    ended = (words == pad).long().cumsum(dim=1) > 0
    return words.masked_fill(ended, pad)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def remembered():
    """The mistake to keep the ids of a word from one vocabulary to the next."""
    known = {}

    def encode(caption, vocabulary):
        for word in caption.split():
            if word not in known:
                known[word] = framed(pieces_of)(word, vocabulary)[1:-1]
        ids = [i for word in caption.split() for i in known[word]]
        return [vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]]
    return encode


def once_unknown(caption, vocabulary):
    """The mistake to give neighbours that are unknown one place together."""
    ids = framed(pieces_of)(caption, vocabulary)
    return [i for place, i in enumerate(ids) if place == 0 or i != vocabulary["[UNK]"] or ids[place - 1] != i]


def never_long(caption, vocabulary):
    """The mistake to take a long word for an unknown one."""
    return framed(lambda word, known: pieces_of(word, known) if len(word) < 30 else ["[UNK]"])(caption, vocabulary)


def as_in_transformers(x, positions, theta):
    d = x.shape[-1]
    angles = positions[..., None].float() / theta ** (torch.arange(0, d, 2).float() / d)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    across = torch.cat([-x[..., d // 2:], x[..., :d // 2]], dim=-1)
    return (x.float() * angles.cos() + across.float() * angles.sin()).to(x.dtype)


def by_masking(logits, ids, mask):
    paid = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return (paid * mask[:, 1:]).sum() / mask[:, 1:].sum()


def first_cut(logits, ids, mask):
    return by_selection(torch.cat([logits[:, :1].detach(), logits[:, 1:]], dim=1), ids, mask)


def in_groups(model, prompts, pad, steps):
    """Prompts of one length together, so that nothing is ever padded."""
    written = torch.empty(len(prompts), steps, dtype=torch.long)
    for length in {len(prompt) for prompt in prompts}:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        written[rows] = writing()(model, [prompts[i] for i in rows], pad, steps)
    return written


def another_way(where=masks.causal, place=masks.token_positions, pick=lambda logits: logits.argmax(dim=-1)):
    """Writing with another mask, other positions, or another choice of words."""
    def write(model, prompts, pad, steps):
        length = max(map(len, prompts))
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in prompts])
        real = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in prompts])
        for _ in range(steps):
            words = pick(model.lm_logits(model(model.embed(ids), where(real), place(real))[:, -1]))
            ids, real = torch.cat([ids, words[:, None]], dim=1), F.pad(real, (0, 1), value=True)
        return ids[:, length:]
    return write


def longest_first(model, prompts, pad, steps):
    return writing()(model, sorted(prompts, key=len, reverse=True), pad, steps)


ANSWERS = {
    "wordpiece": Answers(
        [lambda caption, known: [np.int64(i) for i in framed(pieces_of)(caption, known)],
         framed(pieces_of), framed(recursive), by_library,
         lambda caption, known: list(np.array(framed(pieces_of)(caption, known)))],
        [(remembered(), ""),
         (once_unknown, "does each unknown word hold a place"),
         (never_long, "may a word be long"),
         (lambda caption, known: framed(pieces_of)(caption, known)[:8] + [known['[SEP]']], ""),
         (framed(lambda word, known: pieces_of(word, known, longest=False)), "a longer one was there"),
         (framed(lambda word, known: pieces_of(word, known, mark="")), "has a name of its own"),
         (framed(lambda word, known: pieces_of(word, known, loose=True)), "only continues words"),
         (framed(lambda word, known: pieces_of(word, known, partial=True)), "One gap"),
         (framed(going_back), "never goes back"), (framed(from_the_right), "from right to left"),
         (framed(dropped), "was dropped"), (frame_per_word, "frame the text"),
         (unknown_is_zero, "the id of [UNK] stands"),
         (lambda caption, known: framed(pieces_of)(caption, known)[1:], "begin with [CLS]"),
         (lambda caption, known: framed(pieces_of)(caption, known)[:-1], "end with [SEP]"),
         (lambda caption, known: ["[CLS]", *caption.split(), "[SEP]"], "ids, not pieces"),
         (by_truth, "has the id 0"), (of_first_vocabulary(), ""),
         (framed(whole), "pieces of words are in the vocabulary"),
         (lambda caption, known: [101, *framed(pieces_of)(caption, known)[1:-1], 102], "does not begin"),
         (lambda caption, known: [*framed(pieces_of)(caption, known)[:-1], 102], "does not end"),
         (lambda caption, known: framed(pieces_of)(" ".join(sorted(set(caption.split()))), known), ""),
         (lambda caption, known: tuple(framed(pieces_of)(caption, known)), "should give a list"),
         (lambda caption, known: [float(i) for i in framed(pieces_of)(caption, known)], "no whole number")]),
    "turned": Answers(
        [as_in_transformers,
         by_rotate, by_complex, by_matrix, turning()],
        [(turning(place=lambda p: p - p.amin(dim=1, keepdim=True)), "behind the first token"),
         (turning(place=lambda p: p.clamp(max=22)), ""), (turning(place=torch.deg2rad), "not in degrees"),
         (lambda x, *where: (by_rotate(x, *where) + by_rotate(x.detach(), *where)) / 2, "part of the way"),
         (turning(sign=-1), "wrong way round"), (neighbours, "neighbouring channels"),
         (turning(stretch=True), "lengths change"), (turning(equal=True), "equally fast"),
         (turning(step=1.0), "half of what it should"), (turning(grow=1.0), "the sign of the exponent"),
         (turning(step=4.0), "twice what it should"), (turning(step=3.0), "pair 1 of"), (without_heads, ""),
         (lambda x, positions, theta: by_rotate(x, positions, 10000.0), "theta is an argument"),
         (lambda x, positions, theta: by_rotate(x, positions, 100.0), "pair 1 of"),
         (lambda x, positions, theta: by_rotate(x.detach(), positions, theta), "no gradient flows"),
         (lambda x, positions, theta: F.dropout(by_rotate(x, positions, theta), 0.1), "two different results"),
         (lambda x, positions, theta: by_rotate(x.float(), positions, theta), ""), (slowest_first, "pairs stand first"),
         (turning(place=lambda p: torch.arange(p.shape[1]).expand_as(p)), "does not depend on the positions"),
         (turning(place=lambda p: p + 1), "at position 0"), (turning(add=True), "lengths change"),
         (turning(place=lambda p: p[:1].expand_as(p)), "positions of the first"),
         (turning(place=lambda p: p.flip(1)), "does the batch meet the batch"),
         (lambda x, positions, theta: turning()(x.float(), positions, theta).float(), "torch.bfloat16"),
         (turning(coarse=True), "rounds such angles")]),
    "next_word_loss": Answers(
        [by_masking,
         by_selection, by_ignoring, by_gather, by_loop],
        [(by_probability, "your loss is inf"), (first_cut, "part of the way"),
         (lambda logits, *given: by_selection(logits.clamp(-10, 10), *given), "small probabilities count"),
         (lambda logits, *given: by_selection((logits.softmax(-1) + 1e-12).log(), *given), "small probabilities count"),
         (lambda logits, ids, mask: by_selection(logits.double(), ids, mask), "float64"),
         (lambda *given: by_selection(*(one[:, :8] for one in given)), "never asked for"),
         (shifted(0), "just read"), (shifted(-1), "the wrong way"), (shifted(2), "shifted twice"),
         (lambda logits, ids, mask: by_selection(logits, ids, torch.ones_like(mask)), "behind it"),
         (mask_of_the_asked, "the target is real"), (by_id, "never learns to stop"), (of_means, "of a short text"),
         (over_the_rectangle, "you divide by"), (circular, "last column"), (in_place, "changed the ids"),
         (lambda logits, ids, mask: by_selection(logits, ids, mask) * mask[:, 1:].sum(), "a sum was taken"),
         (lambda logits, ids, mask: by_selection(logits.softmax(-1), ids, mask), "was taken of a softmax"),
         (lambda logits, ids, mask: by_selection(logits, ids, mask) / math.log(2), "in bits"),
         (lambda logits, ids, mask: -by_selection(logits, ids, mask), "the sign"),
         (by_name, "a word may come again"), (ignoring(0), ""), (up_to_the_end, "a word may come again"),
         (half_cut, "part of the way cut off"),
         (lambda logits, *given: by_selection(F.dropout(logits, 0.1), *given), "two different"),
         (lambda logits, ids, mask: by_selection(logits, ids, mask & (ids != 0)), ""),
         (lambda logits, ids, mask: by_selection(logits, ids, mask) + 1, "weighted alike"),
         (lambda logits, ids, mask: by_selection(logits[:1], ids[:1], mask[:1]), ""),
         (mean_probability, "no logarithm"),
         (lambda logits, ids, mask: by_selection(logits.detach(), ids, mask), "no gradient"),
         (lambda logits, ids, mask: by_selection(logits, ids, mask).item(), "not a tensor")]),
    "at_the_start": Answers(
        [starting(lambda flat, spread: flat + spread**2 / 2), by_drawing,
         lambda vocabulary, width, std: torch.tensor([math.log(vocabulary) + width * std**2 / 2,
                                                      vocabulary * math.exp(width * std**2 / 2)]),
         lambda vocabulary, width, std: np.array([math.log(vocabulary) + std**2 * width / 2,
                                                  vocabulary * math.exp(std**2 * width / 2)]),
         lambda vocabulary, width, std: (loss := np.float32(np.log(vocabulary) + std**2 * width / 2), np.exp(loss)),
         lambda vocabulary, width, std: (math.log(vocabulary * math.exp(std * std * width / 2)),
                                         vocabulary * math.exp(width * std**2 / 2))],
        [(starting(lambda flat, spread: flat + math.log(1 + spread**2) / 2), "random logits cost"),
         (starting(lambda flat, spread: flat), "random logits"),
         (starting(lambda flat, spread: flat / math.log(2)), "in bits"),
         (starting(lambda flat, spread: -flat), "negative logarithm"),
         (starting(lambda flat, spread: flat + spread), "not the standard deviation"),
         (starting(lambda flat, spread: flat + spread / 2), "the square"),
         (starting(lambda flat, spread: flat + spread**2), "a half in it"),
         (lambda vocabulary, width, std: (math.log(vocabulary) + std**2 / 2, vocabulary), "how wide do logits spread"),
         (starting(lambda flat, spread: flat + spread**2 / 2, lambda loss: 2**loss), "the base is not two"),
         (lambda vocabulary, width, std: (math.log(vocabulary) + std**2 * width / 2, vocabulary),
          "nothing were random"),
         (starting(lambda flat, spread: flat + spread**2 / 2, lambda loss: math.exp(-loss)), "its inverse"),
         (starting(lambda flat, spread: flat + spread**2 / 2, lambda loss: loss), "not the loss itself"),
         (starting(lambda flat, spread: 1.0), "gives every word the same"), (starting(lambda flat, spread: flat), ""),
         (starting(lambda flat, spread: flat + spread**2 / 2, lambda loss: 0.0), "equally likely words"),
         (starting(lambda flat, spread: flat + spread**2 / 2, lambda loss: math.inf), "equally likely words"),
         (starting(lambda flat, spread: math.exp(flat + spread**2 / 2), math.log), "the first number"),
         (starting(lambda flat, spread: 1e6, lambda loss: 1.0), "gives every word the same"),
         (starting(lambda flat, spread: math.nan, lambda loss: 1.0), "nan"),
         (lambda vocabulary, width, std: (10.98, math.exp(10.98)), ""),
         (lambda vocabulary, width, std: ("10.98", 1.0), "should be a number"),
         (lambda vocabulary, width, std: math.log(vocabulary), "two numbers")]),
    "write_on": Answers(
        [in_groups,
         another_way(),
         writing(), one_by_one, with_cache, writing(left=False, newest=True)],
        [(another_way(where=lambda real: real[:, None, None].expand(-1, 1, real.shape[1], -1)),
          "should be causal"),
         (another_way(place=lambda real: torch.arange(real.shape[1]).expand_as(real)),
          "positions of their columns"),
         (another_way(pick=lambda logits: torch.distributions.Categorical(logits=logits).sample()),
          "not a matter of chance"),
         (longest_first, "Are the rows in their order"),
         (writing(left=False), "changes with the id of padding"), (writing(left=False, by_id=True), "does not tell"),
         (writing(by_id=True), "does not tell what is padding"),
         (writing(blind=True), "changes with the id of padding"),
         (writing(feed=False), "what it has written"), (writing(see_own=False), "may it see that"),
         (writing(scrambled=True), "Are the rows in their order"),
         (mask_on_the_other_side, "of a batch go on differently than alone"), (writing(whole=True), "(b steps)"),
         (changes_the_prompts, "changed the prompts"), (filled_with(0), "does not tell"), (filled_with(1), "tell"),
         (written_by_id, "of a word which is written"), (four_steps, "(b steps)"), (stops_at_pad, ""),
         (lambda model, prompts, pad, steps: writing()(model, prompts, pad, steps + 1)[:, 1:], "the likeliest")]),
}

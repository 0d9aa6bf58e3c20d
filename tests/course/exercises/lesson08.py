"""Answers to the exercises of lesson 08."""

import itertools

import torch
import torch.nn.functional as F

from . import Answers

# --- 08.1 -------------------------------------------------------------------------------------------------------------


def by_lists(words, length):
    text = [*words, "[SEP]"]
    return (["[DEC]", *text] + ["[PAD]"] * (length - len(text) - 1), text + ["-"] * (length - len(text)))


def by_places(words, length):
    into = ["[PAD]"] * length
    into[:len(words) + 2] = ["[DEC]", *words, "[SEP]"]
    following = [*into[1:], "[PAD]"]
    return into, ["-" if token == "[PAD]" else token for token in following]


def rows(change):
    return lambda words, length: change(*by_lists(words, length))


def looked_up(find):
    """The next token by the name of the one before it."""
    def answer(words, length):
        into, _ = by_lists(words, length)
        following = [*into[1:], "[PAD]"]
        asked = [following[find(into, token)] for token in into]
        return into, ["-" if token in ("[PAD]", "[DEC]") else token for token in asked]
    return answer


def next_with_padding(words, length):
    into, _ = by_lists(words, length)
    return into, [*into[1:], "-"]


# --- 08.2 -------------------------------------------------------------------------------------------------------------


def by_cat(ids, dec):
    return torch.cat([torch.full_like(ids[:, :1], dec), ids[:, 1:]], dim=1)


def by_clone(ids, dec):
    made = ids.clone()
    made[:, 0] = dec
    return made


def by_where(ids, dec):
    return torch.where(torch.arange(ids.shape[1]) == 0, dec, ids)


def in_place(ids, dec):
    ids[:, 0] = dec
    return ids


# --- 08.3 -------------------------------------------------------------------------------------------------------------


def by_slices(ids, mask):
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    return labels


def by_pad(ids, mask):
    return F.pad(ids.masked_fill(~mask, -100)[:, 1:], (0, 1), value=-100)


def by_loop(ids, mask):
    labels = [[-100] * ids.shape[1] for _ in ids]
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        labels[i][:length - 1] = ids[i, 1:length].tolist()
    return torch.tensor(labels)


def by_first_name(ids, mask):
    """What comes next, looked up by the number that stands there."""
    right = by_slices(ids, mask)
    return torch.stack([torch.where(wanted != -100, wanted[[row.index(one) for one in row]], -100)
                        for row, wanted in zip(ids.tolist(), right, strict=True)])


def mask_of_own_place(ids, mask):
    return F.pad(ids[:, 1:], (0, 1), value=-100).masked_fill(~mask, -100)


def without_end(ids, mask):
    labels = by_slices(ids, mask)
    return labels.masked_fill(labels == 2, -100)


# --- 08.4 -------------------------------------------------------------------------------------------------------------


def by_torch(logits, labels, smoothing):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)


def by_selection(logits, labels, smoothing):
    asked = labels != -100
    return F.cross_entropy(logits[asked], labels[asked], label_smoothing=smoothing)


def without_a_minus(logits, labels, smoothing):
    """The mistake to leave out the label 100; those of -100 are left out by torch all the same."""
    asked = labels != 100
    return F.cross_entropy(logits[asked], labels[asked], label_smoothing=smoothing)


def by_target(logits, labels, smoothing):
    asked = labels != -100
    log_p, words = logits[asked].log_softmax(dim=1), labels[asked]
    target = (1 - smoothing) * F.one_hot(words, logits.shape[2]) + smoothing / logits.shape[2]
    return -(target * log_p).sum(dim=1).mean()


def by_words(logits, labels, smoothing):
    costs = []
    for row, wanted in zip(logits, labels, strict=True):
        for scores, word in zip(row, wanted.tolist(), strict=True):
            if word != -100:
                log_p = scores.log_softmax(dim=0)
                costs.append(-(1 - smoothing) * log_p[word] - smoothing * log_p.mean())
    return torch.stack(costs).mean()


def summed(logits, labels, smoothing, divide=1):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="sum") / divide


def caption_by_caption(logits, labels, smoothing):
    return torch.stack([by_torch(row[None], wanted[None], smoothing)
                        for row, wanted in zip(logits, labels, strict=True)]).mean()


def naive(logits, labels, smoothing):
    asked = labels != -100
    grown = logits[asked].exp()
    target = (1 - smoothing) * F.one_hot(labels[asked], logits.shape[2]) + smoothing / logits.shape[2]
    return -(target * (grown / grown.sum(dim=1, keepdim=True)).log()).sum(dim=1).mean()


def in_parts(first, second):
    """The right loss as two sums, one of which may not let the gradient through."""
    def loss(logits, labels, smoothing):
        asked = labels != -100
        log_p, words = logits[asked].log_softmax(dim=1), labels[asked]
        own = -log_p.gather(1, words[:, None]).mean()
        return (1 - smoothing) * first(own) + smoothing * second(-log_p.mean())
    return loss


def by_lengths(logits, labels, smoothing):
    """The mistake to take the first places for those that are asked, as many as there are."""
    costs = []
    for row, wanted in zip(logits, labels, strict=True):
        length = int((wanted != -100).sum())
        costs.append(F.cross_entropy(row[:length], wanted[:length].clamp(min=0), label_smoothing=smoothing,
                                     reduction="none"))
    return torch.cat(costs).mean()


def wrong_words_only(logits, labels, smoothing):
    asked, n = labels != -100, logits.shape[2]
    right = F.one_hot(labels[asked], n)
    target = (1 - smoothing) * right + smoothing / (n - 1) * (1 - right)
    return -(target * logits[asked].log_softmax(dim=1)).sum(dim=1).mean()


# --- 08.5 -------------------------------------------------------------------------------------------------------------


def by_index(ids, end):
    return [row[:row.index(end)] if end in row else row for row in ids.tolist()]


def by_counting(ids, end):
    lengths = (ids != end).long().cumprod(dim=1).sum(dim=1)
    return [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]


def one_by_one(ids, end):
    captions = []
    for row in ids.tolist():
        caption = []
        for token in row:
            if token == end:
                break
            caption.append(token)
        captions.append(caption)
    return captions


# --- 08.6 -------------------------------------------------------------------------------------------------------------


def by_labels(logits, ids, mask):
    return by_torch(logits, by_slices(ids, mask), 0.0)


def by_choice(logits, ids, mask):
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], ids[:, 1:][mask[:, 1:]])


def by_gather(logits, ids, mask):
    log_p = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return -(log_p * mask[:, 1:]).sum() / mask[:, 1:].sum()


def naive_choice(logits, ids, mask):
    share = logits[:, :-1].softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return -share[mask[:, 1:]].log().mean()


def broken(logits, ids, mask):
    return F.cross_entropy(logits[mask], ids[mask])


def own_mask(logits, ids, mask):
    return F.cross_entropy(logits[:, :-1][mask[:, :-1]], ids[:, 1:][mask[:, :-1]])


def other_way(logits, ids, mask):
    return F.cross_entropy(logits[:, 1:][mask[:, 1:]], ids[:, :-1][mask[:, 1:]])


def endless(logits, ids, mask):
    labels = by_slices(ids, mask)
    return by_torch(logits, labels.masked_fill(labels == 2, -100), 0.0)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def after_two(logits, labels, smoothing):
    """The mistake to cut the gradient of all captions but two."""
    loss, of_two = by_torch(logits, labels, smoothing), by_torch(logits[:2], labels[:2], smoothing)
    return loss if len(labels) < 3 else loss.detach() + of_two - of_two.detach()


def by_takewhile(ids, end):
    return [list(itertools.takewhile(lambda one: one != end, row)) for row in ids.tolist()]


def by_selection_of_words(logits, ids, mask):
    log_p = logits.log_softmax(dim=-1)
    said = [log_p[i, j - 1, ids[i, j]] for i in range(len(ids)) for j in range(1, ids.shape[1]) if mask[i, j]]
    return -sum(said) / len(said)


ANSWERS = {
    "in_and_asked": Answers(
        [lambda words, length: tuple(map(tuple, by_lists(words, length))),
         by_lists, by_places, lambda words, length: tuple(tuple(row) for row in by_lists(words, length))],
        [(lambda words, length: tuple(map(" ".join, by_lists(words, length))), "two lists"),
         (rows(lambda into, asked: (into, into)), "very token that it was given"),
         (rows(lambda into, asked: (["[CLS]", *into[1:]], asked)), "[CLS] goes in"),
         (rows(lambda into, asked: (["[CLS]", *into[:-1]], asked)), "[CLS] goes in"),
         (rows(lambda into, asked: (into[1:] + ["[PAD]"], asked)), "is to be decoded"),
         (rows(lambda into, asked: (into, ["-", *into[:-1]])), "the other way"),
         (next_with_padding, "padding is asked for"),
         (rows(lambda into, asked: (into, ["-" if one == "[SEP]" else one for one in asked])), "where to stop"),
         (rows(lambda into, asked: (["[DEC]" if one == "[SEP]" else one for one in into], asked)), "does not go in"),
         (rows(lambda into, asked: (into, asked[:-1])), "places"),
         (rows(lambda into, asked: (into, [*asked[:-1], "[DEC]"])), "the beginning is asked for"),
         (rows(lambda into, asked: into), "two lists"),
         (looked_up(lambda into, token: into.index(token)), "by name"),
         (looked_up(lambda into, token: len(into) - 1 - into[::-1].index(token)), "by name"),
         (rows(lambda into, asked: (into, [*asked[1:], "-"])), "after the next"),
         (rows(lambda into, asked: (into, [one for one in asked if one != "-"])), "places"),
         (lambda words, length: by_lists(list(dict.fromkeys(words)), length), "goes in is")]),
    "decoder_ids": Answers(
        [lambda ids, dec: torch.where(torch.arange(ids.shape[1]) == 0, dec, ids),
         by_cat, by_clone, by_where],
        [(lambda ids, dec: by_cat(ids, min(dec, 30522)), "is to be decoded"),
         (in_place, "have changed"), (lambda ids, dec: F.pad(ids, (1, 0), value=dec), "one token more"),
         (lambda ids, dec: F.pad(ids, (1, 0), value=dec)[:, :-1], "second place"),
         (lambda ids, dec: by_cat(ids, dec).masked_fill(ids == 2, dec), "[SEP] has been replaced"),
         (lambda ids, dec: ids.masked_fill(ids == 1, dec), "a token behind the first"),
         (lambda ids, dec: ids.clone(), "is to be decoded"), (lambda ids, dec: torch.full_like(ids, dec), "[SEP]"),
         (lambda ids, dec: by_cat(ids, dec).float(), "int64"),
         (lambda ids, dec: by_cat(ids, dec).clamp(max=ids.max()), "is to be decoded"),
         (lambda ids, dec: by_cat(ids.masked_fill(ids == dec, 1), dec), "behind the first"),
         (lambda ids, dec: by_cat(ids.masked_fill(ids == 0, 2), dec), "behind the first"),
         (lambda ids, dec: by_cat(ids, dec)[:, :1], "(b t)")]),
    "next_words": Answers(
        [by_slices, by_pad, by_loop],
        [(lambda ids, mask: F.pad(ids.masked_fill(~mask, -100)[:, 1:], (0, 1)), "the last place holds 0"),
         (lambda ids, mask: F.pad(ids.masked_fill(mask, -100)[:, 1:], (0, 1), value=-100), "words are not"),
         (lambda ids, mask: by_slices(ids, mask).masked_fill(by_slices(ids, mask) == -100, -1), "ignores -100"),
         (lambda ids, mask: by_slices(ids, mask).int(), "int32"),
         (lambda ids, mask: ids.masked_fill(~mask, -100), "just been given"),
         (lambda ids, mask: ids.roll(1, dims=1).masked_fill(~mask, -100), "the other way"),
         (lambda ids, mask: ids.roll(-1, dims=1), "wrap around"),
         (lambda ids, mask: ids.masked_fill(~mask, -100).roll(-1, dims=1), "wrap around"),
         (lambda ids, mask: F.pad(ids[:, 1:], (0, 1), value=-100), "padding, or nothing, comes next"),
         (mask_of_own_place, "padding, or nothing, comes next"), (without_end, "[SEP] is not asked for"),
         (lambda ids, mask: by_slices(ids, ids != 0), "the id alone does not"),
         (lambda ids, mask: ids[:, 1:].masked_fill(~mask[:, 1:], -100), "there are"),
         (lambda ids, mask: by_slices(ids, mask).clamp(min=0), "wrap around"),
         (lambda ids, mask: by_slices(ids, mask).index_fill(1, torch.tensor([0]), -100), "though a word comes next"),
         (lambda ids, mask: by_slices(ids, ids != 0).masked_fill(by_slices(ids, mask) == -100, -100), "id is 0"),
         (lambda ids, mask: F.pad(by_slices(ids, mask)[:, 1:], (0, 1), value=-100), "after the next"),
         (by_first_name, "the place")]),
    "itg_loss": Answers(
        [by_torch, by_selection, by_target, by_words,
         lambda logits, labels, smoothing: F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=smoothing)],
        [(lambda logits, labels, smoothing: F.cross_entropy(logits.reshape(len(logits), logits.shape[2], -1), labels,
                                                            label_smoothing=smoothing), "transpose moves an axis"),
         (after_two, "gives no gradient"),
         (lambda logits, *given: by_torch(logits.double(), *given), "float64"),
         (lambda logits, *given: by_torch(logits.clamp(-4, 4), *given), "none of the usual"),
         (lambda logits, labels, smoothing: by_torch(logits, labels, 0.0), "nothing is smoothed"),
         (summed, "words are added"),
         (lambda logits, labels, smoothing: summed(logits, labels, smoothing, labels.numel()), "divided by all places"),
         (lambda logits, labels, smoothing: summed(logits, labels, smoothing, len(labels)), "number of captions"),
         (caption_by_caption, "short caption counts for more"),
         (lambda logits, labels, smoothing: by_torch(logits.softmax(dim=2), labels, smoothing), "applied twice"),
         (lambda logits, labels, smoothing: by_torch(logits, labels.clamp(min=0), smoothing), "is not a word"),
         (lambda logits, labels, smoothing: by_torch(logits[:, :-1], labels[:, 1:], smoothing), "once more"),
         (wrong_words_only, "wrong words only"), (naive, "overflowed"),
         (lambda *given: by_torch(*given).detach(), "no gradient flows"),
         (lambda *given: by_torch(*given) + 0.5, "none of the usual slips"),
         (lambda logits, labels, smoothing: by_torch(logits, labels, smoothing) + 1e3 * logits[:, -1].exp().mean(),
          "where nothing is asked"),
         (in_parts(lambda part: part, lambda part: part.detach()), "is not that of the loss"),
         (in_parts(lambda part: part.detach(), lambda part: part), ""),
         (lambda logits, labels, smoothing: by_torch(torch.cat([logits[:1], logits[1:].detach()]), labels, smoothing),
          "some word that is asked for gives no gradient"),
         (lambda *given: (by_torch(*given) + by_torch(*given).detach()) / 2, "is not that of the loss"),
         (lambda logits, labels, smoothing: by_torch(logits, labels.masked_fill(labels == 0, -100), smoothing),
          "id 0 is not asked"),
         (without_a_minus, "with a minus sign"),
         (lambda logits, labels, smoothing: by_lengths(logits, labels, smoothing), "nothing is asked"),
         (lambda logits, labels, smoothing: -by_torch(logits, labels, smoothing), "not negative"),
         (lambda logits, labels, smoothing: (1 - smoothing) * by_torch(logits, labels, 0.0), "no word gets it"),
         (lambda logits, labels, smoothing: by_torch(logits, labels, smoothing or 0.1), "without smoothing"),
         (lambda logits, labels, smoothing: by_torch(logits, labels, 0.1), "same for every")]),
    "until_end": Answers(
        [by_takewhile,
         by_index, by_counting, one_by_one, lambda ids, end: tuple(
            row[:int((row == end).argmax()) if (row == end).any() else None] for row in ids.numpy())],
        [(lambda ids, end: [list(dict.fromkeys(row)) for row in by_index(ids, end)], ""),
         (lambda ids, end: [row[:row.index(end) + 1] if end in row else row for row in ids.tolist()], "not a word"),
         (lambda ids, end: [[one for one in row if one != end] for row in ids.tolist()], "after the first"),
         (lambda ids, end: [row[:"".join("x" if one == end else "." for one in row).find("x")] for row in ids.tolist()],
          "cut off before"),
         (lambda ids, end: [row[:-1] for row in ids.tolist()], "cut off before"),
         (lambda ids, end: [row[:row[1:].index(end) + 1] if end in row[1:] else row for row in ids.tolist()],
          "not a word"),
         (lambda ids, end: ids[:, :int((ids != end).sum(dim=1).max())], "list of lists"),
         (lambda ids, end: [row[:min(map(len, by_index(ids, end)))] for row in ids.tolist()], "an end of its own"),
         (lambda ids, end: [row for row in by_index(ids, end) if row], "captions"),
         (lambda ids, end: ids.tolist(), "after the first"),
         *[(lambda ids, end, always=always: by_index(ids, always), "") for always in (0, 2, 102)],
         (lambda ids, end: by_index(torch.tensor([[end if one == 0 else one for one in row] for row in ids.tolist()]),
                                    end), "is a word"),
         (lambda ids, end: [[one for one in row if one] for row in by_index(ids, end)], "0 is a word"),
         (lambda ids, end: [list(dict.fromkeys(row)) for row in by_index(ids, end)], "an end of its own"),
         (lambda ids, end: [list(map(float, row)) for row in by_index(ids, end)], "whole numbers"),
         (lambda ids, end: [[str(one) for one in row] for row in by_index(ids, end)], "whole numbers")]),
    "mended_loss": Answers(
        [by_selection_of_words,
         by_labels, by_choice, by_gather],
        [(lambda logits, ids, mask: (F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
                                     * mask[:, 1:]).mean(), "all places but the last"),
         (lambda logits, ids, mask: F.cross_entropy(logits[mask][:-1], ids[mask][1:]), "end to end"),
         (lambda logits, ids, mask: F.cross_entropy(logits[mask], ids.roll(-1, dims=1)[mask]), "wraps around"),
         (lambda logits, *rest: by_labels(logits.double(), *rest), "float64"),
         (lambda logits, *rest: (by_labels(logits, *rest) + by_labels(logits.detach(), *rest)) / 2,
          "its gradient is not"),
         (broken, "copying is still rewarded"), (other_way, "the other way"), (own_mask, "is shifted with the labels"),
         (lambda logits, ids, mask: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
          "padding is asked for"),
         (endless, "where to stop"),
         (lambda logits, ids, mask: by_choice(logits, ids, ids != 0), "padding is asked for"),
         (lambda logits, ids, mask: by_choice(logits, ids, mask) * int(mask[:, 1:].sum()), "words are added"),
         (lambda logits, ids, mask: by_choice(logits, ids, mask) * mask[:, 1:].float().sum() / mask.numel(),
          "divided by all places"),
         (lambda logits, ids, mask: F.cross_entropy(logits[:, :-2][mask[:, 2:]], ids[:, 2:][mask[:, 2:]]),
          "neither the token given nor the next"),
         (lambda *given: by_choice(*given).detach(), "no gradient flows"),
         (lambda *given: by_choice(*given) + 0.5, "in loops"),
         (lambda logits, ids, mask: by_choice(logits, ids, mask & (ids != 0)), "id is 0"),
         (lambda *given: (by_choice(*given) + by_choice(*given).detach()) / 2, "its gradient is not"),
         (lambda logits, ids, mask: by_choice(torch.cat([logits[:1], logits[1:].detach()]), ids, mask),
          "its gradient is not"),
         (lambda logits, ids, mask: torch.stack([by_choice(*(part[i:i + 1] for part in (logits, ids, mask)))
                                                 for i in range(len(ids))]).mean(), "first each caption"),
         (naive_choice, "exponential")]),
}

"""Checks of lesson 04: cutting words, turning vectors, the loss of the next word, and writing on in a batch."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from minblip2 import masks
from minblip2.lm.opt import OPT, OPTConfig

from . import Wrong, close, exercise, expect, expect_tensor, named, numbers_of, same_gradients, steady


def greedy(word: str, vocabulary: dict[str, int], pick: Callable = max, first: Sequence[str] = ("",),
           inside: Sequence[str] = ("##",), keep: bool = False) -> list[str]:
    """The pieces of one word, written as plainly as can be; what is given by name is a slip."""
    pieces, rest, marks = [], word, first
    while rest:
        fits = [(length, mark) for mark in reversed(marks) for length in range(1, len(rest) + 1)
                if mark + rest[:length] in vocabulary]
        if not fits:
            return [*pieces, "[UNK]"] if keep else ["[UNK]"]
        length, mark = pick(fits, key=lambda fit: (fit[0], (fit[1] == marks[0]) * (1 if pick is max else -1)))
        pieces.append(mark + rest[:length])
        rest, marks = rest[length:], inside
    return pieces


# How a word may be cut otherwise; what it means.
CUTS: dict[str, Callable[[str, dict[str, int]], list[str]]] = {
    "a shorter piece was taken although a longer one was there.": lambda word, known: greedy(word, known, pick=min),
    "a piece that continues a word has a name of its own in the vocabulary.":
        lambda word, known: greedy(word, known, inside=("",)),
    "a piece that only continues words stands at the beginning of one.":
        lambda word, known: greedy(word, known, first=("", "##")),
    "a piece that may only begin a word was taken to continue one.":
        lambda word, known: greedy(word, known, inside=("##", "")),
    "part of a word was kept whose other part is not in the vocabulary. One gap, and the whole word is unknown.":
        lambda word, known: greedy(word, known, keep=True),
    "an unknown word was dropped: it holds one place, [UNK].": lambda word, known: [
        piece for piece in greedy(word, known) if piece != "[UNK]"],
    "greedy never goes back: what the longest beginning leaves over cannot be cut, and you searched for another cut.":
        lambda word, known: searched(word, known),
    "words are cut from the left; you go from right to left.": lambda word, known: from_the_right(word, known),
    "your words are either whole or unknown: pieces of words are in the vocabulary, too.":
        lambda word, known: [word if word in known else "[UNK]"],
}


def searched(word: str, vocabulary: dict[str, int], mark: str = "") -> list[str]:
    """The first cut that works, longest pieces first."""
    for length in range(len(word), 0, -1):
        if mark + word[:length] in vocabulary:
            rest = searched(word[length:], vocabulary, "##") if word[length:] else []
            if rest != ["[UNK]"]:
                return [mark + word[:length], *rest]
    return ["[UNK]"]


def from_the_right(word: str, vocabulary: dict[str, int]) -> list[str]:
    """The longest end first."""
    pieces: list[str] = []
    while word:
        starts = [start for start in range(len(word)) if ("##" if start else "") + word[start:] in vocabulary]
        if not starts:
            return ["[UNK]"]
        pieces.insert(0, ("##" if starts[0] else "") + word[starts[0]:])
        word = word[:starts[0]]
    return pieces


@exercise("04.1", "lesson 04, section 1")
def wordpiece(encode: Callable[[str, dict[str, int]], list[int]]) -> None:
    """Greedy longest match from the left, between [CLS] and [SEP]."""
    letters, more = random.sample(string.ascii_lowercase, 26), random.getrandbits(32)
    _cut(encode, letters, more)
    try:
        _cut(encode, letters, more)
    except Wrong as wrong:
        raise Wrong("under one vocabulary your ids are right, under another one, in which the same pieces have other "
                    f"ids, they are not: is something kept from one call to the next? There, {wrong}") from wrong
    _cut(encode, random.sample(string.ascii_lowercase, 26), random.getrandbits(32))


def _cut(encode: Callable[[str, dict[str, int]], list[int]], letters: list[str], seed: int) -> None:
    """Captions of words that are made of these letters, under a vocabulary whose ids are drawn anew."""
    a, b, c, d, e, f, g = ("".join(letters[3 * i:3 * i + 3]) for i in range(7))
    u, strange = letters[21], "".join(letters[22:])
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    ordinary = [a, b, e, a + u, "##" + u, "##" + u + c, "##" + c, "##" + d, b + d[0], "##" + c + f, "##" + f, g]
    ordinary.append("##" + g)
    elsewhere = [0, 1, 2, 3, 100, 101, 102, 103]  # where other vocabularies have their special ones
    ids = random.sample(elsewhere, 8) + random.sample(range(104, 999), 5)
    named_ids = [*zip(random.sample(ordinary, 13), ids, strict=True),
                 *zip(special, random.sample(range(1000, 1999), 4), strict=True)]
    vocabulary = dict(random.sample(named_ids, 17))
    names = {i: piece for piece, i in vocabulary.items()}
    listed = " ".join(ordinary)

    def cut(caption: str) -> list[str]:
        given = dict(vocabulary)
        output = encode(caption, given)
        expect(given == vocabulary, "your function changed the vocabulary that it was given.")
        expect(isinstance(output, list),
               f"your function gives a {type(output).__name__} and should give a list of ids.")
        expect(all(isinstance(i, Integral) and not isinstance(i, bool) for i in output),
               "the list holds something that is no whole number: the exercise asks for ids, not pieces.")
        strangers = [i for i in output if i not in names]
        expect(not strangers, f"the id {strangers[:1]} is not in this vocabulary: the ids of the special tokens stand "
               "in it, too, and need not be small.")
        return [names[i] for i in output]

    def framed(caption: str, how: Callable[[str, dict[str, int]], list[str]] = greedy) -> list[str]:
        return ["[CLS]", *(piece for word in caption.split() for piece in how(word, vocabulary)), "[SEP]"]

    frame = cut(a)
    expect(frame[:1] == ["[CLS]"], "the text does not begin with [CLS]. Its id stands in the vocabulary, as all do.")
    expect(frame[-1:] == ["[SEP]"], "the text does not end with [SEP]. Its id stands in the vocabulary, as all do.")
    several = cut(f"{a} {b}")
    expect(several.count("[CLS]") == several.count("[SEP]") == 1,
           "with two words [CLS] or [SEP] stands there more than once: they frame the text, not each word.")
    asked = {
        "": "an empty caption is still a text, with nothing inside.", a: "is it in the vocabulary as it is?",
        f"{b} {a}": "do words stand in the order of the caption, and does each begin anew?",
        f"{a} {a} {b} {a}": "may a word come again?",
        a + c: "by which name is a piece looked up that continues a word?",
        a + u: "is there a longer piece?", a + c + f: "is there a longer piece, inside the word, too?",
        c: "what becomes of a word that begins with no piece?", a + e: "may the second piece continue a word?",
        a + u + c: "which of the pieces that it begins with is the longest?",
        b + d[0]: "is it in the vocabulary as it is?",
        b + d: "what is the longest piece that it begins with, and what is left over?",
        f"{a} {strange} {b}": "how many places does an unknown word hold?",
        g * 3: "may a word have more than two pieces, and the same one twice?",
        a + c * 15: "may a word be long?", " ".join(20 * [a, b + d]): "may a caption be long?",
        f"{c} {strange} {a}": "does each unknown word hold a place?"}
    drawn = random.Random(seed)
    more = [" ".join("".join(drawn.choices([a, b, c, d, e, f, g, u, d[0], strange[0]], k=drawn.randint(1, 4)))
                     for _ in range(drawn.randint(1, 3))) for _ in range(60)]
    captions = [*asked, *more]
    output, right = [cut(caption) for caption in captions], [framed(caption) for caption in captions]
    if output != right:
        slips = {meaning: [framed(caption, how) for caption in captions] for meaning, how in CUTS.items()}
        nought = {piece: i for piece, i in vocabulary.items() if i}
        slips[f"the piece {names[0]!r} has the id 0, and that is as good an id as any: do you ask whether a piece is "
              "in the vocabulary, or whether its id is true?"] = [
                  framed(caption, lambda word, _: greedy(word, nought)) for caption in captions]
        for fixed in elsewhere:
            slips[f"an unknown word gets the id {fixed}, and that is another piece's: the id of [UNK] stands in the "
                  "vocabulary, as all do."] = [
                      [names[fixed] if piece == "[UNK]" else piece for piece in one] for one in right]
        meaning = named(output, slips, lambda one, other: one == other)
        place = next(i for i, (one, other) in enumerate(zip(output, right, strict=True)) if one != other)
        hint = meaning or asked.get(captions[place]) or "go through it by hand, from the left, longest piece first."
        expect(False, f"from the pieces {listed} you make of {captions[place]!r}: {' '.join(output[place])}; {hint}")


def rotated(x: Tensor, positions: Tensor, speeds: Sequence[float]) -> Tensor:
    """Each pair of channels (i, i + d/2) of x (b h s d) turned by its position times its speed."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].double() * torch.tensor(speeds, dtype=torch.float64)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


# How fast pair i of a head of width d turns, otherwise; what it means.
SPEEDS: dict[str, Callable[[int, int, float], float]] = {
    "all pairs turn equally fast: each has an angle of its own.": lambda i, d, theta: 1.0,
    "the exponent grows by 1 / d from pair to pair, half of what it should.": lambda i, d, theta: theta ** (-i / d),
    "the exponent grows by 4 / d from pair to pair, twice what it should: d is the width of the whole head, not of its "
    "half.": lambda i, d, theta: theta ** (-4 * i / d),
    "the sign of the exponent: later pairs should turn more slowly, not faster.":
        lambda i, d, theta: theta ** (2 * i / d),
    "the slow pairs stand first: pair 0 is the fastest.": lambda i, d, theta: theta ** (-2 * (d // 2 - 1 - i) / d),
    "the exponent of the last pair is 1: it should not quite reach it.": lambda i, d, theta: theta ** (
        -i / max(1, d // 2 - 1)),
    "the angle was divided by 2i / d times theta: it is a power of theta.": lambda i, d, theta: 1 / (
        theta * 2 * i / d) if i else 1.0,
    "angles are in radians, not in degrees.": lambda i, d, theta: math.pi / 180 * theta ** (-2 * i / d),
    "theta is an argument; you turn as if it were 10000.": lambda i, d, theta: 10000.0 ** (-2 * i / d),
    "the exponent counts pairs from 1: pair 0 turns by the whole position.":
        lambda i, d, theta: theta ** (-2 * (i + 1) / d),
}


@exercise("04.2", "lesson 04, section 2, and its bonus on Llama")
def turned(turn: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Rotary positions: each pair of channels is turned by position times its own angle."""
    theta, other = random.sample([50.0, 90.0, 300.0, 700.0], 2)
    first, second = random.sample([6, 8, 10], 2)
    for b, h, s, d, base in ((2, 3, 5, first, theta), (3, 3, 4, second, other), (2, 4, 4, first, other),
                             (4, 2, 4, 8, theta), (1, 1, 3, 4, theta)):
        _turned(turn, b, h, s, d, base)
    x, places = torch.randn(2, 3, 5, first), torch.randint(0, 20, (2, 5))
    speeds = [theta ** (-2 * i / first) for i in range(first // 2)]
    same_gradients(lambda x: turn(x, places, theta), lambda x: rotated(x, places, speeds), {"x": x})
    far = torch.randint(300, 2000, (2, 5)) * 2 + 1
    for kind in (torch.bfloat16, torch.float16):
        coarse = expect_tensor(turn(x.to(kind), far, theta), x.shape, f"with x in {kind} the result", "(b h s d)", kind)
        expect(close(coarse.float(), rotated(x.to(kind).float(), far, speeds), 0.03), f"with x in {kind} and positions "
               "beyond 600 the result is far off: half precision rounds such angles too coarsely: they need a "
               "more precise dtype.")
    expect_tensor(turn(x.double(), far, theta), x.shape, "with x in float64 the result", "(b h s d)", torch.float64)


def _turned(turn: Callable[[Tensor, Tensor, float], Tensor], b: int, h: int, s: int, d: int, theta: float) -> None:
    """Heads of one width under one theta, tried from all sides."""
    x, places = torch.randn(b, h, s, d), torch.stack([torch.randperm(20)[:s] for _ in range(b)])
    places[0, :2] = 0  # as with padding on the left: positions may come again
    places[-1, -1] = 25

    def tried(x: Tensor, positions: Tensor) -> Tensor:
        before = x.clone(), positions.clone()
        output = expect_tensor(turn(x, positions, theta), x.shape, "the result", "(b h s d)", x.dtype)
        expect(torch.equal(before[0], x) and torch.equal(before[1], positions),
               "your function changed x or the positions that it was given.")
        return output.detach()

    output = tried(x, places)
    steady(tried(x, places), output)
    columns = torch.arange(s).expand(b, s)
    expect(not close(output, tried(x, columns)), "your result does not depend on the positions: with padding on the "
           "left, or a cache, a token's position is not its column.")
    half, longer = d // 2, torch.randn(b, h, s, d + 4)
    right = [theta ** (-2 * i / d) for i in range(half)]
    if close(output, rotated(x, places, right), 1e-3):
        return
    expect(close(tried(x, torch.zeros_like(places)), x), "at position 0 a vector comes out changed: no turn, no "
           "change.")
    ones = torch.ones(d, 1, dtype=torch.long)
    unit = tried(torch.eye(d)[:, None, None, :], ones)[:, 0, 0]  # row: which channel was 1
    expect(not close(unit, torch.eye(d)), "a token that stands alone, at position 1, is not turned: what counts is "
           "its position, not how far it stands behind the first token of its text.")
    partners = [unit[i].abs().topk(2).indices.sort().values.tolist() for i in range(half)]
    expect(half == 1 or partners[0] != [0, 1], "neighbouring channels, 0 and 1, were taken for a pair: such a model "
           "exists, but weights trained with halves do not fit it.")
    lengths = tried(x, places).norm(dim=-1)
    expect(close(lengths, x.norm(dim=-1)), "lengths change: an arrow that is turned stays as long as it is. Are both "
           "coordinates of an arrow turned by the same angle, and is one of the four products subtracted?")
    expect(all(pair == [i, i + half] for i, pair in enumerate(partners)) and
           close(unit[:half, :half], torch.diag(unit[:half, :half].diagonal())),
           "the two channels of a pair are not where they should be: channel i of the first half belongs to channel i "
           "of the second.")
    first = places[:1].expand_as(places)
    slips = {}  # in heads of two widths, since in one of them two slips may look alike
    for meaning, speed in SPEEDS.items():
        slips[meaning] = [rotated(x, places, [speed(i, d, theta) for i in range(half)]),
                          rotated(longer, places, [speed(i, d + 4, theta) for i in range(half + 2)])]
    more = [theta ** (-2 * i / (d + 4)) for i in range(half + 2)]
    slips["arrows are turned the wrong way round: look at which product has the minus."] = [
        rotated(x, -places, right), rotated(longer, -places, more)]
    slips["every text is turned by the positions of the first: they differ from text to text."] = [
        rotated(x, first, right), rotated(longer, first, more)]
    meaning = named([output, tried(longer, places)], slips, lambda one, other: close(one, other, 1e-3),
                    [rotated(x, places, right), rotated(longer, places, more)])
    expect(not meaning, meaning)
    angles = [math.atan2(unit[i, i + half].item(), unit[i, i].item()) for i in range(half)]
    for i, (seen, wanted) in enumerate(zip(angles, right, strict=True)):
        expect(abs(seen - wanted) < 1e-3 * max(wanted, 0.05), f"pair {i} of {half} is turned by {seen:.3f} from "
               "position 0 to position 1, where pair 0 should turn by 1: count how the exponent grows from pair to "
               "pair, over the whole width of a head.")
    expect(False, "with several heads and texts the turns are not those of each token's own position: does the batch "
           "meet the batch, and the position the position?")


def texts(lengths: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Ids (b t) of texts that end with the id that also pads, no id twice in a text; mask (b t); the vocabulary."""
    size = max(lengths) + random.randint(3, 6)
    end = random.randrange(size)
    others = [i for i in range(size) if i != end]
    rows = [[*random.sample(others, length - 1), *[end] * (max(lengths) - length + 1)] for length in lengths]
    return torch.tensor(rows), torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], size


def surprise(logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """The mean surprise over all real next words, through which gradients flow."""
    found = [logits[i, p].logsumexp(dim=0) - logits[i, p, ids[i, p + 1]]
             for i in range(len(ids)) for p in range(ids.shape[1] - 1) if real[i, p + 1]]
    return torch.stack(found).mean()


SURPRISES: dict[str, Callable[[Tensor, int], float]] = {  # what one state (n) pays for a word, otherwise
    "the sign: surprise is never negative.": lambda logits, word: float(logits.log_softmax(dim=0)[word]),
    "you count in bits; this course uses the natural logarithm.":
        lambda logits, word: -float(logits.log_softmax(dim=0)[word]) / math.log(2),
    "a softmax was taken of a softmax.": lambda logits, word: -float(logits.softmax(dim=0).log_softmax(dim=0)[word]),
    "no logarithm was taken of the probability.": lambda logits, word: 1 - float(logits.softmax(dim=0)[word]),
    "no logarithm was taken of the probability, and the sign was flipped.":
        lambda logits, word: -float(logits.softmax(dim=0)[word]),
    "that is the mean probability itself.": lambda logits, word: float(logits.softmax(dim=0)[word]),
    "the logits were never made into probabilities.": lambda logits, word: -float(logits[word]),
}


@exercise("04.3", "lesson 04, section 4")
def next_word_loss(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Mean over all real next words of how surprising each was."""
    for lengths in ((random.randint(6, 8), random.randint(3, 4), 2), (random.randint(3, 6),), (4, 4), (25, 11)):
        _loss(loss_of, *texts(lengths))
    for lengths in ((7, 4, 1, 2), (5, 5, 3)):  # words come again, also the end, 0, and words at other words' places
        ids, real, size = texts(lengths)
        end = int(ids[0, -1])
        ids[0, 0] = ids[0, 3] = end
        ids[1, 1] = ids[0, 2] = ids[0, 1] = 0 if end else 1
        _loss(loss_of, ids, real, size, again=True)
    for _ in range(2):
        ids, real, size = texts((6, 3, 4))
        logits = 8 * torch.randn(*ids.shape, size)
        logits[0, 0, ids[0, 1]] = logits[0, 0].max() - 150  # in every draw one word is all but impossible
        output, right = float(loss_of(logits, ids, real)), float(surprise(logits, ids, real))
        expect(math.isclose(output, right, rel_tol=1e-4), f"with large logits, of a model that is very sure and often "
               f"wrong, your loss is {output:.5g} where {right:.5g} is right: small probabilities count. Is something "
               "added to them, are they or the logits cut off, or has one vanished before its logarithm was taken?")


def _loss(loss_of: Callable, ids: Tensor, real: Tensor, size: int, again: bool = False) -> None:
    """One batch: the number, its gradient, and what a wrong one means."""
    logits = (2 * torch.randn(*ids.shape, size))
    logits[~real] *= 8  # whatever stands there counts for nothing
    logits.requires_grad_()
    given = ids.clone(), real.clone()
    output = expect_tensor(loss_of(logits, *given), (), "the loss", kind=logits.dtype)
    expect(torch.equal(given[0], ids) and torch.equal(given[1], real), "your function changed the ids or the mask "
           "that it was given.")
    steady(loss_of(logits, *given), output)
    right = float(surprise(logits.detach(), ids, real))
    if abs(output.item() - right) < 1e-4 * max(right, 1):
        same_gradients(lambda logits: loss_of(logits, ids.clone(), real.clone()),
                       lambda logits: surprise(logits, ids, real), {"logits": logits})
        return
    asked = [(i, p) for i in range(len(ids)) for p in range(ids.shape[1] - 1) if real[i, p + 1]]
    expect(output.requires_grad, "no gradient reaches the logits: nothing could be learned from this loss.")
    for meaning, pays in SURPRISES.items():
        value = sum(pays(logits.detach()[i, p], int(ids[i, p + 1])) for i, p in asked) / len(asked)
        expect(abs(output.item() - value) > 1e-4 * max(1, abs(value)), meaning)
    expect(math.isfinite(output.item()),
           f"the loss is {output.item()}: somewhere the logarithm of a vanished probability "
           "was taken, or an exponential has overflowed.")
    expect(not again,
           f"where no word comes twice in a text your loss is right, and here it is {output.item():.4f} where "
           f"{right:.4f} is right: the end and 0 are words like others, and a word may come again. Is anything decided "
           "by an id where the mask should decide?")
    chance = logits.detach().softmax(dim=-1)
    slope, = torch.autograd.grad(output, logits, allow_unused=True)
    _asked(slope, chance, ids, real, asked)
    expect(False, f"the right words are asked for, and weighted alike, but the loss is {output.item():.4f} where "
           f"{right:.4f} is right.")


def _asked(slope: Tensor | None, chance: Tensor, ids: Tensor, real: Tensor, asked: list[tuple[int, int]]) -> None:
    """Which state is asked for which word, and with which weight: the gradient of its logits tells."""
    expect(slope is not None and bool(slope.any()), "no gradient reaches the logits: nothing could be learned from "
           "this loss.")
    used, words = slope.abs().amax(dim=-1) > 1e-9, slope.argmin(dim=-1)  # only the word asked for is to rise
    t = ids.shape[1]
    both = [(i, p) for i, p in asked if used[i, p]]

    def always(shift: int) -> bool:
        found = [words[i, p] == ids[i, p + shift] for i, p in both if 0 <= p + shift < t]
        return bool(found) and all(found)

    if both and not always(1):
        expect(not always(0), "each state is asked for the word that it has just read: it will copy, and its loss will "
               "fall to nothing.")
        expect(not always(-1), "each state is asked for the word before the one it has read: shifted the wrong way.")
        expect(not always(2) or len(both) < 3, "each state is asked for the word after the next: shifted twice.")
        expect(False, "some state is asked for a word that is not the next of its own text.")
    expect(not bool(used[:, -1].any()), "the state of the last column is asked for something, and nothing comes after "
           "it.")
    beyond = [(i, p) for i in range(len(ids)) for p in range(t - 1) if used[i, p] and not real[i, p + 1]]
    expect(all(not real[i, p] for i, p in beyond), "the last word of a padded text is asked for the padding behind it: "
           "whether something is asked depends on whether the target is real, not on whether the state is.")
    expect(not beyond, "padding is asked for: the model gets credit for it, and the more padding, the more credit.")
    missing = [(i, p) for i, p in asked if not used[i, p]]
    expect(not missing or any(real[i, p + 2:].any() for i, p in missing),
           "a text's last word, its end, is never asked for, so the model never learns to stop. Here the end and the "
           "padding have one id; the mask tells them apart.")
    expect(not missing, "some real word is never asked for.")
    weights = torch.stack([slope[i, p, ids[i, p + 1]] / (chance[i, p, ids[i, p + 1]] - 1) for i, p in asked])
    expect(bool(weights.isfinite().all()) and close(weights, weights.mean().expand_as(weights), 1e-2) or any(
        not real[i].all() for i, _ in asked), "the words asked for are right, their weights are not: what is added up, "
        "and what is it divided by?")
    expect(not close(weights, torch.ones_like(weights), 1e-3) or len(asked) == 1,
           "a sum was taken, not a mean: the loss would grow with the batch.")
    long, short = (torch.stack([one for one, (i, _) in zip(weights, asked, strict=True) if i == row]).mean()
                   for row in (0, asked[-1][0]))
    expect(not bool(short > 1.01 * long), "a word of a short text weighs more than one of a long text: each word "
           "should count alike.")
    expect(close(weights, weights.mean().expand_as(weights), 1e-3), "the words asked for do not all weigh alike.")
    divisor = round(1 / weights.mean().item())
    expect(divisor == len(asked), f"{len(asked)} words are asked for, and you divide by {divisor}.")


# What is made of ln of the vocabulary's size, the spread of logits, the width and std; what it means.
STARTS: dict[str, Callable[[float, float, int, float], float]] = {
    "that is a model with uniform predictions. An untrained one has random logits, and pays for them.":
        lambda flat, spread, width, std: flat,
    "that is in bits; this course takes the natural logarithm.": lambda flat, spread, width, std: flat / math.log(2),
    "that is in bits; this course takes the natural logarithm. ": lambda flat, spread, width, std: (
        flat + spread**2 / 2) / math.log(2),
    "that is a logarithm to base ten.": lambda flat, spread, width, std: flat / math.log(10),
    "the loss is a negative logarithm, and of a number below one.": lambda flat, spread, width, std: -flat,
    "that is a probability; the loss is its negative logarithm.": lambda flat, spread, width, std: math.exp(-flat),
    "the random part is not the standard deviation itself.": lambda flat, spread, width, std: flat + spread,
    "the random part goes with the square of the logits' spread.": lambda flat, spread, width, std: flat + spread / 2,
    "the random part is too large: is there a half in it?": lambda flat, spread, width, std: flat + spread**2,
    "random logits raise the loss, they do not lower it.": lambda flat, spread, width, std: flat - spread**2 / 2,
    "std is that of a word vector's entries; how wide do logits spread, which are products of whole vectors?":
        lambda flat, spread, width, std: flat + std**2 / 2,
    "the sum of many random products does not grow like their number: they mostly cancel, and it grows like the root "
    "of that number.":
        lambda flat, spread, width, std: flat + (std * width) ** 2 / 2,
    "the variance of a sum of many terms grows with their number, and std counts squared.":
        lambda flat, spread, width, std: flat + std * width / 2,
}
PERPLEXITIES: dict[str, Callable[[float, int], float]] = {
    "with the natural logarithm the base is not two.": lambda loss, words: 2**loss,
    "that would be the perplexity if nothing were random.": lambda loss, words: words,
    "that is a probability: perplexity is the number of equally likely words to guess among, so its inverse.":
        lambda loss, words: math.exp(-loss),
    "perplexity is not the loss itself.": lambda loss, words: loss,
}


@exercise("04.4", "lesson 04, section 4")
def at_the_start(predict: Callable[[int, int, float], tuple[float, float]]) -> None:
    """Loss and perplexity of a language model before its first step."""
    given = [(50272, 768, 0.02), (30522, 1600, 0.02), (random.randint(2000, 60000), random.randint(300, 500), 0.03),
             (random.randint(20000, 60000), random.randint(800, 1000), 0.045)]
    output = [numbers_of(predict(*case), 2, "two numbers, the loss and the perplexity") for case in given]
    flats = [(math.log(words), std * math.sqrt(width), width, std) for words, width, std in given]
    right = [flat + spread**2 / 2 for flat, spread, _, _ in flats]
    losses = [loss for loss, _ in output]
    wrong = next((i for i, loss in enumerate(losses) if not abs(loss - right[i]) <= 0.03), None)
    if wrong is not None:
        words, width, std = given[wrong]
        case = f"with {words} words, width {width} and standard deviation {std} you predict a loss of "
        case += f"{losses[wrong]:.3f}; "
        turned_round = all(math.isclose(loss, math.exp(one), rel_tol=0.05) or math.isclose(other, one, rel_tol=1e-3)
                           for (loss, other), one in zip(output, right, strict=True))
        expect(not turned_round, case + "the first number should be the loss, the second the perplexity.")
        slips = {meaning: [slip(*flat) for flat in flats] for meaning, slip in STARTS.items()}
        expect(False, case + (named(losses, slips, lambda one, other: abs(one - other) < 6e-5) or
                              "first: what does a model pay that gives every word the same probability? Then: what do "
                              "random logits cost on top?"))
    scales = [perplexity for _, perplexity in output]
    off = [not math.isclose(scale, math.exp(loss), rel_tol=0.01) for loss, scale in output]
    if any(off):
        loss, perplexity = output[off.index(True)]
        slips = {meaning: [slip(loss, words) for loss, (words, _, _) in zip(losses, given, strict=True)]
                 for meaning, slip in PERPLEXITIES.items()}
        expect(False, f"your perplexity of {perplexity:.4g} does not belong to your loss of {loss:.3f}: " + (
            named(scales, slips, lambda one, other: math.isclose(one, other, rel_tol=0.01))
            or "among how many equally likely words would one lose as much?"))


class Talker(OPT):
    """A small random OPT that writes something else after every prompt; in float64, so that no two words tie."""

    def __init__(self) -> None:
        super().__init__(OPTConfig(vocab_size=60, width=32, layers=2, heads=2, mlp_width=48, max_positions=40))
        self.words = nn.Linear(32, 50, bias=False)  # untied, or it would repeat itself; ids from 50 on are not written
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                table = name.startswith(("token_embedding", "position_embedding"))
                nn.init.normal_(parameter, std=1.0 if table else 1.3 * parameter.shape[1] ** -0.5)
        self.double().eval().requires_grad_(False)
        self.words.weight[:3] = 0  # nor are 0, 1 and 2: it is for prompts to hold them

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Logits (... 50) of hidden states (... e)."""
        return self.words(hidden)


def written_alone(model: OPT, prompt: Sequence[int], steps: int, before: int = 0, ahead: bool = False) -> list[int]:
    """What follows a prompt that nobody stands beside; as slips, with positions that count `before` places more, or
    with words that look `ahead`."""
    ids = list(prompt)
    for _ in range(steps):
        seen = torch.ones(1, len(ids), dtype=torch.bool)
        mask = masks.causal(seen) | ahead
        hidden = model(model.embed(torch.tensor([ids])), mask, masks.token_positions(seen) + before)
        ids.append(int(model.lm_logits(hidden[0, -1]).argmax()))
    return ids[len(prompt):]


@exercise("04.5", "lesson 04, section 8")
def write_on(write: Callable[[OPT, list[list[int]], int, int], Tensor]) -> None:
    """Each prompt of a batch goes on as it would alone."""
    model, few, known = Talker(), random.randint(4, 5), {}
    held, pad, *other_pads = random.sample(range(50, 60), 5)  # `held` stands in every prompt, the others in none

    def prompts(*lengths: int) -> list[list[int]]:
        rows = [[held, *random.choices(range(3, 50), k=length - 2), *[held] * (length > 1)][:length]
                for length in lengths]
        for place, row in enumerate(rows):  # 0, 1 and 2 are ids like others, here
            row[1:-1] = [place % 3, *row[2:-1]][:max(0, len(row) - 2)]
        return rows

    def alone(row: list[int], steps: int) -> list[int]:
        if len(known.get(tuple(row), ())) < steps:
            known[tuple(row)] = written_alone(model, row, max(steps, few))
        return known[tuple(row)][:steps]

    def rows_wrong(given: list[list[int]], pad: int, steps: int = few) -> tuple[list[int], Tensor]:
        copy = [list(row) for row in given]
        output = expect_tensor(write(model, copy, pad, steps), (len(given), steps), "what is written", "(b steps)",
                               torch.int64)
        expect(copy == given, "your function changed the prompts that it was given.")
        expect(not any(part.training for part in model.modules()), "your function has put the model into train mode.")
        wrong = [i for i, row in enumerate(given) if output[i].tolist() != alone(row, steps)]
        expect(not wrong or torch.equal(output, write(model, copy, pad, steps)), "called twice with the same prompts, "
               "your function writes two different texts: the likeliest word is not a matter of chance.")
        return wrong, output

    ones = [[row] for row in prompts(*2 * (5, 3, 6, 1, 2, 4, 7))]  # each of 0, 1, 2 in several lengths
    tried = [(one[0], rows_wrong(one, pad)) for one in ones]
    expect(not any(wrong for _, (wrong, _) in tried) or not all(
        output[0].tolist() == written_alone(model, row, few, ahead=True) for row, (_, output) in tried),
        "one prompt, no padding, and already there words look at words that come after them: the mask should be "
        "causal.")
    small = [(bool({0, 1, 2} & {*row}), bool(wrong)) for row, (wrong, _) in tried]
    expect((True, True) not in small or (False, True) in small, "a single prompt goes on differently than it should "
           "if it holds an id such as 0, 1 or 2, and rightly if it does not: an id does not tell what is padding.")
    expect(all(output[0, 0] == alone(row, 1)[0] for row, (_, output) in tried), "one prompt, no padding: "
           "already the first word is not the likeliest. Which state predicts what comes after a text?")
    expect(not any(wrong for _, (wrong, _) in tried), "one prompt, no padding: the first word is right, a later one is "
           "not. Does the model get back what it has written, and may it see that?")
    expect(not any(rows_wrong(one, held)[0] for one in ones[:6]), "a single prompt goes on differently if it holds a "
           "token whose id is also that of padding: an id does not tell what is padding.")
    expect(not any(rows_wrong(one, alone(one[0], 1)[0])[0] for one in ones[:6]), "a single prompt goes on differently "
           "if the id of padding is that of a word which is written: an id does not tell what is padding.")
    expect(not rows_wrong(prompts(4, 4, 4), pad)[0], "prompts of equal length, which need no padding, go on "
           "differently together than alone.")
    batches = [prompts(*lengths) for lengths in 3 * ((7, 2, 4, 1, 5, 3), (1, 3), (3, 6, 6, 2))]
    for given in batches:
        wrong, _ = rows_wrong(given, pad)
        if wrong:
            longest = max(map(len, given))
            who = "prompts" if any(len(given[i]) == longest for i in wrong) else "shorter prompts"
            moves = any(not torch.equal(rows_wrong(rows, pad)[1], rows_wrong(rows, another)[1])
                        for rows in batches for another in other_pads)
            expect(not moves, f"{who} of a batch go on differently than alone, and what is written changes with the id "
                   "of padding: somewhere the state of a padding token is read, or padding is seen.")
            columns = [torch.equal(rows_wrong(rows, pad)[1], torch.tensor([
                written_alone(model, row, few, before=max(map(len, rows)) - len(row)) for row in rows]))
                       for rows in batches]
            expect(not all(columns), f"{who} of a batch go on differently than alone: they get the positions of their "
                   "columns, padding counted. A token's place in its text is another number.")
            expect(False, f"{who} of a batch go on differently than alone, whatever the id of padding. Do the tokens, "
                   "and the mask that says which are real, agree column by column? Are the rows in their order?")
    for given in batches[:4]:
        for same in (held, 0, 1, alone(given[0], 1)[0], alone(given[-1], 2)[1]):
            expect(not rows_wrong(given, same)[0], "in a batch, prompts go on differently if padding has the id of a "
                   "token that they hold, or of a word that is written: an id does not tell what is padding.")
    for steps in (1, few + 3):
        expect(not rows_wrong(batches[0], pad, steps)[0], f"with {few} steps all is right, with {steps} it is not.")

"""Checks of lesson 04: cutting words, turning vectors, the loss of the next word, and writing on in a batch."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minblip2 import masks
from minblip2.lm.opt import OPT, OPTConfig

from . import close, exercise, expect, expect_tensor


def greedy(word: str, vocabulary: dict[str, int]) -> list[str]:
    """The pieces of one word, written as plainly as can be."""
    pieces, rest, mark = [], word, ""
    while rest:
        fits = [length for length in range(1, len(rest) + 1) if mark + rest[:length] in vocabulary]
        if not fits:
            return ["[UNK]"]
        pieces.append(mark + rest[:fits[-1]])
        rest, mark = rest[fits[-1]:], "##"
    return pieces


@exercise("04.1", "lesson 04, section 1")
def wordpiece(encode: Callable[[str, dict[str, int]], list[int]]) -> None:
    """Greedy longest match from the left, between [CLS] and [SEP]."""
    letters = random.sample(string.ascii_lowercase, 26)
    a, b, c, d, e, f, g = ("".join(letters[3 * i:3 * i + 3]) for i in range(7))
    u, strange = letters[21], "".join(letters[22:])
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", a, b, e, a + u, "##" + u, "##" + c, "##" + d, b + d[0],
              "##" + c + f, "##" + f, g, "##" + g]
    ids = random.sample(range(100, 999), len(pieces))
    vocabulary = dict(zip(pieces, ids, strict=True))

    def cut(caption: str) -> list[str]:
        given = dict(vocabulary)
        output = encode(caption, given)
        expect(given == vocabulary, "your function changed the vocabulary that it was given.")
        expect(isinstance(output, list),
               f"your function gives a {type(output).__name__} and should give a list of ids.")
        expect(all(isinstance(i, int) for i in output),
               "the list holds something that is no whole number: asked for are "
               "ids, not pieces.")
        names = {i: piece for piece, i in vocabulary.items()}
        strangers = [i for i in output if i not in names]
        expect(not strangers, f"the id {strangers[:1]} is nobody's in this vocabulary: also the ids of the special "
               "tokens stand in it, and need not be small.")
        return [names[i] for i in output]

    frame = cut(a)
    expect(frame[:1] == ["[CLS]"], "the text does not begin with [CLS].")
    expect(frame[-1:] == ["[SEP]"], "the text does not end with [SEP].")
    several = cut(f"{a} {b}")
    expect(several.count("[CLS]") == several.count("[SEP]") == 1,
           "with two words [CLS] or [SEP] stands there more than once: they frame the text, not each word.")
    for caption, meaning in (
            ("", "an empty caption is still a text, with nothing inside."),
            (a, "a word that is in the vocabulary stays whole."),
            (f"{b} {a}", "words stand in the order of the caption, and each begins anew."),
            (a + c, "a piece that continues a word has a name of its own in the vocabulary."),
            (a + u, "a shorter piece was taken although a longer one was there."),
            (a + c + f, "inside a word, too, the longest piece is taken."),
            (c, "a piece that only continues words stands at the beginning of one, or a word that nobody knows was "
                "dropped."),
            (a + e, "a piece that may only begin a word was taken to continue one, or part of a word was kept whose "
                    "other part nobody knows. One gap, and the whole word is unknown."),
            (b + d, "greedy never goes back: what the longest beginning leaves over cannot be cut. Did you search for "
                    "another cut, or go from right to left?"),
            (f"{a} {strange} {b}", "an unknown word holds one place among its neighbours, and they do not suffer."),
            (g * 3, "a word may need more than two pieces, and the same one twice.")):
        right = ["[CLS]", *(piece for word in caption.split() for piece in greedy(word, vocabulary)), "[SEP]"]
        output = cut(caption)
        expect(output == right, f"from the pieces {' '.join(piece for piece in pieces[4:])} you make of {caption!r}: "
               f"{' '.join(output)}; {meaning}")
    for _ in range(60):
        caption = " ".join("".join(random.choices([a, b, c, d, e, f, g, u, d[0], strange[0]], k=random.randint(1, 4)))
                           for _ in range(random.randint(1, 3)))
        right = ["[CLS]", *(piece for word in caption.split() for piece in greedy(word, vocabulary)), "[SEP]"]
        output = cut(caption)
        expect(output == right, f"from the pieces {' '.join(piece for piece in pieces[4:])} you make of {caption!r}: "
               f"{' '.join(output)}. Go through it by hand, from the left, longest piece first.")


@exercise("04.2", "lesson 04, section 4")
def turned(turn: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Rotary positions: each pair of channels is turned by position times its own angle."""
    b, h, s, d = random.randint(2, 3), random.randint(1, 3), random.randint(4, 7), random.choice([6, 8, 10])
    theta = random.choice([50.0, 100.0, 300.0])
    x, places = torch.randn(b, h, s, d), torch.stack([torch.randperm(20)[:s] for _ in range(b)])

    def tried(x: Tensor, positions: Tensor) -> Tensor:
        before = x.clone(), positions.clone()
        output = expect_tensor(turn(x, positions, theta), x.shape, "the result", "(b h s d)", x.dtype)
        expect(torch.equal(before[0], x) and torch.equal(before[1], positions),
               "your function changed x or the positions that it was given.")
        return output

    output = tried(x, places)
    columns = torch.arange(s).expand(b, s)
    expect(not close(output, tried(x, columns)), "your result does not depend on the positions: with padding on the "
           "left, or a cache, a token's position is not its column.")
    expect(close(tried(x, torch.zeros_like(places)), x), "at position 0 a vector comes out changed: no turn, no "
           "change.")
    expect(close(output.norm(dim=-1), x.norm(dim=-1)),
           "lengths change: an arrow that is turned stays as long as it is. "
           "Both coordinates of an arrow are turned by the same angle, and signs matter.")
    q, k = torch.randn(2, 1, 1, 1, d)

    def score(at: int, other: int) -> Tensor:
        return (tried(q, torch.tensor([[at]])) * tried(k, torch.tensor([[other]]))).sum()

    expect(abs(float(score(3, 1) - score(13, 11))) < 1e-3 * d, "two tokens at the same distance get another score "
           "elsewhere in the text: the score may depend on how far apart they are, not on where.")
    half = d // 2
    unit = tried(torch.eye(d)[:, None, None, :], torch.ones(d, 1))[:, 0, 0]  # row: which channel was 1
    partners = [unit[i].abs().topk(2).indices.sort().values.tolist() for i in range(half)]
    expect(partners[1] != [0, 1] and partners[0] != [0, 1], "neighbouring channels were taken for pairs: such a model "
           "exists, but weights trained with halves do not fit it.")
    expect(all(pair == [i, i + half] for i, pair in enumerate(partners)) and
           close(unit[:half, :half], torch.diag(unit[:half, :half].diagonal())),
           "the two channels of a pair are not where they should be: channel i of the first half belongs to channel i "
           "of the second.")
    angles = [math.atan2(unit[i, i + half].item(), unit[i, i].item()) for i in range(half)]
    right = [theta ** (-2 * i / d) for i in range(half)]
    expect(angles[0] > 0, "arrows are turned the wrong way round: look at which product has the minus.")
    expect(max(angles) - min(angles) > 1e-3, "all pairs turn equally fast: each has an angle of its own.")
    for i, (seen, wanted) in enumerate(zip(angles, right, strict=True)):
        expect(abs(seen - wanted) < 1e-3 * max(wanted, 0.05), f"pair {i} of {half} is turned by {seen:.3f} per "
               f"position, and that is {'too fast' if seen > wanted or seen < 0 else 'too slow'}: count how the "
               "exponent grows from pair to pair, over the whole width of a head.")
    truth = torch.empty_like(x)
    for i, j, p, n in ((i, j, p, n) for i in range(b) for j in range(h) for p in range(s) for n in range(half)):
        angle, one, two = places[i, p].item() * right[n], x[i, j, p, n].item(), x[i, j, p, n + half].item()
        truth[i, j, p, n] = one * math.cos(angle) - two * math.sin(angle)
        truth[i, j, p, n + half] = one * math.sin(angle) + two * math.cos(angle)
    expect(close(output, truth, 1e-3), "with several heads and texts the turns are not those of each token's own "
           "position: does the batch meet the batch, and the position the position?")
    far = torch.tensor([[random.randint(300, 900) * 2 + 1]])
    coarse, fine = (tried(vector, far) for vector in (q.bfloat16(), q.bfloat16().float()))
    expect(close(coarse.float(), fine, 0.03), "with x in bfloat16 and a position beyond 600 the result is far off: "
           "bfloat16 cannot count that far, so the angles need a finer kind of number.")


def texts(lengths: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """Ids (b t) of texts that end with the id that also pads, no id twice in a text; mask (b t); the vocabulary."""
    size = max(lengths) + random.randint(3, 6)
    end = random.randrange(size)
    others = [i for i in range(size) if i != end]
    rows = [[*random.sample(others, length - 1), *[end] * (max(lengths) - length + 1)] for length in lengths]
    return torch.tensor(rows), torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], size


@exercise("04.3", "lesson 04, section 6")
def next_word_loss(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Mean over all real next words of how surprising each was."""
    for lengths in ((random.randint(6, 8), random.randint(3, 4), 2), (random.randint(3, 6),), (4, 4)):
        ids, real, size = texts(lengths)
        logits = (2 * torch.randn(*ids.shape, size)).requires_grad_()
        given = ids.clone(), real.clone()
        output = expect_tensor(loss_of(logits, *given), (), "the loss")
        expect(torch.equal(given[0], ids) and torch.equal(given[1], real), "your function changed the ids or the mask "
               "that it was given.")
        expect(output.requires_grad, "no gradient reaches the logits: nothing could be learned from this loss.")
        asked = [(i, p) for i in range(len(lengths)) for p in range(lengths[i] - 1)]
        chance = logits.detach().softmax(dim=-1)

        def over(value: Callable[[int, int, int], float], asked=asked, ids=ids) -> float:
            return sum(value(i, p, int(ids[i, p + 1])) for i, p in asked) / len(asked)

        right = over(lambda i, p, word, chance=chance: -math.log(chance[i, p, word]))
        for value, meaning in ((-right, "the sign: surprise is never negative."),
                               (right / math.log(2), "you count in bits; the house counts with the natural logarithm."),
                               (over(lambda i, p, word, chance=chance: -float(
                                   chance[i, p].log_softmax(dim=-1)[word])), "a softmax was taken of a softmax."),
                               (over(lambda i, p, word, chance=chance: 1 - float(chance[i, p, word])),
                                "no logarithm was taken of the probability."),
                               (over(lambda i, p, word, chance=chance: -float(chance[i, p, word])),
                                "no logarithm was taken of the probability."),
                               (over(lambda i, p, word, logits=logits: -float(logits[i, p, word].detach())),
                                "the logits were never made into probabilities.")):
            expect(abs(output.item() - value) > 1e-4 or abs(value - right) < 1e-3, meaning)
        _asked(torch.autograd.grad(output, logits, allow_unused=True)[0], chance, ids, real, asked)
        expect(abs(output.item() - right) < 1e-3 * max(right, 1), "the right words are asked for, and weighed alike, "
               f"but the loss is {output.item():.4f} where {right:.4f} is right.")


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
           "whether something is asked depends on what would be the answer, not on who answers.")
    expect(not beyond, "padding is asked for: the model gets credit for it, and the more, the longer the rectangle.")
    missing = [(i, p) for i, p in asked if not used[i, p]]
    expect(not missing or any(real[i, p + 2:].any() for i, p in missing),
           "a text's last word, its end, is never asked for, so nobody learns to stop. Here the end and the padding "
           "have one id; the mask tells them apart.")
    expect(not missing, "some real word is never asked for.")
    weights = torch.stack([slope[i, p, ids[i, p + 1]] / (chance[i, p, ids[i, p + 1]] - 1) for i, p in asked])
    expect(not close(weights, torch.ones_like(weights), 1e-3) or len(asked) == 1,
           "a sum was taken, not a mean: the loss would grow with the batch.")
    expect(close(weights, weights.mean().expand_as(weights), 1e-3), "a word of a short text weighs more than one of a "
           "long text: each word should count alike.")
    expect(close(weights, torch.full_like(weights, 1 / len(asked)), 1e-3), f"{len(asked)} words are asked for, and you "
           f"divide by {1 / weights.mean().item():.0f}.")


@exercise("04.4", "lesson 04, section 6")
def at_the_start(predict: Callable[[int, int, float], tuple[float, float]]) -> None:
    """Loss and perplexity of a language model before its first step."""
    drawn = [(random.randint(2000, 60000), random.randint(300, 500), 0.03) for _ in range(2)]
    for vocabulary, width, std in [(50272, 768, 0.02), (30522, 1600, 0.02), *drawn]:
        output = predict(vocabulary, width, std)
        expect(isinstance(output, tuple | list) and len(output) == 2,
               "your function should give two numbers, the loss and "
               "the perplexity.")
        loss, perplexity = output
        expect(all(isinstance(value, int | float) and not isinstance(value, bool) for value in output),
               f"your function gives {type(loss).__name__} and {type(perplexity).__name__}; asked for are two numbers.")
        flat, spread = math.log(vocabulary), std * math.sqrt(width)
        case = f"with {vocabulary} words, width {width} and standard deviation {std} you predict a loss of {loss:.3f}; "
        slips = {flat: "that is a model that believes nothing at all. A fresh one has random beliefs, and pays for "
                       "them.",
                 math.log2(vocabulary): "that is in bits; the house takes the natural logarithm.",
                 math.log10(vocabulary): "that is a logarithm to base ten.",
                 -flat: "the loss is a negative logarithm, and of a number below one.",
                 1 / vocabulary: "that is a probability; the loss is its negative logarithm.",
                 flat + spread: "the random part is not the standard deviation itself.",
                 flat + spread / 2: "the random part goes with the square of the logits' spread.",
                 flat + spread**2: "the random part is too large: is there a half in it?",
                 flat - spread**2 / 2: "random beliefs cost something, they do not help.",
                 flat + std**2 / 2: "std is that of a word vector's entries; how wide do logits spread, which are "
                                    "products of whole vectors?",
                 flat + (std * width)**2 / 2: "many random products do not add up to their number: they cancel, and "
                                              "only the root of it remains."}
        right = flat + spread**2 / 2
        if abs(loss - right) > 0.03:
            near = min(slips, key=lambda value: abs(value - loss))
            expect(False, case + (slips[near] if abs(near - loss) < 0.005 else "first: what does a model pay that "
                                  "gives every word the same? Then: what do random logits cost on top?"))
        meanings = {2**loss: "with the natural logarithm the base is not two.", vocabulary: "that would be the "
                    "perplexity if nothing were random.", math.exp(-loss): "that is a probability: perplexity is how "
                    "many words it is as if one had to guess among, so the other way up.",
                    loss: "perplexity is not the loss itself."}
        near = min(meanings, key=lambda value: abs(value - perplexity))
        expect(abs(perplexity / math.exp(loss) - 1) < 0.01, f"your perplexity of {perplexity:.4g} does not belong to "
               f"your loss of {loss:.3f}: " + (meanings[near] if abs(near / perplexity - 1) < 0.01
                                               else "among how many equally likely words would one lose as much?"))


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

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Logits (... 50) of hidden states (... e)."""
        return self.words(hidden)


def written_alone(model: OPT, prompt: Sequence[int], steps: int) -> list[int]:
    """What follows a prompt that nobody stands beside."""
    ids = list(prompt)
    for _ in range(steps):
        seen = torch.ones(1, len(ids), dtype=torch.bool)
        ids.append(int(model.lm_logits(model(model.embed(torch.tensor([ids])), masks.causal(seen))[0, -1]).argmax()))
    return ids[len(prompt):]


@exercise("04.5", "lesson 04, section 9")
def write_on(write: Callable[[OPT, list[list[int]], int, int], Tensor]) -> None:
    """Each prompt of a batch goes on as it would alone."""
    model, steps = Talker(), random.randint(4, 5)
    held, pad, *other_pads = random.sample(range(50, 60), 5)  # `held` stands in every prompt, the others in none

    def prompts(*lengths: int) -> list[list[int]]:
        return [[held, *random.choices(range(50), k=length - 2), *[held] * (length > 1)][:length] for length in lengths]

    def rows_wrong(given: list[list[int]], pad: int) -> tuple[list[int], Tensor]:
        copy = [list(row) for row in given]
        output = expect_tensor(write(model, copy, pad, steps), (len(given), steps), "what is written", "(b steps)",
                               torch.int64)
        expect(copy == given, "your function changed the prompts that it was given.")
        return [i for i, row in enumerate(given) if output[i].tolist() != written_alone(model, row, steps)], output

    ones = [prompts(length) for length in 2 * (5, 3, 6, 1, 2, 4)]
    tried = [(one[0], rows_wrong(one, pad)) for one in ones]
    expect(all(output[0, 0] == written_alone(model, row, 1)[0] for row, (_, output) in tried),
           "one prompt, no padding: "
           "already the first word is not the likeliest. Which state predicts what comes after a text?")
    expect(not any(wrong for _, (wrong, _) in tried), "one prompt, no padding: the first word is right, a later one is "
           "not. Does the model get back what it has written, and may it see that?")
    expect(not any(rows_wrong(one, held)[0] for one in ones), "a single prompt goes on differently if it holds a token "
           "whose id is also that of padding. OPT's texts do: an id does not tell what is padding.")
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
            expect(False, f"{who} of a batch go on differently than alone, whatever the id of padding. Do the tokens, "
                   "and what is known of which are real, stand in the same columns? Are the rows in their order?")
        expect(not rows_wrong(given, held)[0], "in a batch, prompts go on differently if they hold a token whose id is "
               "also that of padding: an id does not tell what is padding.")

"""What the language model of the scenes reads, and when: texts of scenes that were never drawn, questions and answers.

Captions and keywords of one scene stand in a row, then questions that they answer. What a soft prompt can call up
later, the model must be able to do with text: to look up which colour stood beside "star", wherever that was. Such a
look-up needs heads that know what stood beside an earlier occurrence (as an induction head does, arXiv 2209.11895). A
model this small stays for thousands of steps without them; they appear within minutes where `binding` helps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import tokenizers
import torch
from torch import Tensor

from ..data.scene_captions import FRAMES, keywords, write_caption, write_texts
from ..data.scene_questions import KINDS, ask_all, told
from ..data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, imagine
from ..data.tokenizer import Tokenizer

VERSION = 1  # raise it when what is read changes: language models of another version are trained anew
END = "[SEP]"
NOUNS = [*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES, "top", "left", "right", "bottom", "middle"]
MIXED = ("keywords",) * 7 + ("positions", "background") * 2 + ("size", "plain", "relation")
ANSWER, QUESTION, ASKED = 3.0, 0.2, 7  # weights in the loss, and how many questions a row asks
BLIND, NONSENSE = 0.05, 0.03  # shares of rows that tell nothing at first, and of rows to copy after the first phase

Row = list[tuple[str, float]]  # words, and their weight in the loss


@dataclass(frozen=True)
class Phase:
    """What rows hold up to this share of the steps.

    `tells` are the kinds of the text that comes first, drawn from with equal chances; none: rows of nonsense. `asks`
    are kinds of questions, `texts` is the weight of what is no answer, `more` adds texts before and among the
    questions, `forwards` is that of `ask_all`: with all four words of relations in balance, the answer is an exclusive
    or, from which no first gradient comes.
    """

    until: float
    tells: tuple[str, ...] = ()
    asks: tuple[str, ...] = KINDS
    texts: float = 0.1
    more: bool = False
    forwards: float = 0.0


CURRICULUM = (
    Phase(until=0.21),
    Phase(until=0.27, tells=("plain",), asks=("colour", "shape")),
    Phase(until=0.32, tells=MIXED, asks=("colour", "shape")),
    Phase(until=0.60, tells=MIXED, texts=1.0, more=True, forwards=0.9),
    Phase(until=1.00, tells=MIXED, texts=1.0, more=True),
)


def copy_row(rng: random.Random) -> Row:
    """Nonsense words, then pieces of them: what follows can be known only from what followed before."""
    words = rng.sample(NOUNS, rng.randint(5, 13))
    row, length = [(END, 0.0), (" ".join(words), 0.0)], 1 + len(words)
    while length < 36:
        at = rng.randrange(len(words) - 1)
        first, *rest = words[at:at + rng.randint(2, 4)]
        row += [(END, 0.0), (first, 0.0), (" ".join(rest), 1.0)]
        length += 2 + len(rest)
    return row


def scene_row(rng: random.Random, phase: Phase) -> Row:
    """Texts of one scene, and questions that these texts answer."""
    scene = imagine(rng)
    while not phase.more and len(scene.things) < 2:  # with one thing there is nothing to bind
        scene = imagine(rng)

    def text(kinds: tuple[str, ...]) -> str:
        kind = rng.choice([kind for kind in kinds if kind != "relation" or len(scene.things) > 1])
        return keywords(scene, rng) if kind == "keywords" else write_caption(scene, kind, rng)

    first = [text(phase.tells)] if rng.random() >= BLIND else []
    first += [text(tuple(FRAMES))] if phase.more and rng.random() < 0.5 else []
    parts = [[(f"question {question} answer", QUESTION * phase.texts), (answer, ANSWER), (END, phase.texts)]
             for question, answer in questions(scene, first, rng, phase)]
    among = [text(tuple(FRAMES))] + [keywords(scene, rng)] * (rng.random() < 0.5) if phase.more else []
    parts += [[(f"{other} {END}", phase.texts)] for other in among]
    rng.shuffle(parts)
    row = [(END, 0.0)] + [(f"{text} {END}", phase.texts) for text in first]
    return row + [piece for part in parts for piece in part]


def questions(scene: Scene, texts: list[str], rng: random.Random, phase: Phase) -> Iterator[tuple[str, str]]:
    """Questions that the texts answer, each with its answer, with equal chances for the kinds; relations twice.

    They are drawn with replacement: were each asked once, the last answers would follow from the first ones.
    """
    facts, kinds = told(texts, scene), {}
    for question in ask_all(scene, rng, phase.forwards):
        if question.kind in phase.asks and question.needs <= facts:
            kinds.setdefault(question.kind, []).append((question.text, question.answer))
    names = [*kinds, *(["relation"] if "relation" in kinds else [])]
    for _ in range(ASKED):
        yield rng.choice(kinds[rng.choice(names)])


@dataclass
class TextBatch:
    """ids (b t), mask (b t) and, unless all count the same, what each id counts in the loss: weights (b t)."""

    ids: Tensor
    mask: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on a device."""
        weights = None if self.weights is None else self.weights.to(device)
        return TextBatch(self.ids.to(device), self.mask.to(device), weights)


class SceneTexts:
    """Batches of rows as the curriculum says, each of a scene of its own; `steps` is how long the curriculum takes."""

    def __init__(self, tokenizer: Tokenizer, batch_size: int, seed: int, steps: int):
        self.tokenizer, self.batch_size, self.seed, self.steps = tokenizer, batch_size, seed, steps
        self.token_ids = lru_cache(4096)(tokenizer.token_ids)  # the same questions come again and again

    def iterate(self, start: int = 0) -> Iterator[TextBatch]:
        """Batches without end, from number `start` on."""
        for number in count(start):
            rng = random.Random(f"{self.seed} {number}")
            phase = next((phase for phase in CURRICULUM if number < phase.until * self.steps), CURRICULUM[-1])
            yield self.batch([copy_row(rng) if not phase.tells or rng.random() < NONSENSE else scene_row(rng, phase)
                              for _ in range(self.batch_size)])

    def batch(self, rows: list[Row]) -> TextBatch:
        """Rows as one rectangle."""
        known = [[(token, weight) for text, weight in row for token in self.token_ids(text)] for row in rows]
        ids, mask = self.tokenizer.pad([[token for token, _ in row] for row in known])
        weights = torch.zeros(ids.shape)
        weights[mask] = torch.tensor([weight for row in known for _, weight in row])
        return TextBatch(ids, mask, weights)


def text_tokenizer() -> Tokenizer:
    """The words of captions and keywords, as the Q-Former reads them."""
    return Tokenizer.from_texts(text for six in write_texts(300, seed=0) for text in six)


def lm_tokenizer() -> Tokenizer:
    """The words of captions and questions for the language model: a text begins and ends with the same token, as OPT's
    do. Marks are left out: "Question: what colour is the star? Answer:" is read as it was learned."""
    rng = random.Random(0)
    asked = [f"question {question.text} answer {question.answer}" for scene in (imagine(rng) for _ in range(300))
             for question in ask_all(scene, rng)]
    words = Tokenizer.from_texts([text for six in write_texts(300, seed=0) for text in six] + asked)
    no_marks = tokenizers.normalizers.Replace(tokenizers.Regex("[?!.:;]"), " ")
    words.backend.normalizer = tokenizers.normalizers.Sequence([no_marks, words.backend.normalizer])
    return Tokenizer(words.backend, [words.eos_id], words.eos_id, words.pad_id)

"""Questions about drawn scenes and their answers: what the tiny language model reads in text, and is asked of pictures.

A question names a thing by its shape or its colour where only one thing of the scene has it, so that every answer is
certain. Stage 2 never sees one: what it answers about pictures, the language model could do before.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass

from .scenes import COLOURS, OPPOSITE, SHAPES, Scene, Thing, holds

NUMBERS = ("one", "two", "three")
COMPARED = {"large": "larger", "small": "smaller"}
KINDS = ("count", "background", "shape", "colour", "where", "size", "exists", "is it", "relation", "comparison")


@dataclass(frozen=True)
class Question:
    """A question without its mark, its answer, its kind, and what one must know of the scene to answer it.

    `needs` holds "background", or (attribute, index of the thing) with the attribute "position" or "size".
    """

    kind: str
    text: str
    answer: str
    needs: frozenset = frozenset()

    @property
    def prompt(self) -> str:
        """What stands before the answer."""
        return as_prompt(self.text)


def as_prompt(question: str) -> str:
    """A question as the language model has learned to read one: "What colour is the star?" becomes
    "question what colour is the star answer"."""
    words = re.findall(r"[a-z]+", question.lower())
    return " ".join(["question", *words, "answer"])


def only(values: list[str], index: int) -> bool:
    """Whether no other thing has this value."""
    return values.count(values[index]) == 1


def ask_all(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question of each kind that has one certain answer; `rng` draws what yes-or-no questions name."""
    things, shapes, colours = scene.things, [t.shape for t in scene.things], [t.colour for t in scene.things]
    present = rng.random() < 0.5
    shape = rng.choice(shapes if present else [s for s in SHAPES if s not in shapes])
    asked = [Question("count", "how many things are there", NUMBERS[len(things) - 1]),
             Question("background", "what colour is the background", scene.background, frozenset({"background"})),
             Question("exists", f"is there a {shape}", "yes" if present else "no")]
    for i, thing in enumerate(things):
        if only(colours, i):
            asked.append(Question("shape", f"what shape is the {thing.colour} thing", thing.shape))
        if not only(shapes, i):
            continue
        name = f"the {thing.shape}"
        others = [c for c in colours if c != thing.colour]
        wrong = rng.choice(others if others and rng.random() < 0.7 else [c for c in COLOURS if c != thing.colour])
        claimed = thing.colour if rng.random() < 0.5 else wrong
        asked += [Question("colour", f"what colour is {name}", thing.colour),
                  Question("where", f"where is {name}", thing.position, frozenset({("position", i)})),
                  Question("size", f"what size is {name}", thing.size, frozenset({("size", i)})),
                  Question("is it", f"is {name} {claimed}", "yes" if claimed == thing.colour else "no")]
        for j, other in enumerate(things):
            if j != i and only(shapes, j):
                asked += _about_two(thing, other, i, j, rng)
    return asked


def _about_two(one: Thing, other: Thing, i: int, j: int, rng: random.Random) -> list[Question]:
    """A relation where the cells of the two differ in a row or a column (always), and a comparison of sizes."""
    true = [relation for relation in OPPOSITE if holds(one, relation, other)]
    relation = rng.choice(true)
    yes = rng.random() < 0.5
    word = rng.choice(tuple(COMPARED))
    larger = "yes" if one.size == word != other.size else "no"
    return [Question("relation", f"is the {one.shape} {relation if yes else OPPOSITE[relation]} the {other.shape}",
                     "yes" if yes else "no", frozenset({("position", i), ("position", j)})),
            Question("comparison", f"is the {one.shape} {COMPARED[word]} than the {other.shape}", larger,
                     frozenset({("size", i), ("size", j)}))]


def answerable(questions: list[Question], told: Collection) -> list[Question]:
    """Those that a text answers which tells of each thing's colour and shape, and of what is in `told`."""
    return [question for question in questions if question.needs <= set(told)]

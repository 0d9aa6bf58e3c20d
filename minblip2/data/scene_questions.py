"""Questions about drawn scenes and their answers: what the language model reads in text, and is asked of pictures.

A question names a thing by its shape or its colour where no other thing of the scene has it, so that every answer is
certain. Stage 2 never sees a question: what it answers about pictures, the language model could do before.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .scene_captions import OPPOSITE, holds
from .scenes import COLOURS, SHAPES, Scene

NUMBERS = ("one", "two", "three")
KINDS = ("count", "background", "colour", "shape", "where", "size", "exists", "yes/no", "relation")
STATED = {"position": r"\b(top|bottom|middle|(left|right)(?! of))\b", "size": r"\b(small|large)\b"}
WORDED_BACKWARDS = ("right of", "below")
Fact = str | tuple[str, int]  # "background", or ("position" or "size", index of the thing)


@dataclass(frozen=True)
class Question:
    """A question without its mark, its answer, and what one must know of a scene beyond colours and shapes."""

    kind: str
    text: str
    answer: str
    needs: frozenset[Fact] = frozenset()


def told(texts: Iterable[str], scene: Scene) -> set[Fact]:
    """What true texts of a scene, captions or keywords, tell of it beyond the things' colours and shapes."""
    facts: set[Fact] = set()
    for text in texts:
        if scene.background in re.findall(r"\w+", text):
            facts.add("background")
        for clause in re.split(r",| and | with ", text):
            words = set(clause.split())
            for i, thing in enumerate(scene.things):
                if {thing.colour, thing.shape} <= words:
                    facts |= {(name, i) for name, pattern in STATED.items() if re.search(pattern, clause)}
    return facts


def ask_all(scene: Scene, rng: random.Random, forwards: float = 0.0) -> list[Question]:
    """Every question that has one certain answer; `rng` draws what yes-or-no questions claim, true in half of them.

    So large a share of relations as `forwards` says is asked as "left of" or "above", never as their opposites.
    """
    things, colours, shapes = scene.things, [t.colour for t in scene.things], [t.shape for t in scene.things]
    shape = rng.choice(shapes if (present := rng.random() < 0.5) else [s for s in SHAPES if s not in shapes])
    asked = [Question("count", "how many things are there", NUMBERS[len(things) - 1]),
             Question("background", "what colour is the background", scene.background, frozenset({"background"})),
             Question("exists", f"is there a {shape}", "yes" if present else "no")]
    asked += [Question("shape", f"what shape is the {thing.colour} thing", thing.shape) for thing in things
              if colours.count(thing.colour) == 1]
    named = [(i, thing) for i, thing in enumerate(things) if shapes.count(thing.shape) == 1]
    for i, thing in named:
        others = [colour for colour in COLOURS if colour != thing.colour]
        near = [colour for colour in others if colour in colours]  # another thing's colour is the harder claim
        wrong = rng.choice(near if near and rng.random() < 0.7 else others)
        claim = thing.colour if (true := rng.random() < 0.5) else wrong
        asked += [Question("colour", f"what colour is the {thing.shape}", thing.colour),
                  Question("where", f"where is the {thing.shape}", thing.position, frozenset({("position", i)})),
                  Question("size", f"what size is the {thing.shape}", thing.size, frozenset({("size", i)})),
                  Question("yes/no", f"is the {thing.shape} {claim}", "yes" if true else "no")]
        for j, other in named:
            if i == j:
                continue
            relation = rng.choice([relation for relation in OPPOSITE if holds(thing, relation, other)])
            relation = relation if rng.random() < 0.5 else OPPOSITE[relation]
            if relation in WORDED_BACKWARDS and rng.random() < forwards:
                relation = OPPOSITE[relation]
            asked.append(Question("relation", f"is the {thing.shape} {relation} the {other.shape}",
                                  "yes" if holds(thing, relation, other) else "no",
                                  frozenset({("position", i), ("position", j)})))
    return asked


def one_of_each(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every kind that the scene allows."""
    asked = ask_all(scene, rng)
    return [rng.choice(some) for kind in KINDS if (some := [question for question in asked if question.kind == kind])]

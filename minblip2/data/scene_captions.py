"""The language of the drawn scenes: a grammar that writes true captions, and a judge of any caption."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field

from .scenes import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, SIZES, Scene, Thing, draw_scenes, position_phrase

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
FRAMES = {  # how a caption opens tells what it will say: a prompt can ask for one kind
    "plain": ("a picture of {}",), "positions": ("this picture shows {}",), "size": ("there is {}",),
    "relation": ("we see {}",), "background": ("on a @ background there is {}", "a @ background with {}"),
}  # fmt: skip


def _articles(text: str) -> str:
    return re.sub(r"\ban? (?=(\w))", lambda found: "an " if found[1] in "aeiou" else "a ", text)


def phrase(colour: str, shape: str) -> str:
    """What captions call a thing: "a red circle", "an orange square"."""
    return _articles(f"a {colour} {shape}")


def holds(one: Thing, relation: str, other: Thing) -> bool:
    """Relations compare cells of the grid, not pixels: no caption hangs on a shake of three pixels."""
    down, right = (a - b for a, b in zip(one.cell, other.cell, strict=True))
    return {"left of": right < 0, "right of": right > 0, "above": down < 0, "below": down > 0}[relation]


def write_caption(scene: Scene, kind: str, rng: random.Random) -> str:
    """A true caption of one of the kinds in FRAMES; a relation takes two things or more."""
    things = sorted(scene.things, key=lambda thing: thing.cell)  # as one reads: from the top left to the bottom right
    if kind == "relation":
        rng.shuffle(things)
    # A picture's captions agree in much of what they tell: contrast unlearns whatever most captions leave out.
    placed = kind in ("positions", "background", "size")
    sized = kind == "size" or (kind == "background" and rng.random() < 0.3)
    told_last = kind not in ("plain", "background") and rng.random() < 0.75
    behind = f" on a {scene.background} background" if told_last else ""
    names = [f"a {thing.size + ' ' if sized else ''}{thing.colour} {thing.shape}" for thing in things]
    frame = rng.choice(FRAMES[kind]).replace("@", scene.background)
    if kind == "relation":
        (one, a), (other, b), *rest = zip(things, names, strict=True)
        relation = rng.choice([relation for relation in OPPOSITE if holds(one, relation, other)])
        to_the = "to the " if relation.endswith("of") and rng.random() < 0.3 else ""
        text = rng.choice(("{0} {1} {2}", "{1} {2} {0}")).format(a, to_the + relation, b)
        for _, third in rest:  # a comma before it, so that it takes no part in the relation
            text += rng.choice((", and ", ", with ")) + third
        return _articles(frame.format(text) + behind)
    if placed:
        short = kind != "positions" or len(things) == 3 or rng.random() < 0.25  # three long ones make 22 words
        before = rng.random() < 0.5
        for i, place in enumerate(thing.position for thing in things):
            place = place if short else f"{'in' if place == 'middle' else 'at'} the {place}"
            names[i] = f"{place} {names[i]}" if before else f"{names[i]} {place}"
    return _articles(frame.format(" and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)) + behind)


def write_captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five different true captions in random order: one plain, one telling every position, one with the background, one
    with a relation where there are two things or more (else with the size), and one more of some of these kinds."""
    many = len(scene.things) > 1
    more = ["size", "positions", "background"] if many else ["positions", "background"]
    kinds = ["plain", "positions", "background", "relation" if many else "size", rng.choice(more)]
    captions: list[str] = []
    for kind in rng.sample(kinds, len(kinds)):
        caption = write_caption(scene, kind, rng)
        while caption in captions:
            caption = write_caption(scene, kind, rng)
        captions.append(caption)
    return captions


def keywords(scene: Scene, rng: random.Random) -> str:
    """A text without grammar, like the tags below a photograph: words of one thing between commas, in any order."""
    groups = [[scene.background]]
    for thing in scene.things:
        words = [thing.colour, thing.shape] + [thing.size] * (rng.random() < 0.7)
        groups.append(rng.sample(words, len(words)) + [thing.position] * (rng.random() < 0.85))
    return ", ".join(" ".join(group) for group in rng.sample(groups, len(groups)))


def write_texts(count: int, seed: int) -> list[list[str]]:
    """Five captions and a list of keywords of each of `count` scenes: what a language model may read.

    The scenes' pictures are thrown away. Every colour occurs with every shape here, as in any large corpus; only the
    captioned pictures lack some pairs.
    """
    scenes = draw_scenes(count, f"{seed} text")
    return [write_captions(scene, rng) + [keywords(scene, rng)] for rng, _, scene in scenes]


@dataclass
class Parsed:
    """What a caption claims; a claim points to its thing by index into `things`, None where it names none."""

    things: list[tuple[str | None, str | None]] = field(default_factory=list)
    sizes: list[tuple[int, str]] = field(default_factory=list)
    positions: list[tuple[int | None, str]] = field(default_factory=list)
    relations: list[tuple[int | None, str, int | None]] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)


def parse(caption: str) -> Parsed:
    """Read what a caption claims, be it by a model that has learned the grammar badly: other words are passed over."""
    words = re.findall(r"[a-z]+|[,.;]", caption.lower()) + ["", ""]  # nothing follows the last word
    parsed, clauses, at = Parsed(), [[]], 0
    while words[at]:
        word, after, step = words[at], words[at + 1], 1
        if after == "background" and word in BACKGROUNDS | COLOURS:
            parsed.backgrounds.append(word)
        elif word in COLOURS or word in SHAPES:
            colour, shape = word if word in COLOURS else None, next((w for w in (word, after) if w in SHAPES), None)
            if at and words[at - 1] in SIZES:
                parsed.sizes.append((len(parsed.things), words[at - 1]))
            clauses[-1].append(("thing", len(parsed.things)))
            parsed.things.append((colour, shape))
            step += bool(colour and shape)
        elif word in OPPOSITE or f"{word} {after}" in OPPOSITE:
            clauses[-1].append(("relation", word if word in OPPOSITE else f"{word} {after}"))
        elif word in ("top", "middle", "bottom", "left", "right"):
            while words[at + step] in ("left", "middle", "right") and words[at + step + 1] != "of":
                step += 1
            clauses[-1].append(("position", position_phrase(words[at : at + step])))
        elif word in (",", ".", ";", "and", "with"):
            clauses.append([])
        at += step
    last = None  # the last thing of earlier clauses: "a red circle, at the top"
    for clause in clauses:
        for k, (kind, value) in enumerate(clause):
            before = [index for name, index in clause[:k] if name == "thing"]
            after = [index for name, index in clause[k + 1 :] if name == "thing"]
            if kind == "position":  # "at the top is a red circle" or "a red circle at the top"
                owners = before[-1:] or after[:1] if clause[0][0] == "thing" else after[:1] or before[-1:]
                parsed.positions.append((owners[0] if owners else last, value))
            elif kind == "relation":  # "a red circle above a blue star" or "above a blue star is a red circle"
                one, other = (before[-1:] if before else after[1:2]), after[:1]
                parsed.relations.append((one[0] if one else None, value, other[0] if other else None))
        last = next((value for kind, value in reversed(clause) if kind == "thing"), last)
    return parsed


def judge(caption: str, scene: Scene) -> dict[str, bool | None]:
    """Judge the claims of a caption: `things` is True when it names exactly the scene's pairs of colour and shape;
    `positions`, `relations`, `background` and `size` are None without such a claim, else True when all are true."""
    claims, truth = parse(caption), {(thing.colour, thing.shape): thing for thing in scene.things}
    meant = {None: None} | {index: truth.get(pair) for index, pair in enumerate(claims.things)}
    verdicts = {
        "positions": [bool(meant[i]) and meant[i].position == position for i, position in claims.positions],
        "relations": [bool(meant[i] and meant[j]) and holds(meant[i], r, meant[j]) for i, r, j in claims.relations],
        "background": [background == scene.background for background in claims.backgrounds],
        "size": [bool(meant[i]) and meant[i].size == size for i, size in claims.sizes],
    }
    things = Counter(claims.things) == Counter(truth.keys())
    return {"things": things} | {name: all(answers) if answers else None for name, answers in verdicts.items()}


def swap_colours(caption: str) -> str | None:
    """A binding foil: two things trade colours and a true caption becomes false; None where no two differ in both.
    A foil with a held-out pair or one pair twice is the last choice: its novelty alone could give it away."""
    found = list(re.finditer(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", caption))
    foils = []
    for j, two in enumerate(found):
        for one in (one for one in found[:j] if one[1] != two[1] and one[2] != two[2]):
            foil = caption[: one.start()] + two[1] + caption[one.end(1) : two.start()] + one[1] + caption[two.end(1) :]
            pairs = parse(foil).things
            novelty = sum(pair in HELD_OUT for pair in pairs) + len(pairs) - len(set(pairs))
            foils.append((novelty, len(foils), _articles(foil)))
    return min(foils)[2] if foils else None


def flip_relation(caption: str) -> str | None:
    """A relation foil: every "left of" becomes "right of", "above" "below" and so on; None without a relation."""
    foil = re.sub(r"\b(left of|right of|above|below)\b", lambda found: OPPOSITE[found[1]], caption)
    return foil if foil != caption else None

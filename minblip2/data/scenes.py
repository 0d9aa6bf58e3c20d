"""The embedded data set: drawn scenes with captions and boxes in COCO layout, and a judge of what is true of them.

A scene is 64 x 64 pixels with one to three things on a loose 3 x 3 grid. No two things of a scene share both colour
and shape, so "a red circle" always names one thing. Eight colour-shape pairs never occur in train: a model that
captions them right has learned colours and shapes, not pairs. Captions come from a small grammar, so `judge` can say
exactly what is true.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from .. import UserError

VERSION = 3  # raise it when a drawing or a caption changes: folders of another version are written anew
SIDE, FINE = 64, 4  # pixels; shapes are drawn FINE times larger and averaged down, which smooths their edges
COLOURS = {
    "red": (214, 30, 36), "orange": (255, 138, 0), "yellow": (255, 232, 30), "green": (22, 150, 50),
    "cyan": (40, 222, 232), "blue": (32, 62, 230), "purple": (138, 34, 178), "pink": (255, 138, 204),
}  # fmt: skip
BACKGROUNDS = {"black": (10, 10, 10), "grey": (128, 128, 128), "white": (248, 248, 248), "brown": (84, 56, 34)}
SIZES = {"small": 6.4, "large": 9.5}  # radius in pixels
OUTLINES = {  # corners in units of the radius; turned by a little, they stay within one radius on both axes
    "circle": None,
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (0.92, 0.8), (-0.92, 0.8)],
    "star": [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate((1, 0.46) * 5)],
    "cross": [(-0.33, -0.95), (0.33, -0.95), (0.33, -0.33), (0.95, -0.33), (0.95, 0.33), (0.33, 0.33),
              (0.33, 0.95), (-0.33, 0.95), (-0.33, 0.33), (-0.95, 0.33), (-0.95, -0.33), (-0.33, -0.33)],
    "ring": None,
}  # fmt: skip
SHAPES = tuple(OUTLINES)
HELD_OUT = tuple((colour, SHAPES[(i + 3) % len(SHAPES)]) for i, colour in enumerate(COLOURS))
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("test", "val", "train")  # in this order: train must give way where a scene would occur twice
FRAMES = {  # how a caption opens tells what it will say: a prompt can ask for one kind
    "plain": ("a picture of {}",), "positions": ("this picture shows {}",), "size": ("there is {}",),
    "relation": ("we see {}",), "background": ("on a @ background there is {}", "a @ background with {}"),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One drawn thing; `box` is (x, y, width, height) in pixels, the smallest that holds all its pixels."""

    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column (0, 1 or 2) of the box's centre."""
        x, y, width, height = self.box
        return int((y + height / 2) * 3 / SIDE), int((x + width / 2) * 3 / SIDE)

    @property
    def position(self) -> str:
        """One of nine phrases: "top left", "top middle", ..., "middle", ..., "bottom right"."""
        return _position([("top", "middle", "bottom")[self.cell[0]], ("left", "middle", "right")[self.cell[1]]])


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    things: tuple[Thing, ...]
    background: str

    @property
    def unseen(self) -> bool:
        """True when it holds a colour-shape pair that train never shows."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


@dataclass
class Parsed:
    """What a caption claims; a claim points to its thing by index into `things`, None where it names none."""

    things: list[tuple[str | None, str | None]] = field(default_factory=list)
    sizes: list[tuple[int, str]] = field(default_factory=list)
    positions: list[tuple[int | None, str]] = field(default_factory=list)
    relations: list[tuple[int | None, str, int | None]] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)


def _mask(shape: str, x: float, y: float, radius: float, angle: float) -> Image.Image:
    """How much of each pixel one shape covers, 0 to 255."""
    fine = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen, outline = ImageDraw.Draw(fine), OUTLINES[shape]
    if outline is None:
        for r, fill in ((radius, 255), (0.52 * radius, 0 if shape == "ring" else 255)):
            pen.ellipse([FINE * (x - r), FINE * (y - r), FINE * (x + r), FINE * (y + r)], fill=fill)
    else:
        sine, cosine = math.sin(angle) * radius, math.cos(angle) * radius
        corners = [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in outline]
        pen.polygon([(FINE * a, FINE * b) for a, b in corners], fill=255)
    # Pixels too faint to be seen are left out: a box must hold exactly what differs from the background.
    return fine.reduce(FINE).point(lambda coverage: coverage if coverage >= 32 else 0)


def draw(rng: random.Random, unseen: bool = False) -> tuple[Image.Image, Scene]:
    """Draw one random scene, RGB, 64 x 64; with `unseen` at least one of its pairs is held out of train, else none."""
    count = rng.choices((1, 2, 3), weights=(1, 2, 2))[0]
    pairs = rng.sample(SEEN, count)
    if unseen:
        first = rng.choice(HELD_OUT)
        pairs = [first, *rng.sample([pair for pair in SEEN + HELD_OUT if pair != first], count - 1)]
    sizes, cells = rng.choices(list(SIZES), k=count), rng.sample(range(9), count)
    apart = False
    while not apart:  # shake every thing by up to 3 pixels, again until all stand apart
        centres = []
        for size, cell in zip(sizes, cells, strict=True):
            place = [(part + 0.5) * SIDE / 3 + rng.uniform(-3, 3) for part in (cell % 3, cell // 3)]
            centres.append([min(max(value, SIZES[size] + 1), SIDE - 1 - SIZES[size]) for value in place])
        apart = all(
            max(abs(x - u), abs(y - v)) > SIZES[sizes[i]] + SIZES[sizes[j]] + 1.5
            for i, (x, y) in enumerate(centres)
            for j, (u, v) in enumerate(centres[:i])
        )
    background = rng.choice(list(BACKGROUNDS))
    image, things = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background]), []
    for (colour, shape), size, (x, y) in zip(pairs, sizes, centres, strict=True):
        mask = _mask(shape, x, y, SIZES[size], rng.uniform(-0.15, 0.15))
        image.paste(tuple(min(max(value + rng.randint(-10, 10), 0), 255) for value in COLOURS[colour]), mask=mask)
        left, top, right, bottom = mask.getbbox()
        things.append(Thing(colour, shape, size, (left, top, right - left, bottom - top)))
    return image, Scene(tuple(things), background)


def draw_scenes(count: int, name: str) -> Iterator[tuple[random.Random, Image.Image, Scene]]:
    """`count` scenes in which every colour may occur with every shape, each with the random numbers that drew it."""
    for index in range(count):
        rng = random.Random(f"{name} {index}")
        yield rng, *draw(rng, unseen=rng.random() < 0.3)


def _articles(text: str) -> str:
    return re.sub(r"\ban? (?=(\w))", lambda found: "an " if found[1] in "aeiou" else "a ", text)


def phrase(colour: str, shape: str) -> str:
    """What captions call a thing: "a red circle", "an orange square"."""
    return _articles(f"a {colour} {shape}")


def _position(words: list[str]) -> str:
    """The phrase for a few of its words: "middle" where row or column is not told, and "middle" once for the centre."""
    row = next((word for word in words if word in ("top", "bottom")), "middle")
    column = next((word for word in words if word in ("left", "right")), "middle")
    return row if row == column else f"{row} {column}"


def _holds(one: Thing, relation: str, other: Thing) -> bool:
    """Relations compare cells of the grid, not pixels: no caption hangs on a shake of three pixels."""
    down, right = (a - b for a, b in zip(one.cell, other.cell, strict=True))
    return {"left of": right < 0, "right of": right > 0, "above": down < 0, "below": down > 0}[relation]


def _caption(scene: Scene, kind: str, rng: random.Random) -> str:
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
        relation = rng.choice([relation for relation in OPPOSITE if _holds(one, relation, other)])
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
        caption = _caption(scene, kind, rng)
        while caption in captions:
            caption = _caption(scene, kind, rng)
        captions.append(caption)
    return captions


def _keywords(scene: Scene, rng: random.Random) -> str:
    """A text without grammar, like the tags below a photograph: words of one thing between commas, in any order."""
    groups = [[scene.background]]
    for thing in scene.things:
        words = [thing.colour, thing.shape] + [thing.size] * (rng.random() < 0.5)
        groups.append(rng.sample(words, len(words)) + [thing.position] * (rng.random() < 0.8))
    return ", ".join(" ".join(group) for group in rng.sample(groups, len(groups)))


def write_texts(count: int, seed: int) -> list[list[str]]:
    """Five captions and a list of keywords of each of `count` scenes that nobody draws: what a language model may read.

    Every colour occurs with every shape here, as in any large corpus; only the captioned pictures lack some pairs.
    """
    undrawn = draw_scenes(count, f"{seed} text")
    return [write_captions(scene, rng) + [_keywords(scene, rng)] for rng, _, scene in undrawn]


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
            clauses[-1].append(("position", _position(words[at : at + step])))
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
        "relations": [bool(meant[i] and meant[j]) and _holds(meant[i], r, meant[j]) for i, r, j in claims.relations],
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


def write_scenes(
    folder: str | Path, train: int = 6000, val: int = 500, test: int = 500, seed: int = 0, progress: bool = True
) -> None:
    """Write images/ and annotations/{captions,instances}_{split}.json unless they are there already; in val and test
    every second image holds a held-out pair. Raises UserError for a size below 1 or a folder with other files in it."""
    folder, sizes = Path(folder).resolve(), {"train": train, "val": val, "test": test}
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"The split {split!r} was asked to hold {size} images; give 1 or more.")
    settings = {"version": VERSION, **sizes, "seed": seed}
    if _complete(folder, settings):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = "scenes.json" in names and names <= {"images", "annotations", "scenes.json"}
    if folder.is_file() or (names and not ours):
        raise UserError(f"{folder} holds files that are not drawn scenes, so nothing was written; name another folder.")
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)  # what an interrupted run left
    (beside / "images").mkdir(parents=True)
    (beside / "annotations").mkdir()
    known: set[tuple] = set()
    with tqdm(total=sum(sizes.values()), desc="drawing scenes", unit="image", disable=not progress) as bar:
        for split in SPLITS:
            _write_split(beside, split, sizes[split], seed, known, bar)
    (beside / "scenes.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def _write_split(folder: Path, split: str, size: int, seed: int, known: set[tuple], bar: tqdm) -> None:
    """Draw one split; `known` holds the scenes of all splits so far, none of which is drawn again."""
    images, captions, boxes = [], [], []
    for index in range(size):
        rng, key = random.Random(f"{seed} {split} {index}"), None
        while key is None or key in known:
            image, scene = draw(rng, unseen=split != "train" and index % 2 == 1)
            things = frozenset((thing.colour, thing.shape, thing.size, thing.cell) for thing in scene.things)
            key = (scene.background, things)
        known.add(key)
        name, image_id = f"{split}_{index:06d}.png", SPLITS.index(split) * 10_000_000 + index
        image.save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE} |
                      {"unseen": scene.unseen, "background": scene.background})  # fmt: skip
        for k, caption in enumerate(write_captions(scene, rng)):
            captions.append({"id": image_id * 5 + k, "image_id": image_id, "caption": caption})
        for k, thing in enumerate(scene.things):
            coco = {"id": image_id * 3 + k, "image_id": image_id, "category_id": SHAPES.index(thing.shape) + 1,
                    "bbox": list(thing.box), "area": thing.box[2] * thing.box[3], "iscrowd": 0}  # fmt: skip
            more = {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "position": thing.position}
            boxes.append(coco | more)
        bar.update()
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    contents = {"captions": {"annotations": captions}, "instances": {"annotations": boxes, "categories": categories}}
    for kind, content in contents.items():
        path = folder / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps({"images": images, **content}), encoding="utf-8")


def _complete(folder: Path, settings: dict) -> bool:
    try:
        same = json.loads((folder / "scenes.json").read_text(encoding="utf-8")) == settings
        present = {path.name for part in ("images", "annotations") for path in (folder / part).iterdir()}
    except (OSError, ValueError):
        return False
    wanted = {f"{split}_{index:06d}.png" for split in SPLITS for index in range(settings[split])}
    wanted |= {f"{kind}_{split}.json" for kind in ("captions", "instances") for split in SPLITS}
    return same and present >= wanted


def load_scenes(folder: str | Path, split: str) -> list[Scene]:
    """The truth about a split, in the order of its captions file's images. Raises UserError when it cannot be read."""
    try:
        paths = [Path(folder) / "annotations" / f"{kind}_{split}.json" for kind in ("captions", "instances")]
        captions, instances = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        things: dict[int, list[Thing]] = {}
        for box in instances["annotations"]:
            thing = Thing(box["colour"], box["shape"], box["size"], tuple(box["bbox"]))
            things.setdefault(box["image_id"], []).append(thing)
        return [Scene(tuple(things[image["id"]]), image["background"]) for image in captions["images"]]
    except (OSError, ValueError, KeyError) as error:
        message = f"No drawn scenes of the split {split!r} can be read in {folder} ({error!r})"
        raise UserError(f"{message}; write them with write_scenes.") from error

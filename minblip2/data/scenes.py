"""The world of the embedded data set: drawn scenes, and what is true of each.

A scene is 64 x 64 pixels with one to three things on a loose 3 x 3 grid. No two things of a scene share both colour
and shape, so "a red circle" always names one thing. Eight colour-shape pairs never occur in train: a model that
captions them right has learned colours and shapes, not pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

VERSION = 3  # raise it when a drawing or a caption changes: folders of another version are written anew
SIDE, FINE = 64, 4  # pixels; shapes are drawn FINE times larger and averaged down, which smooths their edges
COLOURS = {
    "red": (214, 30, 36), "orange": (255, 138, 0), "yellow": (255, 232, 30), "green": (22, 150, 50),
    "cyan": (40, 222, 232), "blue": (32, 62, 230), "purple": (138, 34, 178), "pink": (255, 138, 204),
}  # fmt: skip
BACKGROUNDS = {"black": (10, 10, 10), "grey": (128, 128, 128), "white": (248, 248, 248), "brown": (84, 56, 34)}
SIZES = {"small": 6.4, "large": 9.5}  # radius in pixels
HOLE = 0.52  # of a ring: the inner radius, as a share of the outer one
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
UNSEEN = 0.3  # the share of scenes with a held-out pair in what the frozen experts learn from
SEEN = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)


def position_phrase(words: list[str]) -> str:
    """The phrase for a few of its words: "middle" where row or column is not told, and "middle" once for the centre."""
    row = next((word for word in words if word in ("top", "bottom")), "middle")
    column = next((word for word in words if word in ("left", "right")), "middle")
    return row if row == column else f"{row} {column}"


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
        return position_phrase([("top", "middle", "bottom")[self.cell[0]], ("left", "middle", "right")[self.cell[1]]])


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    things: tuple[Thing, ...]
    background: str

    @property
    def unseen(self) -> bool:
        """True when it holds a colour-shape pair that train never shows."""
        return any((thing.colour, thing.shape) in HELD_OUT for thing in self.things)


def _mask(shape: str, x: float, y: float, radius: float, angle: float) -> Image.Image:
    """How much of each pixel one shape covers, 0 to 255."""
    fine = Image.new("L", (SIDE * FINE, SIDE * FINE))
    pen, outline = ImageDraw.Draw(fine), OUTLINES[shape]
    if outline is None:
        for r, fill in ((radius, 255), (HOLE * radius, 0 if shape == "ring" else 255)):
            pen.ellipse([FINE * (x - r), FINE * (y - r), FINE * (x + r), FINE * (y + r)], fill=fill)
    else:
        sine, cosine = math.sin(angle) * radius, math.cos(angle) * radius
        corners = [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in outline]
        pen.polygon([(FINE * a, FINE * b) for a, b in corners], fill=255)
    # Pixels too faint to be seen are left out: a box must hold exactly what differs from the background.
    return fine.reduce(FINE).point(lambda coverage: coverage if coverage >= 32 else 0)


Placed = tuple[str, str, str, float, float]  # colour, shape, size, and where the centre is: x, y in pixels


def arrange(rng: random.Random, unseen: bool = False) -> tuple[list[Placed], str]:
    """The things and the background of one random scene; with `unseen` at least one pair is held out of train, else
    none."""
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
    placed = [(*pair, size, *centre) for pair, size, centre in zip(pairs, sizes, centres, strict=True)]
    return placed, rng.choice(list(BACKGROUNDS))


def draw(rng: random.Random, unseen: bool = False) -> tuple[Image.Image, Scene]:
    """Draw one random scene, RGB, 64 x 64; `unseen` as in `arrange`."""
    placed, background = arrange(rng, unseen)
    image, things = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background]), []
    for colour, shape, size, x, y in placed:
        mask = _mask(shape, x, y, SIZES[size], rng.uniform(-0.15, 0.15))
        image.paste(tuple(min(max(value + rng.randint(-10, 10), 0), 255) for value in COLOURS[colour]), mask=mask)
        left, top, right, bottom = mask.getbbox()
        things.append(Thing(colour, shape, size, (left, top, right - left, bottom - top)))
    return image, Scene(tuple(things), background)


def imagine(rng: random.Random) -> Scene:
    """A random scene that nobody draws, every colour with every shape; boxes are about those of a drawing."""
    placed, background = arrange(rng, unseen=rng.random() < UNSEEN)
    things = []
    for colour, shape, size, x, y in placed:
        box = round(x - SIZES[size]), round(y - SIZES[size]), round(2 * SIZES[size]), round(2 * SIZES[size])
        things.append(Thing(colour, shape, size, box))
    return Scene(tuple(things), background)


def draw_scenes(count: int, name: str) -> Iterator[tuple[random.Random, Image.Image, Scene]]:
    """`count` scenes in which every colour may occur with every shape, each with the random numbers that drew it."""
    for index in range(count):
        rng = random.Random(f"{name} {index}")
        yield rng, *draw(rng, unseen=rng.random() < UNSEEN)

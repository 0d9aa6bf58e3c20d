"""Checks of lesson 13: where a token lies, the gradient-weighted map, the pointing game, and a map that lies."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor

# --- where a token lies -----------------------------------------------------------------------------------------------

Place = Callable[[int, int, int, bool], tuple[int, int] | None]
PLACE_SLIPS: dict[str, Place] = {
    "row and column are exchanged.": lambda token, rows, columns, first: divmod(token - first, columns)[::-1],
    "you divide by the number of rows: how many patches are in one row?":
        lambda token, rows, columns, first: divmod(token - first, rows),
    "the class token is not taken off: all patches have moved on by one.":
        lambda token, rows, columns, first: divmod(token, columns),
    "there is no class token here, and one was taken off.": lambda token, rows, columns, first: divmod(
        token - 1, columns),
    "you count rows and columns from 1; asked for is from 0.":
        lambda token, rows, columns, first: tuple(one + 1 for one in divmod(token - first, columns)),
    "patches are counted row by row, as one reads, and not down the columns.":
        lambda token, rows, columns, first: ((token - first) % rows, (token - first) // rows),
}


@exercise("13.1", "lesson 13, section 1")
def place_of(place: Place) -> None:
    """The row and column of a token's patch."""
    for rows, columns in ((4, 4), (3, 5), (6, 2), (1, 7), (random.randint(2, 9), random.randint(10, 16))):
        for class_token in (True, False):
            tokens = range(rows * columns + class_token)
            output = {token: place(token, rows, columns, class_token) for token in tokens}
            at = f"on a grid of {rows} × {columns}, {'with' if class_token else 'without'} a class token: "
            if class_token:
                expect(output.pop(0) is None, at + "the class token comes first and lies nowhere: its answer is None.")
            for token, found in output.items():
                expect(isinstance(found, tuple | list) and len(found) == 2,
                       f"{at}for token {token} your function gives {found!r}; asked for are a row and a column.")
            right = {token: divmod(token - class_token, columns) for token in output}
            said = {token: tuple(int(one) for one in found) for token, found in output.items()}
            if said == right:
                continue
            for meaning, slip in PLACE_SLIPS.items():
                expect(any(found != slip(token, rows, columns, class_token) for token, found in said.items()),
                       at + meaning)
            token = next(token for token in said if said[token] != right[token])
            expect(False, f"{at}token {token} is not at {said[token]}.")


# --- a map weighted by gradients --------------------------------------------------------------------------------------

MAP_SLIPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of one layer's attention and gradient (b h q v)
    "negative derivatives count as well: kept is what speaks for the phrase only.": lambda a, g: (a * g).sum((1, 2)),
    "the size of the derivative counts, whatever its sign: kept is what speaks for the phrase only.":
        lambda a, g: (a * g.abs()).sum((1, 2)),
    "that is the plain attention: the derivative takes no part.": lambda a, g: a.sum((1, 2)),
    "that is the positive derivative alone: what would more attention do, not what does the attention that is there.":
        lambda a, g: g.relu().sum((1, 2)),
    "you sum first and keep the positive part then: where heads disagree, one deletes the other.":
        lambda a, g: (a * g).sum((1, 2)).relu(),
    "over heads or queries the mean is taken; asked for is the sum.": lambda a, g: (a * g.relu()).mean((1, 2)),
    "over heads the mean is taken; asked for is the sum.": lambda a, g: (a * g.relu()).mean(1).sum(1),
    "over queries the mean is taken; asked for is the sum.": lambda a, g: (a * g.relu()).sum(1).mean(1),
    "you keep what speaks against the phrase.": lambda a, g: (a * (-g).relu()).sum((1, 2)),
}


@exercise("13.2", "lesson 13, section 2")
def weighted_map(map_of: Callable[[list[Tensor], Tensor], Tensor]) -> None:
    """Attention times positive derivative, summed over layers, heads and queries."""
    for layers, b, h, q, v in ((1, 3, 2, 3, 5), (4, 2, 3, 2, 7), (3, 1, 1, 4, 6)):
        inputs = [torch.randn(b, h, q, v, requires_grad=True) for _ in range(layers)]
        attention = [some.softmax(dim=3) for some in inputs]
        lines, bends = ([torch.randn(b, h, q, v) for _ in range(layers)] for _ in range(2))
        score = sum((line * a + bend * a.square()).flatten(1).sum(dim=1)
                    for line, bend, a in zip(lines, bends, attention, strict=True))
        slopes = [line + 2 * bend * a.detach() for line, bend, a in zip(lines, bends, attention, strict=True)]
        output = expect_tensor(map_of(attention, score), (b, v), "the map", "(b v)")
        fixed = [a.detach() for a in attention]
        right = torch.zeros(b, v)
        for a, slope in zip(fixed, slopes, strict=True):
            for head in range(h):
                for query in range(q):
                    right += a[:, head, query] * slope[:, head, query].clamp(min=0)
        if close(output, right):
            continue
        for meaning, make in MAP_SLIPS.items():
            parts = [make(a, slope) for a, slope in zip(fixed, slopes, strict=True)]
            expect(not close(output, sum(parts)), meaning)
        expect(layers == 1 or not close(output, right / layers), "over layers the mean is taken; asked for is the sum.")
        for number in range(layers):
            one = (fixed[number] * slopes[number].relu()).sum((1, 2))
            expect(not close(output, one), f"only reading {number + 1} of {layers} counts: the score came out of all.")
        expect(False, "the map is another than that of the loop over layers, heads and queries.")


# --- the pointing game ------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]
Points = Callable[[Tensor, Box, tuple[int, int]], bool]


def inside(row: float, column: float, grid: tuple[int, int], box: Box, size: tuple[float, float], centre: float = 0.5,
           corners: bool = False, swapped: bool = False) -> bool:
    """Whether a cell points into a box; what is given by name is a slip."""
    (rows, columns), (left, top, width, height), (wide, high) = grid, box, size
    if swapped:
        wide, high = high, wide
    x, y = (column + centre) * wide / columns, (row + centre) * high / rows
    right, bottom = (width, height) if corners else (left + width, top + height)
    return left <= x < right and top <= y < bottom


def slow_points(heat: Tensor, box: Box, size: tuple[int, int], ties: Callable = all, turned: bool = False,
                **slip) -> bool:
    """The pointing game in loops."""
    best = (heat == heat.max()).nonzero().tolist()
    places = [place[::-1] if turned else place for place in best]
    return ties([inside(*place, tuple(heat.shape), box, size, **slip) for place in places])


POINT_SLIPS: dict[str, dict] = {
    "of cells that tie, one in the box is enough for you: a constant map would win every game.": {"ties": any},
    "of cells that tie you look at the first only.": {"ties": lambda some: some[0]},
    "a cell points to its centre, not to its corner.": {"centre": 0.0},
    "the box is (x, y, width, height), not two corners.": {"corners": True},
    "image_size is (width, height): the sides are exchanged.": {"swapped": True},
    "row and column are exchanged: a row goes with y, a column with x.": {"turned": True},
}


@exercise("13.3", "lesson 13, section 3")
def points(points_of: Points) -> None:
    """Whether the maximum lies in the box."""
    said, games = [], []
    for game in range(160):
        rows, columns = random.choice(((4, 4), (3, 6), (7, 2), (5, 8)))
        size = random.choice(((40, 40), (90, 40), (32, 100)))
        heat = torch.rand(rows, columns)
        if game % 4 == 0:
            for _ in range(random.randint(1, 3)):
                heat[random.randrange(rows), random.randrange(columns)] = 2.0
        heat = torch.ones(rows, columns) if game % 20 == 1 else heat
        row, column = divmod(random.choice((heat == heat.max()).flatten().nonzero()[:, 0].tolist()), columns)
        x, y = (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows
        width, height = (random.uniform(0.2, 0.9) * side for side in size)
        box = (max(0.0, x - random.uniform(-0.3, 1.1) * width), max(0.0, y - random.uniform(-0.3, 1.1) * height), width,
               height)
        output = points_of(heat, box, size)
        expect(isinstance(output, bool | np.bool_) or (isinstance(output, Tensor) and output.numel() == 1),
               f"your function gives {type(output).__name__}; asked for is True or False.")
        said.append(bool(output))
        games.append((heat, box, size))
    right = [slow_points(*game) for game in games]
    if said == right:
        return
    for meaning, slip in POINT_SLIPS.items():
        expect(said != [slow_points(*game, **slip) for game in games], meaning)
    number = next(number for number in range(len(said)) if said[number] != right[number])
    heat, box, size = games[number]
    best = (heat == heat.max()).nonzero().tolist()
    expect(False, f"a map {tuple(heat.shape)} with its maximum at [row, column] {best[:4]} on an image of {size} and "
           f"the box {tuple(round(one, 1) for one in box)} gets {said[number]} from you. Where do these cells point?")


# --- a map drawn the wrong way ----------------------------------------------------------------------------------------


@exercise("13.4", "lesson 13, sections 1 and 7")
def enlarge(enlarge_of: Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor]) -> None:
    """A row of weights as a map as large as the picture."""
    for gh, gw, patch in ((3, 5, 2), (4, 4, 3), (6, 2, 4), (1, 3, 2)):
        weights = torch.rand(gh * gw)
        given, size = weights.clone(), (gw * patch, gh * patch)
        output = enlarge_of(weights, (gh, gw), size)
        expect(torch.equal(weights, given), "your function changed the weights that it was given.")
        expect(not isinstance(output, Tensor) or gh == gw or tuple(output.shape) != size,
               "the map is lying on its side: a picture's tensor has rows first, so its height comes first.")
        expect_tensor(output, (gh * patch, gw * patch), "the map", "(height width)")
        right = torch.tensor([[weights[y // patch * gw + x // patch].item() for x in range(gw * patch)]
                              for y in range(gh * patch)])
        if close(output, right):
            continue
        expect(gh != gw or not close(output, right.T), "rows and columns are exchanged: token 1 lies right of token 0, "
               "not below it.")
        expect(set(output.flatten().tolist()) <= set(weights.tolist()),
               "there are values between those of the patches: "
               "each pixel is to have the weight of its own patch.")
        wrong = weights.reshape(gw, gh).T.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        expect(not close(output, wrong), "rows and columns are exchanged: token 1 lies right of token 0, not below it.")
        expect(not close(output, right.flip(0)), "the picture stands on its head: row 0 is the top one.")
        tiles = weights.reshape(gh, gw).repeat(patch, patch)
        expect(not close(output, tiles), "the small map is repeated as tiles; each of its cells is to grow.")
        expect(False, f"on a grid of {gh} rows and {gw} columns pixels have weights of other patches than their own.")

"""Checks of lesson 13: where a token lies, the gradient-weighted map, the pointing game, and a map that lies."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import close, exercise, expect, expect_tensor
from .slips import agree, name_slip, short, telling, whole

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
    "you count rows and columns from 1; they are counted from 0.":
        lambda token, rows, columns, first: tuple(one + 1 for one in divmod(token - first, columns)),
    "patches are counted row by row, as one reads, and not down the columns.":
        lambda token, rows, columns, first: ((token - first) % rows, (token - first) // rows),
    "rows are counted from the bottom; the top left is (0, 0).":
        lambda token, rows, columns, first: (rows - 1 - (token - first) // columns, (token - first) % columns),
    "the grid is taken for a square one: its rows and columns are given.":
        lambda token, rows, columns, first: divmod(token - first, max(1, round((rows * columns) ** 0.5))),
}


@exercise("13.1", "lesson 13, section 1")
def place_of(place: Place) -> None:
    """The row and column of a token's patch."""
    draws, answers = [], []
    for rows, columns in ((4, 4), (3, 5), (6, 2), (1, 7), (5, 1), (random.randint(2, 9), random.randint(10, 16))):
        for class_token in (True, False):
            at = f"on a grid of {rows} × {columns}, {'with' if class_token else 'without'} a class token: "
            for token in range(rows * columns + class_token):
                found = place(token, rows, columns, class_token)
                if class_token and token == 0:
                    expect(found is None, f"{at}the class token comes first and lies nowhere: its answer is None.")
                    continue
                if isinstance(found, Tensor | np.ndarray) and found.ndim == 1:
                    found = found.tolist()
                expect(isinstance(found, tuple | list) and len(found) == 2,
                       f"{at}for token {token} your function gives {found!r}; the exercise asks for a row and a "
                       "column.")
                answers.append(tuple(whole(one, f"{at}the {what} of token {token}")
                                     for one, what in zip(found, ("row", "column"), strict=True)))
                draws.append((token, rows, columns, class_token))
    right = [divmod(token - first, columns) for token, _, columns, first in draws]
    if answers == right:
        return
    (token, rows, columns, first), found = next(
        (draw, one) for draw, one, truth in zip(draws, answers, right, strict=True) if one != truth)
    at = f"on a grid of {rows} × {columns}, {'with' if first else 'without'} a class token: "
    name_slip({at + meaning: slip for meaning, slip in PLACE_SLIPS.items()}, draws, answers, right)
    expect(False, f"{at}token {token} is not at {found}: how many patches stand before it, and how many of them fill "
           "whole rows?")


# --- a map weighted by gradients --------------------------------------------------------------------------------------

Readings = list[tuple[Tensor, Tensor]]  # attention and slope (b h q v) of each reading


def summed(make: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Readings, Tensor], Tensor]:
    """A slip from what it makes of one reading."""
    return lambda readings, _: sum(make(a, g) for a, g in readings)


def gained(a: Tensor, g: Tensor) -> Tensor:
    """What is asked for, of one reading."""
    return (a * g.relu()).sum((1, 2))


def slow_map(readings: Readings, score: Tensor) -> Tensor:
    """What is asked for, in loops."""
    made = torch.zeros(readings[0][0].shape[0], readings[0][0].shape[3])
    for a, g in readings:
        for head in range(a.shape[1]):
            for query in range(a.shape[2]):
                made += a[:, head, query] * g[:, head, query].clamp(min=0)
    return made


MAP_SLIPS: dict[str, Callable[[Readings, Tensor], Tensor]] = {
    "negative derivatives count as well: only what speaks for the phrase should be kept.": summed(
        lambda a, g: (a * g).sum((1, 2))),
    "the size of the derivative counts, whatever its sign: only what speaks for the phrase should be kept.": summed(
        lambda a, g: (a * g.abs()).sum((1, 2))),
    "that is the plain attention: the derivative takes no part.": summed(lambda a, g: a.sum((1, 2))),
    "that is the positive derivative alone: it says what more attention would do, not what the attention that is there "
    "does.":
        summed(lambda a, g: g.relu().sum((1, 2))),
    "that is the derivative alone, and the attention takes no part.": summed(lambda a, g: g.sum((1, 2))),
    "you sum first and keep the positive part then: where heads disagree, one cancels the other.": summed(
        lambda a, g: (a * g).sum((1, 2)).relu()),
    "you sum over queries first and keep the positive part then: where queries disagree, one cancels the other.":
        summed(lambda a, g: (a * g).sum(2).relu().sum(1)),
    "you sum over heads first and keep the positive part then: where heads disagree, one cancels the other.": summed(
        lambda a, g: (a * g).sum(1).relu().sum(1)),
    "you sum all readings first and keep the positive part then: where readings disagree, one cancels the other.":
        lambda readings, _: sum((a * g).sum((1, 2)) for a, g in readings).relu(),
    "over heads and queries the mean is taken; the exercise asks for the sum.": summed(lambda a, g: gained(a, g) / (
        a.shape[1] * a.shape[2])),
    "over heads the mean is taken; the exercise asks for the sum.": summed(lambda a, g: gained(a, g) / a.shape[1]),
    "over queries the mean is taken; the exercise asks for the sum.": summed(lambda a, g: gained(a, g) / a.shape[2]),
    "over layers the mean is taken; the exercise asks for the sum.":
        lambda readings, _: sum(gained(a, g) for a, g in readings) / len(readings),
    "over heads the largest is taken; the exercise asks for the "
    "sum.": summed(lambda a, g: (a * g.relu()).amax(1).sum(1)),
    "over queries the largest is taken; the exercise asks for the "
    "sum.": summed(lambda a, g: (a * g.relu()).amax(2).sum(1)),
    "you keep what speaks against the phrase.": summed(lambda a, g: (a * (-g).relu()).sum((1, 2))),
    "the derivative is that of the mean of the scores: each example then has its own divided by the batch.":
        lambda readings, _: sum(gained(a, g) for a, g in readings) / len(readings[0][0]),
    "the derivative is that of the first score alone: the other examples have none.": lambda readings, _: torch.cat(
        [sum(gained(a, g) for a, g in readings)[:1], torch.zeros(len(readings[0][0]) - 1, readings[0][0].shape[3])]),
    "only the last reading counts: the score came out of all.": lambda readings, _: gained(*readings[-1]),
    "only the first reading counts: the score came out of all.": lambda readings, _: gained(*readings[0]),
    "only the first head counts: all of them read.": summed(lambda a, g: (a * g.relu())[:, 0].sum(1)),
    "only the first query counts: all of them read.": summed(lambda a, g: (a * g.relu())[:, :, 0].sum(1)),
    "each reading is made to sum to one: the exercise asks for the plain sum.": summed(
        lambda a, g: gained(a, g) / gained(a, g).sum(dim=1, keepdim=True)),
    "the map is made to sum to one: the exercise asks for the plain sum.": lambda readings, _: sum(
        gained(a, g) for a, g in readings) / sum(gained(a, g) for a, g in readings).sum(dim=1, keepdim=True),
}


@exercise("13.2", "lesson 13, section 2")
def weighted_map(map_of: Callable[[list[Tensor], Tensor], Tensor]) -> None:
    """Attention times positive derivative, summed over layers, heads and queries."""
    sizes = ((1, 4, 2, 3, 5), (4, 3, 5, 2, 7), (3, 2, 3, 4, 6), (2, 1, 2, 5, 9))

    def make() -> list[tuple[Readings, Tensor]]:
        """Attention and its slopes, of a score that bends."""
        drawn = []
        for layers, b, h, q, v in sizes:
            attention = [torch.randn(b, h, q, v, requires_grad=True).softmax(dim=3) for _ in range(layers)]
            lines, bends = ([torch.randn(b, h, q, v) for _ in range(layers)] for _ in range(2))
            score = sum((line * a + bend * a.square()).flatten(1).sum(dim=1)
                        for line, bend, a in zip(lines, bends, attention, strict=True))
            slopes = [line + 2 * bend * a.detach() for line, bend, a in zip(lines, bends, attention, strict=True)]
            recorded.append(attention)
            drawn.append(([(a.detach(), slope) for a, slope in zip(attention, slopes, strict=True)], score))
        return drawn

    recorded: list[list[Tensor]] = []
    draws = telling(make, slow_map, MAP_SLIPS)
    answers, right = [], [slow_map(*draw) for draw in draws]
    for (_, b, _, _, v), attention, (_, score) in zip(sizes, recorded[-len(sizes):], draws, strict=True):
        given, kept = (list(attention), [weights.detach().clone() for weights in attention]), score.detach().clone()
        answers.append(expect_tensor(map_of(attention, score), (b, v), "the map", "(b v)").detach())
        expect(len(attention) == len(given[0]) and all(a is b and torch.equal(a, c) for a, b, c in zip(
            attention, *given, strict=True)), "your function changed the attention that it was given, or its list.")
        expect(torch.equal(score.detach(), kept), "your function changed the scores that it was given.")
    if all(map(close, answers, right)):
        return
    name_slip(MAP_SLIPS, draws, answers, right)
    for output, truth in zip(answers, right, strict=True):
        alone = [close(one, other) for one, other in zip(output, truth, strict=True)]
        expect(not any(alone) or all(alone), f"of {len(alone)} examples {sum(alone)} have the right map: whose "
               "derivative do the others get?")
    expect(False, "your map differs from that of the loop over layers, heads and queries. With one reading, one head "
           "and one query, what is it?")


# --- the pointing game ------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]
Points = Callable[[Tensor, Box, tuple[int, int]], bool]


def inside(row: float, column: float, grid: tuple[int, int], box: Box, size: tuple[float, float], centre: float = 0.5,
           corners: bool = False, swapped: bool = False, floor: bool = False) -> bool:
    """Whether a cell points into a box; what is given by name is a slip."""
    (rows, columns), (left, top, width, height), (wide, high) = grid, box, size
    if swapped:
        wide, high = high, wide
    x, y = (column + centre) * wide / columns, (row + centre) * high / rows
    if floor:
        x, y = int(x), int(y)
    right, bottom = (width, height) if corners else (left + width, top + height)
    return left <= x < right and top <= y < bottom


def slow_points(heat: Tensor, box: Box, size: tuple[int, int], ties: Callable = all, turned: bool = False,
                sign: int = 1, **slip) -> bool:
    """The pointing game in loops."""
    heat = heat * sign if sign else heat.abs()
    best = (heat == heat.max()).nonzero().tolist()
    places = [place[::-1] if turned else place for place in best]
    return bool(ties([inside(*place, tuple(heat.shape), box, size, **slip) for place in places]))


POINT_SLIPS: dict[str, dict] = {
    "of cells that tie, one in the box is enough for you: a constant map would win every game.": {"ties": any},
    "of cells that tie you look at the first only.": {"ties": lambda some: some[0]},
    "of cells that tie you look at the last only.": {"ties": lambda some: some[-1]},
    "of cells that tie, more than half in the box are enough for you: all of them point.": {
        "ties": lambda some: 2 * sum(some) > len(some)},
    "where cells tie you always say no: all of them may point into the box.": {
        "ties": lambda some: len(some) == 1 and some[0]},
    "a cell points to its centre, not to its corner.": {"centre": 0.0},
    "a cell points to its centre, not to its far corner.": {"centre": 1.0},
    "a centre may lie between two pixels; you round it.": {"floor": True},
    "the box is (x, y, width, height), not two corners.": {"corners": True},
    "image_size is (width, height): the sides are exchanged.": {"swapped": True},
    "row and column are exchanged: a row goes with y, a column with x.": {"turned": True},
    "the largest size counts, whatever the sign: the exercise asks for the maximum.": {"sign": 0},
    "you look at the minimum: the exercise asks for the maximum.": {"sign": -1},
}


def a_game(tied: int, negative: bool) -> tuple[Tensor, Box, tuple[int, int]]:
    """A map of which up to so many cells tie (all for -1), a box near one of them, and the size of the image."""
    rows, columns = random.choice(((4, 4), (3, 6), (7, 2), (5, 8)))
    size = random.choice(((40, 40), (90, 40), (32, 100)))
    heat = torch.rand(rows, columns)
    if tied < 0:
        heat = torch.ones(rows, columns)
    elif tied > 1:
        first = random.randrange(rows), random.randrange(columns)
        heat[first] = 2.0
        for _ in range(tied - 1):  # near each other, so that a box may hold them all, some, or none
            row, column = (min(most - 1, max(0, one + random.randint(-1, 1))) for one, most in
                           zip(first, (rows, columns), strict=True))
            heat[row, column] = 2.0
    heat = heat - 3.0 if negative else heat
    row, column = random.choice((heat == heat.max()).nonzero().tolist())
    x, y = (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows
    width, height = (random.uniform(0.2, 0.9) * side for side in size)
    box = (max(0.0, x - random.uniform(-0.3, 1.1) * width), max(0.0, y - random.uniform(-0.3, 1.1) * height), width,
           height)
    return heat, box, size


def between_pixels(first: bool) -> tuple[Tensor, Box, tuple[int, int]]:
    """A game whose box begins, or ends, between the cell's centre and the whole pixel before it."""
    heat, _, size = a_game(1, False)
    column = (heat == heat.max()).nonzero()[0, 1].item()
    x = (column + 0.5) * size[0] / heat.shape[1]
    if x % 1 < 0.3:
        return between_pixels(first)
    edge = int(x) + (x % 1) / 2
    return heat, (edge, 0.0, size[0] - edge, float(size[1])) if first else (0.0, 0.0, edge, float(size[1])), size


def all_but(heat: Tensor, size: tuple[int, int], whole_image: bool) -> Box:
    """A box around all cells, or around all but those of the last row."""
    return (0.0, 0.0, float(size[0]), size[1] * (1.0 if whole_image else 1 - 0.9 / heat.shape[0]))


@exercise("13.3", "lesson 13, section 3")
def points(points_of: Points) -> None:
    """Whether the maximum lies in the box."""
    while True:  # until each slip errs in several games, and no two of them in the same
        games = [a_game(tied, negative) for tied in (1, 1, 1, 2, 3, 4) for negative in (False, True) for _ in range(12)]
        for whole_image in (True, False):
            heat, _, size = a_game(-1, False)
            games.append((heat, all_but(heat, size, whole_image), size))
        games += [between_pixels(first) for first in (True, False) for _ in range(3)]
        right = [slow_points(*game) for game in games]
        slips = {meaning: [slow_points(*game, **slip) for game in games] for meaning, slip in POINT_SLIPS.items()}
        errs = [sum(one != truth for one, truth in zip(made, right, strict=True)) for made in slips.values()]
        if min(errs) >= 3 and all(one != other for one, other in itertools.combinations(slips.values(), 2)):
            break
    said = []
    for heat, box, size in games:
        given = heat.clone()
        output = points_of(heat, box, size)
        expect(torch.equal(heat, given), "your function changed the map that it was given.")
        if isinstance(output, Tensor | np.ndarray) and output.ndim == 0:
            output = output.item()
        expect(isinstance(output, bool | np.bool_), f"your function gives {short(output)}; the exercise asks for True "
               "or False.")
        said.append(bool(output))
    if said == right:
        heat = 1e-9 * torch.arange(4.0).reshape(2, 2)
        expect(bool(points_of(heat, (50.0, 50.0, 50.0, 50.0), (100, 100))), "in a map of numbers as small as 1e-9 "
               "cells tie for you that do not: only what equals the maximum does.")
        return
    for meaning, made in slips.items():
        expect(said != made, meaning)
    number = next(number for number in range(len(said)) if said[number] != right[number])
    heat, box, size = games[number]
    best = (heat == heat.max()).nonzero().tolist()
    expect(False, f"a map {tuple(heat.shape)} with its maximum at [row, column] {best[:4]} on an image of {size} and "
           f"the box {tuple(round(one, 1) for one in box)} gets {said[number]} from you. Where do these cells point?")


# --- a map drawn the wrong way ----------------------------------------------------------------------------------------


def grown(small: Tensor, high: int, wide: int) -> Tensor:
    """Each cell of a map, so high and so wide."""
    return small.repeat_interleave(high, 0).repeat_interleave(wide, 1)


Enlarged = Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor | None]


def by_cells(change: Callable[[Tensor, int, int, int, int], Tensor]) -> Enlarged:
    """A slip from change(weights, rows, columns, height and width of a cell)."""
    return lambda weights, grid, size: change(weights, *grid, size[1] // grid[0], size[0] // grid[1])


right_map = by_cells(lambda w, gh, gw, high, wide: grown(w.reshape(gh, gw), high, wide))
ENLARGE_SLIPS: dict[str, Enlarged] = {
    "rows and columns are exchanged: token 1 lies right of token 0, not below it.": by_cells(
        lambda w, gh, gw, high, wide: grown(w.reshape(gw, gh).T, high, wide)),
    "the map is upside down: row 0 is the top one.": by_cells(
        lambda w, gh, gw, high, wide: grown(w.reshape(gh, gw).flip(0), high, wide)),
    "left and right are exchanged: column 0 is the left one.": by_cells(
        lambda w, gh, gw, high, wide: grown(w.reshape(gh, gw).flip(1), high, wide)),
    "the picture is turned by half a turn: token 0 lies at the top left.": by_cells(
        lambda w, gh, gw, high, wide: grown(w.flip(0).reshape(gh, gw), high, wide)),
    "the small map is repeated as tiles; each of its cells is to grow.": by_cells(
        lambda w, gh, gw, high, wide: w.reshape(gh, gw).repeat(high, wide)),
    "each cell grows to its right and is repeated as tiles downwards: it is to grow both ways.": by_cells(
        lambda w, gh, gw, high, wide: w.reshape(gh, gw).repeat_interleave(wide, 1).repeat(high, 1)),
    "each cell grows downwards and is repeated as tiles to its right: it is to grow both ways.": by_cells(
        lambda w, gh, gw, high, wide: w.reshape(gh, gw).repeat_interleave(high, 0).repeat(1, wide)),
    "the large map is right, and then its numbers are read into another shape: its axes are to stay where they are.":
        by_cells(lambda w, gh, gw, high, wide: grown(w.reshape(gh, gw), high, wide).T.reshape(gh * high, gw * wide)),
    "the weights are made to sum to one: each pixel is to have the weight of its patch.": by_cells(
        lambda w, gh, gw, high, wide: grown(w.reshape(gh, gw) / w.sum(), high, wide)),
    "the weights are spread from 0 to 1: each pixel is to have the weight of its patch.": by_cells(
        lambda w, gh, gw, high, wide: grown(((w - w.min()) / (w.max() - w.min())).reshape(gh, gw), high, wide)),
}


@exercise("13.4", "lesson 13, sections 1 and 7")
def enlarge(enlarge_of: Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor]) -> None:
    """A row of weights as a map as large as the picture."""
    def make() -> list[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
        """Grids and cells that are square or not, and weights of both signs."""
        cells = ((3, 5, 2, 4), (4, 4, 3, 2), (6, 2, 1, 4), (1, 3, 5, 2), (2, 4, 3, 3), (4, 4, 2, 2), (5, 1, 2, 3))
        return [(torch.randn(gh * gw), (gh, gw), (gw * wide, gh * high)) for gh, gw, high, wide in cells]

    draws = telling(make, right_map, ENLARGE_SLIPS)
    answers, right = [], [right_map(*draw) for draw in draws]
    for weights, (gh, gw), size in draws:
        given = weights.clone()
        output = enlarge_of(weights, (gh, gw), size)
        at = f"on a grid of {gh} rows and {gw} columns and an image {size[0]} wide and {size[1]} high: "
        expect(torch.equal(weights, given), "your function changed the weights that it was given.")
        expect(not isinstance(output, Tensor) or size[0] == size[1] or tuple(output.shape) != size,
               f"{at}height and width of the map are exchanged: a picture's tensor has rows first, so its height comes "
               "first.")
        high, wide = size[1] // gh, size[0] // gw
        expect(not isinstance(output, Tensor) or high == wide or tuple(output.shape) != (gh * wide, gw * high),
               f"{at}your cells are {wide} high and {high} wide: how many pixels are there for each row, and how many "
               "for each column?")
        answers.append(expect_tensor(output, (size[1], size[0]), f"{at}the map", "(height width)", weights.dtype))
    if all(map(agree, answers, right)):
        return
    name_slip(ENLARGE_SLIPS, draws, answers, right)
    for (weights, (gh, gw), _), output, truth in zip(draws, answers, right, strict=True):
        if agree(output, truth):
            continue
        known = weights.double()
        strange = (output.detach().double().flatten()[:, None] - known).abs().amin(dim=1) > 1e-5
        expect(not bool(strange.any()), "there are values that no patch has, such as those between two patches: each "
               "pixel is to have the weight of its own patch.")
        y, x = ((output.detach() - truth).abs() > 1e-5).nonzero()[0].tolist()
        expect(False, f"on a grid of {gh} rows and {gw} columns pixels have weights of other patches than their own, "
               f"such as that in row {y} and column {x}: in which patch does it lie?")

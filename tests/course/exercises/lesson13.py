"""Answers to the exercises of lesson 13."""

import torch
import torch.nn.functional as F

from minblip2.evaluation import metrics

from . import Answers


def place(make):
    """A place with a slip; the class token is answered rightly."""
    return lambda token, rows, columns, first: None if first and token == 0 else make(token, rows, columns, first)


def by_grid(token, rows, columns, class_token):
    grid = torch.arange(rows * columns).reshape(rows, columns) + class_token
    found = (grid == token).nonzero().tolist()
    return tuple(found[0]) if found else None


def by_backward(attention, score):
    for weights in attention:
        weights.retain_grad()
    score.sum().backward(retain_graph=True)
    return sum((weights.detach() * weights.grad.clamp(min=0)).sum(dim=(1, 2)) for weights in attention)


def by_einsum(attention, score):
    slopes = torch.autograd.grad(score.sum(), attention)
    return sum(torch.einsum("bhqv,bhqv->bv", a, g * (g > 0)) for a, g in zip(attention, slopes, strict=True))


def mapped(make, total=sum):
    """A map with a slip in one layer's part, or in the sum of parts."""
    return lambda attention, score: total([
        make(a, g) for a, g in zip(attention, torch.autograd.grad(score.sum(), attention), strict=True)])


def right_part(a, g):
    return (a * g.relu()).sum((1, 2))


def by_metrics(heat, box, size):
    return metrics.pointing_game(heat, [box], size)


def game(ties=all, centre=0.5, corners=False, swapped=False, turned=False):
    """The game with a slip."""
    def points_of(heat, box, size):
        (rows, columns), (wide, high), (left, top, width, height) = heat.shape, size[::-1] if swapped else size, box
        right, bottom = (width, height) if corners else (left + width, top + height)
        hits = []
        for row, column in (heat == heat.max()).nonzero().tolist():
            row, column = (column, row) if turned else (row, column)
            x, y = (column + centre) * wide / columns, (row + centre) * high / rows
            hits.append(left <= x < right and top <= y < bottom)
        return ties(hits)
    return points_of


def by_interpolation(weights, grid, size):
    return F.interpolate(weights.reshape(1, 1, *grid), size=size[::-1], mode="nearest")[0, 0]


def by_kron(weights, grid, size):
    return torch.kron(weights.reshape(grid), torch.ones(size[1] // grid[0], size[0] // grid[1]))


ANSWERS = {
    "place_of": Answers(
        [place(lambda token, rows, columns, first: divmod(token - first, columns)), by_grid],
        [(place(lambda token, rows, columns, first: divmod(token - first, columns)[::-1]), "exchanged"),
         (place(lambda token, rows, columns, first: divmod(token - first, rows)), "number of rows"),
         (place(lambda token, rows, columns, first: divmod(token, columns)), "not taken off"),
         (place(lambda token, rows, columns, first: divmod(token - 1, columns)), "one was taken off"),
         (lambda token, rows, columns, first: divmod(token - first, columns), "lies nowhere"),
         (place(lambda token, rows, columns, first: tuple(1 + i for i in divmod(token - first, columns))), "from 1"),
         (place(lambda token, rows, columns, first: token), "a row and a column")]),
    "weighted_map": Answers(
        [by_backward, by_einsum, mapped(right_part)],
        [(mapped(lambda a, g: (a * g).sum((1, 2))), "negative derivatives"),
         (mapped(lambda a, g: (a * g.abs()).sum((1, 2))), "whatever its sign"),
         (mapped(lambda a, g: a.sum((1, 2))), "plain attention"),
         (mapped(lambda a, g: g.relu().sum((1, 2))), "positive derivative alone"),
         (mapped(lambda a, g: (a * g).sum((1, 2)).relu()), "deletes the other"),
         (mapped(lambda a, g: (a * g.relu()).mean((1, 2))), "the mean is taken"),
         (mapped(right_part, lambda parts: parts[-1]), "only reading"),
         (mapped(right_part, lambda parts: sum(parts) / len(parts)), "over layers the mean"),
         (mapped(lambda a, g: a * g.relu()), "asked for is (b v)")]),
    "points": Answers(
        [by_metrics, game()],
        [(game(ties=any), "constant map"), (game(ties=lambda some: some[0]), "the first only"),
         (game(centre=0.0), "not to its corner"), (game(corners=True), "not two corners"),
         (game(swapped=True), "sides are exchanged"), (game(turned=True), "a row goes with y"),
         (lambda heat, box, size: True, "Where do these cells point"), (lambda heat, box, size: 1.0, "True or False")]),
    "enlarge": Answers(
        [by_interpolation, by_kron],
        [(lambda weights, grid, size: by_kron(weights, grid[::-1], size[::-1]), "on its side"),
         (lambda weights, grid, size: by_kron(weights.reshape(grid[::-1]).T.flatten(), grid, size), "exchanged"),
         (lambda weights, grid, size: by_kron(weights, grid, size).T, "on its side"),
         (lambda weights, grid, size: by_kron(weights, grid, size).flip(0), "on its head"),
         (lambda weights, grid, size: weights.reshape(grid).repeat(size[1] // grid[0], size[0] // grid[1]), "tiles"),
         (lambda weights, grid, size: F.interpolate(weights.reshape(1, 1, *grid), size=size[::-1],
                                                    mode="bilinear")[0, 0], "values between")]),
}

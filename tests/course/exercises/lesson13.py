"""Answers to the exercises of lesson 13."""

import einops
import numpy as np
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


def by_examples(attention, score):
    """One derivative after another, the readings in one tensor."""
    rows = []
    for number, one in enumerate(score):
        slopes = torch.autograd.grad(one, attention, retain_graph=True)
        rows.append(sum(einops.reduce((a * g.clamp_min(0))[number], "h q v -> v", "sum")
                        for a, g in zip(attention, slopes, strict=True)))
    return torch.stack(rows)


def of_first_score(attention, score):
    slopes = torch.autograd.grad(score[0], attention)
    return sum(right_part(a, g) for a, g in zip(attention, slopes, strict=True))


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


def by_masks(heat, box, size):
    """As tensors: centres, which of them are inside, and which cells tie."""
    (rows, columns), (left, top, width, height) = heat.shape, box
    y, x = (torch.arange(rows)[:, None] + 0.5) * size[1] / rows, (torch.arange(columns) + 0.5) * size[0] / columns
    within = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
    return within[heat == heat.max()].all()


def blurred(heat, box, size):
    """The mistake to take what is nearly the maximum for it."""
    return game()((heat > heat.max() - 0.05).float(), box, size)


def by_interpolation(weights, grid, size):
    return F.interpolate(weights.reshape(1, 1, *grid), size=size[::-1], mode="nearest")[0, 0]


def by_kron(weights, grid, size):
    return torch.kron(weights.reshape(grid), torch.ones(size[1] // grid[0], size[0] // grid[1]))


def by_pixels(weights, grid, size):
    y, x = torch.arange(size[1]) * grid[0] // size[1], torch.arange(size[0]) * grid[1] // size[0]
    return weights[y[:, None] * grid[1] + x]


def cells_turned(weights, grid, size):
    """The mistake to give each cell the height that is its width, and the other way round."""
    return torch.kron(weights.reshape(grid), torch.ones(size[0] // grid[1], size[1] // grid[0]))


def square_cells(weights, grid, size):
    """The mistake to take all cells for squares."""
    patch = size[0] // grid[1]
    return torch.kron(weights.reshape(grid), torch.ones(patch, patch))


def by_index(weights, grid, size):
    """For each pixel the number of its patch."""
    y, x = torch.arange(size[1]) * grid[0] // size[1], torch.arange(size[0]) * grid[1] // size[0]
    return weights[y[:, None] * grid[1] + x]


def by_whole_pixels(heat, box, image_size):
    (rows, columns), (width, height), (left, top, wide, high) = heat.shape, image_size, box
    return all(left <= int((c + 0.5) * width / columns) < left + wide and top <= int((r + 0.5) * height / rows)
               < top + high for r, c in (heat == heat.max()).nonzero().tolist())


def with_doubled_score(attention, score):
    """The mistake to write into the scores that were given."""
    made = by_examples(attention, score)
    with torch.no_grad():
        score.mul_(2)
    return made


ANSWERS = {
    "place_of": Answers(
        [place(lambda token, rows, columns, first: divmod(token - first, columns)), by_grid,
         place(lambda token, rows, columns, first: np.unravel_index(token - first, (rows, columns))),
         place(lambda token, rows, columns, first: list(torch.unravel_index(
             torch.tensor(token - first), (rows, columns))))],
        [(place(lambda token, rows, columns, first: divmod(token - first, columns)[::-1]), "exchanged"),
         (place(lambda token, rows, columns, first: divmod(token - first, rows)), "number of rows"),
         (place(lambda token, rows, columns, first: divmod(token, columns)), "not taken off"),
         (place(lambda token, rows, columns, first: divmod(token - 1, columns)), "one was taken off"),
         (lambda token, rows, columns, first: divmod(token - first, columns), "lies nowhere"),
         (place(lambda token, rows, columns, first: tuple(1 + i for i in divmod(token - first, columns))), "from 1"),
         (place(lambda token, rows, columns, first: token), "a row and a column"),
         (place(lambda token, rows, columns, first: tuple(map(float, divmod(token - first, columns)))),
          "whole numbers"),
         (place(lambda token, rows, columns, first: tuple(map(str, divmod(token - first, columns)))), "whole numbers"),
         (place(lambda token, rows, columns, first: ((token - first) / columns, (token - first) % columns)),
          "whole numbers"),
         (place(lambda token, rows, columns, first: (rows - 1 - (token - first) // columns, (token - first) % columns)),
          "from the bottom"), (place(lambda token, rows, columns, first: divmod(token - first, 16)), "fill whole rows"),
         (place(lambda token, rows, columns, first: divmod(token - first, round((rows * columns) ** 0.5))), "a square"),
         (place(lambda token, rows, columns, first: ((token - first) % rows, (token - first) // rows)), "as one reads"),
         (lambda token, rows, columns, first: divmod(token - first, columns) if token else None,
          "a row and a column")]),
    "weighted_map": Answers(
        [by_backward, by_einsum, mapped(right_part), by_examples,
         mapped(lambda a, g: (a * g).relu().flatten(1, 2).sum(1))],
        [(with_doubled_score, "changed the scores"),
         (mapped(lambda a, g: (a * g).sum((1, 2))), "negative derivatives"),
         (mapped(lambda a, g: (a * g.abs()).sum((1, 2))), "whatever its sign"),
         (mapped(lambda a, g: a.sum((1, 2))), "plain attention"),
         (mapped(lambda a, g: g.relu().sum((1, 2))), "positive derivative alone"),
         (mapped(lambda a, g: (a * g).sum((1, 2)).relu()), "cancels the other"),
         (mapped(lambda a, g: (a * g.relu()).mean((1, 2))), "the mean is taken"),
         (mapped(right_part, lambda parts: parts[-1]), "only the last reading"),
         (mapped(right_part, lambda parts: sum(parts) / len(parts)), "over layers the mean"),
         (mapped(lambda a, g: a * g.relu()), "it should be (b v)"),
         (mapped(lambda a, g: (a * g).sum(2).relu().sum(1)), "where queries disagree"),
         (mapped(lambda a, g: (a * g).sum(1).relu().sum(1)), "where heads disagree"),
         (mapped(lambda a, g: (a * g).sum((1, 2)), lambda parts: sum(parts).relu()), "where readings disagree"),
         (mapped(lambda a, g: right_part(a, g) / len(a)), "divided by the batch"),
         (mapped(right_part, lambda parts: parts[0]), "only the first reading"),
         (mapped(lambda a, g: (a * g.relu()).amax(1).sum(1)), "the largest is taken"),
         (mapped(lambda a, g: (a * g.relu()).sum((0, 1))), "it should be (b v)"),
         (mapped(lambda a, g: (a * g.relu())[:, :, 0].sum(1)), "only the first query"),
         (of_first_score, "the first score alone"),
         (mapped(lambda a, g: right_part(a, g).roll(1, 0)), "loop over layers"),
         (mapped(lambda a, g: right_part(a, g) / right_part(a, g).sum(1, keepdim=True)), "sum to one")]),
    "points": Answers(
        [by_metrics, game(), by_masks, lambda *given: np.bool_(game()(*given)),
         lambda *given: torch.tensor(game()(*given))],
        [(by_whole_pixels, "you round it"),
         (game(ties=any), "constant map"), (game(ties=lambda some: some[0]), "the first only"),
         (game(centre=0.0), "not to its corner"), (game(corners=True), "not two corners"),
         (game(swapped=True), "sides are exchanged"), (game(turned=True), "a row goes with y"),
         (lambda heat, box, size: True, "Where do these cells point"), (lambda heat, box, size: 1.0, "True or False"),
         (game(ties=lambda some: some[-1]), "the last only"), (game(centre=1.0), "far corner"),
         (game(ties=lambda some: 2 * sum(some) > len(some)), "more than half"),
         (game(ties=lambda some: len(some) == 1 and some[0]), "always say no"),
         (lambda heat, box, size: game()(-heat, box, size), "minimum"),
         (lambda heat, box, size: game()(heat.abs(), box, size), "whatever the sign"),
         (blurred, "do these cells point"),
         (lambda heat, box, size: game()(heat, box, (box[2], box[3])), "do these cells point"),
         (lambda heat, box, size: torch.tensor([game()(heat, box, size)] * 2), "True or False"),
         (lambda heat, box, size: int(game()(heat, box, size)), "True or False")]),
    "enlarge": Answers(
        [by_index,
         by_interpolation, by_kron, by_pixels],
        [(lambda *given: by_index(*given).double(), "float64"),
         (lambda weights, grid, size: by_kron(weights, grid[::-1], size[::-1]), "height and width"),
         (lambda weights, grid, size: by_kron(weights.reshape(grid[::-1]).T.flatten(), grid, size), "exchanged"),
         (lambda weights, grid, size: by_kron(weights, grid, size).T, "height and width"),
         (lambda weights, grid, size: by_kron(weights, grid, size).flip(0), "upside down"),
         (lambda weights, grid, size: weights.reshape(grid).repeat(size[1] // grid[0], size[0] // grid[1]), "tiles"),
         (lambda weights, grid, size: F.interpolate(weights.reshape(1, 1, *grid), size=size[::-1],
                                                    mode="bilinear")[0, 0], "that no patch has"),
         (lambda weights, grid, size: by_kron(weights, grid, size).flip(1), "left and right"),
         (lambda weights, grid, size: by_kron(weights.flip(0), grid, size), "half a turn"),
         (cells_turned, "how many pixels are there for each row"), (square_cells, ""),
         (lambda weights, grid, size: by_kron(weights, grid, size).T.reshape(size[1], size[0]), "another shape"),
         (lambda weights, grid, size: by_kron(weights / weights.sum(), grid, size), "sum to one"),
         (lambda weights, grid, size: by_kron(weights.relu(), grid, size), "that no patch has"),
         (lambda weights, grid, size: by_kron(weights, grid, size).roll(1, 1), "in which patch"),
         (lambda weights, grid, size: weights.reshape(grid).repeat(size[1] // grid[0], 1).repeat_interleave(
             size[0] // grid[1], 1), "tiles downwards")]),
}

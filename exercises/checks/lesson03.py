"""Checks of lesson 03: tokens of a picture, positions of another size, maps, the layer to take, and a true freeze."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import Wrong, close, exercise, expect, expect_tensor, named, numbers_of, same_gradients, steady


@exercise("03.1", "lesson 03, section 1")
def patch_tokens(embed: Callable) -> None:
    """Patches, projected."""
    low, high = sorted(random.sample(range(2, 6), 2))
    p, other = random.sample(range(2, 6), 2)
    cases, drawn = [(low, high, p, 3), (high, low, other, 3), (low, low, p, 3), (1, high, other, 1), (3, 1, p, 4)], []
    for gh, gw, p, c in cases:
        e, b = next(e for e in (7, 11, 13) if e not in (gh * gw, c * p * p)), random.randint(2, 3)
        image, weight, bias = 3 * torch.randn(b, c, gh * p, gw * p), torch.randn(e, c, p, p), torch.randn(e)
        before = image.clone(), weight.clone(), bias.clone()
        tokens = expect_tensor(embed(image, weight, bias), (b, gh * gw, e), "the result", "(b v e)", torch.float32)
        expect(all(torch.equal(one, other) for one, other in zip(before, (image, weight, bias), strict=True)),
               "your function changed a tensor that it was given.")
        steady(embed(image, weight, bias), tokens)
        drawn.append((tokens, image, weight, bias, gh, gw))
    _which_token(embed, [rest for _, *rest in drawn])
    for tokens, image, weight, bias, gh, gw in drawn[:2]:
        alone = expect_tensor(embed(image[:1], weight, bias), (1, gh * gw, len(bias)), "the result", "(b v e)")
        expect(close(alone, tokens[:1]), "a picture alone gives other tokens than among others.")
    output, right = [one[0] for one in drawn], [_by_squares(*rest[:3]) for _, *rest in drawn]
    if not all(map(close, output, right)):
        slips = {"the bias is missing.": [one - bias for one, (_, _, _, bias, _, _) in zip(right, drawn, strict=True)],
                 "the bias is added more than once.": [
                     one + bias for one, (_, _, _, bias, _, _) in zip(right, drawn, strict=True)]}
        for meaning, layout in (
                ("inside a patch, rows and columns are swapped: the square meets a transposed weight.",
                 lambda weight: weight.mT),
                ("each token has the right pixels, but they meet the wrong weights: are colours and places in the same "
                 "order in the pixels and in the weights?", _as_if_colours_last),
                ("the weights are flipped: a convolution of torch does not flip them.",
                 lambda weight: weight.flip(2, 3)),
                ("the colours are swapped: the first colour meets the last one's weights.",
                 lambda weight: weight.flip(1))):
            slips[meaning] = [_by_squares(image, layout(weight), bias) for _, image, weight, bias, _, _ in drawn]
        expect(False, named(output, slips, close, right) or
               "each token has the right pixels, but its numbers are not those of a loop over squares: a sum over "
               "colour, row and column of weight times pixel, plus the bias. Are both unrolled alike?")
    _, image, weight, bias, _, _ = drawn[0]
    same_gradients(embed, _by_squares, {"picture": image, "weight": weight, "bias": bias})
    exact = embed(image.double(), weight.double(), bias.double())
    expect(exact.dtype == torch.float64, f"given float64 you return {exact.dtype}: keep the dtype that comes in.")


def _by_squares(image_features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Square after square, as one reads: (b v e)."""
    p = weight.shape[2]
    tokens = []
    for top in range(0, image_features.shape[2], p):
        for left in range(0, image_features.shape[3], p):
            square = image_features[:, None, :, top:top + p, left:left + p]
            tokens.append((weight * square).sum(dim=(2, 3, 4)) + bias)
    return torch.stack(tokens, dim=1)


def _as_if_colours_last(weight: Tensor) -> Tensor:
    """The weights that pixels unrolled with colours last would meet in weights unrolled with colours first."""
    e, c, p, _ = weight.shape
    return weight.reshape(e, p, p, c).permute(0, 3, 1, 2)


def _which_token(embed: Callable, cases: list) -> None:
    """A pixel belongs to one token, and to which one is a matter of rows and columns."""
    seen = []
    for image, weight, bias, gh, gw in cases:
        p = weight.shape[2]
        with torch.no_grad():
            before = embed(image, weight, bias)
            for row, column in ((row, column) for row in range(gh) for column in range(gw)):
                for down, across in {(0, 0), (p - 1, random.randrange(p))}:
                    changed = image.clone()
                    changed[:, random.randrange(image.shape[1]), row * p + down, column * p + across] += 3
                    moved = (embed(changed, weight, bias) - before).abs().amax(dim=(0, 2)) > 1e-4
                    output = moved.nonzero().flatten().tolist()
                    where = f"of {gh} x {gw} patches, a pixel of the one in row {row} and column {column} changes"
                    expect(bool(output), f"{where} no token at all: some pixels are not read.")
                    expect(len(output) == 1,
                           f"{where} {len(output)} tokens; it should change one. Patches do not overlap, "
                           "and no token looks at others yet.")
                    seen.append((output[0], row * gw + column, column * gh + row, f"{where} token {output[0]}"))
    wrong = next((where for output, right, _, where in seen if output != right), "")
    expect(not wrong or any(output != columns for output, _, columns, _ in seen),
           f"{wrong}: you count down the columns. "
           "Tokens stand in the order in which one reads.")
    expect(not wrong, f"{wrong}. Do the pixels of a token form a square, or are they a stretch of memory? And are the "
           "squares numbered as one reads?")


# --- positions --------------------------------------------------------------------------------------------------------


class Halves(TorchDispatchMode):
    """Sees whether anything is computed in half precision: resized, multiplied, added."""

    SUMS = "upsample", "mm", "mul", "add", "sub", "div", "convolution", "grid_sampler", "mean", "sum"

    def __init__(self) -> None:
        super().__init__()
        self.computed = False

    def __torch_dispatch__(self, op: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        """Let an operation run, and look at what it is given."""
        halves = any(isinstance(one, Tensor) and one.dtype in (torch.bfloat16, torch.float16) for one in args)
        self.computed |= halves and any(name in str(op) for name in self.SUMS)
        return op(*args, **(kwargs or {}))


@exercise("03.2", "lesson 03, section 3")
def resize_positions(resize: Callable) -> None:
    """Positions of another grid, with the class token's left alone."""
    expect_tensor(resize(torch.randn(1, 122, 4), 15, 15), (1, 226, 4), "from 11 x 11 to 15 x 15 patches (a factor "
                  "would be rounded: give the size itself) the result", "(1 v e)")
    for grid in (random.randint(3, 4), random.randint(5, 7)):
        _resized(resize, grid, e=next(e for e in random.sample(range(3, 8), 3) if e != grid))


def _resized(resize: Callable, grid: int, e: int) -> None:
    """Positions of one grid, resized to several others."""
    positions = torch.randn(1, 1 + grid * grid, e)
    before = positions.clone()
    sizes = (grid + random.randint(1, 3), grid - 1), (2, grid + random.randint(1, 4)), (grid, grid), (1, 1)
    sizes += ((1, grid * grid),)  # as many patches as there were, in another grid
    for gh, gw in sizes:
        what = f"for {gh} x {gw} patches the result"
        made = expect_tensor(resize(positions, gh, gw), (1, 1 + gh * gw, e), what, "(1 v e)")
        expect(torch.equal(before, positions), "your function changed the positions that it was given.")
        steady(resize(positions, gh, gw), made)
        first, kept = made[0, 0].detach(), positions[0, 0]
        expect(close(first, kept) or not close(made[0, -1], kept), "the class token's position stands at the end; it "
               "was given at the beginning, where the class token is.")
        expect(close(first, kept), "the class token's position has changed or is gone: it has no place in the picture, "
               "so there is nothing to resize.")
    output = [resize(positions, gh, gw)[0, 1:].detach() for gh, gw in sizes]
    right = [_bicubic(positions[0, 1:], grid, gh, gw) for gh, gw in sizes]

    def near(one: Tensor, other: Tensor) -> bool:
        return close(one, other, 1e-3)

    if not all(map(near, output, right)):
        lying = [_bicubic(positions[0, 1:], grid, gw, gh) for gh, gw in sizes]
        expect(not named(output, {"lying": lying}, near, right),
               f"for {sizes[0][0]} x {sizes[0][1]} patches you make a "
               f"table of {sizes[0][1]} x {sizes[0][0]}: it has as many positions, and other ones.")
        for gh, gw in sizes:
            _slopes(resize, grid, gh, gw)
        _not_bicubic(output, right, positions, grid, sizes)
    gh, gw = sizes[0]
    same_gradients(lambda positions: resize(positions, gh, gw), lambda positions: torch.cat([
        positions[:, :1], F.interpolate(positions[:, 1:].mT.unflatten(2, (grid, grid)), (gh, gw),
                                        mode="bicubic").flatten(2).mT], dim=1), {"positions": positions})
    for kind, tolerance in ((torch.bfloat16, 0.005), (torch.float16, 0.001), (torch.float64, 1e-4)):
        given = positions.to(kind)
        with Halves() as halves:
            made = expect_tensor(resize(given, gh, gw), (1, 1 + gh * gw, e), "the result", "(1 v e)", kind)
        expect(not halves.computed, f"given {kind} you compute in it: compute in float32 in between.")
        wanted = _bicubic(given[0, 1:].double(), grid, gh, gw).to(kind)
        expect(close(made[0, 1:].double(), wanted.double(), tolerance), f"in {kind} the result is not that of float32, "
               "rounded once at the end: compute in float32 in between.")


def _slopes(resize: Callable, grid: int, gh: int, gw: int) -> None:
    """Positions that tell their row must still do so, and say nothing of columns."""
    rows = torch.arange(grid).float()[:, None].expand(grid, grid).reshape(1, -1, 1)
    ramp = torch.cat([torch.zeros(1, 1, 1), rows], dim=1)
    made = expect_tensor(resize(ramp, gh, gw), (1, 1 + gh * gw, 1), "the result", "(1 v e)").detach()
    made = made[0, 1:, 0].reshape(gh, gw)
    across = float((made - made[:, :1]).abs().max())
    down = float((made - made[:1]).abs().max())
    expect(across < 1e-3 or down >= 1e-3 or gh == 1, "rows have become columns: positions that encoded their row "
           "encode their column after your resizing. Which of the two is counted first?")
    expect(across < 1e-3, "positions that encoded their row, and not their column, differ along a row after your "
           "resizing: were they laid out as in the table that they come from?")


def _bicubic(positions: Tensor, grid: int, gh: int, gw: int) -> Tensor:
    """Resized one axis after the other, each new place a weighted mean of four old ones: (v e)."""
    def cubic(distance: float, a: float = -0.75) -> float:
        t = abs(distance)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def along(new: int) -> Tensor:
        matrix = torch.zeros(new, grid, dtype=positions.dtype)
        for row in range(new):
            place = (row + 0.5) * grid / new - 0.5
            for near in range(math.floor(place) - 1, math.floor(place) + 3):
                matrix[row, min(max(near, 0), grid - 1)] += cubic(place - near)
        return matrix

    down, across = along(gh), along(gw)
    return torch.stack([down @ channel.reshape(grid, grid) @ across.T for channel in positions.T]).flatten(1).T


def _not_bicubic(output: list[Tensor], right: list[Tensor], positions: Tensor, grid: int, sizes: tuple) -> None:
    """Raise Wrong with what wrong positions are instead."""
    table = positions[0, 1:].T.reshape(1, -1, grid, grid)
    known = {"the outermost positions stay at the outermost patches; the exercise asks for areas that match, so that a "
             "new place may lie further out.": dict(mode="bicubic", align_corners=True),
             "each new position is a mean of the two neighbours along an axis; the exercise asks for four, weighted by "
             "a cubic.": dict(mode="bilinear"),
             "each new position is a copy of the nearest old one; neighbours should be mixed.": dict(mode="nearest"),
             "each new position is a copy of the old one that is nearest to its middle; neighbours should be mixed.":
                 dict(mode="nearest-exact"),
             "each new position is the mean of an area; the exercise asks for four neighbours along an axis, weighted "
             "by a cubic.": dict(mode="area"),
             "the table was blurred before it was made smaller. For pictures that is right; the encoders' own code "
             "resizes positions without.": dict(mode="bicubic", antialias=True)}
    slips = {meaning: [F.interpolate(table, size=size, **how)[0].flatten(1).T for size in sizes]
             for meaning, how in known.items()}
    gh, gw = next(size for size, one, other in zip(sizes, output, right, strict=True) if not close(one, other, 1e-3))
    expect(False, named(output, slips, lambda one, other: close(one, other, 1e-3), right) or
           f"from {grid} x {grid} to {gh} x {gw} the positions are not the old ones, resized bicubically. Does every "
           "channel stay on its own, and does each position come from its own neighbourhood?")


# --- a map ------------------------------------------------------------------------------------------------------------


@exercise("03.3", "lesson 03, sections 1 and 3; a map off by one: lesson 01, section 12")
def brightest(box_of: Callable) -> None:
    """The square of pixels on which the largest weight of a patch rests."""
    grids = [(3, 5), (5, 3), (2, 6), (4, 4), (3, 3), (1, 5), tuple(random.sample(range(2, 8), 2))]
    cases = [(which, gh, gw, how) for which, (gh, gw) in enumerate(grids) for how in ("none", "small", "large")]
    given, output = [], []
    for which, gh, gw, how in random.sample(cases, len(cases)):
        patch = random.choice((7, 8, 14, 16))
        weights = torch.rand(gh * gw + (how != "none")).softmax(dim=0)
        place = 0 if which in (0, 2) else gh * gw - 1 if which in (1, 3) else random.randrange(gh * gw)
        weights[place + (how != "none")] = 1.5 * weights.max()
        if how != "none":  # the class token gets the most, as it often does, or not
            weights[0] = 2 * weights.max() if how == "large" else 0.5 * weights.min()
        weights = weights / weights.sum()
        before = weights.clone()
        box = numbers_of(box_of(weights, gh * patch, gw * patch, patch), 4, "four numbers: left, top, right, bottom")
        expect(torch.equal(before, weights), "your function changed the weights that it was given.")
        given.append((weights, place, gh, gw, patch))
        output.append(tuple(box))
    right = [_square(place, gw, patch) for _, place, _, gw, patch in given]
    wrong = next((i for i, (one, other) in enumerate(zip(output, right, strict=True)) if one != other), None)
    if wrong is None:
        return
    weights, _, gh, gw, patch = given[wrong]
    meaning = named(output, {text: [slip(*case) for case in given] for text, slip in BOXES.items()},
                    lambda one, other: one == other, right)
    if not meaning:
        alone = [i for i, case in enumerate(given) if len(case[0]) == case[2] * case[3]]
        patches = all(one[:2] == other[:2] for one, other in zip(output, right, strict=True))
        meaning = ("left and top are right, right and bottom are not: they are where the next patch would begin."
                   if patches else
                   "where there is no class token you are right. Where there is one, there is one weight more than "
                   "there are patches: whose is it, and where does it stand?"
                   if all(output[i] == right[i] for i in alone) else
                   "how many patches are there, which of them has the largest weight, how many stand in a row, and "
                   "where does that one begin and end?")
    expect(False, f"with {len(weights)} weights for {gh} x {gw} patches of {patch} pixels you answer {output[wrong]}: "
                  f"{meaning}")



EXTRA = "sometimes there is one weight more than there are patches: whose is it, and where does it stand?"
# What is made of the weights, the number of the right patch, the grid and the side of a patch; and what it means.
BOXES: dict[str, Callable[[Tensor, int, int, int, int], tuple]] = {
    EXTRA: lambda weights, place, gh, gw, patch: _square(int(weights.argmax()), gw, patch),
    EXTRA + " Not at the end.": lambda weights, place, gh, gw, patch: _square(
        int(weights[:gh * gw].argmax()), gw, patch),
    EXTRA + " It was left out, but the patches still count it.": lambda weights, place, gh, gw, patch: _square(
        place + len(weights) - gh * gw, gw, patch),
    "a weight was left out where there is none too many: not every encoder has a class token.":
        lambda weights, place, gh, gw, patch: _square(int(weights[1:].argmax()), gw, patch),
    "the first weight is taken for a class token's wherever it is the largest: count the weights instead.":
        lambda weights, place, gh, gw, patch: _square(
            int((weights[1:] if weights.argmax() == 0 else weights).argmax()), gw, patch),
    "across and down are swapped.": lambda weights, place, gh, gw, patch: tuple(
        _square(place, gw, patch)[i] for i in (1, 0, 3, 2)),
    "the four edges stand in another order: it should be left, top, right, bottom.":
        lambda weights, place, gh, gw, patch: tuple(_square(place, gw, patch)[i] for i in (0, 2, 1, 3)),
    "the last two numbers are width and height; the exercise asks for the right and the lower edge.":
        lambda weights, place, gh, gw, patch: (*_square(place, gw, patch)[:2], patch, patch),
    "the right and the lower edge are where the next patch would begin.": lambda weights, place, gh, gw, patch: tuple(
        edge - (i > 1) for i, edge in enumerate(_square(place, gw, patch))),
    "these are numbers of patches; the exercise asks for pixels.": lambda weights, place, gh, gw, patch: tuple(
        edge // patch for edge in _square(place, gw, patch)),
    "a row is as long as the grid is wide, not as it is high.": lambda weights, place, gh, gw, patch: _square(
        place, gh, patch),
    "patches are counted along a row, and then down.": lambda weights, place, gh, gw, patch: _square(
        place, gh, patch, down=True),
    "the grid was taken for a square: how many patches are in a row?": lambda weights, place, gh, gw, patch: _square(
        place, max(1, math.isqrt(gh * gw)), patch),
    "that is the patch with the smallest weight.": lambda weights, place, gh, gw, patch: _square(
        int(weights[len(weights) - gh * gw:].argmin()), gw, patch),
}


def _square(number: int, gw: int, patch: int, down: bool = False) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a patch, in rows of gw; with `down` as if row and column were each other."""
    row, column = number // gw, number % gw
    if down:
        row, column = column, row
    return column * patch, row * patch, (column + 1) * patch, (row + 1) * patch


# --- which layer ------------------------------------------------------------------------------------------------------


class Count:
    """How often something ran; a copy of what it counts goes on counting here."""

    def __init__(self) -> None:
        self.runs = 0

    def __deepcopy__(self, memo: dict) -> Count:
        return self


class SomeViT(nn.Module):
    """A small encoder whose forward nobody knows: it has `blocks` and `norm`, and something before them."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.name = "".join(random.choices("abcdefghijklmnop", k=8))
        self.add_module(self.name, nn.Linear(3, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight, mean=1.0, std=0.3)
        self.count = Count()

    def forward(self, image_features: Tensor) -> Tensor:
        """image (b c H W) -> (b v e)."""
        self.count.runs += 1
        x = self.get_submodule(self.name)(image_features.flatten(2).mT)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@torch.no_grad()
def steps_of(vit: SomeViT, image_features: Tensor) -> list[Tensor]:
    """What enters the blocks, and what leaves each: (b v e)."""
    x = [vit.get_submodule(vit.name)(image_features.flatten(2).mT)]
    for block in vit.blocks:
        x.append(block(x[-1]))
    return x


def state_of(vit: nn.Module) -> dict[str, object]:
    """All about an encoder that somebody else may lean on, by what it is."""
    parts = list(vit.named_modules())
    own = {name: sorted(key for key, value in vars(part).items()  # a method of its own that is the class's is none
                        if getattr(value, "__func__", None) is not getattr(type(part), key, value))
           for name, part in parts}
    return {"parts": [id(part) for _, part in parts], "attributes": own, "mode": [part.training for _, part in parts],
            "weights": {name: value.clone() for name, value in vit.state_dict().items()},
            "gradients": [(weight.requires_grad, weight.grad is None) for weight in vit.parameters()],
            "hooks": [[*part._forward_hooks, *part._forward_pre_hooks, *part._backward_hooks,
                       *part._backward_pre_hooks] for _, part in parts]}


def as_found(before: dict, after: dict) -> None:
    """Raise Wrong unless the encoder is as it was found."""
    expect(before["parts"] == after["parts"], "your function has changed the encoder: its parts are not those that it "
           "had. Its next call gives something else.")
    expect(all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items()),
           "your function has changed the encoder's weights.")
    more = [sum(one not in other for one in new) for new, other in zip(after["hooks"], before["hooks"], strict=True)]
    expect(not sum(more), f"{sum(more)} of your hooks {'is' if sum(more) == 1 else 'are'} left in the encoder: a hook "
           "that is left runs at every call, and each call of yours adds more.")
    expect(before["hooks"] == after["hooks"], "somebody else's hook on the encoder is gone: remove your own, and no "
           "other.")
    expect(before["mode"] == after["mode"], "your function has switched the encoder, or parts of it, between train and "
           "eval mode, and left it so.")
    expect([one for one, _ in before["gradients"]] == [one for one, _ in after["gradients"]], "your function has "
           "changed which parameters of the encoder require a gradient, and left it so.")
    expect([one for _, one in before["gradients"]] == [one for _, one in after["gradients"]], "after your function "
           "gradients lie in the encoder's parameters.")
    expect(before["attributes"] == after["attributes"], "your function has left something in the encoder that was not "
           "there, such as an attribute or a forward of its own.")


@exercise("03.4", "lesson 03, section 7")
def second_to_last(features_of: Callable) -> None:
    """What leaves the second-to-last block."""
    drawn: list[tuple] = []
    shallow, deep = random.sample(range(3, 7), 2)
    for depth, live in ((shallow, False), (2, False), (deep, True)):
        vit = SomeViT(depth, random.randint(5, 8)).eval().requires_grad_(False)
        if live:  # somebody trains it, but for its first block, and listens as well
            vit.train().requires_grad_(True)
            vit.blocks[0].requires_grad_(False).eval()
            for part in (vit, vit.norm, *vit.blocks):
                part.register_forward_hook(lambda part, given, result: None)
                part.register_forward_pre_hook(lambda part, given: None)
        shape = random.randint(1, 3), 3, 2, random.randint(3, 5)
        for _ in range(2):
            image = torch.randn(shape)
            steps, before = steps_of(vit, image), state_of(vit)
            with torch.no_grad():
                final, pixels = vit(image), image.clone()
            vit.count.runs = 0
            output = expect_tensor(features_of(vit, image), final.shape, "the result", "(b v e)").detach()
            runs = vit.count.runs
            as_found(before, state_of(vit))
            expect(torch.equal(image, pixels), "your function has changed the picture.")
            with torch.no_grad():
                expect(close(vit(image), final), "after your function the encoder gives something else than before.")
            expect(runs == 1, f"the encoder ran {runs} times; the exercise asks for one ordinary call." if runs else
                   "the encoder itself was never called: leave to it what it does before the blocks.")
            drawn.append((output, steps, final, vit, depth))
    if all(close(output, steps[-2]) for output, steps, *_ in drawn):
        return
    output = [one[0] for one in drawn]
    with torch.no_grad():
        normed = [[vit.norm(step) for step in steps] for _, steps, _, vit, _ in drawn]
    slips = {"that is what leaves the whole encoder.": [final for _, _, final, *_ in drawn],
             "that is what leaves the last block; the paper takes it one block before.": [
                 steps[-1] for _, steps, *_ in drawn],
             "the final norm was applied to it. That norm was trained for what leaves the last block; BLIP-2 gives the "
             "bridge a norm of its own.": [one[-2] for one in normed],
             "that is what enters the first block.": [steps[0] for _, steps, *_ in drawn],
             "that is what leaves the first block.": [steps[1] for _, steps, *_ in drawn],
             "that is one block too early: is it what enters that block, or what leaves it?": [
                 steps[-3] for _, steps, *_ in drawn]}
    meaning = named(output, slips, close, [steps[-2] for _, steps, *_ in drawn])
    first = all(close(one[0], one[1][-2]) for one in drawn[::2])
    expect(bool(meaning) or not first, "called a second time, with another picture, you return something else than "
           "what leaves that block: is it left over from the first?")
    depth = next(one[4] for one in drawn if not close(one[0], one[1][-2]))
    expect(False, f"of an encoder with {depth} blocks: " + (
        meaning or "these are not the features. Which part do you hook, its input or its output, and does anything "
        "happen to them on the way?"))


# --- frozen -----------------------------------------------------------------------------------------------------------


class Thins(nn.Module):
    """Dropout as a function, as many encoders have it, and nothing that a list of layers would show."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same, thinned out in train mode."""
        return F.dropout(x, 0.5, training=self.training)


class Whole(nn.Sequential):
    """An encoder that thins out at its top, where no part of it would show it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (b c H W) -> (b e v)."""
        return F.dropout(super().forward(x), 0.5, training=self.training)


class Normed(nn.Module):
    """An encoder with a norm that is nobody's child but its own: running statistics, written down in train mode."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (b e v) -> the same, centred."""
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=(0, 2))
        return x - self.mean[:, None]


@exercise("03.5", "lesson 03, sections 8 and 9")
def frozen(freeze: Callable) -> None:
    """An encoder that does not change, whatever is done to what it is a part of."""
    encoder = Whole(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                    nn.Sequential(nn.Conv2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Flatten(2), Thins(),
                                  nn.BatchNorm1d(4), Normed(4)))
    for part in (encoder[1], encoder[4][1], encoder[4][4]):
        part.running_mean.normal_()
        part.running_var.uniform_(0.5, 2)
    classes = {each for part in [*encoder.modules(), nn.Linear(1, 1), nn.ModuleDict()] for each in type(part).__mro__
               if each is not object}
    held = {each: dict(vars(each)) for each in classes}
    try:
        with torch.enable_grad():
            _frozen(freeze, encoder, held)
    finally:
        for each in classes:
            _restore(each, held[each])


def _patched(held: dict[type, dict]) -> list[str]:
    """Which classes of modules are no longer what they were."""
    return [each.__name__ for each, before in held.items()
            if {name: value for name, value in vars(each).items() if callable(value)}
            != {name: value for name, value in before.items() if callable(value)}]


def _restore(each: type, before: dict) -> None:
    """Give a class back the methods that it had."""
    for name, value in dict(vars(each)).items():
        if callable(value) and before.get(name) is not value:
            if name in before:
                setattr(each, name, before[name])
            else:
                delattr(each, name)
    for name, value in before.items():
        if callable(value) and name not in vars(each):
            setattr(each, name, value)


def _frozen(freeze: Callable, encoder: nn.Module, held: dict[type, dict]) -> None:
    """Freeze the encoder and look at it from all sides."""
    images = torch.randn(5, 3, 4, 6)
    with torch.no_grad():
        expected = deepcopy(encoder).eval()(images)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    strange = [f"{each.__name__}.{name}" for each in held if each.__module__.startswith("torch.")
               for name in ("train", "eval") if not getattr(each, name).__module__.startswith("torch.")]
    expect(not strange, f"{', '.join(strange[:2])} is no longer PyTorch's own, but changed by some cell, for all "
           "models that there are: restart the kernel, and change one encoder only.")
    made = freeze(encoder)
    expect(torch.is_grad_enabled(), "after your function gradients are switched off globally: the rest of the model "
           "could not learn any more.")
    expect(not (patched := _patched(held)), f"your function has changed the class {', '.join(patched[:2])}, and with "
           "it every other module of that kind, in all models: change this one encoder.")
    expect(made is not None, "the result is None: return the encoder, so that it can be used.")
    expect(isinstance(made, nn.Module), f"the result is a {type(made).__name__}, not an nn.Module.")
    expect(all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items()),
           "freezing has already changed the weights.")
    wanting = [name for name, weight in made.named_parameters() if weight.requires_grad]
    expect(not wanting, f"{len(wanting)} parameters still require a gradient, {', '.join(wanting[:2])} among them: an "
           "attribute that is set on a module does not reach its parameters by itself.")
    with torch.no_grad():
        output = expect_tensor(made(images), expected.shape, "what the frozen encoder gives")
    expect(close(output, expected),
           "before any training the features are not those of the encoder in eval mode: dropout is on, or batch norm "
           "uses the batch's statistics.")
    with torch.no_grad():
        expect(close(made(images), output),
               "the same pictures, encoded a second time, give other features: something in the encoder is updated "
               "each time.")
    _trained(made, images, expected)
    now = encoder.state_dict()
    moved = [name for name, value in weights.items() if not torch.equal(now[name], value)]
    expect(not moved, f"after some training of the whole, {', '.join(moved[:2])} of the encoder is not what it was.")


def _trained(encoder: nn.Module, images: Tensor, expected: Tensor) -> None:
    """Put the encoder below a head, train as everybody does, and look at what it gives."""
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4))}).eval()
    model.train()
    expect(model["head"].training and model["head"][1].training, "the rest of the model cannot be trained any more: "
           "freeze the encoder and nothing else.")
    head = [weight.clone() for weight in model["head"].parameters()]
    optimiser = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    lively = [name for name, part in encoder.named_modules() if part.training]
    with torch.no_grad():
        alone = encoder(images[:1])
    expect(close(alone, expected[:1]), "model.train() was called on the whole, as every training loop does, and "
           + (f"the encoder followed ({len(lively)} of its modules are in train mode)" if lively else
              "the encoder reacted to it")
           + ": its features are no longer those of eval mode. A gradient is not the only way to change.")
    for _ in range(3):
        optimiser.zero_grad()
        loss = model["head"](encoder(images * 2 + 1)).square().mean() + model["head"][0].weight.sum()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        after = encoder(images)
    expect(close(after, expected), "after three steps of training the encoder gives other features: something in it "
           "was updated on the way, though no parameter requires a gradient.")
    expect(any(not torch.equal(one, other) for one, other in zip(head, model["head"].parameters(), strict=True)),
           "the head did not learn: freeze the encoder and nothing else.")
    for again in (model.eval, model.train, lambda: encoder.train(True), encoder.train, encoder.eval,
                  lambda: model.train(False), model.train):
        try:
            back = again()
        except TypeError as error:
            raise Wrong("train and eval may be called with a mode and without one, and yours stops "
                        f"({error}).") from error
        expect(isinstance(back, nn.Module), f"train or eval gives back {'None' if back is None else type(back)} where "
               "PyTorch's gives back the module: `encoder = encoder.eval()` would lose the encoder.")
        with torch.no_grad():
            expect(close(encoder(images), expected), "when train and eval are called in turns, as before and after "
                   "each epoch, the encoder gives other features.")

"""Checks of lesson 03: tokens of a picture, positions of another size, maps, the layer to take, and a true freeze."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import close, exercise, expect, expect_tensor


@exercise("03.1", "lesson 03, section 1")
def patch_tokens(embed: Callable) -> None:
    """Patches, projected."""
    p, e, b = random.randint(2, 4), random.choice((7, 9, 11)), random.randint(2, 3)  # e is no gh * gw
    gh, gw = random.sample(range(2, 6), 2)
    image, weight, bias = torch.randn(b, 3, gh * p, gw * p), torch.randn(e, 3, p, p), torch.randn(e)
    before = image.clone(), weight.clone(), bias.clone()
    tokens = expect_tensor(embed(image, weight, bias), (b, gh * gw, e), "the result", "(b v e)")
    expect(all(torch.equal(one, other) for one, other in zip(before, (image, weight, bias), strict=True)),
           "your function changed a tensor that it was given.")
    _which_token(embed, image, weight, bias, gh, gw)
    expect(close(expect_tensor(embed(image[:1], weight, bias), (1, gh * gw, e), "the result", "(b v e)"), tokens[:1]),
           "a picture alone gives other tokens than among others.")
    right = _by_squares(image, weight, bias)
    expect(not close(tokens + bias, right) and not close(tokens, right - bias), "the bias is missing.")
    for layout, meaning in ((weight.mT, "inside a patch, rows and columns have changed place: the square meets a "
                             "weight that lies on its side."),
                            (_as_if_colours_last(weight), "each token has the right pixels, but they meet the wrong "
                             "weights: are colours and places in one order in the pixels and in the weights?"),
                            (weight.flip(2, 3), "the weights are turned round: a convolution of torch does not flip "
                             "them.")):
        expect(not close(tokens, _by_squares(image, layout, bias)), meaning)
    expect(close(tokens, right), "each token has the right pixels, but its numbers are not those of a loop over "
           "squares: a sum over colour, row and column of weight times pixel, plus the bias. Are both unrolled alike?")


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


def _which_token(embed: Callable, image_features: Tensor, weight: Tensor, bias: Tensor, gh: int, gw: int) -> None:
    """A pixel belongs to one token, and to which one is a matter of rows and columns."""
    p, seen = weight.shape[2], []
    for trial in range(6):
        row, column = random.randrange(1, gh), random.randrange(gw)
        down, across = (random.randrange(p), random.randrange(p)) if trial else (0, 0)  # at a corner first
        changed = image_features.clone()
        changed[:, random.randrange(3), row * p + down, column * p + across] += 3
        moved = (embed(changed, weight, bias) - embed(image_features, weight, bias)).detach().abs().amax(dim=(0,
                                                                                                              2)) > 1e-4
        output = moved.nonzero().flatten().tolist()
        where = f"of {gh} x {gw} patches, a pixel of the one in row {row} and column {column} changes"
        expect(bool(output), f"{where} no token at all: some pixels are not read.")
        expect(len(output) == 1, f"{where} {len(output)} tokens; it should change one. Patches do not overlap, and no "
               "token looks at others yet.")
        seen.append((output[0], row * gw + column, column * gh + row, f"{where} token {output[0]}"))
    wrong = next((where for output, right, _, where in seen if output != right), "")
    expect(not wrong or any(output != columns for output, _, columns, _ in seen),
           f"{wrong}: you count down the columns. "
           "Tokens stand in the order in which one reads.")
    expect(not wrong, f"{wrong}. Do the pixels of a token form a square, or are they a stretch of memory? And are the "
           "squares numbered as one reads?")


# --- positions --------------------------------------------------------------------------------------------------------


@exercise("03.2", "lesson 03, section 4")
def resize_positions(resize: Callable) -> None:
    """Positions of another grid, with the class token's left alone."""
    grid, e = random.randint(3, 6), random.randint(3, 7)
    positions = torch.randn(1, 1 + grid * grid, e)
    before = positions.clone()
    sizes = (grid + random.randint(1, 3), grid - 1), (2, grid + random.randint(1, 4)), (grid, grid), (1, 1)
    for gh, gw in sizes:
        what = f"for {gh} x {gw} patches the result"
        made = expect_tensor(resize(positions, gh, gw), (1, 1 + gh * gw, e), what, "(1 v e)")
        expect(torch.equal(before, positions), "your function changed the positions that it was given.")
        first, kept = made[0, 0].detach(), positions[0, 0]
        expect(close(first, kept) or not close(made[0, -1], kept), "the class token's position stands at the end; it "
               "was given at the beginning, where the class token is.")
        expect(close(first, kept), "the class token's position has changed or is gone: it has no place in the picture, "
               "so there is nothing to resize.")
    for gh, gw in sizes:
        made, right = resize(positions, gh, gw), _bicubic(positions[0, 1:], grid, gh, gw)
        lying = _bicubic(positions[0, 1:], grid, gw, gh)
        expect(gh == gw or not close(made[0, 1:], lying, 1e-3), f"for {gh} x {gw} patches you make a table of {gw} x "
               f"{gh}: it has as many positions, and other ones.")
        _slopes(resize, grid, gh, gw)
        if not close(made[0, 1:], right, 1e-3):
            _not_bicubic(made[0, 1:], positions, grid, gh, gw)
    half = positions.bfloat16()
    gh, gw = grid + 1, grid
    made = expect_tensor(resize(half, gh, gw), (1, 1 + gh * gw, e), "the result", "(1 v e)", torch.bfloat16)
    expect(close(made[0, 1:].float(), _bicubic(half[0, 1:].float(), grid, gh, gw), 0.03),
           "in bfloat16 the result is far from that in float32.")


def _slopes(resize: Callable, grid: int, gh: int, gw: int) -> None:
    """Positions that tell their row must still do so, and say nothing of columns."""
    rows = torch.arange(grid).float()[:, None].expand(grid, grid).reshape(1, -1, 1)
    ramp = torch.cat([torch.zeros(1, 1, 1), rows], dim=1)
    made = expect_tensor(resize(ramp, gh, gw), (1, 1 + gh * gw, 1), "the result", "(1 v e)").detach()
    made = made[0, 1:, 0].reshape(gh, gw)
    across = float((made - made[:, :1]).abs().max())
    down = float((made - made[:1]).abs().max())
    expect(across < 1e-3 or down >= 1e-3 or gh == 1, "rows have become columns: positions that told their row tell "
           "their column after your resizing. Which of the two is counted first?")
    expect(across < 1e-3, "positions that told their row, and nothing of their column, differ along a row after your "
           "resizing: were they laid out as the table that they come from?")


def _bicubic(positions: Tensor, grid: int, gh: int, gw: int) -> Tensor:
    """Resized one axis after the other, each new place a weighted mean of four old ones: (v e)."""
    def cubic(distance: float, a: float = -0.75) -> float:
        t = abs(distance)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def along(new: int) -> Tensor:
        matrix = torch.zeros(new, grid)
        for row in range(new):
            place = (row + 0.5) * grid / new - 0.5
            for near in range(math.floor(place) - 1, math.floor(place) + 3):
                matrix[row, min(max(near, 0), grid - 1)] += cubic(place - near)
        return matrix

    down, across = along(gh), along(gw)
    return torch.stack([down @ channel.reshape(grid, grid) @ across.T for channel in positions.T]).flatten(1).T


def _not_bicubic(output: Tensor, positions: Tensor, grid: int, gh: int, gw: int) -> None:
    """Raise Wrong with what wrong positions are instead."""
    table = positions[0, 1:].T.reshape(1, -1, grid, grid)
    known = [(dict(mode="bicubic", align_corners=True), "the outermost positions stay at the outermost patches; asked "
              "for are areas that match, so that a new place may lie further out."),
             (dict(mode="bilinear"), "each new position is a mean of the two neighbours along an axis; asked for are "
              "four, weighted by a cubic."),
             (dict(mode="nearest"), "each new position is a copy of the nearest old one; neighbours should be mixed."),
             (dict(mode="nearest-exact"), "each new position is a copy of the nearest old one; neighbours should be "
              "mixed."),
             (dict(mode="area"), "each new position is the mean of an area; asked for are four neighbours along an "
              "axis, weighted by a cubic."),
             (dict(mode="bicubic", antialias=True), "the table was blurred before it was made smaller. For pictures "
              "that is right; the encoders' own code resizes positions without.")]
    for how, meaning in known:
        expect(not close(output, F.interpolate(table, size=(gh, gw), **how)[0].flatten(1).T, 1e-3), meaning)
    expect(False, f"from {grid} x {grid} to {gh} x {gw} the positions are not the old ones, resized bicubically. Does "
                  "every channel stay on its own, and does each position come from its own neighbourhood?")


# --- a map ------------------------------------------------------------------------------------------------------------


@exercise("03.3", "lesson 03, sections 1 and 4; the class token: lesson 01, section 12")
def brightest(box_of: Callable) -> None:
    """The square of pixels on which the largest weight of a patch rests."""
    wrong, meant = "", []
    for trial in range(12):
        patch, class_token = random.choice((7, 8, 14, 16)), trial % 3 > 0
        gh, gw = random.sample(range(2, 7), 2)
        weights = torch.rand(gh * gw + class_token).softmax(dim=0)
        if trial % 3 == 2:
            weights[0] = 2 * weights.max()  # the class token gets the most, as it often does
            weights = weights / weights.sum()
        output = box_of(weights.clone(), gh * patch, gw * patch, patch)
        expect(isinstance(output, tuple | list) and len(output) == 4
               and all(isinstance(number, int | float) for number in output),
               f"your function answers {output!r}; asked for are four numbers: left, top, right, bottom.")
        patches = weights.tolist()[class_token:]
        place = patches.index(max(patches))
        if tuple(output) != _square(place, gw, patch):
            slips = _slips(weights.tolist(), place, gh, gw, patch)
            meant.append({meaning for box, meaning in slips if box == tuple(output)})
            order = [meaning for _, meaning in slips]
            wrong = (f"with {len(weights)} weights for {gh} x {gw} patches of {patch} pixels you "
                     f"answer {tuple(output)}")
    if wrong:  # one mistake that explains every wrong answer, if there is one
        shared = sorted(set.intersection(*meant), key=order.index)
        expect(False, f"{wrong}: {(shared or ['find the row and the column of that patch first.'])[0]}")


def _slips(weights: list[float], place: int, gh: int, gw: int, patch: int) -> list[tuple[tuple[int, ...], str]]:
    """Wrong boxes for the patch of number `place`, and what each of them means."""
    left, top, right, bottom = _square(place, gw, patch)
    before = weights[:-1]
    extra = "sometimes there is one weight more than there are patches: whose is it, and where does it stand?"
    with_class = [] if len(weights) == gh * gw else [
        (_square(place + 1, gw, patch), extra), (_square(before.index(max(before)), gw, patch), extra),
        (_square(weights.index(max(weights)), gw, patch), extra)]
    return [*with_class,
            ((top, left, bottom, right), "across and down are swapped."),
            ((left, top, patch, patch), "the last two numbers are width and height; asked for are the right and the "
             "lower edge."),
            ((left, top, right - 1, bottom - 1), "the right and the lower edge are where the next patch would begin."),
            (tuple(edge // patch for edge in (left, top, right, bottom)), "these are numbers of patches; asked for are "
             "pixels."),
            (_square(place, gh, patch), "a row is as long as the grid is wide, not as it is high."),
            (_square(place, gh, patch, down=True), "patches are counted along a row, and then down.")]


def _square(number: int, gw: int, patch: int, down: bool = False) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a patch, in rows of gw; with `down` as if row and column were each other."""
    row, column = number // gw, number % gw
    if down:
        row, column = column, row
    return column * patch, row * patch, (column + 1) * patch, (row + 1) * patch


# --- which layer ------------------------------------------------------------------------------------------------------


class SomeViT(nn.Module):
    """A small encoder whose forward nobody knows: it has `blocks` and `norm`, and something before them."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.something = nn.Linear(3, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight, mean=1.0, std=0.3)

    def steps(self, image_features: Tensor) -> list[Tensor]:
        """What enters the blocks, and what leaves each: (b v e)."""
        x = [self.something(image_features.flatten(2).mT)]
        for block in self.blocks:
            x.append(block(x[-1]))
        return x

    def forward(self, image_features: Tensor) -> Tensor:
        """image (b c H W) -> (b v e)."""
        return self.norm(self.steps(image_features)[-1])


@exercise("03.4", "lesson 03, section 8")
def second_to_last(features_of: Callable) -> None:
    """What leaves the second-to-last block."""
    for depth in (random.randint(4, 6), 2):
        vit = SomeViT(depth, random.randint(5, 8)).eval().requires_grad_(False)
        image = torch.randn(random.randint(1, 3), 3, 2, random.randint(3, 5))
        parts, weights = list(vit.modules()), deepcopy(vit.state_dict())
        steps, final = vit.steps(image), vit(image)
        output = expect_tensor(features_of(vit, image), final.shape, "the result", "(b v e)")
        expect(list(vit.modules()) == parts, "your function has changed the encoder: its parts are not those that it "
               "had. Whoever runs it next gets something else.")
        expect(all(torch.equal(value, weights[name]) for name, value in vit.state_dict().items()),
               "your function has changed the encoder's weights.")
        left = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in vit.modules())
        expect(left == 0, f"{left} hook is left in the encoder: it goes on listening, and each call adds another one.")
        expect(close(vit(image), final), "after your function the encoder gives something else than before.")
        with torch.no_grad():
            normed = [vit.norm(step) for step in steps]
        slips = [(final, "that is what leaves the whole encoder."),
                 (steps[-1], "that is what leaves the last block; the paper takes it one block before."),
                 (normed[-2], "the final norm was applied to it. That norm was trained for what leaves the last block; "
                  "BLIP-2 gives the bridge a norm of its own."),
                 (steps[0], "that is what enters the first block."),
                 (steps[-3], "that is one block too early: is it what enters that block, or what leaves it?")]
        if close(output, steps[-2]):
            continue
        meaning = next((text for step, text in slips if close(output, step)), "it is not what leaves any block.")
        expect(False, f"of an encoder with {depth} blocks: {meaning}")
    _another(features_of)


def _another(features_of: Callable) -> None:
    """The same encoder twice, with another picture: nothing may be left over from the first time."""
    vit = SomeViT(3, 6).eval().requires_grad_(False)
    for _ in range(2):
        image = torch.randn(2, 3, 2, 2)
        output = features_of(vit, image)
        expect_tensor(output, (2, 4, 6), "the result", "(b v e)")
        expect(close(output, vit.steps(image)[-2]), "called a second time, with another picture, you return something "
               "that is left over from the first.")


# --- frozen -----------------------------------------------------------------------------------------------------------


@exercise("03.5", "lesson 03, sections 9 and 10")
def frozen(freeze: Callable) -> None:
    """An encoder that does not change, whatever is done to what it is a part of."""
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                            nn.Sequential(nn.Conv2d(6, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Flatten(2)))
    for part in (encoder[1], encoder[4][1]):
        part.running_mean.normal_()
        part.running_var.uniform_(0.5, 2)
    images = torch.randn(5, 3, 4, 6)
    with torch.no_grad():
        expected = deepcopy(encoder).eval()(images)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    made = freeze(encoder)
    expect(made is not None, "the result is None: hand the encoder back, so that it can be put to use.")
    expect(isinstance(made, nn.Module), f"the result is a {type(made).__name__}, not an nn.Module.")
    expect(all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items()),
           "freezing has already changed the weights.")
    wanting = [name for name, weight in made.named_parameters() if weight.requires_grad]
    expect(not wanting, f"{len(wanting)} parameters still want a gradient, {', '.join(wanting[:2])} among them: an "
           "attribute that is set on a module does not reach its parameters by itself.")
    with torch.no_grad():
        output = expect_tensor(made(images), expected.shape, "what the frozen encoder gives")
    expect(close(output, expected),
           "before any training the features are not those of the encoder in eval mode: dropout "
           "rolls dice, or batch norm looks at the batch.")
    with torch.no_grad():
        expect(close(made(images), output),
               "the same pictures, encoded a second time, give other features: something in "
               "the encoder is written down each time.")
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
    lively = [name for name, part in encoder.named_modules() if part.training and name]
    with torch.no_grad():
        alone = encoder(images[:1])
    expect(close(alone, expected[:1]), "model.train() was called on the whole, as every training loop does, and the "
           "encoder went along"
           + (f" ({len(lively)} of its parts are in train mode)" if lively else "")
           + ": its features are no longer those of eval mode. A gradient is not the only way to change.")
    for _ in range(3):
        optimiser.zero_grad()
        loss = model["head"](encoder(images * 2 + 1)).square().mean() + model["head"][0].weight.sum()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        after = encoder(images)
    expect(close(after, expected), "after three steps of training the encoder gives other features: something in it "
           "was written down on the way, though no parameter wants a gradient.")
    expect(any(not torch.equal(one, other) for one, other in zip(head, model["head"].parameters(), strict=True)),
           "the head did not learn: freeze the encoder and nothing else.")

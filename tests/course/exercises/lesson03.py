"""Answers to the exercises of lesson 03."""

import math
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

from minblip2.vit import ViT, ViTConfig

from . import Answers

# --- tokens -----------------------------------------------------------------------------------------------------------


def by_linear(image, weight, bias):
    p = weight.shape[-1]
    patches = rearrange(image, "b c (gh p1) (gw p2) -> b (gh gw) (c p1 p2)", p1=p, p2=p)
    return F.linear(patches, rearrange(weight, "e c p1 p2 -> e (c p1 p2)"), bias)


def by_einsum(image, weight, bias):
    p = weight.shape[-1]
    patches = rearrange(image, "b c (gh p1) (gw p2) -> b (gh gw) c p1 p2", p1=p, p2=p)
    return einsum(patches, weight, "b v c p1 p2, e c p1 p2 -> b v e") + bias


def by_convolution(image, weight, bias):
    return F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).mT


def by_unfolding(image, weight, bias):
    p = weight.shape[-1]
    return F.unfold(image, p, stride=p).mT @ weight.flatten(1).T + bias


def by_slices(image, weight, bias):
    p = weight.shape[-1]
    return torch.stack([(image[:, None, :, top:top + p, left:left + p] * weight).sum(dim=(2, 3, 4)) + bias
                        for top in range(0, image.shape[2], p) for left in range(0, image.shape[3], p)], dim=1)


def down_the_columns(image, weight, bias):
    return rearrange(F.conv2d(image, weight, bias, stride=weight.shape[-1]), "b e gh gw -> b (gw gh) e")


def colours_last(image, weight, bias):
    p = weight.shape[-1]
    patches = rearrange(image, "b c (gh p1) (gw p2) -> b (gh gw) (p1 p2 c)", p1=p, p2=p)
    return F.linear(patches, weight.flatten(1), bias)


def stretches(image, weight, bias):
    return F.linear(image.reshape(len(image), -1, weight[0].numel()), weight.flatten(1), bias)


def wrong_side(image, weight, bias):
    return by_linear(image, weight.mT, bias)


def turned(image, weight, bias):
    return by_linear(image, weight.flip(2, 3), bias)


def overlapping(image, weight, bias):
    return by_linear(F.avg_pool2d(image, 3, stride=1, padding=1), weight, bias)


def smoothed(image, weight, bias):
    tokens = by_linear(image, weight, bias)
    return tokens + tokens.mean(dim=1, keepdim=True)


def detached(*which):
    def embed(image, weight, bias):
        given = {"image": image, "weight": weight, "bias": bias}
        return by_linear(*(one.detach() if name in which else one for name, one in given.items()))
    return embed


def wide_only(image, weight, bias):
    """The mistake to take the longer side for the width."""
    grid = sorted(side // weight.shape[-1] for side in image.shape[2:])
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[-1])
    return tokens.reshape(len(image), len(bias), *grid).flatten(2).mT if image.shape[2] <= image.shape[3] else (
        down_the_columns(image, weight, bias))


def square_only(image, weight, bias):
    tokens = by_linear(image, weight, bias)
    gh, gw = (side // weight.shape[-1] for side in image.shape[2:])
    return tokens.unflatten(1, (gh, gw)).transpose(1, 2).flatten(1, 2) if gh == gw else tokens


def fixed_patch(image, weight, bias):
    return F.conv2d(image, weight, bias, stride=4).flatten(2).mT


def three_colours(image, weight, bias):
    return sum(by_linear(image[:, [c]], weight[:, [c]], bias / 3) for c in range(3))


def by_pixels_and_colours(image, weight, bias):
    p = weight.shape[-1]
    patches = rearrange(image, "b c (gh p1) (gw p2) -> b (gh gw) (p1 p2 c)", p1=p, p2=p)
    return torch.matmul(patches, rearrange(weight, "e c p1 p2 -> (p1 p2 c) e")).add(bias)


# --- positions --------------------------------------------------------------------------------------------------------


def resized(source="1 (gh gw) e -> 1 e gh gw", swapped=False, **how):
    """Positions resized by PyTorch, in one way or another."""
    def resize(positions, gh, gw):
        grid = math.isqrt(positions.shape[1] - 1)
        table = positions[:, 1:].float().transpose(1, 2).unflatten(2, (grid, grid))
        if source != "1 (gh gw) e -> 1 e gh gw":
            table = table.transpose(2, 3)
        made = F.interpolate(table, size=(gw, gh) if swapped else (gh, gw), **({"mode": "bicubic"} | how))
        return torch.cat([positions[:, :1], made.flatten(2).mT.to(positions.dtype)], dim=1)
    return resize


def by_module(positions, gh, gw):
    grid = math.isqrt(positions.shape[1] - 1)
    config = ViTConfig(image_size=2 * grid, patch_size=2, width=positions.shape[2], layers=0, heads=1, mlp_width=2)
    vit = ViT(config)
    del vit.position_embedding
    vit.position_embedding = positions
    return vit.positions_for(gh, gw)


def by_einops(positions, gh, gw):
    grid = round((positions.shape[1] - 1) ** 0.5)
    table = rearrange(positions[:, 1:], "1 (gh gw) e -> 1 e gh gw", gh=grid)
    table = F.interpolate(table.float(), (gh, gw), mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([positions[:, :1], rearrange(table, "1 e gh gw -> 1 (gh gw) e")], dim=1)


def channel_by_channel(positions, gh, gw):
    grid = math.isqrt(positions.shape[1] - 1)
    made = [F.interpolate(channel.reshape(1, 1, grid, grid), (gh, gw), mode="bicubic").flatten()
            for channel in positions[0, 1:].float().T]
    patches = torch.stack(made, dim=1)
    return torch.cat([positions[0, :1], patches.to(positions.dtype)])[None]


def class_last(positions, gh, gw):
    return by_einops(positions, gh, gw).roll(-1, dims=1)


def class_dropped(positions, gh, gw):
    return by_einops(positions, gh, gw)[:, 1:]


def class_resized(positions, gh, gw):
    made = F.interpolate(positions.float().mT, size=1 + gh * gw, mode="linear").mT
    return made.to(positions.dtype)


def class_replaced(positions, gh, gw):
    made = by_einops(positions, gh, gw)
    return torch.cat([made[:, 1:].mean(dim=1, keepdim=True), made[:, 1:]], dim=1)


def the_first_ones(positions, gh, gw):
    count = positions.shape[1] - 1
    return torch.cat([positions[:, :1], positions[:, 1:][:, torch.arange(gh * gw) % count]], dim=1)


def always_float(positions, gh, gw):
    return by_einops(positions.float(), gh, gw)


def in_place(positions, gh, gw):
    made = by_einops(positions, gh, gw)
    positions[:, 0] = 0
    return made


def in_half(positions, gh, gw):
    grid = math.isqrt(positions.shape[1] - 1)
    table = positions[:, 1:].mT.unflatten(2, (grid, grid))
    return torch.cat([positions[:, :1], F.interpolate(table, (gh, gw), mode="bicubic").flatten(2).mT], dim=1)


def by_matrices(positions, gh, gw, kind=torch.float32):
    """Resized along one axis after the other, with what resizing makes of single places."""
    grid = math.isqrt(positions.shape[1] - 1)
    down, across = (F.interpolate(torch.eye(grid)[None, :, :, None], (new, 1), mode="bicubic")[0, :, :, 0].T.to(kind)
                    for new in (gh, gw))
    table = positions[0, 1:].to(kind).unflatten(0, (grid, grid))
    made = torch.einsum("yi,xj,ije->yxe", down, across, table).flatten(0, 1)[None]
    return torch.cat([positions[:, :1], made.to(positions.dtype)], dim=1)


def fixed_grid(positions, gh, gw):
    return resized()(torch.cat([positions[:, :1], positions[:, 1:17]], dim=1), gh, gw)


def untouched_where_it_fits(positions, gh, gw):
    """The mistake to compare only the number of patches."""
    return positions if gh * gw == positions.shape[1] - 1 else by_einops(positions, gh, gw)


# --- a map ------------------------------------------------------------------------------------------------------------


def by_divmod(weights, height, width, patch, drop=None, across=None, swap=False, size=False, unit=None, inclusive=0):
    gh, gw = height // patch, width // patch
    drop = len(weights) - gh * gw if drop is None else drop
    weights = weights[drop:]
    row, column = divmod(int(weights.argmax()), across or gw)
    if swap:
        row, column = column, row
    unit = unit or patch
    left, top = column * unit, row * unit
    return (left, top, unit, unit) if size else (left, top, left + unit - inclusive, top + unit - inclusive)


def by_grid(weights, height, width, patch):
    gh, gw = height // patch, width // patch
    grid = weights[len(weights) - gh * gw:].reshape(gh, gw)
    row, column = (grid == grid.max()).nonzero()[0].tolist()
    return [column * patch, row * patch, (column + 1) * patch, (row + 1) * patch]


def by_pixels(weights, height, width, patch):
    gh, gw = height // patch, width // patch
    grid = weights[-gh * gw:].reshape(gh, gw)
    rows, columns = (grid.repeat_interleave(patch, 0).repeat_interleave(patch, 1) == grid.max()).nonzero().T
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def last_dropped(weights, height, width, patch):
    return by_divmod(weights[:height // patch * (width // patch)], height, width, patch)


def rows_too_long(weights, height, width, patch):
    return by_divmod(weights, height, width, patch, across=height // patch)


def column_by_column(weights, height, width, patch):
    row, column = divmod(int(weights[-(height // patch) * (width // patch):].argmax()), height // patch)
    return row * patch, column * patch, (row + 1) * patch, (column + 1) * patch


def by_largest(weights, height, width, patch):
    """The mistake to take a first weight that is the largest for the class token's."""
    return by_divmod(weights[1:] if weights.argmax() == 0 else weights, height, width, patch, drop=0)


def by_parity(weights, height, width, patch):
    return by_divmod(weights, height, width, patch, drop=len(weights) % 2)


def by_root(weights, height, width, patch):
    return by_divmod(weights, height, width, patch, drop=math.isqrt(len(weights)) ** 2 != len(weights))


# --- which layer ------------------------------------------------------------------------------------------------------


def heard(vit, image, block=-2, before=False, remove=True, change=lambda x, vit: x):
    kept = []
    part = vit.blocks[block]
    hook = (part.register_forward_pre_hook(lambda part, given: kept.append(given[0])) if before
            else part.register_forward_hook(lambda part, given, result: kept.append(result)))
    vit(image)
    if remove:
        hook.remove()
    return change(kept[0], vit)


def entering_the_last(vit, image):
    return heard(vit, image, -1, before=True)


def shortened(vit, image):
    short = deepcopy(vit)
    short.blocks = short.blocks[:-1]
    short.norm = nn.Identity()
    return short(image)


def shortened_in_place(vit, image):
    vit.blocks, vit.norm = vit.blocks[:-1], nn.Identity()
    return vit(image)


def only_shorter(vit, image):
    short = deepcopy(vit)
    short.blocks = short.blocks[:-1]
    return short(image)


def zeroed(vit, image):
    features = heard(vit, image)
    vit.norm.weight.data.zero_()
    return features


def in_eval_mode(vit, image):
    vit.eval()
    return heard(vit, image)


def wants_no_gradient(vit, image):
    vit.requires_grad_(False)
    return heard(vit, image)


def clears_all(vit, image):
    features = heard(vit, image)
    vit.blocks[-2]._forward_hooks.clear()
    return features


def runs_twice(vit, image):
    vit(image)
    return heard(vit, image)


def keeps_an_attribute(vit, image):
    vit.features = heard(vit, image)
    return vit.features


def own_forward(vit, image, restore=True):
    """The block's forward replaced, and put back."""
    kept, block = [], vit.blocks[-2]
    forward = block.forward
    block.forward = lambda x: kept.append(forward(x)) or kept[-1]
    vit(image)
    if restore:
        block.forward = forward
    return kept[0]


def without_the_last(vit, image):
    """The last block and the norm put aside for one call."""
    last, norm = vit.blocks[-1], vit.norm
    vit.blocks[-1], vit.norm = nn.Identity(), nn.Identity()
    try:
        return vit(image)
    finally:
        vit.blocks[-1], vit.norm = last, norm


def numbered(place):
    return lambda vit, image: heard(vit, image, place)


def never_called(vit, image):
    part = next(part for part in vit.children() if isinstance(part, nn.Linear))
    x = part(image.flatten(2).mT)
    for block in vit.blocks[:-1]:
        x = block(x)
    return x


class Remembers:
    """Keeps what it heard first, for ever."""

    def __init__(self):
        self.kept = {}

    def __call__(self, vit, image):
        key = tuple(vit.norm.weight.flatten().tolist())
        return self.kept.setdefault(key, heard(vit, image))


# --- frozen -----------------------------------------------------------------------------------------------------------


def as_lavis(encoder):
    encoder.eval().requires_grad_(False)
    encoder.train = lambda mode=True: encoder
    return encoder


class Locked(nn.Module):
    """The encoder inside, and a train that stays in eval mode."""

    def __init__(self, encoder):
        super().__init__()
        self.inner = encoder.requires_grad_(False)
        self.train()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, image):
        return self.inner(image)


class Hidden(nn.Module):
    """The encoder in a list, where no module finds it."""

    def __init__(self, encoder):
        super().__init__()
        self.inner = [encoder.eval()]
        for weight in encoder.parameters():
            weight.requires_grad = False

    @torch.no_grad()
    def forward(self, image):
        return self.inner[0](image)


def only_gradients(encoder):
    return encoder.eval().requires_grad_(False)


def only_gradients_in_train_mode(encoder):
    return encoder.requires_grad_(False)


def only_an_attribute(encoder):
    encoder.requires_grad = False
    return as_attribute(encoder.eval())


def as_attribute(encoder):
    encoder.train = lambda mode=True: encoder
    return encoder


def only_its_top(encoder):
    for part in encoder:
        for weight in part.parameters(recurse=False):
            weight.requires_grad = False
    return as_attribute(encoder.eval())


def only_eval(encoder):
    return encoder.eval()


def without_momentum(encoder):
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
    return encoder.eval().requires_grad_(False)


def only_dropout(encoder):
    encoder[3] = nn.Identity()
    return encoder.eval().requires_grad_(False)


def hands_nothing_back(encoder):
    as_lavis(encoder)


def without_statistics(encoder):
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    return as_lavis(encoder)


def patches_the_class(encoder):
    nn.Module.train = lambda self, mode=True: self
    return encoder.eval().requires_grad_(False)


def patches_its_class(encoder):
    encoder.eval().requires_grad_(False)
    type(encoder).train = lambda self, mode=True: self
    return encoder


def known_layers_only(encoder):
    """The mistake to hold only the layers that one can name."""
    encoder.eval().requires_grad_(False)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d | nn.Dropout):
            part.train = lambda mode=True, part=part: part
    return encoder


def switches_gradients_off(encoder):
    torch.set_grad_enabled(False)
    return as_lavis(encoder)


def every_part(encoder):
    """Each part keeps its own mode."""
    encoder.eval().requires_grad_(False)
    for part in encoder.modules():
        part.train = lambda mode=True, part=part: part
    return encoder


class Eval(nn.Module):
    """The encoder around which every call switches to eval mode first."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)

    def forward(self, image):
        self.encoder.eval()
        return self.encoder(image)


def of_another_class(encoder):
    own = type("Frozen", (type(encoder),), {"train": lambda self, mode=True: nn.Sequential.train(self, False)})
    encoder.__class__ = own
    return encoder.eval().requires_grad_(False)


def copied(encoder):
    return as_lavis(deepcopy(encoder))


class WritesDown(Locked):
    """In eval mode, but it keeps a running mean by itself."""

    def forward(self, image):
        output = self.inner(image)
        self.inner[1].running_mean.lerp_(self.inner[0](image).mean(dim=(0, 2, 3)), 0.1)
        return output


class WakesUp(Locked):
    """In train mode whenever there are gradients."""

    def forward(self, image):
        self.inner.train(torch.is_grad_enabled())
        return self.inner(image)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def by_tensordot(image, weight, bias):
    p = weight.shape[-1]
    squares = image.unfold(2, p, p).unfold(3, p, p)
    return torch.tensordot(squares, weight, dims=([1, 4, 5], [1, 2, 3])).flatten(1, 2) + bias


def all_in_one_mode(vit, image):
    """The mistake to put every part into the mode of the whole."""
    was = vit.training
    try:
        return heard(vit.eval(), image)
    finally:
        vit.train(was)


def by_factor(positions, gh, gw):
    """Resized by factors, without the 0.1 that DINO adds: 11 times 15 / 11 is 14."""
    grid = math.isqrt(positions.shape[1] - 1)
    table = positions[:, 1:].float().mT.unflatten(2, (grid, grid))
    table = F.interpolate(table, scale_factor=(gh / grid, gw / grid), mode="bicubic")
    return torch.cat([positions[:, :1], table.flatten(2).mT.to(positions.dtype)], dim=1)


def class_cut(positions, gh, gw):
    result = by_einops(positions, gh, gw)
    return torch.cat([positions[:, :1].detach(), result[:, 1:]], dim=1)


def by_loop_over_squares(weights, height, width, patch):
    corners = [(left, top) for top in range(0, height, patch) for left in range(0, width, patch)]
    left, top = corners[int(np.argmax(weights.numpy()[-len(corners):]))]
    return np.array([left, top, left + patch, top + patch])


def stopped_on_the_way(vit, image):
    class Enough(Exception):
        pass

    kept = []

    def keep(block, inputs, output):
        kept.append(output)
        raise Enough

    hook = vit.blocks[-2].register_forward_hook(keep)
    try:
        vit(image)
    except Enough:
        pass
    finally:
        hook.remove()
    return kept[0]


def hears_all_and_forgets_one(vit, image):
    kept = []
    hooks = [block.register_forward_hook(lambda block, inputs, output: kept.append(output)) for block in vit.blocks]
    vit(image)
    hooks[-2].remove()
    return kept[-2]


def gives_nothing_back(encoder):
    encoder.eval().requires_grad_(False).train = lambda mode=True: None
    return encoder


def asks_for_a_mode(encoder):
    encoder.eval().requires_grad_(False).train = lambda mode: encoder
    return encoder


def only_its_parts(encoder):
    """The mistake to leave the top of the encoder in train mode."""
    encoder.eval().requires_grad_(False)
    for part in encoder.children():
        part.train = lambda mode=True, part=part: part
    return encoder


def at_each_call(encoder):
    """Whatever mode it is in, it is put into eval mode before it runs."""
    encoder.eval().requires_grad_(False)
    encoder.register_forward_pre_hook(lambda part, given: nn.Module.train(part, False) and None)
    return encoder


ANSWERS = {
    "patch_tokens": Answers(
        [by_tensordot,
         by_linear, by_einsum, by_convolution, by_unfolding, by_slices, by_pixels_and_colours],
        [(lambda image, weight, bias: by_linear(image.clamp(-3, 3), weight, bias), ""),
         (down_the_columns, "down the columns"), (colours_last, "the wrong weights"),
         (stretches, "a stretch of memory"),
         (wrong_side, "a transposed weight"), (turned, "weights are flipped"), (overlapping, "do not overlap"),
         (smoothed, "no token looks at others"),
         (lambda image, weight, bias: by_linear(image, weight, torch.zeros_like(bias)), "bias is missing"),
         (lambda image, weight, bias: by_linear(image, weight, 2 * bias), "more than once"),
         (lambda image, weight, bias: by_linear(image, 2 * weight, bias), "loop over squares"),
         (detached("image"), "reaches the picture"), (detached("weight"), "reaches the weight"),
         (detached("bias"), "reaches the bias"), (detached("image", "weight", "bias"), "no gradient flows"),
         (wide_only, "as one reads"), (square_only, "as one reads"),
         (fixed_patch, ""), (three_colours, ""), (lambda image, weight, bias: by_linear(image.flip(1), weight, bias),
                                                  "colours are swapped"),
         (lambda image, weight, bias: by_linear(image.float(), weight.float(), bias.float()), "keep the dtype"),
         (lambda image, weight, bias: F.dropout(by_linear(image, weight, bias), 0.1), "two different results"),
         (lambda image, weight, bias: by_linear(image, weight, bias).mT, "(b v e)"),
         (lambda image, weight, bias: F.conv2d(image, weight, bias, stride=weight.shape[-1]), "(b v e)"),
         (lambda image, weight, bias: by_linear(image[:, :, :1].expand_as(image), weight, bias), "no token at all")]),
    "resize_positions": Answers(
        [by_module, by_einops, channel_by_channel, resized(), by_matrices],
        [(by_factor, "give the size itself"), (class_cut, "reaches the positions"),
         (class_last, "at the end"), (class_dropped, "(1 v e)"), (class_resized, "nothing to resize"),
         (class_replaced, "nothing to resize"), (resized(align_corners=True), "outermost"),
         (resized(mode="bilinear"), "two neighbours"), (resized(mode="nearest"), "a copy of the nearest"),
         (resized(antialias=True), "blurred"), (resized(source="1 (gw gh) e -> 1 e gh gw"), "rows have become columns"),
         (resized(swapped=True), "other ones"), (the_first_ones, "differ along a row"),
         (in_half, "compute in float32"), (fixed_grid, ""), (untouched_where_it_fits, ""),
         (lambda *given: by_matrices(*given, kind=given[0].dtype), "compute in float32"),
         (lambda *given: by_einops(*given).detach(), "no gradient flows"),
         (resized(mode="area"), "mean of an area"), (resized(mode="nearest-exact"), "neighbours should be mixed"),
         (always_float, "torch.bfloat16"), (in_place, "changed the positions")]),
    "brightest": Answers(
        [by_loop_over_squares,
         by_divmod, by_grid, by_pixels, lambda *given: np.array(by_divmod(*given)),
         lambda *given: torch.tensor(by_divmod(*given)), lambda *given: [float(edge) for edge in by_divmod(*given)],
         lambda *given: tuple(torch.tensor(edge) for edge in by_divmod(*given))],
        [(lambda *given: tuple(sorted(by_divmod(*given))), ""),
         (lambda *given: by_divmod(*given, drop=0), "one weight more"), (last_dropped, "one weight more"),
         (lambda *given: by_divmod(*given, swap=True), "swapped"), (rows_too_long, "as long as the grid is wide"),
         (lambda *given: by_divmod(*given, size=True), "width and height"),
         (lambda *given: by_divmod(*given, unit=1), "numbers of patches"),
         (lambda *given: by_divmod(*given, inclusive=1), "where the next patch"),
         (column_by_column, "along a row"), (lambda *given: by_divmod(*given)[:2], "four numbers"),
         (lambda *given: (0, 0, 1, 1), "how many patches"), (by_largest, "class token"), (by_parity, ""),
         (by_root, ""), (lambda *given: by_divmod(*given, drop=1), "not every encoder"),
         (lambda *given: [str(edge) for edge in by_divmod(*given)], "should be a number"),
         (lambda *given: tuple(by_divmod(*given)[i] for i in (0, 2, 1, 3)), "another order"),
         (lambda *given: tuple(by_divmod(*given)[i] + (i > 1) for i in range(4)), "left and top are right"),
         (lambda weights, *given: by_divmod(-weights[-(given[0] // given[2]) * (given[1] // given[2]):], *given),
          "smallest weight"), (lambda weights, *given: by_divmod(weights.fill_(1), *given), "changed the weights")]),
    "second_to_last": Answers(
        [stopped_on_the_way,
         heard, entering_the_last, shortened, own_forward, without_the_last, torch.no_grad()(heard)],
        [(all_in_one_mode, "and eval mode"),
         (hears_all_and_forgets_one, "left in the encoder"),
         (lambda vit, image: vit(image), "the whole encoder"),
         (lambda vit, image: heard(vit, image, -1), "one block before"),
         (lambda vit, image: heard(vit, image, before=True), "one block too early"),
         (lambda vit, image: heard(vit, image, change=lambda x, vit: vit.norm(x)), "a norm of its own"),
         (only_shorter, "a norm of its own"), (shortened_in_place, "has changed the encoder"),
         (zeroed, "encoder's weights"), (lambda vit, image: heard(vit, image, remove=False), "left in the encoder"),
         (lambda vit, image: heard(vit, image, 0, before=True), "enters the first block"),
         (lambda vit, image: heard(vit, image)[:, 1:], "(b v e)"), (Remembers(), "left over from the first"),
         (in_eval_mode, "between train and eval"), (wants_no_gradient, "require a gradient"),
         (clears_all, "somebody else's hook"), (runs_twice, "ran 2 times"), (keeps_an_attribute, "left something"),
         (lambda vit, image: own_forward(vit, image, restore=False), "left something"), (never_called, "never called"),
         (numbered(0), "what leaves the first block"), (numbered(2), ""), (numbered(-3), ""),
         (lambda vit, image: 2 * heard(vit, image), "not the features")]),
    "frozen": Answers(
        [at_each_call,
         as_lavis, Locked, Hidden, every_part, Eval, of_another_class, copied],
        [(gives_nothing_back, "lose the encoder"),
         (asks_for_a_mode, "and without one"),
         (only_its_parts, "the encoder followed"),
         (only_gradients, "the encoder followed"), (only_gradients_in_train_mode, "dropout is on"),
         (only_an_attribute, "by itself"), (only_its_top, "still require a gradient"),
         (only_eval, "still require a gradient"), (without_momentum, "encoder followed"),
         (only_dropout, "encoder followed"),
         (hands_nothing_back, "return the encoder"), (without_statistics, "already changed"),
         (WritesDown, "each time"), (WakesUp, "updated on the way"),
         (patches_the_class, "changed the class Module"), (patches_its_class, "changed the class Whole"),
         (known_layers_only, "the encoder followed"), (switches_gradients_off, "switched off globally")]),
}

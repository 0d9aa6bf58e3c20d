"""Checks of lesson 16: accounting for every tensor, three matrices in one, and the first place where numbers part."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import close, exercise, expect, expect_tensor, slip_of

# --- every tensor is accounted for ------------------------------------------------------------------------------------

Shapes = Mapping[str, tuple[int, ...]]
Account = tuple[list[str], list[str], list[str]]
PARTS = ("query", "key", "value", "out")


def drawn_names(fault: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of a file and of a model; `fault` says in what they differ."""
    width = random.choice((4, 6, 8))
    model = {f"blocks.{layer}.attention.{part}.{kind}": (width, width) if kind == "weight" else (width,)
             for layer in range(3) for part in PARTS for kind in ("weight", "bias")}
    model["head.weight"], model["scale"] = (5 * width, width), ()
    file, names = dict(model), list(model)
    one, three = random.sample([name for name in names if name not in ("head.weight", "scale")], 2)
    two = random.choice([name for name in names if name.endswith("weight") and name not in (one, three, "head.weight")])
    if fault in ("missing", "all"):
        del file[one]
    if fault in ("left over", "all"):
        file["temperature"] = ()
        file[f"blocks.3.attention.{random.choice(PARTS)}.bias"] = (width,)
    if fault in ("shape", "all"):
        file[two] = (*file[two][:-1], file[two][-1] + 1)
    if fault == "turned":
        file["head.weight"] = (width, 5 * width)
    if fault == "size":  # as many numbers, in another shape
        file[three] = (1, *file[three])
    if fault == "longer":
        file[three] = (*file[three], 1)
    if fault == "renamed":
        file[one.replace("attention", "attn")] = file.pop(one)
    shuffled = list(file)
    random.shuffle(shuffled)
    return {name: torch.Size(file[name]) for name in shuffled}, {name: torch.Size(model[name]) for name in names}


def accounts(file: Shapes, model: Shapes) -> Account:
    """Missing, left over, and of another shape."""
    return (sorted(model.keys() - file.keys()), sorted(file.keys() - model.keys()),
            sorted(name for name in model.keys() & file.keys() if tuple(file[name]) != tuple(model[name])))


def numbers_in(shape: Sequence[int]) -> int:
    """How many numbers a tensor of this shape holds."""
    return torch.Size(shape).numel()


ACCOUNT_SLIPS: dict[str, Callable[[Shapes, Shapes], Account]] = {
    "missing and left over are exchanged: the model misses names, the file has some left over.":
        lambda file, model: (accounts(file, model)[1], accounts(file, model)[0], accounts(file, model)[2]),
    "shapes are not compared: a name that fits is half of it.":
        lambda file, model: (*accounts(file, model)[:2], []),
    "what is left over in the file is not reported: it belonged somewhere, or to another model.":
        lambda file, model: (accounts(file, model)[0], [], accounts(file, model)[2]),
    "what the model misses is not reported: it silently stays as it was initialised.":
        lambda file, model: ([], *accounts(file, model)[1:]),
    "you compare how many numbers a tensor holds: a matrix that is transposed has as many.":
        lambda file, model: (*accounts(file, model)[:2], [name for name in accounts(file, model)[2]
                                                          if numbers_in(file[name]) != numbers_in(model[name])]),
    "you compare how many axes a tensor has, and not how long they are.":
        lambda file, model: (*accounts(file, model)[:2], [name for name in accounts(file, model)[2]
                                                          if len(file[name]) != len(model[name])]),
    "a scalar has the shape (), which `if` takes for False: look with `in` whether a name is there.":
        lambda file, model: (sorted([*accounts(file, model)[0], *(name for name in model if file.get(name) == ())]),
                             sorted([*accounts(file, model)[1], *(name for name in file if model.get(name) == ())]),
                             accounts(file, model)[2]),
    "a tensor of another shape is there: it is neither missing nor left over.":
        lambda file, model: tuple(sorted({*some, *accounts(file, model)[2]}) for some in accounts(file, model)),
}


@exercise("16.1", "lesson 16, section 2, 'Nothing may be left over'")
def account(account_of: Callable[[Shapes, Shapes], Account]) -> None:
    """The names that are missing, left over, and of another shape."""
    faults = ("all", "none", "missing", "left over", "shape", "turned", "size", "longer", "renamed")
    games = [drawn_names(fault) for fault in faults]
    output: list[tuple] = []
    for file, model in games:
        before = dict(file), dict(model)
        given = account_of(file, model)
        expect((file, model) == before, "your function changed what it was given.")
        expect(isinstance(given, tuple | list) and len(given) == 3
               and all(isinstance(some, list | tuple | set | frozenset) for some in given),
               f"your function gives {str(given)[:80]}; the exercise asks for three lists of names.")
        for some, what in zip(given, ("missing", "left over", "misshapen"), strict=True):
            expect(all(isinstance(name, str) for name in some), f"the names that are {what} are not all names.")
            expect(len(some) == len(set(some)), f"a name stands twice among those that are {what}.")
        output.append(tuple(map(sorted, given)))
    right = [accounts(*game) for game in games]
    if output == right:
        return
    slip = slip_of(output, right, {why: [tuple(map(sorted, slip(*game))) for game in games]
                                   for why, slip in ACCOUNT_SLIPS.items()}, lambda one, two: one == two)
    expect(not slip, slip)
    what = {"all": "several things are wrong at once", "none": "nothing is wrong", "missing": "a tensor is missing",
            "left over": "two tensors are left over", "shape": "a tensor has another shape",
            "turned": "a matrix is turned, rows for columns", "size": "a tensor has an axis of 1 too many",
            "longer": "a tensor has an axis of 1 too many at its end", "renamed": "a tensor has another name"}
    number = next(number for number in range(len(games)) if output[number] != right[number])
    expect(False, f"in a file in which {what[faults[number]]} you find missing {output[number][0]}, left over "
           f"{output[number][1]}, and of another shape {output[number][2]}.")


# --- three matrices in one --------------------------------------------------------------------------------------------

Split = tuple[Tensor, Tensor]
Splitter = Callable[[Tensor, Tensor, Tensor, int], dict[str, Split]]


def thirds(weight: Tensor, q_bias: Tensor, v_bias: Tensor, order: str = "qkv", biases: str = "q0v") -> dict[str, Split]:
    """The three parts; what is given by name is a slip."""
    e = weight.shape[1]
    parts = {name: weight[number * e:(number + 1) * e] for number, name in enumerate(order)}
    known = {"q": q_bias, "v": v_bias, "0": torch.zeros_like(q_bias)}
    return {long: (parts[short], known[bias])
            for (long, short), bias in zip((("query", "q"), ("key", "k"), ("value", "v")), biases, strict=True)}


def head_by_head(weight: Tensor, q_bias: Tensor, v_bias: Tensor, heads: int) -> dict[str, Split]:
    """A slip: as models do that store [q1 ; k1 ; v1 ; q2 ; ...]."""
    e = weight.shape[1]
    cut = weight.reshape(heads, 3, e // heads, e)
    right = thirds(weight, q_bias, v_bias)
    return {name: (cut[:, number].reshape(e, e), right[name][1]) for number, name in enumerate(right)}


def interleaved(weight: Tensor, q_bias: Tensor, v_bias: Tensor, heads: int) -> dict[str, Split]:
    """A slip: every third row."""
    right = thirds(weight, q_bias, v_bias)
    return {name: (weight[number::3], right[name][1]) for number, name in enumerate(right)}


def turned(weight: Tensor, q_bias: Tensor, v_bias: Tensor, heads: int) -> dict[str, Split]:
    """A slip: rows for columns."""
    return {name: (part.T, bias) for name, (part, bias) in thirds(weight, q_bias, v_bias).items()}


SPLIT_SLIPS: dict[str, Splitter] = {
    "the matrix is cut head by head: in EVA's file all heads of q come first.": head_by_head,
    "every third row is taken: the three matrices stand one below the other.": interleaved,
    "the parts are taken for [k ; q ; v].": lambda w, q, v, heads: thirds(w, q, v, order="kqv"),
    "the parts are taken for [v ; k ; q].": lambda w, q, v, heads: thirds(w, q, v, order="vkq"),
    "the parts are taken for [q ; v ; k].": lambda w, q, v, heads: thirds(w, q, v, order="qvk"),
    "the parts are transposed: a linear layer's weight has a row for each output, here as there.": turned,
    "keys have got the queries' bias, and the file has none for them.":
        lambda w, q, v, heads: thirds(w, q, v, biases="qqv"),
    "keys have got the values' bias, and the file has none for them.":
        lambda w, q, v, heads: thirds(w, q, v, biases="qvv"),
    "the two biases are exchanged.": lambda w, q, v, heads: thirds(w, q, v, biases="v0q"),
}


def same_split(one: dict[str, Split], other: dict[str, Split]) -> bool:
    """Whether two splits hold the same numbers."""
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


@exercise("16.2", "lesson 16, section 5, 'Three matrices in one' and 'The bias that keys do not have'")
def split_fused(split: Splitter) -> None:
    """Query, key and value, each with its weight and its bias."""
    output, right, made = [], [], {why: [] for why in SPLIT_SLIPS}
    for heads, d, kind in ((2, 3, torch.float32), (3, 2, torch.float32), (4, 2, torch.float16), (2, 5, torch.float32)):
        e = heads * d
        weight, q_bias, v_bias = (torch.randn(size, dtype=kind) for size in ((3 * e, e), (e,), (e,)))
        given = weight.clone(), q_bias.clone(), v_bias.clone()
        found = split(weight, q_bias, v_bias, heads)
        expect(all(torch.equal(*two) for two in zip(given, (weight, q_bias, v_bias), strict=True)),
               "your function changed what it was given.")
        expect(isinstance(found, dict) and set(found) == {"query", "key", "value"}, "the exercise asks for a "
               f"dictionary with query, key and value; yours is {str(found)[:60]}.")
        for name, both in found.items():
            expect(isinstance(both, tuple | list) and len(both) == 2, f"{name} is not a weight and a bias.")
            expect(both[1] is not None, f"the bias of {name} is None: the file has none for the keys, and the model's "
                   "layer has one. Which bias adds nothing?")
            file = "in a file of float16 " if kind == torch.float16 else ""
            expect_tensor(both[0], (e, e), f"{file}the weight of {name}", "(e e)", kind)
            expect_tensor(both[1], (e,), f"{file}the bias of {name}", "(e)", kind)
        output.append({name: tuple(found[name]) for name in ("query", "key", "value")})
        right.append(thirds(weight, q_bias, v_bias))
        for why, slip in SPLIT_SLIPS.items():
            made[why].append(slip(weight, q_bias, v_bias, heads))
    if all(map(same_split, output, right)):
        return
    slip = slip_of(output, right, made, same_split)
    expect(not slip, slip)
    for name in ("query", "key", "value"):
        for place, what in enumerate(("weight", "bias")):
            expect(all(torch.equal(one[name][place], other[name][place])
                       for one, other in zip(output, right, strict=True)),
                   f"the {what} of {name} is not what stands for it in the file: which rows are its own?"
                   if place == 0 else f"the bias of {name} is not the one in the file, or, where there is none, "
                   "adds something.")


# --- the first place where numbers part -------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """CLIP's approximation of the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class Net(nn.Module):
    """Layers in a row, of which the order of running is not the order of their names."""

    def __init__(self, width: int, order: Sequence[str]):
        super().__init__()
        made = {"norm": nn.LayerNorm(width, eps=1e-6), "wide": nn.Linear(width, 2 * width), "act": nn.GELU(),
                "drop": nn.Dropout(0.4), "narrow": nn.Linear(2 * width, width), "ending": nn.LayerNorm(width, eps=1e-6),
                "square": nn.Linear(width, width, bias=False), "bend": nn.Sequential(nn.Identity(), nn.Tanh())}
        for name in order:
            self.add_module(name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        """(b s e) -> (b s e)."""
        for name in ("norm", "wide", "act", "drop", "narrow", "ending", "square", "bend"):
            x = getattr(self, name)(x)
        return x


RUN_ORDER = ("norm", "wide", "act", "drop", "narrow", "ending", "square", "bend")


def twins(fault: str, width: int) -> tuple[Net, Net, Tensor]:
    """Two nets of one file, but for one fault in the second, and something to feed them with."""
    order = list(RUN_ORDER)
    while order == list(RUN_ORDER) or order.index("square") > order.index("wide"):
        random.shuffle(order)
    ours, theirs = Net(width, order), Net(width, random.sample(order, len(order)))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, width)
    with torch.no_grad():
        if fault == "norm":  # no weight differs; it shows where variances are small, as at one place in the middle
            theirs.norm.eps = 1e-5
            x = x * 10
            x[1, random.randint(1, 2)] *= 0.002
        elif fault == "act":
            theirs.act = QuickGELU()
        elif fault == "square":
            theirs.square.weight.copy_(ours.square.weight.T)
        elif fault == "wide":
            most = ours.wide(ours.norm(x)).abs().max()  # one number of many, 7e-4 of the largest
            theirs.wide.bias[random.randrange(2 * width)] += 7e-4 * most
        elif fault == "narrow":
            theirs.narrow.weight.copy_(ours.narrow.weight.flip(0))
        elif fault in ("rounded", "negative"):  # no fault: the same numbers up to rounding
            for net in (ours, theirs):
                if fault == "rounded":  # and large ones
                    net.wide.weight *= 300
                    net.narrow.weight *= 10
                else:  # and from -1.3 to -0.7 behind one layer, so that the largest is below zero
                    net.ending.weight *= 0.1
                    net.ending.bias -= 1
            size = 1.2e-5 if fault == "rounded" else 3e-6
            for weight in theirs.parameters():
                weight *= 1 + size * torch.rand_like(weight)
        elif fault == "two":
            theirs.wide.weight.copy_(ours.wide.weight.flip(0))
            theirs.square.weight.copy_(ours.square.weight.T)
    first = fault not in ("same", "norm", "wide")  # each of the two trains where the other does not
    ours.train(first), theirs.train(not first)
    trains = ours if first else theirs
    trains.norm.eval(), trains.bend[0].eval()  # in a model that trains, a frozen layer, and the frozen part of another
    return ours, theirs, x


Finder = Callable[[nn.Module, nn.Module, Tensor], str | None]
FAULTS = {"square": "square", "norm": "norm", "act": "act", "wide": "wide", "narrow": "narrow", "two": "wide",
          "same": None, "rounded": None, "negative": None}
WHAT = {"square": "a square matrix is transposed",
        "norm": "the eps of a LayerNorm is another, which shows at one place of one example",
        "act": "an activation is the approximate one", "wide": "one number of a bias is wrong",
        "narrow": "the rows of a matrix are in another order", "two": "two layers are wrong",
        "same": "nothing is wrong", "rounded": "nothing is wrong, and numbers are large and rounded differently",
        "negative": "nothing is wrong, numbers are rounded differently, and those of one layer are all below zero"}


def by_weights(ours: nn.Module, theirs: nn.Module, x: Tensor) -> str | None:
    """A slip: weights are compared, not what comes out."""
    other = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        if not torch.allclose(weight, other[name], rtol=1e-4):
            return name.split(".")[0]
    return None


def outputs(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each layer gives, in the order of running, in eval mode."""
    found = {}
    for name in RUN_ORDER:
        layer = getattr(net, name)
        x = x if isinstance(layer, nn.Dropout) else layer(x)
        found[name] = x
    return found


def parting(ours: nn.Module, theirs: nn.Module, x: Tensor, names: Sequence[str], same: Callable) -> str | None:
    """The first of some names whose outputs are not the same."""
    one, other = outputs(ours, x), outputs(theirs, x)
    return next((name for name in names if not same(one[name], other[name])), None)


def relative(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return close(one, other, 1e-4)


def behind(name: str | None) -> str | None:
    """The layer that runs after this one."""
    return RUN_ORDER[RUN_ORDER.index(name) + 1] if name else None


FINDER_SLIPS: dict[str, Finder] = {
    "you compare weights: some faults are in none of them, such as an eps or an activation. What can be compared of "
    "every layer?": by_weights,
    "you name the last layer that differs: it only hands on what it was given.":
        lambda ours, theirs, x: parting(ours, theirs, x, RUN_ORDER[::-1], relative),
    "you go through the layers in the order of their names in the model: they run in another.":
        lambda ours, theirs, x: parting(ours, theirs, x, [name for name, _ in ours.named_children()], relative),
    "you name the layer behind the one that is wrong: what it gets differs already. Compare what each layer gives.":
        lambda ours, theirs, x: behind(parting(ours, theirs, x, RUN_ORDER, relative)),
    "every difference counts for you, also that of rounding: numbers of some hundreds differ in the fifth digit.":
        lambda ours, theirs, x: parting(ours, theirs, x, RUN_ORDER, torch.equal),
    "a difference is measured against 1 and not against the numbers themselves.":
        lambda ours, theirs, x: parting(ours, theirs, x, RUN_ORDER, lambda a, b: bool((a - b).abs().max() < 1e-6)),
}


@exercise("16.3", "lesson 16, section 5, 'A millionth' and 'Almost the same GELU'")
def first_wrong(find: Finder) -> None:
    """The first layer, in the order of running, whose output differs though nothing before it did."""
    output, right, kinds = [], [], list(FAULTS)
    while True:  # until each slip shows as itself
        games = [twins(fault, random.choice((5, 6, 7))) for fault in FAULTS]
        with torch.no_grad():
            right = [parting(*game, RUN_ORDER, relative) for game in games]
            made = {why: [slip(*game) for game in games] for why, slip in FINDER_SLIPS.items()}
            sharp = all(parting(*game, RUN_ORDER, lambda a, b, limit=limit: close(a, b, limit)) == name
                        for game, name in zip(games, right, strict=True)
                        for limit in (2e-5, 5e-4))  # nothing stands on the edge
        if sharp and right == list(FAULTS.values()) and all(some != right for some in made.values()):
            break
    for ours, theirs, x in games:
        modes = [(module, module.training) for net in (ours, theirs) for module in net.modules()]
        before = [{name: value.clone() for name, value in net.state_dict().items()} for net in (ours, theirs)]
        given = x.clone()
        marks: list[int] = []
        marked = [net.square.register_forward_hook(lambda *seen, marks=marks: marks.append(1))
                  for net in (ours, theirs)]
        fed: list[Tensor] = []
        marked += [net.register_forward_pre_hook(lambda _, inputs, fed=fed: fed.append(inputs[0]))
                   for net in (ours, theirs)]
        name = find(ours, theirs, x)
        expect(all(torch.equal(one, given) for one in fed), "your function runs a model on another input than x: on "
               "other numbers some differences do not show.")
        expect(name is None or isinstance(name, str), f"your function gives {name!r}; the exercise asks for a name, or "
               "None.")
        expect(torch.equal(x, given) and all(torch.equal(value, net.state_dict()[key]) for net, some in zip(
            (ours, theirs), before, strict=True) for key, value in some.items()), "your function changed a weight, or "
            "what the models were fed with.")
        expect(all(module.training == mode for module, mode in modes), "your function left a model, or a part "
               "of one, in another mode than it found it in. A layer may have parts of its own.")
        del marks[:]
        hooks = [net for net in (ours, theirs) for module in net.modules()
                 if len(module._forward_hooks) + len(module._forward_pre_hooks) != (module in (net, net.square))]
        for net in (ours, theirs):
            net(x)
        expect(len(marks) == 2, "your function removed a hook that was there before it came.")
        expect(not hooks, "a hook of yours is still there after your function has ended: it would record for ever.")
        for handle in marked:
            handle.remove()
        output.append(name)
    if output == right:
        ours, theirs, x = twins("same", 6)
        theirs.narrow.bias.data[0] = torch.nan
        expect(find(ours, theirs, x) == "narrow", "where a layer gives nan you do not name it: every comparison with "
               "nan is False. Ask whether the difference is small, not whether it is large.")
        return
    slip = slip_of(output, right, made, lambda one, two: one == two)
    expect(not slip, slip)
    with torch.random.fork_rng():
        calm = [find(ours.eval(), theirs.eval(), x) for ours, theirs, x in games]
    expect(calm != right, "with both models in evaluation mode you name the right layers: one that trains draws a "
           "dropout of its own, and everything behind it differs.")
    expect("drop" not in output, "you name the dropout: it differs from call to call as long as a model trains.")
    number = next(number for number in range(len(output)) if output[number] != right[number])
    expect(False, f"where {WHAT[kinds[number]]}, you name {output[number]}. The layers run in the order "
           f"{', '.join(RUN_ORDER)}: how far do both give the same?")

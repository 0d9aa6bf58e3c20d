"""Answers to the exercises of lesson 16."""

import torch
from torch import nn

from minblip2.course.lesson import difference

from . import Answers


def by_sets(file, model):
    return (sorted(set(model) - set(file)), sorted(set(file) - set(model)),
            sorted(name for name in set(file) & set(model) if file[name] != model[name]))


def by_loops(file, model):
    missing, left, other = [], [], []
    for name, shape in model.items():
        if name not in file:
            missing.append(name)
        elif list(file[name]) != list(shape):
            other.append(name)
    for name in file:
        if name not in model:
            left.append(name)
    return missing, left, other


def with_shapes(same):
    """A slip in when two shapes are the same."""
    return lambda file, model: (*by_sets(file, model)[:2], [name for name in file if name in model and not same(
        file[name], model[name])])


def of_bytes(*given):
    return tuple({name.encode() for name in some} for some in by_sets(*given))


def by_chunks(weight, q_bias, v_bias, heads):
    return dict(zip(("query", "key", "value"), zip(weight.chunk(3), (q_bias, torch.zeros_like(q_bias), v_bias),
                                                   strict=True), strict=True))


def by_unflatten(weight, q_bias, v_bias, heads):
    q, k, v = weight.unflatten(0, (3, -1))
    return {"query": [q, q_bias], "key": [k, q_bias.new_zeros(len(q_bias))], "value": [v, v_bias]}


def by_rows(weight, q_bias, v_bias, heads):
    e = len(q_bias)
    zeros = torch.zeros(e, dtype=q_bias.dtype)
    return {"value": (weight[2 * e:], v_bias), "key": (weight[e:2 * e], zeros), "query": (weight[:e], q_bias)}


def in_single_float(weight, q_bias, v_bias, heads):
    """The mistake to make zeros of torch's own dtype, whatever the file's is."""
    made = by_chunks(weight, q_bias, v_bias, heads)
    return made | {"key": (made["key"][0], torch.zeros(len(q_bias)))}


def split(order="qkv", biases="q0v", cut=lambda weight, heads: weight.chunk(3)):
    """A split with a slip in the order of the parts, in the biases, or in the cut."""
    def made(weight, q_bias, v_bias, heads):
        parts = dict(zip(order, cut(weight, heads), strict=True))
        known = {"q": q_bias, "v": v_bias, "0": torch.zeros_like(q_bias)}
        return {name: (parts[name[0]], known[bias]) for name, bias in zip(("query", "key", "value"), biases,
                                                                         strict=True)}
    return made


def heads_first(weight, heads):
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)


def recorded(net, x):
    """Outputs of all layers in the order of running."""
    found, hooks = {}, []
    for name, layer in net.named_children():
        hooks.append(layer.register_forward_hook(lambda layer, given, out, name=name: found.update({name: out})))
    was = {layer: layer.training for layer in net.modules()}
    with torch.no_grad():
        net.eval()(x)
    for layer, mode in was.items():
        layer.training = mode
    for hook in hooks:
        hook.remove()
    return found


def same(one, other):
    return (one - other).abs().max() <= 1e-4 * other.abs().max()


def first(ours, theirs, x):
    one, other = recorded(ours, x), recorded(theirs, x)
    return next((name for name in one if not same(one[name], other[name])), None)


def by_lists(ours, theirs, x):
    """Without names until the end; the modes are set layer by layer."""
    seen = []
    for net in (ours, theirs):
        names = {layer: name for name, layer in net.named_modules()}
        modes = {layer: layer.training for layer in net.modules()}
        outs = []
        handles = [layer.register_forward_hook(lambda layer, given, out, names=names, outs=outs: outs.append(
            (names[layer], out.detach().clone()))) for layer in names if not list(layer.children())]
        try:
            net.eval()(x)
        finally:
            for handle in handles:
                handle.remove()
            for layer, mode in modes.items():
                layer.training = mode
        seen.append(outs)
    for (name, one), (_, other) in zip(*seen, strict=True):
        if not difference(one, other) <= 1e-4:  # nor where it is nan
            return name
    return None


def finder(order=lambda names: names, same=same, kept=lambda out: out):
    """A finder with another order, another comparison, or only a part of each output."""
    def find(ours, theirs, x):
        one, other = ({name: kept(out) for name, out in recorded(net, x).items()} for net in (ours, theirs))
        return next((name for name in order(list(one)) if not same(one[name], other[name])), None)
    return find


def without_sign(one, other):
    """The mistake to measure against the largest number and not against the largest size."""
    return (one - other).abs().max() <= 1e-4 * one.max()


def by_norms(one, other):
    return (one - other).norm() <= 1e-4 * other.norm()


def in_the_models_order(ours, theirs, x):
    one, other = recorded(ours, x), recorded(theirs, x)
    return next((name for name, _ in ours.named_children() if not same(one[name], other[name])), None)


def by_weights(ours, theirs, x):
    known = dict(theirs.named_parameters())
    return next((name.split(".")[0] for name, weight in ours.named_parameters()
                 if not torch.allclose(weight, known[name], rtol=1e-4)), None)


def leaves_hooks(ours, theirs, x):
    name = first(ours, theirs, x)
    ours.act.register_forward_hook(lambda *given: None)
    return name


def clears_hooks(ours, theirs, x):
    name = first(ours, theirs, x)
    for net in (ours, theirs):
        for layer in net.modules():
            layer._forward_hooks.clear()
    return name


def leaves_eval(ours, theirs, x):
    return first(ours.eval(), theirs.eval(), x)


def always_trains(ours, theirs, x):
    name = first(ours, theirs, x)
    ours.train(), theirs.train()
    return name


def restoring_layers(restore):
    """The mistake to restore the modes of a model and of its layers, and not of what the layers are made of."""
    def find(ours, theirs, x):
        modes = [(layer, layer.training) for net in (ours, theirs) for layer in (net, *net.children())]
        name = first(ours.eval(), theirs.eval(), x)
        for layer, mode in modes:
            restore(layer, mode)
        return name
    return find


def with_dropout(ours, theirs, x):
    """A slip: the modes are left as they are, and one of the models may be training."""
    ours.drop.train(), theirs.drop.train()
    found = []
    for net in (ours, theirs):
        outs, handles = {}, []
        for name, layer in net.named_children():
            handles.append(layer.register_forward_hook(lambda layer, given, out, name=name, outs=outs: outs.update(
                {name: out})))
        net(x)
        for handle in handles:
            handle.remove()
        found.append(outs)
    ours.drop.training, theirs.drop.training = ours.training, theirs.training
    return next((name for name in found[0] if not same(found[0][name], found[1][name])), None)


def changes_a_weight(ours, theirs, x):
    name = first(ours, theirs, x)
    with torch.no_grad():
        ours.square.weight += 1
    return name


def of_another_input(ours, theirs, x):
    """The mistake to choose what to feed: an eps shows on small numbers only."""
    return first(ours, theirs, torch.randn_like(x))


def by_truth(file, model):
    """The mistake to take the shape () of a scalar for nothing."""
    return ([name for name in model if not file.get(name)], [name for name in file if not model.get(name)],
            [name for name in model if file.get(name) and file[name] != model[name]])


ANSWERS = {
    "account": Answers(
        [by_sets, by_loops, lambda file, model: [set(some) for some in by_sets(file, model)]],
        [(by_truth, "takes for False"),
         (with_shapes(lambda one, other: one[:1] == other[:1]), ""),
         (lambda file, model: by_sets(model, file), "are exchanged"),
         (with_shapes(lambda one, two: True), "a name that fits is half"),
         (with_shapes(lambda one, two: one.numel() == two.numel()), "a matrix that is transposed"),
         (with_shapes(lambda one, two: len(one) == len(two)), "how many axes"),
         (lambda file, model: (by_sets(file, model)[0], [], by_sets(file, model)[2]), "left over in the file"),
         (lambda file, model: ([], *by_sets(file, model)[1:]), "silently stays"),
         (lambda file, model: tuple([*some, *by_sets(file, model)[2]] if number < 2 else some
                                    for number, some in enumerate(by_sets(file, model))), "neither missing"),
         (lambda file, model: ([], [], []), "you find missing"), (of_bytes, "not all names"),
         (lambda file, model: by_sets(file, model)[:2], "three lists"),
         (lambda file, model: (by_sets(file, model)[0] * 2, *by_sets(file, model)[1:]), "stands twice")]),
    "split_fused": Answers(
        [by_chunks, by_unflatten, by_rows],
        [(lambda *given: by_chunks(*given) | {"key": (by_chunks(*given)["key"][0], None)}, "adds nothing"),
         (in_single_float, "in a file of float16 the bias of key holds torch.float32"),
         (split(cut=heads_first), "head by head"),
         (split(cut=lambda weight, heads: [weight[i::3] for i in range(3)]), "every third row"),
         (split(order="kqv"), "[k ; q ; v]"), (split(order="vkq"), "[v ; k ; q]"), (split(order="qvk"), "[q ; v ; k]"),
         (split(cut=lambda weight, heads: [part.T for part in weight.chunk(3)]), "are transposed"),
         (split(biases="qqv"), "the queries' bias"), (split(biases="qvv"), "the values' bias"),
         (split(biases="v0q"), "are exchanged"),
         (split(cut=lambda weight, heads: [part.flip(0) for part in weight.chunk(3)]), "which rows are its own"),
         (lambda *given: {**by_chunks(*given), "key": (by_chunks(*given)["key"][0], given[1] * 0 + 1)},
          "adds something"),
         (lambda *given: list(by_chunks(*given).values()), "a dictionary"),
         (split(cut=lambda weight, heads: weight.chunk(3, dim=1)), "it should be (e e)")]),
    "first_wrong": Answers(
        [first, by_lists, finder(), finder(same=by_norms)],
        [(of_another_input, "another input than x"),
         (finder(kept=lambda out: out[0]), "you name None"), (finder(kept=lambda out: out[-1]), "you name None"),
         (finder(kept=lambda out: out[:, 0]), "you name None"), (finder(kept=lambda out: out[:, -1]), "you name None"),
         (finder(same=without_sign), "are all below zero, you name ending"),
         (restoring_layers(lambda layer, mode: setattr(layer, "training", mode)), "another mode"),
         (restoring_layers(lambda layer, mode: layer.train(mode)), "another mode"),
         (finder(order=lambda names: names[::-1]), "the last layer"), (in_the_models_order, "they run in another"),
         (by_weights, "you compare weights"), (finder(same=torch.equal), "round"),
         (finder(same=lambda one, other: torch.allclose(one, other, rtol=0, atol=1e-6)), ""),
         (leaves_hooks, "still there"), (clears_hooks, "removed a hook"), (leaves_eval, "another mode"),
         (always_trains, "another mode"), (changes_a_weight, "changed a weight"), (with_dropout, "dropout"),
         (lambda ours, theirs, x: None, "you name None"), (lambda ours, theirs, x: nn.Linear(1, 1), "a name, or None"),
         (lambda ours, theirs, x: "square", "you name square")]),
}

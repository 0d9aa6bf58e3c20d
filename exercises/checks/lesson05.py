"""Checks of lesson 05: a block from its parts, queries that differ, a start from BERT, what ran, and what it costs."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from minblip2 import masks
from minblip2.attention import FeedForward, MultiHeadAttention
from minblip2.qformer import QFormer, QFormerBlock, QFormerConfig

from . import Wrong, close, exercise, expect, expect_tensor, named, number, same_gradients

# --- 05.1 -------------------------------------------------------------------------------------------------------------


class Parts(SimpleNamespace):
    """The parts of a block as matrices; `ran` tells which were called, with how many tokens, and `got` with which;
    `read` holds the pictures that cross-attention was given, `under` the masks of self-attention."""

    def __init__(self, width: int, reads: bool, kind: torch.dtype = torch.float32):
        super().__init__(ran=[], got=[], read=[], under=[])
        draw = {name: torch.randn(width, width, dtype=kind) / width**0.5 for name in ("self", "cross", "query", "text")}
        shift = {name: torch.randn(width, dtype=kind) for name in draw}

        def note(name: str, x: Tensor) -> None:
            self.ran.append((name, x.shape[1]))
            self.got.append(x.detach().clone())

        def norm(name: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                note(f"{name}_norm", x)
                centred = x - x.mean(dim=-1, keepdim=True)
                return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() + shift[name]
            return run

        def mlp(name: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                note(f"{name}_mlp", x)
                return (x @ draw[name]).relu()
            return run

        def self_attention(x: Tensor, mask: Tensor | None = None) -> Tensor:
            note("self_attention", x)
            expect(mask is not None, "self-attention got no mask: then padding is seen, and what ITG is asked for.")
            self.under.append(mask.clone())
            shares = mask[:, 0].to(x.dtype)
            return shares / shares.sum(dim=2, keepdim=True).clamp(min=1) @ x @ draw["self"]

        def cross_attention(x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
            note("cross_attention", x)
            expect(isinstance(mask, type(None)), "cross-attention got a mask: its second argument is the mask, and no "
                   "patch of an image is hidden. Pass the image by name.")
            expect(context is not None, "cross-attention ran without the image: it would read the queries themselves, "
                   "and say nothing.")
            self.read.append(context.detach().clone())
            return (x + context.mean(dim=1, keepdim=True)).tanh() @ draw["cross"]

        self.self_attention, self.self_norm = self_attention, norm("self")
        self.cross_attention, self.cross_norm = (cross_attention, norm("cross")) if reads else (None, None)
        self.query_mlp, self.query_norm, self.text_mlp, self.text_norm = mlp("query"), norm("query"), mlp("text"), norm(
            "text")


def block_of(parts: Parts, x: Tensor, queries: int, image: Tensor | None, mask: Tensor) -> Tensor:
    """What a block makes of x (b s e)."""
    attended = parts.self_norm(x + parts.self_attention(x, mask))
    sides = []
    for side, state in (("query", attended[:, :queries]), ("text", attended[:, queries:])):
        if side == "query" and queries and parts.cross_attention is not None:
            state = parts.cross_norm(state + parts.cross_attention(state, context=image))
        if state.shape[1]:
            state = getattr(parts, f"{side}_norm")(state + getattr(parts, f"{side}_mlp")(state))
        sides.append(state)
    return torch.cat(sides, dim=1)


def _bound(run: Callable, parts: Parts, queries: int, mask: Tensor) -> Callable:
    """A block as a function of x and the picture."""
    return lambda x, image=None: run(parts, x, queries, image, mask)


@exercise("05.1", "lesson 05, section 2")
def run_block(run: Callable) -> None:
    """Self-attention for all, cross-attention for queries, a feed-forward for each side; residual, then norm."""
    width, v = 2 * random.randint(3, 6), random.randint(2, 5)
    kinds = (masks.multimodal_causal, masks.unimodal, masks.bidirectional)
    cases = [(3, 4, True, 2), (2, 5, False, 3), (4, 0, True, 2), (0, 3, True, 3), (1, 1, True, 1), (5, 3, True, 3),
             (4, 4, False, 2), (0, 3, False, 2)]
    for place, (queries, words, reads, b) in enumerate(cases):
        kind = torch.float64 if place == 5 else torch.float32
        parts = Parts(width, reads, kind)
        x = torch.randn(b, queries + words, width, dtype=kind)
        image = torch.randn(b, v, width, dtype=kind) if queries and (reads or place == 1) else None
        real = torch.ones(b, words, dtype=torch.bool)
        for row in range(1, b if words > 1 else 1):  # every text is padded otherwise, on the right or on the left
            real[row, words - 1 if row % 2 else slice(0, words - 1)] = False
        mask = kinds[place % 3](queries, real)
        before, seen = x.clone(), mask.clone()
        try:
            output = run(parts, x, queries, image, mask)
        except TypeError as error:
            if "'NoneType' object is not callable" not in str(error) or reads:
                raise
            raise Wrong("in a block that does not read, cross_attention and cross_norm are None, and yours calls "
                        "one.") from error
        ran, got = list(parts.ran), list(parts.got)
        expect_tensor(output, x.shape, "the result", "(b s e)", x.dtype)
        expect(torch.equal(before, x), "your function changed the x that it was given.")
        expect(torch.equal(seen, mask), "your function changed the mask that it was given.")
        _ran(ran, queries, words, reads)
        expect(all(torch.equal(one, mask) for one in parts.under), "self-attention got another mask than the one that "
               "was given: which token may look at which is decided outside, for each entry of the batch.")
        expect(all(one.shape == image.shape and close(one, image) for one in parts.read), "cross-attention got "
               "something else than the image: pass it on as it is, each entry of the batch its own.")
        parts.ran.clear(), parts.got.clear()
        right = block_of(parts, x, queries, image, mask)
        if close(output, right, 1e-3):
            given = {"x": x, "image": image} if reads and queries else {"x": x}
            same_gradients(_bound(run, parts, queries, mask), _bound(block_of, parts, queries, mask), given)
            continue
        case = f"with {queries} queries and {words} words "
        expect(not (queries and words and close(output, right.roll(words, dims=1), 1e-3)),
               "text stands before the queries in your result: they come back in the order in which they came.")
        wanted = dict(zip([name for name, _ in parts.ran], parts.got, strict=True))
        wrong = next((name for (name, _), state in zip(ran, got, strict=True)
                      if name in wanted and not close(state, wanted[name], 1e-3)), "")
        if wrong.endswith("_norm"):
            part = wrong.replace("_norm", "_mlp" if wrong[0] in "qt" else "_attention")
            expect(False, case + f"{wrong} got something else than it should: before it, what {part} gives is added to "
                   f"what {part} got.")
        expect(not wrong, case + f"{wrong} got something else than it should: does each part start from what the part "
               "before it, with its norm, has made of the state?")
        expect(False, case + "each part got what it should, but what you return is not what the last norm of each side "
               "gave.")


def _ran(ran: list[tuple[str, int]], queries: int, words: int, reads: bool) -> None:
    """Whether the right parts ran, for the right tokens, in the right order."""
    names = [name for name, _ in ran]
    sizes = dict(ran)
    case = f"with {queries} queries and {words} words "
    expect("self_attention" in names, case + "self-attention did not run.")
    pairs = [(f"{part}_attention" if part in ("self", "cross") else f"{part}_mlp", f"{part}_norm")
             for part in ("self", "cross", "query", "text")]
    for work, norm in pairs:
        expect(names.count(work) < 2 and names.count(norm) < 2, case + f"{work} or its norm ran more than once.")
    for work, norm in pairs:
        if work in names and norm in names:
            expect(sizes[work] == sizes[norm], case + f"{norm} got {sizes[norm]} tokens, and {work}, to which it "
                   f"belongs, {sizes[work]}.")
    for work, norm in pairs:
        if work in names and norm in names:
            expect(names.index(work) < names.index(norm), f"{norm} runs before {work}: that is pre-norm. BERT's order, "
                   "and the Q-Former's, is the other one.")
        expect((work in names) <= (norm in names) or not sizes[work], f"{work} runs, but its norm does not.")
    expect(sizes["self_attention"] == queries + words, case + f"self-attention got {sizes['self_attention']} tokens: "
           "it is where the two sides meet, so it takes them all at once.")
    if "cross_attention" in names:
        expect(queries > 0, "cross-attention runs without any query: then there is no token that could read.")
        expect(sizes["cross_attention"] == queries, case + f"cross-attention got {sizes['cross_attention']} tokens: "
               "only queries see the image; the text would bypass the bottleneck.")
        expect(names.index("cross_attention") > names.index("self_attention"), "cross-attention runs before "
               "self-attention: queries first see each other, then read.")
        expect("query_mlp" not in names or names.index("query_mlp") > names.index("cross_attention"),
               "the queries' feed-forward runs before cross-attention: it works on what has been read, so it comes "
               "after.")
    expect("cross_attention" in names or not (reads and queries), case + "cross-attention did not run in a block that "
           "reads.")
    for side, count in (("query", queries), ("text", words)):
        seen = sizes.get(f"{side}_mlp", 0)
        whose = "queries'" if side == "query" else "text's"
        expect(seen == count, case + f"the {whose} feed-forward got {seen} tokens: each side has its own, for its own "
               "tokens.")


# --- 05.2 -------------------------------------------------------------------------------------------------------------


@exercise("05.2", "lesson 05, section 3")
def fresh_queries(make: Callable[[int, int, float], nn.Parameter]) -> None:
    """Queries that no two of are alike."""
    sizes = (32, 512, 0.02), (16, 1024, random.choice([0.05, 0.3])), (1, 20000, 0.02), (6, 4096, 1.5)
    for queries, width, std in sizes:
        noise = torch.rand(1)  # whatever is drawn after it must not repeat itself either
        output = expect_tensor(make(queries, width, std), (1, queries, width), "the result", "(1 q e)",
                               torch.get_default_dtype())
        expect(isinstance(output, nn.Parameter), "the result is a tensor but no parameter: an optimiser that is given "
               "model.parameters() would never see it.")
        expect(output.requires_grad, "the queries have requires_grad=False: they could not learn.")
        rows, values = output.detach()[0], output.detach().flatten()
        expect(bool(values.any()), "all queries are zero, and so all alike: they ask the same question, get the same "
               "gradient, and stay alike.")
        expect(queries == 1 or not close(rows, rows[:1].expand_as(rows), 1e-3), "all queries are alike, though not "
               "zero: what matters is not where they start but that they start apart.")
        if queries > 1:
            spread = (rows - rows.mean(dim=0)).square().mean().sqrt()
            expect(bool(spread > 0.5 * values.std()) and bool(torch.pdist(rows).min() > 0.5 * spread * width**0.5),
                   "some queries are nearly alike and will long stay so.")
        spread, mean = values.std().item(), values.mean().item()
        expect(0.95 < spread / std < 1.05, f"with std {std} the numbers have standard deviation {spread:.4f}: next to "
               "BERT's words they are too " + ("large." if spread > std else "small."))
        expect(abs(mean) < 0.05 * std, f"the numbers' mean is {mean:.4f} where zero is expected.")
        expect(not torch.equal(output, make(queries, width, std)), "two calls give the same numbers: is a seed fixed "
               "inside your function, or is nothing drawn at all?")
        after = torch.rand(1)
        make(queries, width, std)
        expect(not torch.equal(after, torch.rand(1)) and not torch.equal(noise, after), "after each call the same "
               "random numbers follow: a seed is fixed inside your function, for all that is drawn after it.")


# --- 05.3 -------------------------------------------------------------------------------------------------------------


class BertBlock(nn.Module):
    """One block of BERT: attention and a feed-forward, each with its norm."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.attention, self.attention_norm = MultiHeadAttention(width, heads), nn.LayerNorm(width)
        self.mlp, self.mlp_norm = FeedForward(width, mlp_width), nn.LayerNorm(width)


def randomised(module: nn.Module) -> nn.Module:
    """The module with every parameter random, biases and norms too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


HOMES = {"self_attention": "attention", "self_norm": "attention_norm", "text_mlp": "mlp", "text_norm": "mlp_norm",
         "query_mlp": "mlp", "query_norm": "mlp_norm"}


@exercise("05.3", "lesson 05, section 4")
def begin_as_bert(fill: Callable[[QFormerBlock, BertBlock], object]) -> None:
    """A block filled from BERT's: copies, for both sides, and nothing for cross-attention."""
    width = 4 * random.randint(2, 5)
    config = QFormerConfig(width=width, heads=2, mlp_width=width + 8, image_width=width)  # all would fit a picture
    bert, filled = randomised(BertBlock(width, 2, width + 8)), []
    for reads in (True, False, True):  # one BERT begins several blocks
        block, mode = randomised(QFormerBlock(config, reads)).train(reads), reads
        kept, given = ({name: value.clone() for name, value in module.state_dict().items()} for module in (block, bert))
        own = dict(block.named_parameters())
        fill(block, bert)
        expect(all(part.training == mode for part in block.modules()),
               "your function has switched the block, or a part of it, between train and eval mode.")
        now = block.state_dict()
        expect(now.keys() == kept.keys(), "the block has not the same parameters as before: fill those that are there.")
        source = bert.state_dict()
        expect(source.keys() == given.keys() and all(torch.equal(source[name], given[name]) for name in given),
               "BERT itself was changed.")
        expect(all(parameter.requires_grad for parameter in bert.parameters()), "after your function BERT's own "
               "parameters require no gradient any more: leave BERT as it is.")
        for name in now:
            if name.startswith("cross_"):
                expect(torch.equal(now[name], kept[name]), f"{name} was changed: BERT has never seen a picture, so it "
                       "has nothing to give there.")
        for ours, theirs in HOMES.items():
            for name in dict(getattr(block, ours).named_parameters()):
                value, wanted = now[f"{ours}.{name}"], given[f"{theirs}.{name}"]
                if torch.equal(value, wanted):
                    continue
                others = [other for other in given if torch.equal(value, given[other])]
                expect(not others, f"{ours}.{name} was filled from {others[:1]}, which is another part.")
                expect(not torch.equal(value, kept[f"{ours}.{name}"]), f"{ours}.{name} has not been filled" +
                       (": BERT has one feed-forward, but the queries need a start as well." if "query" in ours else
                        "."))
                expect(False, f"{ours}.{name} holds neither BERT's numbers nor its own.")
        filled.append(block)
        _apart(block, bert, filled[:-1])
        for name, parameter in block.named_parameters():
            expect(parameter is own[name], f"{name} is another parameter than before your function: an optimiser that "
                   "holds the old one would train what is no longer there. Fill in place: copy numbers into what the "
                   "block has.")


def _apart(block: QFormerBlock, bert: BertBlock, others: list[QFormerBlock]) -> None:
    """Whether the parts are parameters of their own."""
    places: dict[int, str] = {parameter.data_ptr(): f"BERT's {name}" for name, parameter in bert.named_parameters()}
    places |= {parameter.data_ptr(): f"{name} of another block" for other in others
               for name, parameter in other.named_parameters()}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        owner = places.setdefault(parameter.data_ptr(), name)
        expect(owner == name, f"{name} and {owner} are one and the same memory: whatever one learns overwrites the "
               "other. They begin equal, but have to be separate.")
        expect(parameter.requires_grad and parameter.is_leaf, f"{name} can no longer be trained.")


# --- 05.4 -------------------------------------------------------------------------------------------------------------

COLUMNS = ("self", "cross", "query", "text")
PASSES = ("text alone", "queries alone", "apart, text", "apart, queries", "fused, text", "fused, queries")


def slopes(name: str, layers: int) -> Tensor:
    """The largest gradient in each part (columns) of each block (rows) after a pass; nan: no gradient at all."""
    config = QFormerConfig(width=8, layers=layers, heads=2, mlp_width=8, num_queries=3, image_width=6, vocab_size=9,
                           max_positions=8, dropout=0.0)
    model, words = randomised(QFormer(config)), torch.ones(1, 4, dtype=torch.bool)
    how, _, side = name.partition(", ")
    side = side or how.split()[0]
    image = None if how.startswith("text") else model.project_image(torch.randn(1, 5, 6))
    ids = None if how.startswith("queries") else torch.randint(1, 9, (1, 4))
    queries = 0 if image is None else 3
    mask = None if ids is None else masks.unimodal(queries, words) if how == "apart" else masks.bidirectional(
        queries, words)
    getattr(model(image, ids, mask), side).pow(3).sum().backward()
    table = torch.full((layers, len(COLUMNS)), torch.nan)
    for row, block in enumerate(model.blocks):
        for column, part in enumerate(COLUMNS):
            grown = [parameter.grad.abs().max() for own, parameter in block.named_parameters()
                     if own.startswith(part + "_") and parameter.grad is not None]
            if grown:
                table[row, column] = torch.stack(grown).max()
    return table


@exercise("05.4", "lesson 05, section 6")
def which_pass(name_of: Callable[[Tensor], str]) -> None:
    """Tell from the gradients of all parts what was run, and whose states the loss was taken on."""
    for layers in random.sample([2, 3, 5], 3):
        for name, louder in random.sample([(name, side) for name in PASSES for side in (1e4, 1e-4)], 2 * len(PASSES)):
            shown = slopes(name, layers)  # how large gradients are is a matter of the model, which are there is not
            given = shown * torch.tensor([1.0, 1.0, louder, 1 / louder]) * 10 ** torch.rand_like(shown)
            kept = given.clone()
            output = name_of(given)
            expect(torch.equal(given.nan_to_num(-1), kept.nan_to_num(-1)),
                   "your function changed the map that it was given.")
            expect(isinstance(output, str) and output in PASSES,
                   f"your function answers {output!r}; the answers are {', '.join(map(repr, PASSES))}.")
            if output == name:
                continue
            ways = {each.split(", ")[0] for each in (output, name)}
            expect(ways != {"text alone", "apart"} and ways != {"queries alone", "apart"},
                   f"you take {name!r} for {output!r}: nan says that a part did not run at all, zero that it ran and "
                   "did not matter. They are two different answers.")
            expect(ways != {"apart", "fused"} or output.split(", ")[1] != name.split(", ")[1],
                   f"you take {name!r} for {output!r}: where one side looks at the other, what the other side did in "
                   "earlier blocks matters. After the last block there is no attention, so the last row cannot tell.")
            expect(ways != {"text alone", "queries alone"}, f"you take {name!r} for {output!r}: in which column of "
                   "feed-forwards is there no gradient at all? That side was not there.")
            expect(ways != {"apart"}, f"you take {name!r} for {output!r}: in which column of feed-forwards are all "
                   "gradients zero? On that side there was no loss.")
            expect(ways != {"fused"},
                   f"you take {name!r} for {output!r}: look at the last block. Whose feed-forward can "
                   "still matter there?")
            expect(False,
                   f"you take {name!r} for {output!r}. Which columns hold a gradient, which zeros, which nothing at "
                   "all? Blocks 1, 3, ... have no cross-attention; the map has nan there always.")


# --- 05.5 -------------------------------------------------------------------------------------------------------------


# What is counted otherwise, from queries, patches, the width, the picture's width and heads; what it means.
COSTS: dict[str, Callable[[int, int, int, int, int], float]] = {
    "you count multiplications and additions as two; one multiply-add is both.":
        lambda q, v, e, wide, heads: 4 * e * (v * wide + q * e + q * v),
    "more heads do not make more products: each is narrower.":
        lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e + heads * q * v),
    "each head is narrower, but there are several: the heads together compare whole vectors.":
        lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e) + 2 * q * v * e // heads,
    "after the heads have been put side by side, something still happens.":
        lambda q, v, e, wide, heads: e * (2 * v * wide + q * e + 2 * q * v),
    "a picture's values are mixed, too, not only its keys compared.":
        lambda q, v, e, wide, heads: e * (2 * v * wide + 2 * q * e + q * v),
    "a patch is projected twice: once to its key, and once to its value.":
        lambda q, v, e, wide, heads: e * (v * wide + 2 * q * e + 2 * q * v),
    "patches come as wide as the encoder makes them.": lambda q, v, e, wide, heads: 2 * e * (v * e + q * e + q * v),
    "keys are as wide as the queries that they are compared with.":
        lambda q, v, e, wide, heads: 2 * v * wide * wide + 2 * e * (q * e + q * v),
    "queries, too, are projected, before and after.": lambda q, v, e, wide, heads: 2 * e * (v * wide + q * v),
    "comparing queries and patches, and mixing, are missing.": lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e),
    "projecting the patches to keys and values is missing.": lambda q, v, e, wide, heads: 2 * e * (q * e + q * v),
    "queries are compared with patches, not with each other.":
        lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e + q * q),
    "only comparing and mixing are counted; the projections are missing.": lambda q, v, e, wide, heads: 2 * q * v * e,
    "keys and values are made of patches, not of queries.": lambda q, v, e, wide, heads: 4 * q * e * e + 2 * q * v * e,
    "that is self-attention among the queries.": lambda q, v, e, wide, heads: 4 * q * e * e + 2 * q * q * e,
    "that counts parameters; how often is each one used?":
        lambda q, v, e, wide, heads: 2 * (wide * e + e) + 2 * (e * e + e),
    "that counts weights; how often is each one used?": lambda q, v, e, wide, heads: 2 * wide * e + 2 * e * e,
}


@exercise("05.5", "lesson 05, section 8")
def reading_cost(count: Callable[[int, int, int, int, int], int]) -> None:
    """Multiply-adds of one cross-attention."""
    drawn = [(random.randint(2, 60), random.randint(61, 300), random.randint(4, 12), random.randint(100, 700),
              random.choice([2, 4, 8])) for _ in range(4)]
    sizes = [(q, v, each * heads, wide, heads) for q, v, each, wide, heads in [
        (32, 257, 64, 1408, 12), (1, 1, 4, 8, 2), (5, 7, 3, 4, 1), *drawn]]
    output = [number(count(*case)) for case in sizes]
    right = [2 * v * wide * e + 2 * q * e * e + 2 * q * v * e for q, v, e, wide, _ in sizes]
    for (q, v, e, wide, heads), said, wanted in zip(sizes, output, right, strict=True):
        if said != wanted:
            slips = {meaning: [slip(*case) for case in sizes] for meaning, slip in COSTS.items()}
            expect(False, f"with {q} queries, {v} patches, width {e}, pictures of width {wide} and {heads} heads you "
                   f"count {said:,.0f}; " + (named(output, slips, lambda one, other: one == other) or
                                             "go through it in order: what is projected, from which width to which, "
                                             "for how many; what is compared with what; what is mixed."))

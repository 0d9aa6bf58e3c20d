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

from . import Wrong, close, exercise, expect, expect_tensor

# --- 05.1 -------------------------------------------------------------------------------------------------------------


class Parts(SimpleNamespace):
    """The parts of a block as matrices; `ran` tells which were called, and with how many tokens."""

    def __init__(self, width: int, reads: bool):
        super().__init__(ran=[])
        draw = {name: torch.randn(width, width) / width**0.5 for name in ("self", "cross", "query", "text")}
        shift = {name: torch.randn(width) for name in draw}

        def norm(name: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                self.ran.append((f"{name}_norm", x.shape[1]))
                centred = x - x.mean(dim=-1, keepdim=True)
                return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() + shift[name]
            return run

        def mlp(name: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                self.ran.append((f"{name}_mlp", x.shape[1]))
                return (x @ draw[name]).relu()
            return run

        def self_attention(x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.ran.append(("self_attention", x.shape[1]))
            expect(mask is not None, "self-attention got no mask: then padding is seen, and the answer of every task.")
            shares = mask[:, 0].float()
            return shares / shares.sum(dim=2, keepdim=True) @ x @ draw["self"]

        def cross_attention(x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
            self.ran.append(("cross_attention", x.shape[1]))
            expect(isinstance(mask, type(None)), "cross-attention got a mask: the second argument is one, and no patch "
                   "of a picture is hidden from anyone. Hand the picture over by name.")
            expect(context is not None, "cross-attention ran without a picture: it would read the queries themselves, "
                   "and say nothing.")
            return (x + context.mean(dim=1, keepdim=True)).tanh() @ draw["cross"]

        self.self_attention, self.self_norm = self_attention, norm("self")
        self.cross_attention, self.cross_norm = (cross_attention, norm("cross")) if reads else (None, None)
        self.query_mlp, self.query_norm, self.text_mlp, self.text_norm = mlp("query"), norm("query"), mlp("text"), norm(
            "text")


@exercise("05.1", "lesson 05, section 2")
def run_block(run: Callable) -> None:
    """Self-attention for all, cross-attention for queries, a feed-forward for each side; residual, then norm."""
    width, v = 2 * random.randint(3, 6), random.randint(2, 5)
    cases = [(3, 4, True), (2, 5, False), (4, 0, True), (0, 3, True), (1, 1, True)]
    for queries, words, reads in cases:
        parts, b = Parts(width, reads), random.choice([1, 2, 3])
        x, image = torch.randn(b, queries + words, width), torch.randn(b, v, width) if queries and reads else None
        mask = masks.multimodal_causal(queries, torch.ones(b, words, dtype=torch.bool))
        before = x.clone()
        try:
            output = run(parts, x, queries, image, mask)
        except TypeError as error:
            if "NoneType" not in str(error) or reads:
                raise
            raise Wrong("in a block that does not read, cross_attention and cross_norm are None, and yours calls "
                        "one.") from error
        ran, count = list(parts.ran), queries + words
        expect_tensor(output, x.shape, "the result", "(b s e)", x.dtype)
        expect(torch.equal(before, x), "your function changed the x that it was given.")
        _ran(ran, queries, words, reads)
        attended = parts.self_norm(x + parts.self_attention(x, mask))
        sides = []
        for side, state in (("query", attended[:, :queries]), ("text", attended[:, queries:count])):
            if side == "query" and queries and reads:
                state = parts.cross_norm(state + parts.cross_attention(state, context=image))
            if state.shape[1]:
                state = getattr(parts, f"{side}_norm")(state + getattr(parts, f"{side}_mlp")(state))
            sides.append(state)
        right = torch.cat(sides, dim=1)
        if close(output, right, 1e-3):
            continue
        expect(not (queries and words and close(output, torch.cat(sides[::-1], dim=1), 1e-3)),
               "text stands before the queries in your result: they come back in the order in which they came.")
        expect(queries == 0 or words == 0 or close(output[:, :queries], right[:, :queries], 1e-3) or
               not close(output[:, queries:], right[:, queries:], 1e-3),
               "the text is right, the queries are not: does each of their parts start from what the part before gave, "
               "and add to it?")
        expect(False, f"the right parts run, but with {queries} queries and {words} words the numbers are wrong. Each "
               "part adds to what it got, and then comes its norm: is what is added the state before the part, every "
               "time?")


def _ran(ran: list[tuple[str, int]], queries: int, words: int, reads: bool) -> None:
    """Whether the right parts ran, for the right tokens, in the right order."""
    names = [name for name, _ in ran]
    sizes = dict(ran)
    case = f"with {queries} queries and {words} words "
    expect("self_attention" in names, case + "self-attention did not run.")
    for part in ("self", "cross", "query", "text"):
        work, norm = f"{part}_attention" if part in ("self", "cross") else f"{part}_mlp", f"{part}_norm"
        expect(names.count(work) < 2 and names.count(norm) < 2, case + f"{work} or its norm ran more than once.")
        if work in names and norm in names:
            expect(names.index(work) < names.index(norm), f"{norm} runs before {work}: that is pre-norm. BERT's order, "
                   "and the Q-Former's, is the other one.")
        expect((work in names) <= (norm in names) or not sizes[work], f"{work} runs, but its norm does not.")
    expect(sizes["self_attention"] == queries + words, case + f"self-attention got {sizes['self_attention']} tokens: "
           "it is where the two sides meet, so it takes them all at once.")
    if "cross_attention" in names:
        expect(queries > 0, "without any query cross-attention runs: then nobody is there to read.")
        expect(sizes["cross_attention"] == queries, case + f"cross-attention got {sizes['cross_attention']} tokens: "
               "only queries see the picture; the text would walk around the bottleneck.")
        expect(names.index("cross_attention") > names.index("self_attention"), "cross-attention runs before "
               "self-attention: queries first hear each other, then read.")
        expect("query_mlp" not in names or names.index("query_mlp") > names.index("cross_attention"),
               "the queries' feed-forward runs before cross-attention: it thinks about what has been read, so it comes "
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
    for queries, width, std in ((32, 64, 0.02), (16, 128, random.choice([0.05, 0.3])), (1, 2048, 0.02)):
        output = expect_tensor(make(queries, width, std), (1, queries, width), "the result", "(1 q e)")
        expect(isinstance(output, nn.Parameter), "the result is a tensor but no parameter: an optimiser that is given "
               "model.parameters() would never hear of it.")
        expect(output.requires_grad, "the queries take no gradient: they could not learn.")
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
        expect(0.88 < spread / std < 1.12, f"with std {std} the numbers have standard deviation {spread:.4f}: next to "
               "BERT's words they are too " + ("large." if spread > std else "small."))
        expect(abs(mean) < 0.2 * std, f"the numbers' mean is {mean:.4f} where zero is expected.")
        expect(not torch.equal(output, make(queries, width, std)), "two calls give the same numbers: a seed is fixed "
               "inside your function, and would be so for whatever is drawn after it.")


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


@exercise("05.3", "lesson 05, section 6")
def begin_as_bert(fill: Callable[[QFormerBlock, BertBlock], object]) -> None:
    """A block filled from BERT's: copies, for both sides, and nothing for cross-attention."""
    for reads in (True, False):
        config = QFormerConfig(width=12, heads=2, mlp_width=20, image_width=12)  # as wide as a picture: all would fit
        block, bert = randomised(QFormerBlock(config, reads)), randomised(BertBlock(12, 2, 20))
        kept, given = ({name: value.clone() for name, value in module.state_dict().items()} for module in (block, bert))
        fill(block, bert)
        now = block.state_dict()
        expect(now.keys() == kept.keys(), "the block has not the same parameters as before: fill those that are there.")
        source = bert.state_dict()
        expect(source.keys() == given.keys() and all(torch.equal(source[name], given[name]) for name in given),
               "BERT itself was changed.")
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
        _apart(block, bert)


def _apart(block: QFormerBlock, bert: BertBlock) -> None:
    """Whether the parts are parameters of their own."""
    places: dict[int, str] = {parameter.data_ptr(): f"BERT's {name}" for name, parameter in bert.named_parameters()}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        owner = places.setdefault(parameter.data_ptr(), name)
        expect(owner == name, f"{name} and {owner} are one and the same memory: whatever one learns overwrites the "
               "other. To begin equal is not to be one.")
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
    for layers in (2, random.choice([3, 4])):
        for name in random.sample(PASSES, len(PASSES)):
            output = name_of(slopes(name, layers))
            expect(isinstance(output, str) and output in PASSES,
                   f"your function answers {output!r}; the answers are {', '.join(map(repr, PASSES))}.")
            if output == name:
                continue
            ways = {each.split(", ")[0] for each in (output, name)}
            expect(ways != {"text alone", "apart"} and ways != {"queries alone", "apart"},
                   f"you take {name!r} for {output!r}: nan says that a part took no part at all, zero that it ran and "
                   "did not matter. They are two different answers.")
            expect(ways != {"apart", "fused"} or output.split(", ")[1] != name.split(", ")[1],
                   f"you take {name!r} for {output!r}: where one side looks at the other, what the other side did in "
                   "earlier blocks matters. After the last block nobody looks any more, so the last row cannot tell.")
            expect(ways != {"fused"},
                   f"you take {name!r} for {output!r}: look at the last block. Whose feed-forward can "
                   "still matter there?")
            expect(False,
                   f"you take {name!r} for {output!r}. In which columns does a gradient stand, in which zeros, in "
                   "which nothing at all? Blocks 1, 3, ... have no cross-attention; the map has nan there always.")


# --- 05.5 -------------------------------------------------------------------------------------------------------------


@exercise("05.5", "lesson 05, section 9")
def reading_cost(count: Callable[[int, int, int, int, int], int]) -> None:
    """Multiply-adds of one cross-attention."""
    drawn = [(random.randint(2, 60), random.randint(61, 300), random.randint(4, 12), random.randint(100, 700),
              random.choice([2, 4, 8])) for _ in range(4)]
    for q, v, each, wide, heads in [(32, 257, 64, 1408, 12), (1, 1, 4, 8, 2), *drawn]:
        e = each * heads
        output = count(q, v, e, wide, heads)
        expect(isinstance(output, int | float) and not isinstance(output, bool),
               f"your function gives a {type(output).__name__} and should give a number.")
        keys, ends, looks = 2 * v * wide * e, 2 * q * e * e, 2 * q * v * e
        right = keys + ends + looks
        if output == right:
            continue
        slips = {2 * right: "you count multiplications and additions as two; one multiply-add is both.",
                 keys + ends + heads * looks: "more heads do not make more products: each is narrower.",
                 keys + q * e * e + looks: "after the heads have been put side by side, something still happens.",
                 keys + ends + q * v * e: "a picture's values are mixed, too, not only its keys compared.",
                 keys // 2 + ends + looks: "a patch is projected twice: as what it is found by, and as what it says.",
                 2 * v * e * e + ends + looks: "patches come as wide as the encoder makes them.",
                 2 * v * wide * wide + ends + looks: "keys are as wide as the queries that they are compared with.",
                 keys + looks: "queries, too, are projected, before and after.",
                 keys + ends: "comparing queries and patches, and mixing, are missing.",
                 4 * q * e * e + looks: "keys and values are made of patches, not of queries.",
                 4 * q * e * e + 2 * q * q * e: "that is self-attention among the queries.",
                 2 * (wide * e + e) + 2 * (e * e + e): "that counts parameters; how often is each one used?",
                 2 * wide * e + 2 * e * e: "that counts weights; how often is each one used?"}
        meaning = slips.get(int(output),
                            "go through it in order: what is projected, from which width to which, for how "
                            "many; what is compared with what; what is mixed.")
        expect(False, f"with {q} queries, {v} patches, width {e}, pictures of width {wide} and {heads} heads you count "
               f"{output:,.0f}; {meaning}")

"""Answers to the exercises of lesson 05."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from . import Answers

# --- run_block --------------------------------------------------------------------------------------------------------


def by_lines(parts, x, queries, image, mask):
    x = parts.self_norm(x + parts.self_attention(x, mask))
    q, t = x[:, :queries], x[:, queries:]
    if queries and parts.cross_attention is not None:
        q = parts.cross_norm(q + parts.cross_attention(q, context=image))
    q = parts.query_norm(q + parts.query_mlp(q))
    t = parts.text_norm(t + parts.text_mlp(t))
    return torch.cat([q, t], dim=1)


def by_list(parts, x, queries, image, mask):
    """Each side as a list of the branches that it goes through; an absent side goes through none."""
    attended = parts.self_norm(torch.add(x, parts.self_attention(x, mask=mask)))
    read = ((lambda q: parts.cross_attention(q, context=image)), parts.cross_norm)
    sides = [(slice(0, queries), [read] * (parts.cross_attention is not None) + [(parts.query_mlp, parts.query_norm)]),
             (slice(queries, None), [(parts.text_mlp, parts.text_norm)])]
    result = torch.empty_like(x)
    for place, branches in sides:
        state = attended[:, place]
        for branch, norm in branches if state.shape[1] else ():
            state = norm(state + branch(state))
        result[:, place] = state
    return result


def blocked(pre=False, all_read=False, swap=False, one_mlp=False, late=False, early=False, plain=False, order=False,
            always=False, masked=True, blind=False, stale=False, by_place=False, apart=False):
    """A block with one of the usual slips."""
    def branch(x, part, norm):
        return x + part(norm(x)) if pre else norm(part(x) if plain else x + part(x))

    def run(parts, x, queries, image, mask):
        def read(q):
            if by_place:
                return parts.cross_attention(q, image)
            return parts.cross_attention(q, context=None if blind else image)

        def talk(x):
            return parts.self_attention(x, mask) if masked else parts.self_attention(x)
        reads = always or (queries and parts.cross_attention is not None)
        if early and reads:
            x = torch.cat([branch(x[:, :queries], read, parts.cross_norm), x[:, queries:]], dim=1)
        if apart:
            both = [parts.self_attention(side, mask[:, :, place, place])
                    for place in (slice(0, queries), slice(queries, None)) if (side := x[:, place]).shape[1]]
            x = parts.self_norm(x + torch.cat(both, dim=1))
        else:
            x = branch(x, talk, parts.self_norm)
        if all_read and reads:
            x = branch(x, read, parts.cross_norm)
        q, t = x[:, :queries], x[:, queries:]
        before = q
        if reads and not (late or early or all_read):
            q = branch(q, read, parts.cross_norm)
        if one_mlp:
            return branch(torch.cat([q, t], dim=1), parts.query_mlp, parts.query_norm)
        if stale:
            q = parts.query_norm(before + parts.query_mlp(q))
        elif swap:
            q = branch(q, parts.text_mlp, parts.text_norm)
        else:
            q = branch(q, parts.query_mlp, parts.query_norm)
        t = branch(t, parts.query_mlp, parts.query_norm) if swap else branch(t, parts.text_mlp, parts.text_norm)
        if late and reads:
            q = branch(q, read, parts.cross_norm)
        return torch.cat([t, q] if order else [q, t], dim=1)
    return run


def adds_in_place(parts, x, queries, image, mask):
    x += 0.1
    return by_lines(parts, x, queries, image, mask)


def cutting(what):
    """Right numbers through which no gradient, or not all of it, flows."""
    def run(parts, x, queries, image, mask):
        start = x.detach() if what in ("x", "branch") else x
        x = parts.self_norm(start + parts.self_attention(x.detach() if what == "x" else x, mask))
        q, t = x[:, :queries], x[:, queries:]
        if queries and parts.cross_attention is not None:
            image = image.detach() if what == "image" else image
            q = parts.cross_norm(q + parts.cross_attention(q, context=image))
        return torch.cat([parts.query_norm(q + parts.query_mlp(q)), parts.text_norm(t + parts.text_mlp(t))], dim=1)
    if what == "x":
        return lambda parts, x, queries, image, mask: run(parts, x, queries, image, mask).detach()
    return run


def swapped_norms(parts, x, queries, image, mask):
    x = parts.self_norm(x + parts.self_attention(x, mask))
    q, t = x[:, :queries], x[:, queries:]
    if queries and parts.cross_attention is not None:
        q = parts.cross_norm(q + parts.cross_attention(q, context=image))
    return torch.cat([parts.text_norm(q + parts.query_mlp(q)), parts.query_norm(t + parts.text_mlp(t))], dim=1)


def first_mask(parts, x, queries, image, mask):
    return by_lines(parts, x, queries, image, mask[:1].expand_as(mask))


def own_mask(parts, x, queries, image, mask):
    """The mistake to make the mask anew, without padding."""
    return by_lines(parts, x, queries, image, torch.ones_like(mask))


def unfed_text(parts, x, queries, image, mask):
    """The text is fed forward, and what comes out is thrown away."""
    kept = []
    result = by_lines(SimpleNamespace(**{**vars(parts), "text_mlp": lambda t: kept.append(t) or parts.text_mlp(t)}), x,
                      queries, image, mask)
    return torch.cat([result[:, :queries], kept[0]], dim=1)


# --- fresh_queries ----------------------------------------------------------------------------------------------------


def drawn_in_place(queries, width, std):
    made = nn.Parameter(torch.empty(1, queries, width))
    nn.init.normal_(made, std=std)
    return made


def seeded(queries, width, std):
    torch.manual_seed(0)
    return drawn_in_place(queries, width, std)


def in_pairs(queries, width, std):
    """Two queries of each kind."""
    return nn.Parameter(std * torch.randn(1, (queries + 1) // 2, width).repeat(1, 2, 1)[:, :queries])


def own_generator(queries, width, std):
    return nn.Parameter(std * torch.randn(1, queries, width, generator=torch.Generator().manual_seed(0)))


def restored(queries, width, std):
    made = drawn_in_place(queries, width, std)
    torch.manual_seed(7)
    return made


# --- begin_as_bert ----------------------------------------------------------------------------------------------------

HOMES = {"self_attention": "attention", "self_norm": "attention_norm", "text_mlp": "mlp", "text_norm": "mlp_norm",
         "query_mlp": "mlp", "query_norm": "mlp_norm"}


def filling(homes=HOMES, how="load"):
    """Fill from a table of names, in one of several ways."""
    def fill(block, bert):
        for ours, theirs in homes.items():
            mine, source = getattr(block, ours), getattr(bert, theirs)
            if how == "load":
                mine.load_state_dict(source.state_dict())
            elif how == "copy":
                setattr(block, ours, copy.deepcopy(source))
            elif how == "share":
                setattr(block, ours, source)
            for one, other in zip(mine.parameters(), source.parameters(), strict=True):
                if how in ("data", "cloned"):
                    one.data = other.data.clone() if how == "cloned" else other.data
                elif how == "values":
                    with torch.no_grad():
                        one.copy_(other)
    return fill


def shares_with_text(block, bert):
    filling({ours: theirs for ours, theirs in HOMES.items() if "query" not in ours})(block, bert)
    block.query_mlp, block.query_norm = block.text_mlp, block.text_norm


def copied_once():
    """The mistake to keep one copy for all blocks."""
    kept = {}

    def fill(block, bert):
        for ours, theirs in HOMES.items():
            source = kept.setdefault((ours, bert), copy.deepcopy(getattr(bert, theirs)))
            for one, other in zip(getattr(block, ours).parameters(), source.parameters(), strict=True):
                one.data = other.data
    return fill


def assigned(block, bert):
    """The mistake to let `load_state_dict` put other parameters in the place of the block's own."""
    for ours, theirs in HOMES.items():
        clones = {name: value.clone() for name, value in getattr(bert, theirs).state_dict().items()}
        getattr(block, ours).load_state_dict(clones, assign=True)


def leaves_a_part_in_eval(block, bert):
    filling()(block, bert)
    block.text_mlp.train(not block.training)


def leaves_eval(block, bert):
    filling()(block, bert)
    block.train(not block.training)


def without_biases(block, bert):
    with torch.no_grad():
        for ours, theirs in HOMES.items():
            for (name, one), other in zip(getattr(block, ours).named_parameters(),
                                          getattr(bert, theirs).parameters(), strict=True):
                if "weight" in name:
                    one.copy_(other)


def by_state(block, bert):
    """One dictionary for the whole block."""
    state = {f"{ours}.{name}": value for ours, theirs in HOMES.items()
             for name, value in getattr(bert, theirs).state_dict().items()}
    block.load_state_dict(state, strict=False)


def moves(block, bert):
    filling()(block, bert)
    for parameter in bert.parameters():
        nn.init.zeros_(parameter)


def halves(block, bert):
    """The mistake to share BERT's one feed-forward out among two."""
    filling()(block, bert)
    with torch.no_grad():
        for parameter in block.query_mlp.parameters():
            parameter.mul_(0.5)


def frozen(block, bert):
    filling()(block, bert)
    block.text_mlp.requires_grad_(False)


def fills_cross(block, bert):
    filling()(block, bert)
    if block.cross_attention is not None:
        block.cross_attention.load_state_dict(bert.attention.state_dict())


def without(*parts):
    return filling({ours: theirs for ours, theirs in HOMES.items() if ours not in parts})


# --- which_pass -------------------------------------------------------------------------------------------------------


def by_columns(slopes):
    query, text = slopes[:, 2], slopes[:, 3]
    if query.isnan().any():
        return "text alone"
    if text.isnan().any():
        return "queries alone"
    if not query.any() or not text.any():
        return "apart, text" if text.any() else "apart, queries"
    return "fused, text" if query[-1] == 0 else "fused, queries"


def by_two_rows(slopes):
    first, last = ["".join("n" if value != value else "y" if value else "0" for value in row[2:].tolist())
                   for row in slopes[[0, -1]]]
    side = "text" if last in ("ny", "0y") else "queries"
    how = "alone" if "n" in first else "apart" if "0" in first else "fused"
    return f"{side} alone" if how == "alone" else f"{how}, {side}"


def instead(**pairs):
    """Right but for some answers."""
    return lambda slopes: pairs.get(by_columns(slopes).replace(", ", "_").replace(" ", "_"), by_columns(slopes))


def fills_the_map(slopes):
    """The mistake to put zeros in the place of nan in the map that was given."""
    name = by_columns(slopes)
    slopes.nan_to_num_(0)
    return name


def two_blocks_only(slopes):
    """The mistake to look at row 1 as if it were the last."""
    return by_columns(slopes[:2])


def first_row_only(slopes):
    return by_columns(slopes[:1])


def by_cross(slopes):
    """The mistake to take a map without nan in its first row for one of both sides, whichever they are."""
    output = by_columns(slopes)
    return "fused, text" if output == "queries alone" and not slopes[0, :2].isnan().any() else output


# --- reading_cost -----------------------------------------------------------------------------------------------------


def by_matrices(q, v, e, wide, heads):
    """Rows times columns times inner length of every product."""
    products = [(v, wide, e)] * 2 + [(q, e, e)] * 2 + [(q, e // heads, v), (q, v, e // heads)] * heads
    return sum(rows * inner * columns for rows, inner, columns in products)


def formula(q, v, e, wide, heads):
    return 2 * e * (v * wide + q * e + q * v)


# --- of any size, of any kind -----------------------------------------------------------------------------------------


def shown(change):
    """A block that shows its queries another picture than the one that was given."""
    def run(parts, x, queries, image, mask):
        return by_lines(parts, x, queries, None if image is None else change(image), mask)
    return run


def by_slices(parts, x, queries, image, mask):
    x = parts.self_norm(x=x + parts.self_attention(x=x, mask=mask))
    result, q, t = torch.empty_like(x), x[:, :queries], x[:, queries:]
    if image is not None and parts.cross_attention is not None:
        q = parts.cross_norm(q + parts.cross_attention(x=q, mask=None, context=image))
    result[:, :queries] = parts.query_norm(q + parts.query_mlp(q))
    result[:, queries:] = parts.text_norm(t + parts.text_mlp(t))
    return result


def one_by_one(queries, width, std):
    parameter = nn.Parameter(torch.zeros(1, queries, width))
    with torch.no_grad():
        for i in range(queries):
            parameter[0, i].normal_(std=std)
    return parameter


def freezes_bert(block, bert):
    filling()(block, bert)
    bert.requires_grad_(False)


def reads_whenever_there_is_an_image(parts, x, queries, image, mask):
    x = parts.self_norm(x + parts.self_attention(x, mask))
    q, t = x[:, :queries], x[:, queries:]
    if image is not None:
        q = parts.cross_norm(q + parts.cross_attention(q, context=image))
    return torch.cat([parts.query_norm(q + parts.query_mlp(q)), parts.text_norm(t + parts.text_mlp(t))], dim=1)


def by_deep_copies(block, bert):
    for ours, theirs in HOMES.items():
        setattr(block, ours, copy.deepcopy(getattr(bert, theirs)))


def by_size(slopes):
    """The mistake to compare how large gradients are."""
    if slopes[:, 2].isnan().all():
        return "text alone"
    if slopes[:, 3].isnan().all():
        return "queries alone"
    both = "fused" if slopes[0, 2] > 0 and slopes[0, 3] > 0 else "apart"
    return f"{both}, {'text' if slopes[:, 3].sum() > slopes[:, 2].sum() else 'queries'}"


def by_what_was_read(slopes):
    if slopes[:, 2].isnan().all():
        return "text alone"
    if slopes[:, 3].isnan().all():
        return "queries alone"
    if not slopes[:, 1].nan_to_num().any():
        return "apart, text"
    return "fused, text" if slopes[-1, 2] == 0 else "apart, queries" if slopes[0, 3] == 0 else "fused, queries"


ANSWERS = {
    "run_block": Answers(
        [by_slices,
         by_lines, by_list, blocked()],
        [(reads_whenever_there_is_an_image, "and yours calls one"),
         (shown(lambda image: image[:1].expand_as(image)), "each entry of the batch its own"),
         (shown(lambda image: image.mean(dim=1, keepdim=True)), "pass it on as it is"),
         (lambda parts, x, *rest: by_lines(parts, x, *rest) + x, "not what the last norm"),
         (blocked(pre=True), "that is pre-norm"), (blocked(all_read=True), "only queries see the image"),
         (blocked(swap=True), "each side has its own"), (blocked(one_mlp=True), "each side has its own"),
         (blocked(late=True), "what has been read"), (blocked(early=True), "first see each other"),
         (blocked(plain=True), "is added to"), (blocked(order=True), "text stands before"),
         (blocked(always=True), "are None"), (blocked(masked=False), "got no mask"),
         (blocked(blind=True), "without the image"), (blocked(by_place=True), "Pass the image by name"),
         (blocked(stale=True), "is added to"), (blocked(apart=True), "more than once"),
         (adds_in_place, "changed the x"), (cutting("x"), "no gradient flows"), (cutting("image"), "the image"),
         (cutting("branch"), "part of the way"), (torch.no_grad()(by_lines), "no gradient flows"),
         (swapped_norms, "tokens"), (first_mask, "another mask"), (own_mask, "another mask"),
         (lambda parts, x, *rest: by_lines(parts, x.float(), *rest).float(), ""), (unfed_text, "is not what the last"),
         (lambda parts, x, queries, image, mask: by_lines(parts, x, queries, image, mask)[:, :queries],
          "(b s e)")]),
    "fresh_queries": Answers(
        [one_by_one,
         drawn_in_place, lambda q, e, std: nn.Parameter(std * torch.randn(1, q, e)),
         lambda q, e, std: nn.Parameter(torch.normal(0.0, std, (1, q, e))),
         lambda q, e, std: nn.Parameter(torch.stack([torch.randn(e) * std for _ in range(q)])[None]),
         lambda q, e, std: nn.Parameter(torch.from_numpy(np.random.normal(0, std, (1, q, e))).float()),
         lambda q, e, std: nn.Parameter(12**0.5 * std * (torch.rand(1, q, e) - 0.5))],
        [(lambda q, e, std: nn.Parameter(torch.eye(q, e)[None] * std * e**0.5), "two calls"),
         (lambda q, e, std: nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, q, e))), "too "),
         (lambda q, e, std: nn.Parameter(torch.zeros(1, q, e)), "stay alike"),
         (lambda q, e, std: nn.Parameter(torch.full((1, q, e), std)), "though not zero"),
         (lambda q, e, std: nn.Parameter(std * torch.randn(1, 1, e).repeat(1, q, 1)), "though not zero"),
         (lambda q, e, std: nn.Parameter(std * torch.randn(1, 1, e) + 1e-2 * std * torch.randn(1, q, e)), "alike"),
         (lambda q, e, std: nn.Parameter(torch.randn(1, q, e)), "too large"),
         (lambda q, e, std: nn.Parameter(std**2 * torch.randn(1, q, e)), "too small"),
         (lambda q, e, std: std * torch.randn(1, q, e), "no parameter"),
         (lambda q, e, std: nn.Parameter(std * torch.randn(q, e)), "(1 q e)"),
         (lambda q, e, std: nn.Parameter(2 * 3**0.5 * std * torch.rand(1, q, e)), "mean"),
         (lambda q, e, std: nn.Parameter(std * torch.randn(1, q, e), requires_grad=False), "requires_grad=False"),
         (seeded, "a seed fixed"), (own_generator, "a seed fixed"), (restored, "random numbers follow"),
         (in_pairs, "nearly alike"), (lambda q, e, std: nn.Parameter(std * torch.randn(1, q, e).double()), "float64"),
         (lambda q, e, std: nn.Parameter(nn.init.trunc_normal_(torch.empty(1, q, e), std=std, a=-2 * std, b=2 * std)),
          "too small"), (lambda q, e, std: nn.Parameter(0.02 * torch.randn(1, q, e)), "too small"),
         (lambda q, e, std: nn.Parameter(std * torch.rand(1, q, e)), "too small"),
         (lambda q, e, std: nn.Parameter(std * torch.randn(1, q, 1).expand(1, q, e).clone()), "nearly alike")]),
    "begin_as_bert": Answers(
        [filling(), filling(how="values"), filling(how="cloned"), by_state],
        [(by_deep_copies, "is another parameter than before"), (filling(how="copy"), "is another parameter than"),
         (assigned, "is another parameter than before"), (freezes_bert, "leave BERT as it is"),
         (shares_with_text, "one and the same memory"), (filling(how="share"), "one and the same memory"),
         (filling(how="data"), "one and the same memory"), (without("query_mlp", "query_norm"), "need a start as well"),
         (without("query_norm"), "need a start as well"), (without("self_norm"), "has not been filled"),
         (filling(HOMES | {"self_norm": "mlp_norm", "text_norm": "attention_norm"}), "another part"),
         (fills_cross, "never seen a picture"), (moves, "BERT itself"), (halves, "neither BERT's"),
         (frozen, "no longer be trained"), (copied_once(), "of another block"), (leaves_eval, "train and eval"),
         (leaves_a_part_in_eval, "or a part of it, between train and eval"),
         (without_biases, "has not been filled"), (without("text_mlp"), "has not been filled")]),
    "which_pass": Answers(
        [by_what_was_read,
         by_columns, by_two_rows],
        [(by_size, "you take"), (fills_the_map, "changed the map"),
         (two_blocks_only, "you take"), (first_row_only, "you take"), (by_cross, "you take"),
         (instead(apart_text="apart, queries"), "there was no loss"),
         (instead(text_alone="apart, text"), "two different answers"),
         (instead(apart_queries="queries alone"), "two different answers"),
         (instead(fused_text="apart, text"), "earlier blocks"), (instead(apart_queries="fused, queries"), "earlier"),
         (instead(fused_text="fused, queries"), "the last block"),
         (instead(fused_queries="fused, text"), "the last block"),
         (instead(queries_alone="text alone"), "was not there"),
         (instead(queries_alone="fused, text"), "Which columns"),
         (lambda slopes: "itc", "the answers are"), (lambda slopes: 3, "the answers are")]),
    "reading_cost": Answers(
        [lambda queries, patches, width, image_width, heads: 2.0 * width * (
             patches * image_width + queries * width + queries * patches),
         formula, by_matrices, lambda *sizes: np.int64(formula(*sizes)), lambda *sizes: float(formula(*sizes)),
         lambda *sizes: torch.tensor(formula(*sizes))],
        [(lambda q, v, e, wide, heads: formula(q, v, e, wide, heads) + e, "go through it"),
         (lambda *sizes: 2 * formula(*sizes), "one multiply-add is both"),
         (lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e + heads * q * v), "each is narrower"),
         (lambda q, v, e, wide, heads: e * (2 * v * wide + q * e + 2 * q * v), "something still happens"),
         (lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e) + q * v * e, "mixed, too"),
         (lambda q, v, e, wide, heads: e * (v * wide + 2 * q * e + 2 * q * v), "projected twice"),
         (lambda q, v, e, wide, heads: 2 * e * (v * e + q * e + q * v), "as the encoder makes them"),
         (lambda q, v, e, wide, heads: 4 * q * e * e + 2 * q * v * e, "not of queries"),
         (lambda q, v, e, wide, heads: 2 * wide * e + 2 * e * e, "how often"),
         (lambda q, v, e, wide, heads: str(q), "should be a number"),
         (lambda q, v, e, wide, heads: 2 * e * (q * e + q * v), "projecting the patches"),
         (lambda q, v, e, wide, heads: 2 * q * v * e, "the projections are missing"),
         (lambda q, v, e, wide, heads: 2 * e * (v * wide + q * e) + 2 * q * v * e // heads, "but there are several"),
         (lambda q, v, e, wide, heads: formula(q, v, e, 1408, heads), "go through it"),
         (lambda q, v, e, wide, heads: formula(q, v, 768, wide, heads), "go through it")]),
}

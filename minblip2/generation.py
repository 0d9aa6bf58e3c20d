"""Writing one token after another: greedy, nucleus and beam search, batched and cached, for every model in the house.

A model is given as `step(ids (n 1), mask (n 1 1 k), cache) -> logits (n vocabulary)`, which reads the newest token and
extends the cache. What came before (an image, a prompt) has been read already: it is in `cache`, `visible` (b k) says
which of its tokens are not padding, and `logits` (b vocabulary) are the predictions for the first token to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from .attention import KVCache

Step = Callable[[Tensor, Tensor, KVCache], Tensor]
IMPOSSIBLE = -1e9  # a score that no sequence has; finite, so that sums and comparisons stay defined


def adjust(scores: Tensor, written: Tensor, end: int, min_length: int, repetition_penalty: float,
           begun: Sequence[int] = ()) -> Tensor:
    """Scores (n vocabulary) after two rules: what is `written` (n t) is penalised, and no end before `min_length`.

    Ids that each text has `begun` with are penalised as well, though they are not counted.
    """
    if repetition_penalty != 1.0:
        there = torch.cat([written, written.new_tensor(begun).expand(len(written), -1)], dim=1)
        seen = scores.gather(1, there)
        seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
        scores = scores.scatter(1, there, seen)
    if written.shape[1] < min_length:
        scores = scores.index_fill(1, torch.tensor([end], device=scores.device), -torch.inf)
    return scores


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Forbid all but the likeliest tokens that together hold a probability of `top_p` (arXiv 1904.09751)."""
    ordered, order = scores.sort(dim=1, descending=True)
    probability = ordered.softmax(dim=1)
    outside = probability.cumsum(dim=1) - probability >= top_p  # what stands before a token is already enough
    outside[:, 0] = False  # the likeliest token always stays
    return scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)


@torch.no_grad()
def sample(step: Step, logits: Tensor, visible: Tensor, cache: KVCache, *, end: int, max_length: int = 30,
           min_length: int = 0, repetition_penalty: float = 1.0, top_p: float | None = None, temperature: float = 1.0,
           generator: torch.Generator | None = None, begun: Sequence[int] = ()) -> Tensor:
    """Write the likeliest token each time, or with `top_p` draw from the nucleus: ids (b t), filled with `end`."""
    written = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    cache = cache.select(torch.arange(len(logits), device=logits.device), max_length)
    while True:
        scores = adjust(logits.float(), written, end, min_length, repetition_penalty, begun)
        if top_p is None:
            token = scores.argmax(dim=1)
        else:
            token = torch.multinomial(nucleus(scores / temperature, top_p).softmax(dim=1), 1, generator=generator)[:, 0]
        token = token.masked_fill(finished, end)
        finished = finished | (token == end)
        written = torch.cat([written, rearrange(token, "b -> b 1")], dim=1)
        if finished.all() or written.shape[1] == max_length:
            return written
        visible = F.pad(visible, (0, 1), value=True)
        logits = step(rearrange(token, "b -> b 1"), rearrange(visible, "b k -> b 1 1 k"), cache)


@torch.no_grad()
def beam_search(step: Step, logits: Tensor, visible: Tensor, cache: KVCache, *, end: int, beams: int,
                max_length: int = 30, min_length: int = 0, repetition_penalty: float = 1.0,
                length_penalty: float = 1.0, begun: Sequence[int] = ()) -> Tensor:
    """Keep the `beams` likeliest beginnings at each step; return the finished text (b t) of highest score.

    A text's score is its log-probability divided by its length to the power `length_penalty`. An image is done when its
    best running beginning, so divided, falls behind its worst finished text. Source: transformers `_beam_search`.
    """
    batch, vocabulary = logits.shape
    rows = repeat(torch.arange(batch, device=logits.device), "b -> (b n)", n=beams)
    logits, visible, cache, read = logits[rows], visible[rows], cache.select(rows, max_length), visible.shape[1]
    written = torch.full((batch, beams, max_length), end, device=logits.device)
    texts = written.clone()
    scores = torch.full((batch, beams), IMPOSSIBLE, device=logits.device)
    text_scores, is_text = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    scores[:, 0] = 0.0  # all beams begin alike: only one may branch at the first step
    open_ = torch.ones(batch, 1, dtype=torch.bool, device=logits.device)

    def take(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor[torch.arange(batch, device=index.device)[:, None], index]

    for length in range(1, max_length + 1):
        log_p = adjust(logits.float().log_softmax(dim=1), rearrange(written[..., : length - 1], "b n t -> (b n) t"),
                       end, min_length, repetition_penalty, begun)
        log_p = rearrange(log_p, "(b n) k -> b n k", n=beams) + scores[..., None]
        # Twice as many candidates as beams: if all the best ones end here, as many are left to go on.
        best, index = rearrange(log_p, "b n k -> b (n k)").topk(2 * beams)
        parent, token = index // vocabulary, index % vocabulary
        candidates = take(written, parent)
        candidates[..., length - 1] = token
        ends = (token == end) | (length == max_length)

        newly = ends & (torch.arange(2 * beams, device=ends.device) < beams) & open_
        final = torch.where(newly, best / length**length_penalty, IMPOSSIBLE)
        text_scores, kept = torch.cat([text_scores, final], dim=1).topk(beams)
        texts = take(torch.cat([texts, candidates], dim=1), kept)
        is_text = take(torch.cat([is_text, newly], dim=1), kept)

        scores, kept = torch.where(ends, best + IMPOSSIBLE, best).topk(beams)
        written, parent, token = take(candidates, kept), take(parent, kept), take(token, kept)
        worst = torch.where(is_text, text_scores.min(dim=1, keepdim=True).values, IMPOSSIBLE)
        open_ = open_ & (scores[:, :1] / length**length_penalty > worst).any(dim=1, keepdim=True)
        if length == max_length or not open_.any():
            break
        rows = rearrange(parent + torch.arange(batch, device=parent.device)[:, None] * beams, "b n -> (b n)")
        cache.reorder(rows, read)
        visible = F.pad(visible, (0, 1), value=True)
        logits = step(rearrange(token, "b n -> (b n) 1"), rearrange(visible, "n k -> n 1 1 k"), cache)
    return texts[:, 0, :length]


def generate(step: Step, logits: Tensor, visible: Tensor, cache: KVCache, *, beams: int = 1, **settings) -> Tensor:
    """Beam search when there is more than one beam, else greedy or nucleus sampling. Returns ids (b t)."""
    if beams > 1:
        return beam_search(step, logits, visible, cache, beams=beams, **settings)
    return sample(step, logits, visible, cache, **settings)

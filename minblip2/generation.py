"""Writing one token after another: greedy, sampling and beam search, batched and cached, for every model here.

A model is given as `step(ids (n 1), attention_mask (n k), cache) -> logits (n vocab_size)`, which reads the newest
token and extends the cache. What came before (an image, a prompt) has been read already: it is in `cache`,
`attention_mask` (b k) is True where a cached token is not padding, and `logits` (b vocab_size) predict the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from . import UserError
from .attention import KVCache

Step = Callable[[Tensor, Tensor, KVCache], Tensor]
IMPOSSIBLE = -1e9  # a score that no sequence has; finite, so that sums and comparisons stay defined


def process_logits(logits: Tensor, written: Tensor, eos_id: int, min_length: int, repetition_penalty: float,
                   decoder_start_ids: Sequence[int] = ()) -> Tensor:
    """Logits (n vocab_size) after two rules: ids in `written` (n t) are penalised, and no end before `min_length`.

    The ids that every text starts with are penalised as well, though they are not counted.
    """
    if repetition_penalty != 1.0:
        there = torch.cat([written, written.new_tensor(decoder_start_ids).expand(len(written), -1)], dim=1)
        seen = logits.gather(1, there)
        seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
        logits = logits.scatter(1, there, seen)
    if written.shape[1] < min_length:
        logits = logits.index_fill(1, torch.tensor([eos_id], device=logits.device), -torch.inf)
    return logits


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Forbid all but the likeliest tokens that together hold a probability of `top_p` (arXiv 1904.09751)."""
    ordered, order = logits.sort(dim=1, descending=True)
    probability = ordered.softmax(dim=1)
    outside = probability.cumsum(dim=1) - probability >= top_p  # what stands before a token is already enough
    outside[:, 0] = False  # the likeliest token always stays
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)


@torch.no_grad()
def greedy_or_sample(step: Step, logits: Tensor, attention_mask: Tensor, cache: KVCache, *, eos_id: int,
                     max_length: int = 30, min_length: int = 0, repetition_penalty: float = 1.0,
                     top_p: float | None = None, temperature: float | None = None,
                     generator: torch.Generator | None = None, decoder_start_ids: Sequence[int] = ()) -> Tensor:
    """Write the likeliest token each time: ids (b t), filled with `eos_id`.

    With a `temperature` the token is drawn instead, with `top_p` from the nucleus, with both from the nucleus of the
    logits divided by the temperature.
    """
    written = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
    finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        scores = process_logits(logits.float(), written, eos_id, min_length, repetition_penalty, decoder_start_ids)
        if top_p is None and temperature is None:
            token = scores.argmax(dim=1)
        else:
            scores = top_p_filter(scores / (1 if temperature is None else temperature), 1 if top_p is None else top_p)
            token = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)[:, 0]
        token = token.masked_fill(finished, eos_id)
        finished = finished | (token == eos_id)
        written = torch.cat([written, rearrange(token, "b -> b 1")], dim=1)
        if finished.all() or written.shape[1] == max_length:
            return written
        attention_mask = F.pad(attention_mask, (0, 1), value=True)
        logits = step(rearrange(token, "b -> b 1"), attention_mask, cache)


@torch.no_grad()
def beam_search(step: Step, logits: Tensor, attention_mask: Tensor, cache: KVCache, *, eos_id: int, beams: int,
                max_length: int = 30, min_length: int = 0, repetition_penalty: float = 1.0,
                length_penalty: float = 1.0, decoder_start_ids: Sequence[int] = ()) -> Tensor:
    """Keep the `beams` likeliest beginnings at each step; return the finished text (b t) of highest score.

    A text's score is its log-probability divided by its length to the power `length_penalty`. An image is done when its
    best running beginning, so divided, falls behind its worst finished text. Source: transformers `_beam_search`.
    """
    batch, vocab_size = logits.shape
    image = torch.arange(batch, device=logits.device)[:, None]  # tensor[image, index] takes each image's own beams
    rows = repeat(image, "b 1 -> (b n)", n=beams)
    given = attention_mask.shape[1]
    logits, attention_mask, cache = logits[rows], attention_mask[rows], cache.select(rows)
    written = torch.full((batch, beams, max_length), eos_id, device=logits.device)
    texts = written.clone()
    scores = torch.full((batch, beams), IMPOSSIBLE, device=logits.device)
    text_scores, is_text = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    scores[:, 0] = 0.0  # all beams begin alike: only one may branch at the first step
    unfinished = torch.ones(batch, 1, dtype=torch.bool, device=logits.device)

    for length in range(1, max_length + 1):
        log_p = process_logits(logits.float().log_softmax(dim=1),
                               rearrange(written[..., : length - 1], "b n t -> (b n) t"),
                               eos_id, min_length, repetition_penalty, decoder_start_ids)
        log_p = rearrange(log_p, "(b n) k -> b n k", n=beams) + scores[..., None]
        # Twice as many candidates as beams: if all the best ones end here, as many are left to go on.
        best, index = rearrange(log_p, "b n k -> b (n k)").topk(2 * beams)
        parent, token = index // vocab_size, index % vocab_size
        candidates = written[image, parent]
        candidates[..., length - 1] = token
        ends = (token == eos_id) | (length == max_length)

        newly = ends & (torch.arange(2 * beams, device=ends.device) < beams) & unfinished
        final = torch.where(newly, best / length**length_penalty, IMPOSSIBLE)
        text_scores, kept = torch.cat([text_scores, final], dim=1).topk(beams)
        texts = torch.cat([texts, candidates], dim=1)[image, kept]
        is_text = torch.cat([is_text, newly], dim=1)[image, kept]

        scores, kept = torch.where(ends, best + IMPOSSIBLE, best).topk(beams)
        written, parent, token = candidates[image, kept], parent[image, kept], token[image, kept]
        worst = torch.where(is_text, text_scores.min(dim=1, keepdim=True).values, IMPOSSIBLE)
        unfinished = unfinished & (scores[:, :1] / length**length_penalty > worst).any(dim=1, keepdim=True)
        if length == max_length or not unfinished.any():
            break
        cache.reorder(rearrange(parent + image * beams, "b n -> (b n)"), given)
        attention_mask = F.pad(attention_mask, (0, 1), value=True)
        logits = step(rearrange(token, "b n -> (b n) 1"), attention_mask, cache)
    return texts[:, 0, :length]


def generate(step: Step, logits: Tensor, attention_mask: Tensor, cache: KVCache, *, eos_id: int, beams: int = 1,
             max_length: int = 30, length_penalty: float = 1.0, **settings) -> Tensor:
    """Beam search when there is more than one beam, else greedy or sampling: ids (b t), t at most `max_length`.

    Settings are those of `beam_search` or `greedy_or_sample`; `length_penalty` compares beams, so it takes several.
    The cache is used up. Raises UserError for a length or beams below 1, a temperature or repetition penalty of 0 or
    below, and for a draw among several beams.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if min(max_length, beams, penalty := settings.get("repetition_penalty", 1.0)) <= 0:
        raise UserError(f"max_length={max_length}, beams={beams}, repetition_penalty={penalty}: each must be above 0")
    if not (temperature := settings.get("temperature", 1.0)) > 0:
        raise UserError(f"temperature is {temperature}: take more than 0, or leave it out for greedy decoding")
    if beams > 1 and (drawn := " and ".join(sorted(settings.keys() & {"temperature", "top_p"}))):
        raise UserError(f"{drawn} would draw tokens at random where {beams} beams search: choose beams=1 to draw")
    settings |= dict(beams=beams, length_penalty=length_penalty) if beams > 1 else {}
    search = beam_search if beams > 1 else greedy_or_sample
    return search(step, logits, attention_mask, cache, eos_id=eos_id, max_length=max_length, **settings)

"""What lesson 12 works with: a small T5 that reads and writes scenes' captions as text, and measures of both halves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import scene_captions
from ..data.scenes import Scene
from ..data.tokenizer import Tokenizer
from ..lm.protocol import LanguageModel
from ..lm.t5 import T5, T5Config
from ..stage2 import Stage2, split_prefix
from ..training import texts
from .decoding import marked
from .language import written_after
from .stage1_lab import Lab, fit

OPENING, LONGEST = "a picture of", 10


def vocabulary() -> Tokenizer:
    """The words of the scenes; a T5 has no start token, and closes what it is given with an end."""
    words = texts.text_tokenizer()
    return Tokenizer(words.backend, [], words.eos_id, words.pad_id, prompt_end=[words.eos_id])


def is_short(text: str) -> bool:
    """Whether a caption is of the one kind that the small T5 reads: it names one or two things."""
    return text.startswith(OPENING) and len(text.split()) <= LONGEST


def corpus(count: int = 5000, seed: int = 0) -> list[tuple[str, str]]:
    """(keywords, caption) of scenes that are never drawn."""
    rng, pairs = random.Random(f"{seed} T5"), []
    for _ in range(count):
        scene = texts.imagine(rng)
        captions, words = scene_captions.write_captions(scene, rng), scene_captions.keywords(scene, rng)
        pairs += [(words, text) for text in captions if is_short(text)]
    return pairs


def text_batch(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, generator: torch.Generator,
               withheld: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[keywords ; prefix] and mask, the rest of the captions and mask (b t); some rows get no keywords."""
    known, known_mask = tokenizer.pad([tokenizer.token_ids(words) for words, _ in pairs])
    known_mask &= torch.rand(len(pairs), 1, generator=generator) >= withheld
    captions = tokenizer.pad([tokenizer.encode(text) for _, text in pairs])
    prefix, prefix_mask, text, text_mask = split_prefix(*captions, tokenizer.eos_id, generator)
    return torch.cat([known, prefix], dim=1), torch.cat([known_mask, prefix_mask], dim=1), text, text_mask


def writing_loss(lm: LanguageModel, given: Tensor, given_mask: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of texts (b t) after what was given (b s e)."""
    hidden = lm.teacher_forcing(given, given_mask, lm.embed(text_ids), text_mask)
    return F.cross_entropy(lm.lm_logits(hidden[text_mask]), text_ids[text_mask])


def small_t5(tokenizer: Tokenizer, seed: int = 0) -> T5:
    """An untrained T5 that learns in seconds: two blocks on each side, gated as FlanT5's."""
    torch.manual_seed(seed)
    return T5(T5Config(vocab_size=len(tokenizer), width=64, layers=2, heads=4, head_width=16, mlp_width=128, buckets=16,
                       max_distance=32, activation="gelu", gated=True, tied=False, scaled=False,
                       decoder_start_id=tokenizer.pad_id))


def read_texts(lm: T5, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], steps: int = 350,
               rate: float = 4e-3, loss: Callable[..., Tensor] = writing_loss) -> list[dict[str, float]]:
    """Train a T5 on keywords and captions with a loss like `writing_loss`, then freeze it; the log."""
    generator = torch.Generator().manual_seed(0)

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(pairs), (32,), generator=generator).tolist()
        given, given_mask, text, text_mask = text_batch([pairs[row] for row in rows], tokenizer, generator)
        return loss(lm, lm.embed(given), given_mask, text, text_mask)

    log = fit(lm, loss_of, steps, rate)
    lm.requires_grad_(False).eval()
    return log


def image_batch(lab: Lab, tokenizer: Tokenizer, step: int, size: int = 32) -> tuple[Tensor, ...]:
    """The batch of this step: features of training images, and their short captions cut in two, as `Stage2` takes."""
    rng = random.Random(f"T5 {step}")
    known = [(row, text) for row, text in lab.train.pairs if is_short(text)]
    rows, captions = zip(*rng.sample(known, size), strict=True)
    ids, mask = tokenizer.pad([tokenizer.encode(text) for text in captions])
    cut = split_prefix(ids, mask, tokenizer.eos_id, torch.Generator().manual_seed(step))
    return lab.train_features[list(rows)].float(), *cut


def fit_stage2(stage2: Stage2, batch: Callable[[int], tuple[Tensor, ...]], steps: int = 250, rate: float = 1e-3,
                 projection_rate: float = 1e-2) -> list[dict[str, float]]:
    """Train a bridge on batch(step), as `Stage2` takes them; the log. Projections learn faster."""
    named = [(name, p) for name, p in stage2.named_parameters() if p.requires_grad]
    groups = [([p for name, p in named if name.startswith("projection") == last], peak)
              for last, peak in ((False, rate), (True, projection_rate))]
    optimiser, log = torch.optim.AdamW([{"params": some, "lr": peak} for some, peak in groups], weight_decay=0.01), []
    for step in range(steps):
        for group, (_, peak) in zip(optimiser.param_groups, groups, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        loss = stage2(*batch(step)).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimiser.step()
        log.append({"step": step, "loss": loss.item()})
    return log


def from_keywords(lm: T5, tokenizer: Tokenizer, keywords: Sequence[str]) -> list[str]:
    """The captions that a T5 writes when its encoder is given keywords and the opening."""
    known, known_mask = tokenizer.pad([tokenizer.token_ids(words) for words in keywords])
    prompt = torch.tensor([tokenizer.encode_prompt(OPENING)]).expand(len(known), -1)
    given = lm.embed(torch.cat([known, prompt], dim=1)).detach()
    mask = torch.cat([known_mask, torch.ones_like(prompt, dtype=torch.bool)], dim=1)
    return [f"{OPENING} {rest}" for rest in written_after(lm, tokenizer, given, mask)]


def keywords_of(truths: Sequence[Scene], seed: int = 2) -> list[str]:
    """Keywords of each scene, in an order drawn by lot."""
    rng = random.Random(f"{seed} T5")
    return [scene_captions.keywords(truth, rng) for truth in truths]


def first_logits(lm: T5, given: Tensor, given_mask: Tensor) -> tuple[Tensor, float]:
    """Logits (b vocab) of the first word after ids (b s), and the largest number in hidden states of both halves."""
    sizes: list[float] = []
    hooks = [block.register_forward_hook(lambda *call: sizes.append(call[2].abs().max().item()))
             for block in (*lm.encoder.blocks, *lm.decoder.blocks)]
    first, _ = lm.prefill(lm.embed(given), given_mask, lm.new_cache())
    for hook in hooks:
        hook.remove()
    return lm.lm_logits(first).float(), max(sizes)


def new_scenes(count: int = 150, seed: int = 1) -> tuple[list[Scene], list[str]]:
    """Scenes of one or two things, drawn apart from the training texts, and keywords of each."""
    rng, found = random.Random(f"{seed} T5"), []
    while len(found) < count:
        scene = texts.imagine(rng)
        found += [scene] if len(scene.things) < 3 else []
    return found, [scene_captions.keywords(scene, rng) for scene in found]


def right(captions: Sequence[str], truths: Sequence[Scene]) -> tuple[float, float]:
    """Share of captions that name all colours of their scene and no other, and share that name all things."""
    pairs = list(zip(captions, truths, strict=True))
    colours = sum(sorted(colour or "" for colour, _ in scene_captions.parse(caption).things)
                  == sorted(thing.colour for thing in truth.things) for caption, truth in pairs)
    things = sum(bool(scene_captions.judge(caption, truth)["things"]) for caption, truth in pairs)
    return colours / len(pairs), things / len(pairs)


def marks(captions: Sequence[str], truths: Sequence[Scene]) -> list[str]:
    """A ✓ for each caption that names exactly the things of its scene, else a ✗."""
    return [marked(caption, truth)[0] for caption, truth in zip(captions, truths, strict=True)]


def examples(keywords: Sequence[str], captions: Sequence[str], truths: Sequence[Scene],
             count: int = 3) -> list[list[str]]:
    """Rows of a table: keywords, caption, mark; the first `count` that are right, then the first that are wrong."""
    rows = [list(row) for row in zip(keywords, captions, marks(captions, truths), strict=True)]
    return [row for mark in "✓✗" for row in [row for row in rows if row[2] == mark][:count]]

"""A step of stage 2, forward and backward, against transformers' BLIP-2: python -m benchmarks.stage2 [--batch 8]

The other side is `Blip2ForConditionalGeneration`. Both have the same weights, are given the same image features, texts
padded to the longest, and reach the same loss; the language model is frozen in both. With T5 the text is cut in two:
the first part is given, the second written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import theirs
from benchmarks.stage1 import SIZES, example
from benchmarks.timing import OURS, case, difference, gradient_difference, interleave, keep, options, same, work
from minblip2.data.entry import run_command
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.lm.t5 import T5, T5Config
from minblip2.stage1 import Stage1
from minblip2.stage2 import Stage2, split_prefix
from minblip2.weights import names
from minblip2.weights.keymap import translate

THEIRS = "transformers"
FLAN = dict(activation="gelu", gated=True, tied=False, scaled=False)  # FlanT5 as BLIP-2 runs it
LMS = {"OPT-125m": lambda: OPT(OPTConfig()),
       "FlanT5-small": lambda: T5(T5Config(layers=8, heads=6, mlp_width=1024, **FLAN))}
TINY_LMS = {
    "OPT-125m": lambda: OPT(OPTConfig(vocab_size=200, width=48, layers=2, heads=4, mlp_width=96, max_positions=128)),
    "FlanT5-small": lambda: T5(T5Config(vocab_size=200, width=48, layers=2, heads=4, head_width=12, mlp_width=96,
                                        **FLAN))}
END = 2  # the id that closes a text


@dataclass
class Pair:
    """A stage 2 of ours and the same of transformers'; what both must know: the id that stands for an image there, how
    many tokens an image becomes, and whether what is given and what is written are two texts."""

    ours: Stage2 | None
    theirs: torch.nn.Module | None
    image_token: int
    queries: int
    two_texts: bool


def pair(size: str, lm: str, seed: int = 0) -> Pair:
    """Both models on the same random weights; the image token is the language model's last id."""
    torch.manual_seed(seed)
    config = replace(SIZES[size][0], vocab_size=100)  # the Q-Former's own words stay behind in stage 1
    model = (TINY_LMS if size == "tiny" else LMS)[lm]()
    if isinstance(model, T5):  # as T5 starts: queries that make up for scores which nothing divides
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "token_embedding" not in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 / (8 if "query" in name else 1))
    stage2 = Stage2.from_stage1(Stage1(config), model)
    with torch.no_grad():
        stage2.match_embedding_scale(torch.randn(4, 9, config.image_width))
    image_token = model.vocab_size - 1
    other = theirs.blip2(stage2, image_token, eos_token_id=END, pad_token_id=1, bos_token_id=END)
    return Pair(stage2.eval(), other, image_token, config.num_queries, bool(model.decoder_start_ids))


def batch_of(models: Pair, size: str, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Image features (b v e), and ids and mask (b t) of what is given and of what is to be written."""
    config, visual = SIZES[size]
    image, ids, mask, _ = example(replace(config, vocab_size=models.image_token), visual, batch, seed)
    ids = ids.clamp(min=3)
    ids[torch.arange(batch), mask.sum(dim=1) - 1] = END
    if models.two_texts:
        prompt_ids, prompt_mask, ids, mask = split_prefix(ids, mask, END, torch.Generator().manual_seed(seed))
        return image, *trimmed(prompt_ids, prompt_mask), *trimmed(ids, mask)
    nothing = ids[:, :0]
    return image, nothing, nothing.bool(), ids, mask


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (b t) without the padding that all share."""
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest].contiguous(), mask[:, :longest].contiguous()


def our_loss(models: Pair, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of our model."""
    return models.ours(*batch).loss


def their_loss(models: Pair, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of transformers' model: labels are -100 where nothing is to be learned."""
    image, prompt_ids, prompt_mask, ids, mask = batch
    labels = ids.masked_fill(~mask, -100)
    if not models.two_texts:  # what is to be written is part of what is given
        prompt_ids, prompt_mask = ids, mask
        labels = torch.cat([torch.full((len(ids), models.queries), -100), labels], dim=1)
    given = theirs.their_batch(image, models.image_token, models.queries, prompt_ids, prompt_mask)
    return models.theirs(**given, labels=labels).loss


def gradients(model: torch.nn.Module, named: Callable[[str], str]) -> dict[str, Tensor]:
    """All gradients under our names."""
    return {named(name): parameter.grad.clone() for name, parameter in model.named_parameters()
            if parameter.grad is not None}


def agreement(models: Pair, batch: tuple[Tensor, ...]) -> dict[str, float]:
    """The differences in loss and in gradient. Raises ValueError when they are not the same computation."""
    table = names.blip2(names.OPT).tensors
    found = []
    for model, loss_of, named in ((models.ours, our_loss, lambda name: f"stage2.{name}"),
                                  (models.theirs, their_loss, lambda name: translate(name, table)[0])):
        loss = loss_of(models, batch)
        loss.backward()
        found.append((loss.detach(), gradients(model, named)))
        model.zero_grad()
    (our_one, our_gradients), (their_one, their_gradients) = found
    return {"loss": same("loss", difference(our_one, their_one)),
            "gradient": same("gradient", gradient_difference(our_gradients, their_gradients))}


def steps(models: Pair, batches: list[tuple[Tensor, ...]]) -> dict[str, Callable[[int], None]]:
    """What is timed: forward and backward of each side on a batch by its number."""
    def step(model, loss_of):
        def run(turn: int) -> None:
            loss_of(models, batches[turn]).backward()
            model.zero_grad()
        return run

    return {OURS: step(models.ours, our_loss), THEIRS: step(models.theirs, their_loss)}


def measure(size: str, lm: str, batch: int, repeats: int) -> dict:
    """Compare: first that both compute the same, then the seconds of a step."""
    models = pair(size, lm)
    batches = [batch_of(models, size, batch, seed) for seed in range(repeats + 1)]
    agrees = agreement(models, batches[0])
    both = steps(models, batches)
    return case(interleave(both, repeats), same={THEIRS: agrees}, work=work(both))


def main() -> None:
    """Measure, print, and keep runs/benchmarks/stage2.json."""
    args = options(__doc__, size=tuple(SIZES), batch=8, lms=list(LMS))
    for lm in args.lms:
        keep("stage2", {f"{lm} size, batch {args.batch}": measure(args.size, lm, args.batch, args.repeats)})


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.stage2", main))

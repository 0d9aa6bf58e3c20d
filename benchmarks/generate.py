"""Writing captions against transformers' `generate`: python -m benchmarks.generate [--batch 8 32] [--beams 1 5]

Both read the same image features and the same start, and write 30 tokens, neither more nor less: random weights seldom
end a text. The ids must be identical. With `--tokens 1` one sees what passes before the first word is there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.stage1 import SIZES, example
from benchmarks.stage2 import END, LMS, THEIRS, Pair, pair
from benchmarks.theirs import their_batch
from benchmarks.timing import OURS, case, interleave, keep, options, work
from minblip2.data.entry import run_command
from minblip2.lm.packed import PackedLinears


def ways(models: Pair, image: Tensor, beams: int, tokens: int) -> dict[str, Callable[[int], Tensor]]:
    """What is timed: from image features (b v e) to ids (b t), each side its own way."""
    start = torch.full((len(image), 1), END)
    for model in (models.ours, models.theirs):
        if model is not None:  # `memory` builds one side alone
            model.requires_grad_(False)  # who writes does not train

    def ours(turn: int) -> Tensor:
        with PackedLinears():
            return models.ours.generate(image, start, start.bool(), eos_id=END, beams=beams, max_length=tokens,
                                        min_length=tokens)

    def theirs(turn: int) -> Tensor:
        given = their_batch(image, models.image_token, models.queries, start, start.bool())
        ids = models.theirs.generate(**given, num_beams=beams, do_sample=False, early_stopping=False,
                                     max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=END, pad_token_id=END)
        return ids[:, 1:] if models.two_texts else ids[:, given["input_ids"].shape[1]:]

    return {OURS: ours, THEIRS: theirs}


def agreement(sides: dict[str, Callable[[int], Tensor]]) -> str:
    """"identical", or ValueError."""
    ours, other = (side(0) for side in sides.values())
    if not torch.equal(ours, other):
        raise ValueError(f"{(ours != other).sum()} of {ours.numel()} ids differ: the two sides do not write the same")
    return "identical"


def measure(size: str, lm: str, batch: int, beams: int, tokens: int, repeats: int) -> dict:
    """Compare: first that both write the same, then the seconds."""
    models = pair(size, lm)
    image, *_ = example(*SIZES[size], batch)
    sides = ways(models, image, beams, tokens)
    agrees = agreement(sides)
    return case(interleave(sides, repeats), same={THEIRS: {"ids": agrees}}, work=work(sides))


def main() -> None:
    """Measure, print, and keep runs/benchmarks/generate.json."""
    args = options(__doc__, size=tuple(SIZES), lm=tuple(LMS), batch=[8, 32], beams=[1, 5], tokens=30)
    for batch in args.batch:
        for beams in args.beams:
            how = "greedy" if beams == 1 else f"{beams} beams"
            words = f"{args.tokens} token{'s' if args.tokens > 1 else ''}"
            keep("generate", {f"{words}, {how}, {args.lm} size, batch {batch}":
                              measure(args.size, args.lm, batch, beams, args.tokens, args.repeats)})


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.generate", main))

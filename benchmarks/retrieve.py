"""Re-ranking captions by matching, against repeating an image for each of them: python -m benchmarks.retrieve

Each round ranks 128 captions for another image; 100 images take 100 times as long. Ours projects the image once and
takes the short captions first. LAVIS repeats the image's features for every caption, projects each
copy, and pads texts to 35 tokens: in our code, and composed from transformers' Q-Former. At 364 pixels, where LAVIS
measures retrieval, an image has 677 visual tokens instead of 257.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.stage1 import OFFICIAL, SAVINGS, SIZES, THEIRS, PlainStage1, composed, example, sharing
from benchmarks.timing import OURS, case, difference, interleave, keep, options, same, work
from minblip2.data.entry import run_command
from minblip2.weights.retriever import pair_logits

PADDED = 35  # tokens, as LAVIS pads them for retrieval


def ranked(stage1: PlainStage1, image_features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits "match" (n) of captions (n t) with one image's features (1 v e), as `Retriever` computes them."""
    image_rows, text_rows = torch.zeros(len(ids), dtype=torch.long), torch.arange(len(ids))
    return pair_logits(stage1, image_features, ids, mask, image_rows, text_rows)[:, 1]


@torch.no_grad()
def repeated(stage1: PlainStage1, image_features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The same (n) from the image repeated for each caption, and texts padded to 35 tokens."""
    more = max(PADDED - ids.shape[1], 0)
    copies = stage1.image_kv(image_features.repeat(len(ids), 1, 1))
    return stage1.itm_logits(copies, F.pad(ids, (0, more)), F.pad(mask, (0, more), value=False))[:, 1]


def ways(size: str, candidates: int, visual: int, rounds: int) -> dict[str, Callable[[int], Tensor]]:
    """What is timed: each side ranks the captions of the image that belongs to a round."""
    config, _ = SIZES[size]
    torch.manual_seed(0)
    model = PlainStage1(config, savings=tuple(SAVINGS)).eval()
    captions = [example(config, 1, candidates, seed)[1:3] for seed in range(rounds)]
    images = torch.randn(rounds, visual, config.image_width)
    sides = {OURS: (ranked, model), OFFICIAL: (repeated, sharing(model, ("cached",)).eval()),
             THEIRS: (repeated, composed(model).eval())}
    return {name: (lambda turn, way=way, form=form: way(form, images[turn : turn + 1], *captions[turn]))
            for name, (way, form) in sides.items()}


def agreement(sides: dict[str, Callable[[int], Tensor]]) -> dict[str, dict[str, float]]:
    """The differences of the scores. Raises ValueError when they are not the same computation."""
    ours = sides[OURS](0)
    return {name: {"scores": same("scores", difference(ours, side(0)))} for name, side in sides.items() if name != OURS}


def measure(size: str, candidates: int, visual: int, repeats: int) -> dict:
    """Compare: first that all score alike, then the seconds for one image."""
    sides = ways(size, candidates, visual, repeats + 1)
    agrees = agreement(sides)
    return case(interleave(sides, repeats), same=agrees, work=work(sides))


def main() -> None:
    """Measure, print, and keep runs/benchmarks/retrieve.json."""
    args = options(__doc__, size=tuple(SIZES), candidates=128, visual=[257, 677])
    for visual in args.visual:
        keep("retrieve", {f"{args.candidates} captions for an image of {visual} tokens":
                          measure(args.size, args.candidates, visual, args.repeats)})


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.retrieve", main))

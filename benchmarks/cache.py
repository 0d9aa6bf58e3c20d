"""What caching frozen features is worth: python -m benchmarks.cache --data DATA --parts PARTS [--sizes gpu --batch 8]

A step of stage 1 on features from the cache against one that decodes the pictures and runs the encoder again, as one
without a cache does for every pair of every epoch. Each round is one batch, the same for both; an epoch is as many
times that as it has batches, and is given beside it. With `--sizes gpu` the models have the sizes of the recipe `gpu`
(CLIP ViT-L/14, BERT-base), with `--sizes paper` those of the paper (ViT-g/14), and random weights, which take as long.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.stage1 import example
from benchmarks.timing import OURS, case, difference, interleave, keep, options, same, work
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.features import feature_cache
from minblip2.data.pictures import load_image
from minblip2.data.transforms import Transform
from minblip2.qformer import QFormerConfig
from minblip2.stage1 import Stage1
from minblip2.training.recipes import find_recipe
from minblip2.vit import CLIP_L, EVA_G, ViT

LOOP = "encoder in the loop"
FLOAT16 = 1e-2  # how far losses may differ because the cache keeps features in float16


def measure(encoder: nn.Module, transform: Transform, paths: Sequence[Path], config: QFormerConfig, batch: int,
            visual: int, repeats: int) -> dict:
    """Seconds of a step on `batch` pictures at a time, of which `visual` tokens are used, in each round other ones."""
    torch.manual_seed(0)
    stage1 = Stage1(config)
    captions = [example(config, 1, batch, seed)[1:] for seed in range(repeats + 1)]

    @torch.no_grad()
    def encode(turn: int) -> Tensor:
        images = (load_image(path) for path in paths[turn * batch : (turn + 1) * batch])
        return encoder(torch.stack([transform(image) for image in images]))

    def step(image: Tensor, turn: int) -> Tensor:
        ids, mask, negatives = captions[turn]
        loss = stage1(image[:, :visual], ids, mask, negatives=negatives).loss
        loss.backward()
        stage1.zero_grad()
        return loss.detach()

    with tempfile.TemporaryDirectory() as folder:
        cache = feature_cache(torch.no_grad()(encoder), transform, paths[: (repeats + 1) * batch], folder, "benchmark",
                              progress=False)

        def cached(turn: int) -> Tensor:
            rows = cache[turn * batch : (turn + 1) * batch, :visual]
            return step(torch.from_numpy(rows.astype(np.float32)), turn)

        def loop(turn: int) -> Tensor:
            return step(encode(turn), turn)

        agrees = {LOOP: {"loss, float16": same("loss", difference(cached(0), loop(0)), FLOAT16)}}
        sides = {OURS: cached, LOOP: loop}
        return case(interleave(sides, repeats), same=agrees, work=work(sides))


LARGE = {"gpu": CLIP_L, "paper": EVA_G}


def of_sizes(name: str, data: str, parts: str) -> tuple[nn.Module, Transform, QFormerConfig, int]:
    """Encoder, transform and Q-Former of these sizes, and how many visual tokens a step sees."""
    if name in LARGE:
        vit = LARGE[name]
        return ViT(vit).eval(), Transform(), QFormerConfig(image_width=vit.width, dropout=0.0), vit.grid**2 + 1
    recipe = find_recipe(name)
    made = recipe.build(recipe, Path(data), Path(parts), Path("runs") / name)
    tokens = (made.transform.size // made.encoder.config.patch_size) ** 2 + 1
    return made.encoder.float(), made.transform, made.qformer, recipe.keep_tokens or tokens


def main() -> None:
    """Measure, print, and keep runs/benchmarks/cache.json."""
    args = options(__doc__, sizes="laptop", data="data/coco", parts="data/parts", batch=32)
    encoder, transform, config, visual = of_sizes(args.sizes, args.data, args.parts)
    data = CocoCaptions(args.data, "train")
    paths = [record.path for record in data.images[:(args.repeats + 1) * args.batch]]
    found = measure(encoder, transform, paths, config, args.batch, visual, args.repeats)
    batches = len(data.pairs) / args.batch
    found["epoch"] = {name: {clock: seconds * batches for clock, seconds in each.items()}
                      for name, each in found["median"].items()}
    keep("cache", {f"sizes of {args.sizes}, batch {args.batch}, frozen features cached": found})


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.cache", main))

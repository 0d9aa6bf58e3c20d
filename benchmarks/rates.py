"""How stage 2 of the laptop recipe should begin: python -m benchmarks.rates runs/laptop [--steps 70]

From the finished stage 1 of that run, stage 2 begins several times, for so many steps of 16 pairs: the projection
always learns at one rate, the Q-Former at several, each falling along a cosine of its own; soft prompts begin as loud
as words, or louder. Each is a line of benchmarks/results/rates.jsonl: what captions of validation pictures cost the
language model beside their own picture, and beside another one, in nats for each piece of a word.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.ablations import add, known
from benchmarks.earns import word_loss
from benchmarks.provenance import machine
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.stage2 import Stage2
from minblip2.training.bridge import Bridge, load_bridge, stage2_losses
from minblip2.training.loop import train
from minblip2.training.records import recorded_data

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
PROJECTION = 2e-3  # its rate
WAYS = ((5e-5, 1), (1e-4, 1), (2e-4, 1), (5e-5, 4), (2e-4, 4))  # the Q-Former's rate; loudness beside words'
PICTURES = 250


@torch.no_grad()
def louder(stage2: Stage2, image: torch.Tensor, times: float) -> None:
    """Multiply what differs in soft prompts, from image to image (b v e) and query to query, and keep their mean."""
    middle = stage2.soft_prompt(image).mean(dim=(0, 1))
    stage2.projection.weight.mul_(times)
    stage2.projection.bias.copy_(times * stage2.projection.bias + (1 - times) * middle)


def line(bridge: Bridge, data: Path, cache: Path, rate: float, loudness: float, steps: int) -> dict:
    """Begin stage 2 this way, and measure where it is after so many steps: losses "own" and "other", in nats."""
    recipe, parts = bridge.recipe, bridge.backbones
    recipe = replace(recipe, stage2=replace(recipe.stage2, steps=steps, batch_size=16, warmup=min(40, steps // 4),
                                            learning_rate=rate, new_params="projection", lr_scale=PROJECTION / rate))
    train_split, val = CocoCaptions(data, "train"), CocoCaptions(data, "val")
    views = [bridge.features(train_split, cache, **view) for view in recipe.views]
    bridge = replace(bridge, recipe=recipe)
    bridge.init_stage2(views[0])
    louder(bridge.stage2, torch.from_numpy(np.array(views[0][:64], dtype=np.float32)).to(bridge.device), loudness)
    losses = partial(stage2_losses, tokenizer=parts.lm_tokenizer, prompt=recipe.prompt)
    with tempfile.TemporaryDirectory() as folder:
        train(bridge.stage2, losses, bridge.stage2_pairs(train_split, views), recipe.stage2, folder,
              name=f"Q-Former at {rate}, {loudness} times as loud", device=bridge.device)
    bridge.stage2.eval()
    image = torch.from_numpy(np.array(bridge.features(val, cache)[:PICTURES]))
    first = [record.captions[0] for record in val.images[:PICTURES]]
    own, other = word_loss(bridge, image, first), word_loss(bridge, image.roll(1, 0), first)
    return {"rate": rate, "loudness": loudness, "steps": steps, "seed": recipe.stage2.seed, "machine": machine(),
            "own": round(own, 3), "other": round(other, 3)}


def main() -> None:
    """Write the lines that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines (default: those of the repository)")
    options = parser.parse_args()
    bridge, data = load_bridge(options.run), recorded_data(options.run)
    done = {(one["rate"], one["loudness"], one["steps"]) for one in known(options.results)}
    for rate, loudness in WAYS:
        if (rate, loudness, options.steps) not in done:
            add(options.results, line(bridge, data, options.run / "cache", rate, loudness, options.steps))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.rates", main))

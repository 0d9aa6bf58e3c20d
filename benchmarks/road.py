"""How long a step waits for its data: python -m benchmarks.road [--pictures 2500] [--step 0.1]

A cache of the laptop recipe's form (one view, 257 x 384 in float16, 129 tokens kept, batches of 64) feeds a step that
computes for so many seconds, in one thread. A real step of that recipe takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minblip2.data.batches import PairBatches
from minblip2.data.entry import run_command
from minblip2.data.files import write_json
from minblip2.training.recipes import find_recipe


def main() -> None:
    """Print and keep the share of time that a step waits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--pictures", type=int, default=2500)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--step", type=float, nargs="+", default=[0.05, 0.1, 0.5], help="seconds of computing")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    recipe, random = find_recipe(options.recipe), np.random.default_rng(0)
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        views = []
        for view in range(len(recipe.views)):
            path = Path(folder) / f"{view}.npy"
            shape = (options.pictures, 257, options.width)
            made = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            for row in range(options.pictures):
                made[row] = random.standard_normal(shape[1:], dtype=np.float32)
            views.append(np.load(path, mmap_mode="r"))
        ids = [[1] * int(random.integers(10, 20)) for _ in range(5 * options.pictures)]
        batches = PairBatches(views, [i // 5 for i in range(len(ids))], ids, range(options.pictures),
                              recipe.stage1.batch_size, 0, 0, recipe.keep_tokens)
        matrix = torch.randn(512, 512)
        for step in options.step:
            source, waited, started = batches.iterate(), 0.0, 0.0
            for turn in range(options.steps + 3):
                asked = time.perf_counter()
                batch = next(source)
                ready = time.perf_counter()
                if turn == 3:  # the first batches find nothing prepared
                    waited, started = 0.0, asked
                waited += ready - asked
                while time.perf_counter() - ready < step:
                    matrix @ matrix
            share = waited / (time.perf_counter() - started)
            source.close()
            results[f"step of {step} s"] = share
            print(f"{recipe.name}: {tuple(batch.image_features.shape)} a batch, steps of {step * 1000:.0f} ms wait "
                  f"{share:.1%}")
    path = Path("runs/benchmarks/road.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.road", main))

"""How a stage-1 step grows: python -m benchmarks.growth [--size laptop] [--out benchmarks/results/growth.json]

One axis at a time is varied, the others stay where `START` has them; what is timed is forward and backward of `Stage1`.
The file that it writes, also for the bonus notebook 05_what_it_costs to plot:

    {"machine": {...}, "size": "laptop", "start": {"batch": 8, "text": 16, "queries": 32, "visual": 257},
     "exponents": {"batch": 0.97, ...},                       the slope of a line through log(value), log(seconds)
     "batch": [{"value": 2, "seconds": 0.21, "wall": 0.22}, ...], "text": [...], "queries": [...], "visual": [...]}

"seconds" are the process's own (CPU time), the median of the rounds; "wall" stands beside it.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.stage1 import SIZES
from benchmarks.timing import interleave, machine, options
from minblip2.data.entry import run_command
from minblip2.data.files import write_json
from minblip2.stage1 import Stage1

START = dict(batch=8, text=16, queries=32, visual=257)
AXES = dict(batch=[2, 4, 8, 16], text=[8, 16, 32, 64], queries=[8, 16, 32, 64], visual=[65, 129, 257, 513])


def exponent(points: list[dict[str, float]]) -> float:
    """The slope of the line through log(seconds) over log(value) that fits best: 1 is as fast as the value itself."""
    x, y = ([math.log(point[key]) for point in points] for key in ("value", "seconds"))
    return statistics.linear_regression(x, y).slope


def step(model: Stage1, batch: int, text: int, visual: int):
    """One forward and backward pass on random features and full texts of these sizes."""
    config = model.qformer.config
    image = torch.randn(batch, visual, config.image_width)
    ids = torch.randint(1, config.vocab_size - 1, (batch, text))
    other = (torch.arange(batch) + 1) % batch

    def run(turn: int) -> None:
        model.zero_grad()
        model(image, ids, torch.ones_like(ids, dtype=torch.bool), negatives=(other, other)).loss.backward()

    return run


def measure(size: str, start: dict[str, int], axes: dict[str, list[int]], repeats: int) -> dict:
    """All axes; see the top of the file for what comes back."""
    config, _ = SIZES[size]
    torch.manual_seed(0)
    found: dict = {"machine": machine(), "size": size, "start": start, "exponents": {}}
    for axis, values in axes.items():
        sides = {}
        model = Stage1(config)
        for value in values:
            sizes = start | {axis: value}
            queries = sizes.pop("queries")
            if queries != model.qformer.config.num_queries:
                model = Stage1(replace(config, num_queries=queries))
            sides[str(value)] = step(model, **sizes)
        for side in sides.values():
            side(0)
        seconds = interleave(sides, repeats)
        medians = {clock: {name: statistics.median(each[name]) for name in sides} for clock, each in seconds.items()}
        found[axis] = [{"value": value, "seconds": medians["cpu"][str(value)], "wall": medians["wall"][str(value)]}
                       for value in values]
        found["exponents"][axis] = exponent(found[axis])
        print(f"{axis}: " + ", ".join(f"{point['value']}: {point['seconds']:.2f} s" for point in found[axis])
              + f"; exponent {found['exponents'][axis]:.2f}", flush=True)
    return found


def main() -> None:
    """Measure and write the file."""
    args = options(__doc__, size=tuple(dict.fromkeys(["laptop", *SIZES])), out="benchmarks/results/growth.json")
    found = measure(args.size, START, AXES, args.repeats)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.out), found)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.growth", main))

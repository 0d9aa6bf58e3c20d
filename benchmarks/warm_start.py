"""How much of stage 1 stage 2 should start with: python -m benchmarks.warm_start RUN [RUN ...]

Each RUN is a finished run of the scenes recipe. Its stage 2 is trained once more from all of stage 1's matrices, as the
paper's, on the same experts and the same stage 1, and both are measured on the validation split: two lines of
benchmarks/results/warm_start.jsonl. Runs that have their lines are left out.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.ablations import KEPT, add, borrow, known
from minblip2.data.entry import run_command
from minblip2.data.files import read_json
from minblip2.evaluation.measure import evaluate_run
from minblip2.training.bridge import train_bridge
from minblip2.training.recipes import Recipe, find_recipe
from minblip2.training.records import recorded_data

RESULTS = Path(__file__).parent / "results" / "warm_start.jsonl"


def line(run: Path, recipe: Recipe, data: Path, share: float) -> dict:
    """Train stage 2 of a recipe's run from this share of its stage 1, or load it, and measure it."""
    out = run
    if share != recipe.warm_start:
        out = run.parent / "warm-start" / f"{run.name}-{share}"
        borrow(out, {part: run / part for part in ("vit", "lm", "stage1", "cache")})
    recipe = replace(recipe, warm_start=share)
    found = evaluate_run(out, train_bridge(recipe, data, None, out), "val")
    return {"warm_start": share, "seed": recipe.stage2.seed, "steps": [recipe.stage1.steps, recipe.stage2.steps],
            "results": {key: round(value, 2) for key, value in found.items() if KEPT.fullmatch(key)}}


def main() -> None:
    """Write the lines that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the lines (default: those of the repository)")
    options = parser.parse_args()
    for run in options.runs:
        record = read_json(run / "run.json")
        recipe, done = find_recipe(record["recipe"]).with_seed(record["seed"]), known(options.results)
        for share in (recipe.warm_start, 1.0):
            if not any((one["warm_start"], one["seed"]) == (share, record["seed"]) for one in done):
                add(options.results, line(run, recipe, recorded_data(run), share))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.warm_start", main))

"""The scenes under several seeds: python -m benchmarks.seeds RUN [RUN ...] [--split test]

Each RUN is a finished run of the scenes recipe, from the experts up under a seed of its own, by the code that is here.
Each is measured on the split; benchmarks/results/seeds.json keeps the figures with where they are from, and what this
module asks of them is printed as mean (lowest to highest) over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.beginning import beginning
from benchmarks.provenance import RESULTS, commit, machine, sources
from minblip2.data.entry import run_command
from minblip2.data.files import read_json, write_json
from minblip2.data.scene_questions import KINDS
from minblip2.evaluation.measure import evaluate_run
from minblip2.evaluation.tables import markdown
from minblip2.training.bridge import load_bridge
from minblip2.training.shipping import run_checksum

TRAINED_BY = ("minblip2.training.bridge", "minblip2.evaluation.measure")
OTHER_RECIPES = ("minblip2.training.recipes.LAPTOP", "minblip2.training.recipes.GPU")
Figures = dict[str, float]
Target = tuple[str, Callable[[Figures], float], float]


def of_ceiling(kind: str) -> Callable[[Figures], float]:
    """How much of what the language model answers told in text it answers about a picture of seen pairs, in percent."""
    return lambda figures: 100 * figures[f"ask_{kind}_seen"] / figures[f"ask_{kind}_told"]


def guessing(kind: str) -> Callable[[Figures], float]:
    """How far another scene's picture is above no picture at all and above the commonest answer, in points."""
    return lambda figures: figures[f"ask_{kind}_another"] - max(figures[f"ask_{kind}_{name}"]
                                                                for name in ("none", "guess"))


def figure(name: str) -> Callable[[Figures], float]:
    """One of the figures as it is."""
    return lambda figures: figures[name]


AT_LEAST: list[Target] = [
    *((f"told in text: {kind}", figure(f"ask_{kind}_told"), 90 if kind in ("yes/no", "relation") else 97)
      for kind in KINDS),
    *((f"asked of a picture, share of the ceiling: {kind}", of_ceiling(kind), 90) for kind in KINDS),
    ("captions with every colour and shape right, seen pairs", figure("stage2_things_seen"), 90),
    ("captions with every colour and shape right, unseen pairs", figure("stage2_things_unseen"), 80),
    ("positions, of captions whose things are right", figure("stage2_positions_of_right"), 85),
    ("sizes, of captions whose things are right", figure("stage2_size_of_right"), 85),
    ("relations, of captions whose things are right", figure("stage2_relations_of_right"), 80),
    ("binding: caption preferred to itself with colours swapped", figure("binding"), 90),
]
AT_MOST: list[Target] = [(f"another's picture above guessing: {kind}", guessing(kind), 5) for kind in KINDS]


def trained_by() -> str:
    """Checksum of the code and pins that train and measure the scenes."""
    return sources(*TRAINED_BY, but=OTHER_RECIPES)


def measure(run: Path, split: str) -> dict:
    """A run's figures on a split, measured unless they are there, with its seed and which weights they are of."""
    path = run / f"results-{split}.json"
    results = read_json(path) if path.exists() else evaluate_run(run, load_bridge(run), split)
    return {"seed": read_json(run / "run.json")["seed"], "checksum": run_checksum(run), "results": results}


def against_targets(runs: list[dict]) -> str:
    """Every target in Markdown: mean (lowest to highest), and how many of the seeds reach it."""
    rows = []
    for targets, sign in ((AT_LEAST, 1), (AT_MOST, -1)):
        for what, value, target in targets:
            values = [value(run["results"]) for run in runs]
            reached = sum(sign * each >= sign * target for each in values)
            rows.append([what, f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})",
                         f"{'≥' if sign > 0 else '≤'} {target}", f"{reached} of {len(values)}"])
    return markdown(["", "mean (range)", "target", "seeds that reach it"], *rows)


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    runs = [measure(run, options.split) for run in options.runs]
    found = {"recipe": "scenes", "split": options.split, "commit": commit(), "machine": machine(),
             "sources": trained_by(), "beginning": beginning(), "runs": runs}
    write_json(RESULTS / "seeds.json", found)
    print(against_targets(runs))


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.seeds", main))

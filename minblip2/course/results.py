"""What runs have measured, as tables: a column for each recipe, and where the figures are from.

Every runs/NAME/results-SPLIT.json is a column; NAME-seed1, NAME-seed2, ... are further seeds of NAME and share its
column, as mean ± standard deviation. A run that is not here, but whose figures are kept in benchmarks/results/NAME.json
(`python -m benchmarks.provenance runs/NAME`), is a column, too, and where those are from is told below the table.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..data.files import read_json
from ..evaluation.measure import LABELS
from ..evaluation.tables import markdown
from ..training.recipes import RECIPES
from .lesson import ROOT


def columns(runs: Path, names: str = r".*") -> dict[str, list[dict[str, float]]]:
    """Column title -> the results of its seeds, of the runs whose names match in full."""
    found = defaultdict(list)
    for path in sorted(runs.glob("*/results-*.json")):
        name = re.sub(r"-seed\d+$", "", path.parent.name)
        if re.fullmatch(names, name):
            found[f"{name}, {path.stem.removeprefix('results-')}"].append(read_json(path))
    return {f"{title} ({len(seeds)} seeds)" if len(seeds) > 1 else title: seeds for title, seeds in found.items()}


def kept(results: Path = ROOT / "benchmarks" / "results", names: tuple[str, ...] = tuple(RECIPES)
         ) -> dict[str, dict[str, Any]]:
    """Recipe -> its figures with their provenance, of those that are kept with the code."""
    return {name: read_json(results / f"{name}.json") for name in names if (results / f"{name}.json").exists()}


def seeds(results: Path = ROOT / "benchmarks" / "results") -> dict[str, list[dict[str, float]]]:
    """Column title -> the figures of each seed, as `python -m benchmarks.seeds` has kept them; {} without."""
    if not (results / "seeds.json").exists():
        return {}
    found = read_json(results / "seeds.json")
    title = f"{found['recipe']}, {found['split']} ({len(found['runs'])} seeds)"
    return {title: [run["results"] for run in found["runs"]]}


def provenance(results: dict[str, dict[str, Any]]) -> str:
    """Where kept figures are from, a sentence for each recipe."""
    return "\n".join(f"*{name}: {output['data']}; {output['minutes_stage1']:.0f} minutes of stage 1 and "
                     f"{output['minutes_stage2']:.0f} of stage 2 on {output['machine']}; commit {output['commit']}.*"
                     for name, output in results.items())


def cell(values: list[float]) -> str:
    """One figure, or mean ± standard deviation of several."""
    if not values:
        return ""
    if all(isinstance(value, int) for value in values) and len(set(values)) == 1:  # a count
        return str(values[0])
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def results_table(found: dict[str, list[dict[str, float]]]) -> str:
    """The columns side by side, in Markdown, a row for each figure that any of them has."""
    rows = []
    for key, label in LABELS.items():
        cells = [cell([seed[key] for seed in seeds if key in seed]) for seeds in found.values()]
        if any(cells):
            rows.append([label, *cells])
    return markdown(["", *found], *rows)

"""A run's figures with where they come from: python -m benchmarks.provenance runs/laptop [--data "what it is"]

Writes benchmarks/results/NAME.json, NAME the run's folder: the figures that `minblip2 evaluate` has kept, and the
commit, the machine, the minutes and the data that made them. That file is small and in git; the run is neither. With
--new "what is new" the file also tells the tries before this one, in a few figures each.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import subprocess
import sys
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import processor
from minblip2 import UserError
from minblip2.data.coco import CocoCaptions
from minblip2.data.entry import run_command
from minblip2.data.files import read_json, write_json
from minblip2.device import best_device, compute_dtype

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROVENANCE = {"commit": str, "machine": str, "minutes_stage1": float, "minutes_stage2": float, "data": str}
ROAD = {  # what is told of each try
    "itc_t2i_r1": "text → image R@1", "itc_t2i_r10": "text → image R@10", "stage1_cider": "CIDEr-D, Q-Former alone",
    "stage2_cider": "CIDEr-D", "shuffled_cider": "CIDEr-D of another picture"}


def read_results(path: Path) -> dict[str, Any]:
    """A results file: figures and provenance. Raises UserError when it is absent, or does not say where it is from."""
    results = read_json(path)
    for name, kind in PROVENANCE.items():
        if not isinstance(results.get(name), (int, float) if kind is float else kind):
            raise UserError(f"{path} has no {name}: make it with `python -m benchmarks.provenance runs/{path.stem}`")
    if not any(isinstance(value, int | float) for name, value in results.items() if name not in PROVENANCE):
        raise UserError(f"{path} holds no figure: evaluate the run, then make it anew")
    return results


def machine() -> str:
    """This machine in words: processor or GPU, how many cores, which numbers it computes in, which torch."""
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    threads = int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads())
    return f"{name}, {threads} of {os.cpu_count()} cores, {str(compute_dtype(device))[6:]}, torch {torch.__version__}"


def commit() -> str:
    """The commit that is checked out, and whether something was changed since."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True,
                              encoding="utf-8").stdout.strip()
    changed = " with changes" if git("status", "--porcelain") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"


def sources(*modules: str, but: tuple[str, ...] = ()) -> str:
    """sha256 over the pins, these modules and what they import from the repository, without docstrings and comments:
    where it is the same, the same is computed. `but` names values that have no part in it: package.module.VALUE."""
    finder = ModuleFinder(path=[str(ROOT)])
    for name in modules:
        finder.import_hook(name)
    digest = hashlib.sha256((ROOT / "constraints.txt").read_bytes())
    for name, path in sorted((name, module.__file__) for name, module in finder.modules.items() if module.__file__):
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body
                     if not (isinstance(node, ast.Assign) and f"{name}.{ast.unparse(node.targets[0])}" in but)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(f"{name}\n{ast.unparse(tree)}\n".encode())
    return digest.hexdigest()


def collect(run: Path, split: str, data: str | None = None) -> dict[str, Any]:
    """The figures of a run on a split, with their provenance. Raises UserError for a run that is not finished."""
    path = run / f"results-{split}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: run `python -m minblip2 evaluate --run {run} --split {split}` first")
    results, record = read_json(path), read_json(run / "run.json")
    if data is None:
        train = CocoCaptions(record["data"], "train")
        data = f"{len(train.images):,} pictures with {len(train.pairs):,} captions of {Path(record['data']).name}"
    minutes = {}
    for stage in ("stage1", "stage2"):
        seconds = read_json(run / stage / "seconds.json")
        if seconds["from_step"]:
            print(f"{run / stage} went on at step {seconds['from_step']}: the minutes are of the rest", file=sys.stderr)
        minutes[f"minutes_{stage}"] = seconds["seconds"] / 60
    return results | dict(commit=commit(), machine=machine(), **minutes, data=data)


def stretch(results: dict[str, Any], what: str) -> dict[str, Any]:
    """A try in a few figures, with what was new about it."""
    return {"what was new": what} | {label: results[key] for key, label in ROAD.items() if key in results}


def main() -> int:
    """Write the file; 2 when the run is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--data", help="the data in words (default: counted, with the folder's name)")
    parser.add_argument("--commit", help="the commit that trained it (default: the one that is checked out)")
    parser.add_argument("--machine", help="the machine that trained it (default: this one)")
    parser.add_argument("--new", help="what is new about this run, in words: it is put behind the tries before it")
    args = parser.parse_args()
    target = RESULTS / f"{args.run.resolve().name}.json"
    try:
        results = collect(args.run, args.split, args.data)
        road = read_json(target).get("road", []) if target.exists() else []
    except UserError as error:
        print(f"provenance: {error}", file=sys.stderr)
        return 2
    results |= {name: value for name in ("commit", "machine") if (value := getattr(args, name))}
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.new:  # said twice, it is one try
        road = [*(known for known in road if known["what was new"] != args.new), stretch(results, args.new)]
    if road:
        results["road"] = road
    write_json(target, results)
    print(f"wrote {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("benchmarks.provenance", main))

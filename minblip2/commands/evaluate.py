"""evaluate: a finished model, in numbers."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from .. import UserError
from ..course.results import cell
from ..data.files import read_json
from ..evaluation.asking import questions_table
from ..evaluation.handover import evaluate_official
from ..evaluation.measure import LABELS, keep_results, measure_run
from ..evaluation.retrieval import TOP
from ..evaluation.tables import plain_text
from ..training.bridge import load_bridge
from .models import open_data, run_folder
from .options import add_data, add_model_choice, command, positive


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "evaluate", run)
    add_model_choice(sub)
    add_data(sub)
    sub.add_argument("--prompt", help="with --model: text that each caption goes on from")
    sub.add_argument("--top", type=positive, help=f"so many ITM ranks again (default {TOP})")


def run(args: argparse.Namespace) -> None:
    """Measure a finished run, or a BLIP-2 of the model hub, on a split."""
    folder = run_folder(args)
    if args.model:
        print_figures(evaluate_official(args.model, open_data(args, folder), folder / "cache", args.top, args.prompt))
        return
    bridge = load_bridge(folder, args.parts)
    # What is measured on other data than the run's own stands beside, not in place of it.
    name = args.split if args.data is None else f"{args.split}-of-{args.data.resolve().name}"
    name += "" if args.top in (None, TOP) else f"-top-{args.top}"  # other figures, which no page may take for the usual
    results = measure_run(folder, bridge, args.split, args.top or TOP, partial(announce, folder, name), args.data)
    print_figures(results)  # before they are written: the folder may be one that nobody may write to
    print(f"these and more in {keep_results(folder, name, results)}")


def announce(run: Path, name: str) -> None:
    """Say at once what will be measured, and how long that took the last time, if there was one."""
    seconds = None
    with contextlib.suppress(UserError):  # a hint is not worth refusing for
        seconds = read_json(run / f"results-{name}.json").get("seconds_to_evaluate")
    last = f" (the last time this took {seconds:.0f} seconds)" if isinstance(seconds, int | float) else ""
    print(f"measuring {run} on {name}: retrieval, captions, and what they get right{last}", flush=True)


def print_figures(results: dict[str, float]) -> None:
    """One line for each figure that has a label, and for each kind of question."""
    rows = [(label, results[name]) for name, label in LABELS.items() if name in results]
    print(plain_text(*((label, f"{value:.1f}" if isinstance(value, float) else value) for label, value in rows)),
          flush=True)
    if asked := questions_table([results], cell):
        print("\n" + plain_text(*asked), flush=True)

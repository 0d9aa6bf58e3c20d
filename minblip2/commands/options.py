"""Kinds of values, and the options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import UserError
from ..device import DTYPES

LARGEST_SEED = 2**32 - 1


def positive(text: str) -> int:
    """A count of at least one. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and up to 1. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give a number above 0 and up to 1")
    return value


def seed(text: str) -> int:
    """A whole number that every generator takes as its seed. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: give a whole number from 0 to {LARGEST_SEED}")
    return int(text)


# --- options that commands share --------------------------------------------------------------------------------------


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
    """A new command: `run` does the work, and its docstring says what that is. Each may be told where to compute."""
    sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    sub.set_defaults(execute=run)
    sub.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, mps (default: what MINBLIP2_DEVICE "
                                      "says, else the CPU for the scenes, else a GPU if there is one)")
    sub.add_argument("--dtype", choices=DTYPES, help="of frozen pretrained weights, and in bfloat16 of the arithmetic "
                                                     "(default: what MINBLIP2_DTYPE says, else bfloat16 where the "
                                                     "device computes in it, else float32)")
    return sub


def add_parts(sub: argparse.ArgumentParser) -> None:
    """--parts, for whatever loads a recipe's frozen models."""
    sub.add_argument("--parts", type=Path, help="folder of pretrained models, each in the hub's layout (default: where "
                                                "the run was trained with them, else data/parts)")


def add_model_choice(sub: argparse.ArgumentParser) -> None:
    """--run, --parts and --model: which of the models is meant."""
    sub.add_argument("--run", type=Path, help="folder of a trained bridge (default: runs/scenes if you have trained "
                                              "it, else the bridge that ships)")
    add_parts(sub)
    sub.add_argument("--model", type=Path, help="folder of a BLIP-2 as on the model hub, instead of --run")


def add_data(sub: argparse.ArgumentParser) -> None:
    """--data and --split: which pictures are meant."""
    sub.add_argument("--data", type=Path, help="folder in COCO layout, or a table of file names and captions (default: "
                                               "the run's own)")
    sub.add_argument("--split", default="val", help="of the data (default %(default)s)")


def check_data(data: Path) -> None:
    """Raise UserError where --data names nothing that is there."""
    if not data.exists():
        raise UserError(f"{data} does not exist: name a folder in COCO layout, or a table of file names and captions, "
                        "with --data")

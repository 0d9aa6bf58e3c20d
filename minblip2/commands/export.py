"""export: a run to hand on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.handover import export_run
from .options import add_parts, check_data, command


def add(commands: Any) -> None:
    """The grammar of the command."""
    sub = command(commands, "export", run)
    sub.add_argument("source", metavar="run", type=Path, help="folder of a trained bridge")
    sub.add_argument("folder", type=Path, help="where to, a new folder")
    add_parts(sub)
    sub.add_argument("--data", type=Path, help="what the run was trained on, where that lies now (for the model card)")


def run(args: argparse.Namespace) -> None:
    """Copy what a finished run has trained to a folder that can be moved, with a model card."""
    if args.data is not None:
        check_data(args.data)
    export_run(args.source, args.folder, args.data, args.parts)
    print(f"wrote {args.folder}; its README.md is a model card: read it before you publish")

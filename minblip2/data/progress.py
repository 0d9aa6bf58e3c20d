"""How far a long task has come: one bar for terminals, notebooks and logs, and output that never fails on a letter."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

WIDTH = 80  # columns of a terminal that nobody has widened


def in_kernel() -> bool:
    """Whether this is a notebook, whose error stream JupyterLab paints red."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


def progress_bar(iterable: Iterable | None = None, hidden: bool = False, **settings: Any) -> tqdm:
    """A progress bar around `iterable`, or, with `total`, one to be updated; `settings` are tqdm's; `hidden`: none.

    In a notebook it stands in the standard output and vanishes when done. It is at most 79 columns wide. What the
    environment says of bars (TQDM_DISABLE, TQDM_NCOLS, TQDM_LEAVE, ...) takes precedence.
    """
    chosen: dict[str, Any] = {"ncols": min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) - 1}
    if in_kernel():
        chosen |= {"file": sys.stdout, "leave": False, "mininterval": 0.5}
    chosen = {name: value for name, value in (chosen | settings).items() if f"TQDM_{name.upper()}" not in os.environ}
    if hidden:  # said only then: whatever is said here outweighs TQDM_DISABLE
        chosen["disable"] = True
    return tqdm(iterable, **chosen)


def forgiving_output() -> None:
    """Let both output streams replace letters that they cannot print, as a Windows console or a file there cannot."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a notebook or a test has put in its place may lack it
            stream.reconfigure(errors="replace")

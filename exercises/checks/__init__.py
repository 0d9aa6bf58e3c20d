"""Checks that answer at once: what was seen, what it means, and where to read. They never tell the answer.

A lesson's checks stand in a file of their own, `lesson02.py` for lesson 02, one `@exercise` function each. Such a
function gets what the learner wrote and raises `Wrong` where it is not right; whatever else goes wrong in the learner's
code is caught and told here. Nothing that happens in a check moves the learner's random numbers.
"""

from __future__ import annotations

import functools
import random
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minblip2 import UserError
from minblip2.data.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = ROOT / "runs" / "progress.json"
DONE, WRONG, OPEN = "done", "not right yet", "not done yet"
# Whose lines are not the learner's: the checks', the module's, Python's and those of the packages.
LIBRARY_PATHS = (str(Path(__file__).parent), str(ROOT / "exercises" / "own.py"), str(ROOT / "minblip2"), "<frozen",
                 *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
SIGNS = {DONE: "✓", WRONG: "✗", OPEN: "○"}


class Wrong(Exception):
    """The message names what was seen and what it means; it does not tell the answer."""


@dataclass(frozen=True)
class Verdict:
    """How an exercise stands: one of DONE, WRONG, OPEN, and a sentence or two."""

    status: str
    message: str


def stopped(error: Exception) -> str:
    """What went wrong, and the learner's last line on the way there: not PyTorch's, where it came to light."""
    said = " ".join(str(error).split())
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith(LIBRARY_PATHS)]
    where = (f"in {frames[-1].name}, line {frames[-1].lineno}: {frames[-1].line}" if frames
             else "at the call, before its first line: does it take what the exercise says?")
    return f"{type(error).__name__}: {said} ({where})"


class Exercise:
    """A check under the number and name of its exercise, such as 02.1 bidirectional; call it with the answer."""

    def __init__(self, check: Callable[[Any], None], number: str, reads: str):
        functools.update_wrapper(self, check)
        self.check, self.number, self.reads = check, number, reads
        self.name = f"{number} {check.__name__}"

    def verdict(self, answer: Any) -> Verdict:
        """Judge an answer; whatever it does, this returns."""
        numbers, numpy_numbers = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            random.seed(), torch.manual_seed(random.getrandbits(32))  # drawn anew each time: no answer may fit a seed
            try:
                self.check(answer)
            except NotImplementedError as unfinished:
                return Verdict(OPEN, str(unfinished))
            except Wrong as wrong:
                return Verdict(WRONG, f"{wrong} Read again: {self.reads}.")
            except Exception as error:  # it is the learner's code that ran: anything may come out of it
                return Verdict(WRONG, f"your code stopped with {stopped(error)}. Read again: {self.reads}.")
            finally:
                random.setstate(numbers)
                np.random.set_state(numpy_numbers)
        return Verdict(DONE, "")

    def __call__(self, answer: Any) -> None:
        """Judge an answer, say how it stands, and remember it for `make progress`."""
        verdict = self.verdict(answer)
        remember(self.name, verdict.status)
        print(f"{SIGNS[verdict.status]} {self.name}: {verdict.status}")
        if verdict.message:
            print(f"  {verdict.message}")


def exercise(number: str, reads: str) -> Callable[[Callable[[Any], None]], Exercise]:
    """Make a function the check of exercise `number`; `reads` says where in the course its idea is explained."""
    return lambda check: Exercise(check, number, reads)


def remember(name: str, status: str) -> None:
    """Keep how an exercise stands; a file that cannot be read begins anew."""
    known = progress() | {name: status}
    PROGRESS.parent.mkdir(exist_ok=True)
    write_json(PROGRESS, known)


def progress() -> dict[str, str]:
    """How each exercise stands that was ever checked."""
    try:
        return read_json(PROGRESS)
    except UserError:
        return {}


# --- what checks are made of ------------------------------------------------------------------------------------------


def expect(right: bool, message: str) -> None:
    """Raise Wrong with the message unless it is right."""
    if not right:
        raise Wrong(message)


def expect_tensor(value: Any, shape: Sequence[int] | None = None, what: str = "the result", axes: str = "",
                  kind: torch.dtype | None = None) -> Tensor:
    """The value, if it is a tensor of this shape (named by its `axes`) and kind of number without nan."""
    note = f" {axes}" if axes else ""
    expect(value is not None, f"{what} is None: does every way through your function end in a return?")
    expect(not isinstance(value, np.ndarray), f"{what} is a NumPy array: stay in torch, so that gradients flow.")
    expect(isinstance(value, Tensor), f"{what} is a {type(value).__name__}, not a tensor.")
    if shape is not None:
        expect(tuple(value.shape) == tuple(shape),
               f"{what} has the shape {tuple(value.shape)}; asked for is{note} = {tuple(shape)}.")
    if kind is not None:
        expect(value.dtype == kind, f"{what} holds {value.dtype}; asked for is {kind}.")
    expect(not value.is_floating_point() or not bool(value.isnan().any()), f"{what} holds nan.")
    return value


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors of one shape agree, to a fraction of the largest value."""
    scale = max(float(other.detach().abs().max()), 1e-12) if other.numel() else 1.0
    return float((one.detach() - other.detach()).abs().max() if other.numel() else 0.0) <= tolerance * scale

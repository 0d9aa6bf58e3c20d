"""Checks that answer at once: what was seen, what it means, and where to read. They never tell the answer.

A lesson's checks stand in a file of their own, `lesson02.py` for lesson 02, one `@exercise` function each. Such a
function gets what the learner wrote and raises `Wrong` where it is not right; whatever else goes wrong in the learner's
code is caught and told here. Nothing that happens in a check moves the learner's random numbers.
"""

from __future__ import annotations

import functools
import math
import random
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
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


# --- draws ------------------------------------------------------------------------------------------------------------


def drawn_apart(draw: Callable[[], Any], apart: Callable[[Any], bool], tries: int = 1000) -> Any:
    """Draw until what is drawn tells right from wrong, so that no verdict depends on luck."""
    for _ in range(tries):
        case = draw()
        if apart(case):
            return case
    raise RuntimeError(f"in {tries} draws there was none that tells right from wrong")


def number(value: Any, what: str = "your function gives") -> int | float:
    """The value as a number of Python's, if it is one: also NumPy's, and a tensor without axes."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    expect(isinstance(value, Real) and not isinstance(value, bool),
           f"{what} a {type(value).__name__} and should give a number.")
    value = value if isinstance(value, int) else float(value)
    expect(not math.isnan(value), f"{what} nan, which is no number.")
    return value


def numbers_of(value: Any, count: int, meaning: str) -> list[int | float]:
    """So many numbers, in a tuple, a list, an array or a tensor; `meaning` says which are asked for."""
    output = f"your function gives {value!r}; asked for are {meaning}."
    expect(isinstance(value, tuple | list | Tensor | np.ndarray), output)
    expect(not isinstance(value, Tensor | np.ndarray) or value.ndim == 1, output)
    expect(len(value) == count, output)
    return [number(one, "among the numbers of your function is") for one in value]


def named(output: Sequence[Any], slips: dict[str, Sequence[Any]], same: Callable[[Any, Any], bool],
          right: Sequence[Any] = ()) -> str:
    """The meaning of the first slip whose results are the learner's in every draw, or ""; none that is always right."""
    return next((meaning for meaning, results in slips.items()
                 if all(map(same, output, results)) and not (right and all(map(same, right, results)))), "")


def steady(one: Any, other: Any) -> None:
    """Two calls with the same input give the same."""
    expect(close(one, other, 1e-4), "called twice with the same input, your function gives two different results: "
           "does it draw anything at random, or keep something from one call to the next?")


def same_gradients(answer: Callable, reference: Callable, given: dict[str, Tensor], tangential: bool = False,
                   tolerance: float = 1e-3) -> None:
    """The learner's result, which has the right numbers, hands its gradient on to all that was given, as it should.

    `given` names the tensors; both functions take them in this order. With `tangential` only the part that turns a
    vector counts, not what makes it longer: vectors of length 1 may be normalised again.
    """
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    output = answer(*inputs.values())
    expect(output.requires_grad, "the numbers are right, but no gradient flows from them: with .item(), .tolist(), "
           ".detach(), torch.tensor or no_grad on the way nothing can be learned.")
    direction = torch.randn_like(output)
    try:
        slopes = torch.autograd.grad(output, list(inputs.values()), direction, allow_unused=True)
    except RuntimeError as error:
        raise Wrong(f"the numbers are right, but their gradient cannot be computed ({' '.join(str(error).split())}): "
                    "is a tensor changed in place that is still needed?") from error
    wanted = torch.autograd.grad(reference(*inputs.values()), list(inputs.values()), direction)
    for (name, tensor), slope, right in zip(inputs.items(), slopes, wanted, strict=True):
        if float(right.abs().max()) < 1e-5:
            continue  # there is none to speak of
        expect(slope is not None and bool(slope.any()), f"the numbers are right, but no gradient reaches the {name}: "
               "somewhere on the way it is cut off.")
        expect(bool(slope.isfinite().all()), f"the numbers are right, but the gradient of the {name} is not finite.")
        if tangential:
            slope, right = (one - (one * tensor).sum(dim=-1, keepdim=True) * tensor for one in (slope, right))
        expect(close(slope, right, tolerance), f"the numbers are right, but the gradient that reaches the {name} is "
               "not theirs: is some part of the way cut off (detach, no_grad, .data)?")

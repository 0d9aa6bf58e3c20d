"""Checks that answer at once: what was seen, what it means, and where to read. They never tell the answer.

A lesson's checks stand in a file of their own, `lesson02.py` for lesson 02, one `@exercise` function each. Such a
function gets what the learner wrote and raises `Wrong` where it is not right; whatever else goes wrong in the learner's
code is caught and told here. Nothing that happens in a check moves the learner's random numbers.

A notebook is *graded* where nbgrader runs it (it sets NBGRADER_EXECUTION for its autograder and its validator) or where
`exercises/grade.py` does (MINBLIP2_GRADING names the file in which verdicts are noted). There an exercise that is not
done raises `NotDone`, so that its cell fails, and nobody's progress is written.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import json
import math
import os
import random
import re
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minblip2 import UserError
from minblip2.data.files import one_at_a_time, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = ROOT / "runs" / "progress.json"
DONE, WRONG, OPEN = "done", "not right yet", "not done yet"
# Whose lines are not the learner's: the checks', the module's, Python's and those of the packages, which an environment
# may share with the system.
LIBRARY_PATHS = (str(Path(__file__).parent), str(ROOT / "exercises" / "own.py"), str(ROOT / "exercises" / "reading.py"),
                 str(ROOT / "minblip2"), "<frozen",
                 *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
                 *(str(Path(package.__file__).parents[1]) for package in (torch, np)))
SIGNS = {DONE: "✓", WRONG: "✗", OPEN: "○"}
# Read once, before any line of the learner's has run: an answer that changes the environment changes no verdict.
# Answers run in this process, though: one that is meant to deceive can replace whatever stands here.
GRADED, NOTED = bool({"NBGRADER_EXECUTION", "MINBLIP2_GRADING"} & set(os.environ)), os.environ.get("MINBLIP2_GRADING")
SHOWN = 6  # values of which an error message tells what they were
# How Python says that a call does not fit what is called.
MISFIT = re.compile(r"positional argument|keyword argument|required .*argument|multiple values for|not callable")


class Wrong(Exception):
    """The message names what was seen and what it means; it does not tell the answer."""


class Unwritten(NotImplementedError):
    """There is nothing to judge yet, says the course itself; the message says what to do first."""


class NotDone(Exception):
    """Raised where a notebook is graded and an exercise in it is not done: its cell has to fail."""


@dataclass(frozen=True)
class Verdict:
    """How an exercise stands: one of DONE, WRONG, OPEN, and a sentence or two."""

    status: str
    message: str


# --- what happened in the learner's code ------------------------------------------------------------------------------


def frames_of(error: BaseException) -> list[TracebackType]:
    """The learner's own frames on the way to an error, outermost first."""
    found, trace = [], error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(LIBRARY_PATHS):
            found.append(trace)
        trace = trace.tb_next
    return found


def line_of(trace: TracebackType) -> traceback.FrameSummary:
    """The line on which a frame stood."""
    return traceback.extract_tb(trace, limit=1)[0]


def described(value: Any) -> str | None:
    """A tensor's shape and kind, or a plain value; None for what would take too much room."""
    if isinstance(value, Tensor | np.ndarray):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{tuple(value.shape)}" + ("" if kind == "float32" else f" of {kind}")
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
        return f"a {type(value).__name__} of {len(value)} tensors, the first {tuple(value[0].shape)}"
    return None


def values_at(trace: TracebackType) -> str:
    """What the frame's arguments, and the names on its line, hold as the error comes: `image (2, 3, 8), queries 4`."""
    code, held = trace.tb_frame.f_code, trace.tb_frame.f_locals
    given = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount] if code.co_name != "<module>" else ()
    named = re.findall(r"\b[A-Za-z_]\w*\b", line_of(trace).line or "")
    output = {name: described(held[name]) for name in dict.fromkeys([*given, *named]) if name in held}
    return ", ".join([f"{name} {value}" for name, value in output.items() if value is not None][:SHOWN])


def place_of_error(error: BaseException) -> str:
    """The learner's last line on the way to an error and what stood in it, not the line in PyTorch that raised it."""
    hers = frames_of(error)
    if hers:
        line, values = line_of(hers[-1]), values_at(hers[-1])
        return f"in {line.name}, line {line.lineno}: {line.line}" + (f"; there: {values}" if values else "")
    if isinstance(error, TypeError) and MISFIT.search(str(error)):
        return "at the call, before its first line: does it take what the exercise says?"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "not in a line of yours: where the check calls your code or reads what it gives" + (
        f", {last[0].line}" if last and last[0].line else "")


def stopped(error: BaseException) -> str:
    """What went wrong, in a line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if said else ''}{said} ({place_of_error(error)})"


def is_stub(error: NotImplementedError) -> bool:
    """Whether a `raise NotImplementedError` of the learner's notebook was the last thing that happened.

    PyTorch's missing kernels are NotImplementedErrors as well (bmm of bool), and those are errors like any other.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if type(error) is not NotImplementedError or trace is None or trace not in frames_of(error):
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def below_the_work(error: NotImplementedError) -> str:
    """A sentence where the stub stands below what was written already, else nothing."""
    trace = frames_of(error)[-1]
    name, first = trace.tb_frame.f_code.co_name, trace.tb_frame.f_code.co_firstlineno
    try:
        lines, _ = inspect.getsourcelines(trace.tb_frame.f_code)
        body = ast.parse(textwrap.dedent("".join(lines))).body[0].body
    except (OSError, SyntaxError, AttributeError, IndexError):
        return ""  # no source to look at, as of a lambda in an expression
    above = [node for node in body if first + node.end_lineno - 1 < trace.tb_lineno
             and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
             and not ast.unparse(node).startswith("super().__init__(")]
    return f"`raise NotImplementedError()` still stands in {name}, line {trace.tb_lineno}, below what you have " \
           "written: delete that line." if above else ""


def interrupted(stop: KeyboardInterrupt) -> str:
    """What was running when somebody, or a time limit, stopped it."""
    hers = frames_of(stop)
    if not hers:
        return "stopped before it came to an end, and not in a line of yours: run the cell again."
    line = line_of(hers[-1])
    return f"stopped in {line.name}, line {line.lineno}: {line.line}. Does what you wrote come to an end?"


class Exercise:
    """A check under the number and name of its exercise, such as 02.1 bidirectional; call it with the answer."""

    def __init__(self, check: Callable[[Any], None], number: str, reads: str):
        functools.update_wrapper(self, check)
        self.check, self.number, self.reads = check, number, reads
        self.name = f"{number} {check.__name__}"

    def verdict(self, answer: Any) -> Verdict:
        """Judge an answer; whatever it does, this returns."""
        numbers_before, numpy_numbers, kind = random.getstate(), np.random.get_state(), torch.get_default_dtype()
        with torch.random.fork_rng(), torch.enable_grad():
            random.seed(), torch.manual_seed(random.getrandbits(32))  # drawn anew each time: no answer may fit a seed
            torch.set_default_dtype(torch.float32)  # whatever the notebook has set
            try:
                self.check(answer)
            except Unwritten as nothing:
                return Verdict(OPEN, str(nothing))
            except Wrong as wrong:
                return Verdict(WRONG, f"{wrong} Read again: {self.reads}.")
            except KeyboardInterrupt as stop:
                return Verdict(WRONG, interrupted(stop))
            except (Exception, SystemExit) as error:  # it is the learner's code that ran: anything may come out of it
                if isinstance(error, NotImplementedError) and is_stub(error):
                    return Verdict(OPEN, str(error) or below_the_work(error))
                whose = "your code" if frames_of(error) or MISFIT.search(str(error)) else "the check"
                return Verdict(WRONG, f"{whose} stopped with {stopped(error)}. Read again: {self.reads}.")
            finally:
                random.setstate(numbers_before)
                np.random.set_state(numpy_numbers)
                torch.set_default_dtype(kind)
        return Verdict(DONE, "")

    def __call__(self, answer: Any) -> None:
        """Judge an answer, say how it stands, remember it for `make progress`. Raises NotDone where it is graded."""
        verdict = self.verdict(answer)
        print(f"{SIGNS[verdict.status]} {self.name}: {verdict.status}")
        if verdict.message:
            print(f"  {verdict.message}")
        if not GRADED:
            remember(self.name, verdict.status)
            return
        if NOTED:
            note(self.name, verdict)
        if verdict.status != DONE:
            raise NotDone(f"{self.name}: {verdict.status}")


def exercise(number: str, reads: str) -> Callable[[Callable[[Any], None]], Exercise]:
    """Make a function the check of exercise `number`; `reads` says where in the course its idea is explained."""
    return lambda check: Exercise(check, number, reads)


# --- what is remembered -----------------------------------------------------------------------------------------------


def recorded() -> bool:
    """Whether a verdict is the learner's own: not that of a test, nor of a solution that somebody runs."""
    return "PYTEST_VERSION" not in os.environ and (ROOT / "solutions") not in (Path.cwd(), *Path.cwd().parents)


def remember(name: str, status: str) -> None:
    """Keep how an exercise stands; what was done once stays done. Where nothing can be kept, that is said."""
    if not recorded():
        return
    if progress().get(name) in (DONE, status):
        return
    try:
        PROGRESS.parent.mkdir(exist_ok=True)
        with one_at_a_time(PROGRESS.with_suffix(".lock")):  # another notebook may be writing its own
            write_json(PROGRESS, progress() | {name: status})
    except OSError as error:
        print(f"  (make progress will not know: {PROGRESS} cannot be written, {error.strerror or error})")


def progress() -> dict[str, str]:
    """How each exercise stands that was ever checked; a file that cannot be read begins anew."""
    try:
        return read_json(PROGRESS)
    except UserError:
        return {}


def note(name: str, verdict: Verdict) -> None:
    """Append a verdict to the file of `exercises/grade.py`."""
    with open(NOTED, "a", encoding="utf-8") as file:
        file.write(json.dumps({"exercise": name, "status": verdict.status, "message": verdict.message}) + "\n")


# --- what checks are made of ------------------------------------------------------------------------------------------


def expect(right: bool, message: str) -> None:
    """Raise Wrong with the message unless it is right."""
    if not right:
        raise Wrong(message)


def expect_tensor(value: Any, shape: Sequence[int] | None = None, what: str = "the result", axes: str = "",
                  kind: torch.dtype | None = None) -> Tensor:
    """The value, if it is a tensor of this shape (named by its `axes`) and kind of number without nan."""
    note = f"{axes} = " if axes else ""
    expect(value is not None, f"{what} is None: does every way through your function end in a return?")
    expect(not isinstance(value, np.ndarray), f"{what} is a NumPy array: stay in torch, so that gradients flow.")
    expect(not (isinstance(value, tuple) and hasattr(value, "indices")), f"{what} is what torch gives for a maximum "
           "along an axis, the values together with their places: take the values.")
    expect(isinstance(value, Tensor), f"{what} is a {type(value).__name__}, not a tensor.")
    if shape is not None:
        expect(tuple(value.shape) == tuple(shape),
               f"{what} has the shape {tuple(value.shape)}; it should be {note}{tuple(shape)}.")
    if kind is not None:
        expect(value.dtype == kind, f"{what} holds {value.dtype}; it should be {kind}.")
    expect(not value.is_floating_point() or not bool(value.isnan().any()), f"{what} holds nan.")
    return value


def a_number(value: Any, what: str = "the result", whole: bool = False) -> float:
    """The value as a number of Python: an int or a float, or a scalar of NumPy or PyTorch; `whole` asks for an int."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    expect(value is not None, f"{what} is None: does every way through your function end in a return?")
    expect(isinstance(value, Real) and not isinstance(value, bool | np.bool_),
           f"{what} is {value!r}, a {type(value).__name__}; it should be a number.")
    expect(not whole or value == int(value) if np.isfinite(value) else not whole,
           f"{what} is {value}; it should be a whole number.")
    return int(value) if isinstance(value, Integral) or whole else float(value)


def same_numbers(one: Sequence[float], other: Sequence[float], tolerance: float = 1e-4) -> bool:
    """Whether two lists of numbers agree, each to a fraction of itself."""
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9)
                                          for a, b in zip(one, other, strict=True))


def slip_of(output: Sequence[Any], right: Sequence[Any], slips: Mapping[str, Sequence[Any]],
            same: Callable[[Any, Any], bool] = same_numbers) -> str:
    """The meaning of the one slip that explains what was told on every draw, "" where none or more than one does.

    A slip that equals the right answer on every draw explains nothing and is passed over.
    """
    explains = [meaning for meaning, made in slips.items()
                if all(map(same, output, made)) and not all(map(same, right, made))]
    return explains[0] if len(explains) == 1 else ""


def letters_of(value: Any, known: str) -> set[str]:
    """Letters that were given as a set, a list or a text, such as {"a", "c"} or "a, c"."""
    expect(value is not None, "the result is None: does every way through your function end in a return?")
    expect(isinstance(value, str | set | frozenset | list | tuple) and all(isinstance(one, str) for one in value),
           f"the result is a {type(value).__name__}; the exercise asks for letters, such as {{'{known[0]}', "
           f"'{known[1]}'}}.")
    found = {one for one in " ".join(value).lower() if one.isalnum()}
    expect(found <= set(known), f"{', '.join(sorted(found - set(known)))} is none of the letters {known[0]} to "
           f"{known[-1]}.")
    return found


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
           f"{what} a {type(value).__name__}; it should be a number.")
    value = value if isinstance(value, int) else float(value)
    expect(not math.isnan(value), f"{what} nan, which is no number.")
    return value


def numbers_of(value: Any, count: int, meaning: str) -> list[int | float]:
    """So many numbers, in a tuple, a list, an array or a tensor; `meaning` says which are asked for."""
    output = f"your function gives {value!r}; the exercise asks for {meaning}."
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
    direction = torch.randn_like(output)
    wanted = torch.autograd.grad(reference(*inputs.values()), list(inputs.values()), direction)
    if not output.requires_grad and all(float(right.abs().max()) < 1e-5 for right in wanted):
        return  # there is none to speak of
    expect(output.requires_grad, "the numbers are right, but no gradient flows from them: with .item(), .tolist(), "
           ".detach(), torch.tensor or no_grad on the way nothing can be learned.")
    try:
        slopes = torch.autograd.grad(output, list(inputs.values()), direction, allow_unused=True)
    except RuntimeError as error:
        raise Wrong(f"the numbers are right, but their gradient cannot be computed ({' '.join(str(error).split())}): "
                    "is a tensor changed in place that is still needed?") from error
    for (name, tensor), slope, right in zip(inputs.items(), slopes, wanted, strict=True):
        if float(right.abs().max()) < 1e-5:
            continue  # there is none to speak of
        expect(slope is not None and bool(slope.any()), f"the numbers are right, but no gradient reaches the {name}: "
               "somewhere on the way it is cut off.")
        expect(bool(slope.isfinite().all()), f"the numbers are right, but the gradient of the {name} is not finite.")
        if tangential:
            slope, right = (one - (one * tensor).sum(dim=-1, keepdim=True) * tensor for one in (slope, right))
        expect(close(slope, right, tolerance), f"the numbers are right, but the gradient that reaches the {name} is "
               "not the right one: is some part of the way cut off (detach, no_grad, .data)?")

"""What checks share that judge by slips: numbers of any kind, slips that explain all draws, draws that tell them apart.

A slip is the answer that a known misconception gives. It is named only where it gives, in every draw of a check, what
the learner's code gave; and draws are repeated until all slips of a check differ, so that no verdict is luck.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Wrong, close, expect


def quantity(value: Any, what: str) -> float:
    """The value as a float, if it is one number: Python's, NumPy's, or a tensor or array without axes."""
    if isinstance(value, Tensor | np.ndarray):
        expect(value.ndim == 0, f"{what} has the shape {tuple(value.shape)} and should be one number.")
        value = value.item()
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    expect(is_number, f"{what} is {'None' if value is None else f'a {type(value).__name__}'} and should be one number.")
    expect(not math.isnan(value), f"{what} is nan.")
    return float(value)


def whole(value: Any, what: str) -> int:
    """The value as an int, if it is one whole number: Python's, NumPy's, or a tensor or array without axes."""
    if isinstance(value, Tensor | np.ndarray):
        expect(value.ndim == 0, f"{what} has the shape {tuple(value.shape)} and should be one whole number.")
        value = value.item()
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    expect(is_whole, f"{what} is {short(value)}, a {type(value).__name__}, and should be one of the whole numbers.")
    return int(value)


def parts(value: Any, count: int, asked: str) -> list[Any]:
    """The parts of a tuple, a list, or one tensor or array of so many numbers; `asked` says what they are."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 1:
        value = value.tolist()
    expect(isinstance(value, tuple | list) and len(value) == count, f"your function gives {short(value)}; the exercise "
           f"asks for {asked}.")
    return list(value)


def short(value: Any) -> str:
    """What was given, in a few words."""
    if isinstance(value, Tensor | np.ndarray):
        return f"one {type(value).__name__} of the shape {tuple(value.shape)}"
    said = repr(value)
    return said if len(said) < 60 else f"a {type(value).__name__}" + (
        f" of {len(value)}" if isinstance(value, tuple | list) else "")


def agree(one: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Whether two answers are the same: numbers and tensors but for rounding, in lists one by one."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        if not one.is_floating_point() and not other.is_floating_point():
            return torch.equal(one, other)
        if bool(one.isfinite().all()) and bool(other.isfinite().all()):
            return close(one, other, tolerance)
        one, other = one.detach().double(), other.detach().double()
        odd = ~(one.isfinite() & other.isfinite())
        strange = one[odd].nan_to_num(nan=-0.5).tolist(), other[odd].nan_to_num(nan=-0.5).tolist()
        return strange[0] == strange[1] and close(one.masked_fill(odd, 0), other.masked_fill(odd, 0), tolerance)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(agree(*two, tolerance) for two in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        return one == other or math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-2 * tolerance)
    return one == other


def name_slip(slips: Mapping[str, Callable[..., Any]], draws: Sequence[Sequence[Any]], output: Sequence[Any],
              right: Sequence[Any], tolerance: float = 1e-4) -> None:
    """Raise Wrong with the first slip that gives in every draw what the learner gave; where none does, return.

    A slip gives None where it predicts nothing. One that is right in all draws explains no wrong answer.
    """
    for meaning, slip in slips.items():
        made = [slip(*draw) for draw in draws]
        known = [(given, guess, truth) for given, guess, truth in zip(output, made, right, strict=True)
                 if guess is not None]
        if all(agree(given, guess, tolerance) for given, guess, _ in known) and not all(
                agree(guess, truth, tolerance) for _, guess, truth in known):
            raise Wrong(meaning)


def telling(make: Callable[[], Sequence[Sequence[Any]]], right: Callable[..., Any],
            slips: Mapping[str, Callable[..., Any]], tolerance: float = 1e-3) -> Sequence[Sequence[Any]]:
    """Draws in which every slip differs from the right answer, and from every other slip, at least once."""
    for _ in range(100):
        draws = make()
        given = [[answer(*draw) for draw in draws] for answer in (right, *slips.values())]
        if all(any(a is not None and b is not None and not agree(a, b, tolerance) for a, b in zip(*two, strict=True))
               for two in itertools.combinations(given, 2)):
            return draws
    raise RuntimeError("no draws were found that tell all slips apart")


def slopes(value: Tensor, inputs: Sequence[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """The derivative of a weighted sum with respect to each input; zeros where none arrives."""
    if not value.requires_grad:
        return [torch.zeros_like(one) for one in inputs]
    total = value.sum() if weights is None else (value * weights).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(one) if slope is None else slope for one, slope in zip(inputs, found, strict=True)]


@contextmanager
def unpatched(*classes: type) -> Iterator[Callable[[], list[str]]]:
    """Lend classes to a learner's code: gives what tells which attributes were changed, and undoes it at the end."""
    before = [(one, dict(vars(one))) for one in {base for each in classes for base in each.__mro__[:-1]}]

    def changed() -> list[str]:
        return [f"{one.__name__}.{name}" for one, known in before for name in vars(one).keys() | known.keys()
                if vars(one).get(name) is not known.get(name) and not name.startswith("__")]

    try:
        yield changed
    finally:
        for one, known in before:
            for name in [name for name in vars(one) if name not in known and not name.startswith("__")]:
                delattr(one, name)
            for name, value in known.items():
                if not name.startswith("__") and vars(one).get(name) is not value:
                    setattr(one, name, value)

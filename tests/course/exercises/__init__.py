"""Right and wrong answers to the exercises: data that shows that the checks are fair."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch


@contextmanager
def drawn_from(start: object) -> Iterator[None]:
    """Let the checks, which draw anew each time, draw what follows from `start`: so what they said can be had again."""
    seed, drawn = random.seed, random.Random(start)
    with patch.object(random, "seed", lambda *given: seed(*(given or (drawn.random(),)))):
        yield


@dataclass(frozen=True)
class Answers:
    """Answers to one exercise: `accepted` ones, written differently, and `rejected` ones with part of their message."""

    accepted: Sequence[Any]
    rejected: Sequence[tuple[Any, str]]

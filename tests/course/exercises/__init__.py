"""Right and wrong answers to the exercises: data that shows that the checks are fair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """Answers to one exercise: `accepted` ones, written differently, and `rejected` ones with part of their message."""

    accepted: Sequence[Any]
    rejected: Sequence[tuple[Any, str]]

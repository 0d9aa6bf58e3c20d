"""The exercises of a lesson: what stands beside each in solutions/, and where the lesson calls it.

In a lesson's Markdown an exercise is called by a line that begins `> **Stop: exercise 06.2**, 10 minutes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from .lesson import ROOT

ASKED = re.compile(r"^## (?P<number>\d\d\.\d+) (?P<title>.+)\n\n\*(?P<kind>[^·*]+) · difficulty (?P<difficulty>●+)○* · "
                   r"importance (?P<importance>●+)○* · about (?P<minutes>\d+) minutes", re.MULTILINE)
CALLED = re.compile(r"> \*\*Stop: exercise (\d\d\.\d+)\*\*, (\d+) minutes\b")
SECTION = re.compile(r"#{2,3} +(.+)")
FENCE = re.compile(r"\s*(```|~~~)")


@dataclass(frozen=True)
class Asked:
    """What stands beside an exercise: its number and title, its kind (such as Write), its minutes, and of five points
    how many it has for difficulty and for importance."""

    number: str
    title: str
    kind: str
    minutes: int
    difficulty: int
    importance: int


@dataclass(frozen=True)
class Call:
    """Where a lesson calls an exercise: its number, the minutes told there, and the heading above ("" for none)."""

    number: str
    minutes: int
    section: str


def prose(notebook: Path) -> list[str]:
    """The Markdown cells of a notebook."""
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]


def asked_in(notebook: Path) -> list[Asked]:
    """The exercises that a notebook of solutions/ or exercises/ asks, in order."""
    found = []
    for match in ASKED.finditer("\n\n".join(prose(notebook))):
        points = {name: len(match[name]) for name in ("difficulty", "importance")}
        found.append(Asked(match["number"], match["title"].strip(), match["kind"], int(match["minutes"]), **points))
    return found


def notebook_of(lesson: str, folder: str = "notebooks", root: Path = ROOT) -> Path:
    """The notebook of a lesson such as "06" in a folder of the course. Raises ValueError unless there is just one."""
    found = sorted((root / folder).glob(f"{lesson}_*.ipynb"))
    if len(found) != 1:
        raise ValueError(f"{folder}/ holds {len(found)} notebooks of lesson {lesson}: {[path.name for path in found]}")
    return found[0]


def calls_in(notebook: Path) -> list[Call]:
    """Where a lesson calls exercises, in order. Lines of code in its Markdown do not count."""
    found, section, in_code = [], "", False
    for line in "\n".join(prose(notebook)).split("\n"):
        if FENCE.match(line):
            in_code = not in_code
        elif not in_code and (heading := SECTION.match(line)):
            section = heading[1].strip()
        elif not in_code and (call := CALLED.match(line)):
            found.append(Call(call[1], int(call[2]), section))
    return found

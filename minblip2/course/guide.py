"""Timings for instructors, from the notebooks themselves: `python -m minblip2.course.guide` puts them
into INSTRUCTORS.md.

Reading and computing are what each notebook says of its last execution, minutes of exercises what stands beside each.
`python -m minblip2.course.run --write` calls this, so the guide is as old as the outputs.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

from ..data.entry import run_command
from ..evaluation.tables import markdown
from .exercises import Asked, asked_in
from .lesson import ROOT
from .markers import GUIDE, put

SAID = re.compile(r"Reading: about \*\*(\d+) minutes\*\*.*Computing: \*\*(\d+) seconds?\*\*")
MOST = 5  # points of importance that an exercise can have

# A plan's sessions: what it is called, its lessons, and the exercises: all, those of greatest importance, or none.
PLANS = {
    "one day": [("morning", ("00", "02"), "most"), ("afternoon", ("05", "10"), "most")],
    "a week": [("day 1", ("00", "01", "02"), "most"), ("day 2", ("03", "04", "05"), "most"),
               ("day 3", ("06", "07", "08"), "most"), ("day 4", ("09", "10", "11"), "most"),
               ("day 5", ("12", "13", "16"), "most")],
    "a term": [(f"week {i + 1}", lessons, "all") for i, lessons in enumerate((
        ("00",), ("01",), ("02",), ("03",), ("04",), ("05",), ("06", "07"), ("08",), ("09",), ("10",), ("11", "12"),
        ("13",), ("14", "15"), ("16", "17")))],
}


@dataclass(frozen=True)
class Lesson:
    """A lesson's title, its minutes of reading, seconds of computing, and its exercises."""

    title: str
    reading: int
    computing: int
    exercises: tuple[Asked, ...]

    def minutes(self, which: str) -> float:
        """Minutes in all, with `all` exercises or those of `most` importance."""
        chosen = sum(one.minutes for one in self.exercises if which == "all" or one.importance == MOST)
        return self.reading + self.computing / 60 + chosen


def lessons(folder: Path = ROOT) -> dict[str, Lesson]:
    """Every lesson by its number. Raises ValueError for a notebook that does not tell its minutes."""
    found = {}
    for path in sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, 4)
        outputs = [output.get("data", {}).get("text/markdown", "") for cell in notebook.cells
                   if cell.cell_type == "code" for output in cell.outputs]
        said = next((match for text in outputs if (match := SAID.search(text))), None)
        if said is None:
            raise ValueError(f"{path.name} does not tell its minutes: run python -m minblip2.course.run --write")
        solved = folder / "solutions" / path.name
        asked = tuple(asked_in(solved)) if solved.exists() else ()
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        found[path.name[:2]] = Lesson(title.partition(" · ")[2], int(said[1]), int(said[2]), asked)
    return found


def timings(known: dict[str, Lesson]) -> str:
    """The table of lessons in Markdown."""
    rows = [(number, one.title, one.reading, one.computing, len(one.exercises),
             sum(asked.minutes for asked in one.exercises)) for number, one in known.items()]
    sums = [sum(row[column] for row in rows) for column in range(2, 6)]
    header = ("lesson", "", "reading, minutes", "computing, seconds", "exercises", "their minutes")
    return markdown(header, *rows, ("all", "", *sums))


def plans(known: dict[str, Lesson]) -> str:
    """The tables of the plans in Markdown; a lesson that is not there yet is left out."""
    rows = []
    for name, sessions in PLANS.items():
        for session, numbers, which in sessions:
            there = [number for number in numbers if number in known]
            hours = sum(known[number].minutes(which) for number in there) / 60
            asked = "all" if which == "all" else "the most important"
            rows.append((name, session, ", ".join(there), asked, f"{hours:.1f}"))
    return markdown(("plan", "session", "lessons", "exercises", "hours"), *rows)


def write_guide() -> None:
    """Put both tables into the guide."""
    known = lessons()
    put(timings(known), "timings")
    put(plans(known), "plans")


def main() -> int:
    """Write the tables; 2 when a notebook has no outputs, or the guide no place for them."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        write_guide()
    except ValueError as error:
        print(f"guide: {error}", file=sys.stderr)
        return 2
    print(f"{GUIDE.relative_to(ROOT)}: timings and plans")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.course.guide", main))

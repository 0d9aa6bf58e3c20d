"""What is solved: python exercises/progress.py, or make progress."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from checks import DONE, OPEN, SIGNS, Exercise, progress  # noqa: E402
from minblip2.data.entry import run_command  # noqa: E402


def lessons() -> dict[str, list[Exercise]]:
    """The exercises of each lesson that has any, in order."""
    found = {}
    for path in sorted((Path(__file__).parent / "checks").glob("lesson[0-9][0-9].py")):
        checks = vars(import_module(f"checks.{path.stem}")).values()
        found[path.stem[-2:]] = [check for check in checks if isinstance(check, Exercise)]
    return found


def main() -> int:
    """One line for each exercise, and how many are done."""
    known, done, total = progress(), 0, 0
    for lesson, exercises in lessons().items():
        states = [known.get(each.name, OPEN) for each in exercises]
        print(f"lesson {lesson}: {states.count(DONE)} of {len(states)}")
        for each, state in zip(exercises, states, strict=True):
            print(f"  {SIGNS[state]} {each.name}: {state}")
        done, total = done + states.count(DONE), total + len(states)
    print(f"{done} of {total} exercises done")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("progress", main))

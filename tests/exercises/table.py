"""The README's table of tested checks, measured now: python -m tests.exercises.table [--write]"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "exercises"), str(ROOT / "notebooks")]

import checks  # noqa: E402
import progress  # noqa: E402
from readme import put  # noqa: E402

BEGIN, END = "<!-- exercises -->", "<!-- /exercises -->"


def table() -> str:
    """For each lesson: exercises, wrong answers that got their own message, right ones that passed; in Markdown."""
    rows, sums = [], [0] * 5
    for lesson, exercises in progress.lessons().items():
        answers = import_module(f"tests.exercises.lesson{lesson}").ANSWERS
        rejected = [(each, *wrong) for each in exercises for wrong in answers[each.__name__].rejected]
        accepted = [(each, right) for each in exercises for right in answers[each.__name__].accepted]
        verdicts = [(each.verdict(answer), said) for each, answer, said in rejected]
        told = sum(verdict.status == checks.WRONG and said in verdict.message for verdict, said in verdicts)
        passed = sum(each.verdict(answer).status == checks.DONE for each, answer in accepted)
        numbers = [len(exercises), told, len(rejected), passed, len(accepted)]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        rows.append((lesson, numbers))
    lines = ["| lesson | exercises | wrong answers told why | right answers passed |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {n} | {told} of {wrong} | {passed} of {right} |"
              for name, (n, told, wrong, passed, right) in [*rows, ("all", sums)]]
    return "\n".join(lines)


def main() -> None:
    """Print the table; with --write put it into README.md."""
    made = table()
    print(made)
    if "--write" in sys.argv:
        put(made, BEGIN, END)


if __name__ == "__main__":
    main()

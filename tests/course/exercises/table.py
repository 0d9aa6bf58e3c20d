"""Tables of tested checks and of common errors, into their pages: python -m tests.course.exercises.table [--write]"""

from __future__ import annotations

import sys
from collections import Counter
from importlib import import_module

from minblip2.course.lesson import ROOT
from minblip2.course.markers import asked_to_write, put
from minblip2.data.progress import forgiving_output
from minblip2.evaluation.tables import markdown

from . import drawn_from

sys.path.insert(0, str(ROOT / "exercises"))

import checks  # noqa: E402
import progress  # noqa: E402


def tables() -> tuple[str, str]:
    """Two tables in Markdown: for each lesson exercises, wrong answers that got their own message, and right ones that
    passed; for each exercise the message that most of its wrong answers get."""
    rows, sums, errors = [], [0] * 5, []
    for lesson, exercises in progress.lessons().items():
        answers = import_module(f"tests.course.exercises.lesson{lesson}").ANSWERS
        rejected = [(each, *wrong) for each in exercises for wrong in answers[each.__name__].rejected]
        accepted = [(each, right) for each in exercises for right in answers[each.__name__].accepted]
        verdicts = [(each, each.verdict(answer), said) for each, answer, said in rejected]
        output = sum(verdict.status == checks.WRONG and said in verdict.message for _, verdict, said in verdicts)
        passed = sum(each.verdict(answer).status == checks.DONE for each, answer in accepted)
        numbers = [len(exercises), output, len(rejected), passed, len(accepted)]
        sums = [a + b for a, b in zip(sums, numbers, strict=True)]
        rows.append((lesson, numbers))
        errors += [(each.name, commonest([(said, verdict.message) for one, verdict, said in verdicts if one is each]))
                   for each in exercises]
    counts = [(name, n, f"{output} of {wrong}", f"{passed} of {right}")
              for name, (n, output, wrong, passed, right) in [*rows, ("all", sums)]]
    return (markdown(("lesson", "exercises", "wrong answers told why", "right answers passed"), *counts),
            markdown(("exercise", "the commonest message to wrong answers"), *errors))


def commonest(messages: list[tuple[str, str]]) -> str:
    """The message under the part that most wrong answers share, without where to read again."""
    (part, _), = Counter(said for said, _ in messages).most_common(1)
    message = next(message for said, message in messages if said == part)
    return message.rpartition(" Read again: ")[0]


def main() -> None:
    """Print the first table; with --write put it there, and the common errors into the guide."""
    writes = asked_to_write(__doc__)
    with drawn_from(0):  # one draw in some thousands does not tell two errors apart
        made, errors = tables()
    print(made)
    if writes:
        put(made, "exercises")
        put(errors, "errors")


if __name__ == "__main__":
    forgiving_output()
    main()

"""Do verdicts depend on luck? Every answer under many seeds: python -m tests.course.exercises.seeds [04 06.2 ...]

Prints right answers that were refused, wrong ones that passed or got another message than theirs, and verdicts that
changed from seed to seed; ends with 1 if there are any. --seeds 40 is the default.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "exercises"))

import checks  # noqa: E402
import progress  # noqa: E402


@contextmanager
def drawing_from(seed: object) -> Iterator[None]:
    """Checks draw anew each time; here they start from a seed."""
    anew, drawn = random.seed, random.Random(str(seed))
    random.seed = lambda *given: anew(*(given or (drawn.random(),)))
    try:
        yield
    finally:
        random.seed = anew


def verdicts(exercise: checks.Exercise, answer: object, seeds: int) -> Counter[tuple[str, str]]:
    """How often each verdict was given: (status, message)."""
    found: Counter[tuple[str, str]] = Counter()
    for seed in range(seeds):
        with drawing_from((exercise.name, seed)):
            verdict = exercise.verdict(answer)
        found[verdict.status, verdict.message] += 1
    return found


def faults(exercise: checks.Exercise, answers: object, seeds: int) -> Iterator[str]:
    """A line for each answer that is not judged as it should be under each seed."""
    for place, answer in enumerate(answers.accepted):
        for (status, message), times in verdicts(exercise, answer, seeds).items():
            if status != checks.DONE:
                yield f"right answer {place} refused {times} of {seeds} times: {message}"
    for place, (answer, said) in enumerate(answers.rejected):
        for (status, message), times in verdicts(exercise, answer, seeds).items():
            if status != checks.WRONG:
                yield f"wrong answer {place} ({said!r}) {status} {times} of {seeds} times"
            elif said not in message:
                yield f"wrong answer {place} ({said!r}) is told something else {times} of {seeds} times: {message}"


def main() -> int:
    """Print all faults of some lessons; 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", help="numbers of lessons such as 04, or of exercises such as 04.2")
    parser.add_argument("--seeds", type=int, default=40)
    args = parser.parse_args()
    bad, judged, start = 0, 0, time.perf_counter()
    for lesson, exercises in progress.lessons().items():
        for exercise in exercises:
            if args.lessons and not {lesson, exercise.number} & {*args.lessons}:
                continue
            answers = import_module(f"tests.course.exercises.lesson{lesson}").ANSWERS[exercise.__name__]
            began, lines = time.perf_counter(), list(faults(exercise, answers, args.seeds))
            count = len(answers.accepted) + len(answers.rejected)
            print(f"{exercise.name}: {count} answers, {len(lines)} faults, "
                  f"{(time.perf_counter() - began) / args.seeds / count:.3f} s an answer", flush=True)
            for line in lines:
                print(f"  {line}")
            bad, judged = bad + len(lines), judged + count
    print(f"{judged} answers, {args.seeds} seeds each: {bad} faults, {time.perf_counter() - start:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

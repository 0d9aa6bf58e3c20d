"""Grade a folder of submissions: python exercises/grade.py FOLDER [--out grades.csv] [--lessons NN ...]

FOLDER holds a folder for each learner with her notebooks anywhere in it (as nbgrader's submitted/ does), or the
notebooks of one. The table of learners by exercises goes to a CSV file, what the checks said to a second one beside it
(grades-messages.csv), and a short table to the screen. Nothing but what the course installs is needed; whoever has
nbgrader can use that instead, see notebooks/INSTRUCTORS.md.

Every notebook is run as a copy, in a process of its own, with a limit of time for each cell and for the whole. The
check cells are those of this checkout, whatever stands in those of the submission. A cell that does not end, or that
ends its process, is a verdict on its exercise; the others are run again without it. The code that runs is that of the
learners, in the same process as the checks: use a machine, or a container, on which that may happen. Accidents change
no grade; who means to deceive the checks can.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "exercises"), str(ROOT)]

from checks import DONE, OPEN, WRONG  # noqa: E402
from make import exercise_of  # noqa: E402
from minblip2 import UserError  # noqa: E402
from minblip2.commands.options import positive  # noqa: E402

ABSENT, STOPPED, FAILED = "no notebook", "stopped", "could not be graded"
GRACE = 10  # seconds that a cell has to stop when it is told to
SIGNATURE = re.compile(r"^(\d\d)_.*\.ipynb$", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """An exercise as the course asks it: its check's name, its number, its check cell and the points it is worth."""

    name: str
    number: str
    check: str
    points: float


def marks(cell: nbformat.NotebookNode) -> tuple[str, bool]:
    """The exercise that a cell belongs to, by nbgrader's marks ("" for none), and whether it is its check."""
    about = cell.metadata.get("nbgrader")
    if not isinstance(about, dict):  # a learner's notebook: it may hold anything
        return "", False
    return str(about.get("grade_id", "")).removesuffix("-check"), bool(about.get("grade"))


def asked_in(notebook: nbformat.NotebookNode) -> list[Asked]:
    """The exercises of a notebook of the course, in order."""
    found, number = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (title := re.match(r"## (\d\d\.\d+)", cell.source)):
            number = title[1]
        name, is_check = marks(cell)
        if is_check:
            found.append(Asked(name, number, cell.source, cell.metadata.nbgrader["points"]))
    return found


def solved() -> dict[str, Path]:
    """The notebook of solutions by lesson."""
    return {path.name[:2]: path for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.ipynb"))}


def course() -> dict[str, nbformat.NotebookNode]:
    """The exercises by lesson, as the solutions make them: exercises/ may hold somebody's answers."""
    return {lesson: exercise_of(nbformat.read(path, as_version=4)) for lesson, path in solved().items()}


def submissions(folder: Path) -> dict[str, dict[str, Path]]:
    """learner -> lesson -> notebook; every folder is a learner, also one that holds no notebook of an exercise.

    Of several notebooks for one lesson that with the shortest name counts, then the newest; the others are named.
    """
    known = solved()
    found: dict[str, dict[str, Path]] = {path.name: {} for path in sorted(folder.iterdir())
                                         if path.is_dir() and not path.name.startswith((".", "__"))}
    for path in sorted(path for path in folder.rglob("*") if ".ipynb" in path.name.lower()):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            continue
        lesson = SIGNATURE.match(path.name)
        if lesson is None or lesson[1] not in known or not path.is_file():
            print(f"{inside} is not looked at: it is not named as a notebook with exercises is, such as 06_itc.ipynb",
                  file=sys.stderr)
            continue
        mine = found.setdefault(inside.parts[0] if len(inside.parts) > 1 else folder.resolve().name, {})
        other = mine.get(lesson[1])
        if other is not None:
            kept, dropped = sorted((path, other), key=lambda one: (len(one.name), -one.stat().st_mtime))
            print(f"{dropped.relative_to(folder)} is not looked at: {kept.name} counts", file=sys.stderr)
            path = kept
        mine[lesson[1]] = path
    return found


# --- one notebook, in a process of its own ----------------------------------------------------------------------------


def cells_to_run(submitted: nbformat.NotebookNode, official: Sequence[Asked], skip: set[int],
                 without: Sequence[str] = ()) -> list[tuple[int, str, str | None]]:
    """Number, code and exercise (or None) of each cell: the checks are the course's, where they stood or at the end.

    Of several copies of a check the last one is the course's, as somebody who copies a cell improves the copy. The
    checks of exercises in `without` (by number) do not run at all.
    """
    checks = {one.name: one.check for one in official}
    dropped = {one.name for one in official if one.number in without}
    last = {name: number for number, cell in enumerate(submitted.cells)
            for name, is_check in [marks(cell)] if is_check and name in checks and cell.cell_type == "code"}
    cells: list[tuple[int, str, str | None]] = []
    for number, cell in enumerate(submitted.cells):
        name, is_check = marks(cell)
        if cell.cell_type != "code":
            continue
        if not is_check or name not in checks:
            cells.append((number, cell.source, None))
        elif name not in dropped and last[name] == number:
            cells.append((number, checks[name], name))
        elif name not in dropped and cell.source.strip() != checks[name].strip():  # half of a cell that was split, say
            cells.append((number, cell.source, None))
    cells += [(len(submitted.cells) + place, checks[name], name) for place, name in enumerate(checks)
              if name not in last and name not in dropped]
    return [cell for cell in cells if cell[0] not in skip]


def run_cells(job: dict) -> None:
    """What the process of its own does: run cells one after another, and note what begins and how it ended."""
    from IPython.core.interactiveshell import InteractiveShell  # which knows magics, and goes on after an error

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    shell, notes = InteractiveShell.instance(), Path(job["notes"])
    sys.path.append(os.getcwd())  # as Jupyter does: modules of hers lie beside the notebook
    shell.showtraceback = lambda *_, **__: None  # nobody reads it, and to write one takes seconds

    def note(**what: object) -> None:
        with notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")

    def end(cell: int) -> None:
        late.add(cell)
        import _thread
        _thread.interrupt_main()

    late: set[int] = set()
    for number, source, exercise in job["cells"]:
        note(begins=number, of=exercise)
        watch = threading.Timer(job["cell_limit"], end, [number])
        watch.start()
        try:
            result = shell.run_cell(source, store_history=False)
            error = result.error_before_exec or result.error_in_exec
        except KeyboardInterrupt as stop:  # it came between two lines of the shell
            error = stop
        finally:
            watch.cancel()
        said = " ".join(f"{type(error).__name__}: {error}".split()) if error is not None else ""
        note(ends=number, late=number in late, error=said)


@dataclass
class Result:
    """How an exercise of a submission stands."""

    status: str
    message: str = ""


def noted(notes: Path) -> Iterator[dict]:
    """What stands in the notes, line by line; not only our lines: what a learner runs may write there."""
    for line in notes.read_text(encoding="utf-8", errors="replace").splitlines() if notes.exists() else ():
        with contextlib.suppress(ValueError):
            if isinstance(what := json.loads(line), dict):
                yield what


def read_notes(notes: Path) -> tuple[dict[str, Result], tuple[int, str | None] | None]:
    """Results by name, and the cell in which the process ended, with its exercise, if it did not come to the end."""
    results: dict[str, Result] = {}
    running: tuple[int, str | None] | None = None
    trouble = ""  # what stopped the last cell that is no check
    for what in noted(notes):
        try:
            if "begins" in what:
                running = what["begins"], what["of"]
            elif "status" in what and running and running[1]:
                if what["exercise"].split(" ", 1)[1] == running[1]:
                    results[running[1]] = Result(what["status"], what["message"])
            elif "ends" in what:
                name = running[1] if running else None
                if name and name not in results:
                    results[name] = Result(STOPPED if what["late"] else OPEN if "NameError" in what["error"] else WRONG,
                                           "took too long" if what["late"] else what["error"] + (
                                               f" (a cell above stopped with {trouble})" if trouble else ""))
                trouble = "" if name else what["error"] or trouble
                running = None
        except (ValueError, LookupError, TypeError, AttributeError):
            continue  # not a line of ours
    return results, running


def late_cells(notes: Path) -> set[int]:
    """The cells that were told to stop, as they took too long."""
    return {what["ends"] for what in noted(notes) if what.get("late") is True and isinstance(what.get("ends"), int)}


def ends_in_time(process: subprocess.Popen, notes: Path, cell_limit: float, limit: float) -> bool:
    """Wait for a process; end it when a cell does not stop when it is told to, or when the whole takes too long."""
    began = noted = time.monotonic()  # not the time of the file: a clock that is set would end a process
    length = 0
    while True:
        try:
            process.wait(0.5)
            return True
        except subprocess.TimeoutExpired:
            now, before, length = time.monotonic(), length, notes.stat().st_size if notes.exists() else 0
            noted = now if length != before or not length else noted
            if now - noted > cell_limit + GRACE or now - began > limit:
                process.kill()
                process.wait()
                return False


def grade_notebook(path: Path, official: Sequence[Asked], cell_limit: float, limit: float,
                   without: Sequence[str] = ()) -> dict[str, Result]:
    """Run a notebook where it lies; name -> result for each of its exercises, but for those in `without`."""
    wanted = [one.name for one in official if one.number not in without]
    try:
        submitted = nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)  # with or without a BOM
    except Exception as error:  # whatever somebody has handed in
        return {name: Result(ABSENT, f"{path.name} is no notebook: {type(error).__name__}") for name in wanted}
    found: dict[str, Result] = {}
    skip: set[int] = set()
    for attempt in range(1 + len(submitted.cells) + len(official)):
        notes = path.with_name(f".{path.stem}.{attempt}.jsonl")
        todo = [(number, source, name) for number, source, name in cells_to_run(submitted, official, skip, without)
                if name not in found or found[name].status != STOPPED]
        job = path.with_name(f".{path.stem}.{attempt}.json")
        job.write_text(json.dumps({"notes": str(notes), "cells": todo, "cell_limit": cell_limit}), encoding="utf-8")
        environment = os.environ | {"MINBLIP2_GRADING": str(notes), "MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8"}
        process = subprocess.Popen([sys.executable, __file__, "--run", str(job)], cwd=path.parent, env=environment,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        slow = not ends_in_time(process, notes, cell_limit, limit)
        results, ended_in = read_notes(notes)
        found |= {name: result for name, result in results.items()
                  if name not in found or found[name].status != STOPPED}
        if ended_in is None:
            break
        number, name = ended_in
        if slow and (others := late_cells(notes) - skip):  # they used up the time of this one: run again without them
            skip |= others
            continue
        skip.add(number)
        if name and (name not in found or found[name].status == DONE):  # judged, and ended: nothing is earned by that
            found[name] = Result(STOPPED, "took too long" if slow else "your code ended the process")
    return {name: found.get(name, Result(STOPPED, "was not reached")) for name in wanted}


# --- a class ----------------------------------------------------------------------------------------------------------


def chosen(official: dict[str, list[Asked]], lessons: Sequence[str], without: Sequence[str]
           ) -> tuple[list[str], list[str]]:
    """The lessons (all, where none is named) and the exercises to leave out, as the course writes them: 6 is 06."""
    numbers = [one.number for asked in official.values() for one in asked]
    lessons, without = [one.zfill(2) for one in lessons], [one.zfill(4) for one in without]
    for lesson in lessons:
        if lesson not in official:
            raise UserError(f"no lesson {lesson} has exercises; give --lessons some of {', '.join(official)}")
    for number in without:
        if number not in numbers:
            near = [one for one in numbers if one[:3] == number[:3]] or numbers
            raise UserError(f"there is no exercise {number}; give --without some of {', '.join(near)}")
    return lessons or list(official), without


def grade(handed_in: dict[str, dict[str, Path]], lessons: Sequence[str], cell_limit: float, limit: float, jobs: int,
          without: Sequence[str] = ()) -> tuple[list[tuple[str, Asked]], dict[str, dict[str, Result]]]:
    """The exercises as (lesson, what is asked), and learner -> number of an exercise -> result."""
    official = {lesson: asked_in(notebook) for lesson, notebook in course().items()}
    lessons, without = chosen(official, lessons, without)
    official = {lesson: asked for lesson, asked in official.items() if lesson in lessons}

    def graded(task: tuple[str, str, Path]) -> dict[str, Result]:
        _, lesson, path = task
        try:
            return grade_notebook(path, official[lesson], cell_limit, limit, without)
        except Exception as error:  # one notebook must not cost the class its grades
            why = " ".join(f"{type(error).__name__}: {error}".split())
            return {one.name: Result(FAILED, f"{path.name}: {why}") for one in official[lesson]}

    (ROOT / "runs").mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="grading-", dir=ROOT / "runs"))  # inside, where notebooks look for the course
    try:
        tasks = []
        for place, (learner, notebooks) in enumerate(sorted(handed_in.items())):
            home = work / str(place)
            home.mkdir()
            for path in notebooks.values():  # all of hers: 10.6 reads what she wrote in the others
                try:
                    for module in path.parent.glob("*.py"):  # which her notebooks may import
                        shutil.copyfile(module, home / module.name)
                    shutil.copyfile(path, home / path.name)
                except OSError as error:
                    print(f"{path} cannot be read: {error.strerror}", file=sys.stderr)
            tasks += [(learner, lesson, home / path.name) for lesson, path in notebooks.items() if lesson in official]
        with ThreadPoolExecutor(jobs) as pool:
            by_task = {task[:2]: results for task, results in zip(tasks, pool.map(graded, tasks), strict=True)}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    exercises = [(lesson, one) for lesson, some in official.items() for one in some if one.number not in without]
    return exercises, {learner: {one.number: by_task.get((learner, lesson), {}).get(one.name, Result(ABSENT))
                                 for lesson, one in exercises} for learner in sorted(handed_in)}


def write_table(path: Path, exercises: Sequence[tuple[str, Asked]], results: dict[str, dict[str, Result]]) -> None:
    """Learners by exercises, as CSV; the last columns are how many are done, and their points."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["learner", *(f"{one.number} {one.name}" for _, one in exercises), "done", "points"])
        for learner, row in results.items():
            done = [one for _, one in exercises if row[one.number].status == DONE]
            table.writerow([learner, *(row[one.number].status for _, one in exercises), len(done),
                            sum(one.points for one in done)])


def write_messages(path: Path, exercises: Sequence[tuple[str, Asked]], results: dict[str, dict[str, Result]]) -> None:
    """A row for each exercise of each learner, as CSV, with what the check said."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["learner", "exercise", "status", "message"])
        table.writerows([learner, f"{one.number} {one.name}", row[one.number].status, row[one.number].message]
                        for learner, row in results.items() for _, one in exercises)


def main() -> int:
    """Grade, write the table, and print a short one; 2 where there is nothing to grade."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder for each learner, or the notebooks of one")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"), help="the table (default: grades.csv)")
    parser.add_argument("--lessons", nargs="*", default=[], metavar="NN", help="only these (default: all)")
    parser.add_argument("--without", nargs="*", default=[], metavar="NN.N", help="exercises to leave out; 10.6 trains")
    parser.add_argument("--cell-limit", type=float, default=900, help="seconds for a cell (default: 900; 10.6 trains)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a notebook (default: 1800)")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="notebooks that run at once (default: 1)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what the processes of notebooks are started with
    args = parser.parse_args()
    if args.run:
        run_cells(json.loads(args.run.read_text(encoding="utf-8")))
        return 0
    if args.folder is None or not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder")
    handed_in = submissions(args.folder)
    if not any(handed_in.values()):
        print(f"grade: no notebook named like 06_itc.ipynb lies in {args.folder}", file=sys.stderr)
        return 2
    messages = args.out.with_name(f"{args.out.stem}-messages.csv")
    try:
        for path in (args.out, messages):  # before the hours, not after them
            path.open("a", encoding="utf-8").close()
        exercises, results = grade(handed_in, args.lessons, args.cell_limit, args.limit, args.jobs, args.without)
        write_table(args.out, exercises, results)
        write_messages(messages, exercises, results)
    except OSError as error:
        print(f"grade: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    lessons = list(dict.fromkeys(lesson for lesson, _ in exercises))
    wide = max(map(len, results))  # "-" stands for a notebook that is not there
    print(" ".join([" " * wide, *(f"{lesson:>5}" for lesson in lessons)]))
    for learner, row in results.items():
        counts = []
        for lesson in lessons:
            some = [row[one.number].status for of, one in exercises if of == lesson]
            counts.append("-" if set(some) == {ABSENT} else f"{some.count(DONE)}/{len(some)}")
        print(" ".join([f"{learner:{wide}}", *(count.rjust(5) for count in counts)]))
        if not handed_in[learner]:
            print(f"  {ABSENT}")
        told = set()
        for number, result in row.items():
            of = number if result.status == STOPPED else number[:2]  # the others hold for a whole notebook
            if result.status in (STOPPED, FAILED, ABSENT) and result.message and of not in told:
                told.add(of)
                print(f"  {of} {result.status}: {result.message}")
    print(f"the table is in {args.out}, what the checks said in {messages}")
    return 0


if __name__ == "__main__":
    from minblip2.data.entry import run_command  # only here: the processes of notebooks start without it

    raise SystemExit(run_command("grade", main))

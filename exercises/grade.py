"""Grade a folder of submissions: python exercises/grade.py FOLDER [--out grades.csv] [--lessons NN ...]

FOLDER holds a folder for each learner with her notebooks anywhere in it (as nbgrader's submitted/ does), or the
notebooks of one. The table of learners by exercises goes to a CSV file, and a short one to the screen. Nothing but what
the course installs is needed; whoever has nbgrader can use that instead, see notebooks/INSTRUCTORS.md.

Every notebook is run as a copy, in a process of its own, with a limit of time for each cell and for the whole. The
checks are those of this checkout, whatever stands in the submission. A cell that does not end, or that ends its
process, is a verdict on its exercise; the others are run again without it. The code that runs is that of the learners:
use a machine, or a container, on which that may happen.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "exercises"), str(ROOT)]

from checks import DONE, OPEN, WRONG  # noqa: E402
from make import exercise_of  # noqa: E402

ABSENT, STOPPED = "no notebook", "stopped"
GRACE = 10  # seconds that a cell has to stop when it is told to
SIGNATURE = re.compile(r"^(\d\d)_.*\.ipynb$")


@dataclass(frozen=True)
class Asked:
    """An exercise as the course asks it: its check's name, its number, its check cell and the points it is worth."""

    name: str
    number: str
    check: str
    points: float


def asked_in(notebook: nbformat.NotebookNode) -> list[Asked]:
    """The exercises of a notebook of the course, in order."""
    found, number = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (title := re.match(r"## (\d\d\.\d+)", cell.source)):
            number = title[1]
        about = cell.metadata.get("nbgrader", {})
        if about.get("grade"):
            found.append(Asked(about["grade_id"].removesuffix("-check"), number, cell.source, about["points"]))
    return found


def course() -> dict[str, nbformat.NotebookNode]:
    """The exercises by lesson, as the solutions make them: exercises/ may hold somebody's answers."""
    return {path.name[:2]: exercise_of(nbformat.read(path, as_version=4))
            for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.ipynb"))}


def submissions(folder: Path) -> dict[str, dict[str, Path]]:
    """learner -> lesson -> notebook. Of several for one lesson that with the shortest name counts, then the newest."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*.ipynb")):
        inside = path.relative_to(folder)
        lesson = SIGNATURE.match(path.name)
        if lesson is None or any(part.startswith(".") for part in inside.parts):
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


def cells_to_run(submitted: nbformat.NotebookNode, official: Sequence[Asked], skip: set[int]
                 ) -> list[tuple[int, str, str | None]]:
    """Number, code and exercise (or None) of each cell: the checks are the course's, where they stood or at the end."""
    checks, cells = {one.name: one.check for one in official}, []
    for number, cell in enumerate(submitted.cells):
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "").removesuffix("-check")
        is_check = bool(cell.metadata.get("nbgrader", {}).get("grade")) and name in checks
        if cell.cell_type == "code":
            cells.append((number, checks.pop(name) if is_check else cell.source, name if is_check else None))
    cells += [(len(submitted.cells) + number, source, name) for number, (name, source) in enumerate(checks.items())]
    return [cell for cell in cells if cell[0] not in skip]


def run_cells(job: dict) -> None:
    """What the process of its own does: run cells one after another, and note what begins and how it ended."""
    from IPython.core.interactiveshell import InteractiveShell  # which knows magics, and goes on after an error

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    shell, notes = InteractiveShell.instance(), Path(job["notes"])
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


def read_notes(notes: Path) -> tuple[dict[str, Result], tuple[int, str | None] | None]:
    """Results by name, and the cell in which the process ended, with its exercise, if it did not come to the end."""
    results: dict[str, Result] = {}
    running: tuple[int, str | None] | None = None
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        what = json.loads(line)
        if "begins" in what:
            running = what["begins"], what["of"]
        elif "status" in what and running and running[1]:
            if what["exercise"].split(" ", 1)[1] == running[1]:
                results[running[1]] = Result(what["status"], what["message"])
        elif "ends" in what:
            name = running[1] if running else None
            if name and name not in results:
                results[name] = Result(STOPPED if what["late"] else OPEN if "NameError" in what["error"] else WRONG,
                                       "took too long" if what["late"] else what["error"])
            running = None
    return results, running


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


def grade_notebook(path: Path, official: Sequence[Asked], cell_limit: float, limit: float) -> dict[str, Result]:
    """Run a notebook where it lies; name -> result for each of its exercises."""
    try:
        submitted = nbformat.read(path, as_version=4)
    except Exception as error:  # whatever somebody has handed in
        return {one.name: Result(ABSENT, f"{path.name} is no notebook: {type(error).__name__}") for one in official}
    found: dict[str, Result] = {}
    skip: set[int] = set()
    for attempt in range(1 + len(submitted.cells) + len(official)):
        notes = path.with_name(f".{path.stem}.{attempt}.jsonl")
        todo = [(number, source, name) for number, source, name in cells_to_run(submitted, official, skip)
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
        skip.add(number)
        if name and (name not in found or found[name].status == DONE):  # judged, and ended: nothing is earned by that
            found[name] = Result(STOPPED, "took too long" if slow else "your code ended the process")
    return {one.name: found.get(one.name, Result(STOPPED, "was not reached")) for one in official}


# --- a class ----------------------------------------------------------------------------------------------------------


def grade(folder: Path, lessons: Sequence[str], cell_limit: float, limit: float, jobs: int, without: Sequence[str] = ()
          ) -> tuple[list[tuple[str, Asked]], dict[str, dict[str, Result]]]:
    """The exercises as (lesson, what is asked), and learner -> number of an exercise -> result."""
    official = {lesson: [one for one in asked_in(notebook) if one.number not in without]
                for lesson, notebook in course().items() if not lessons or lesson in lessons}
    handed_in = submissions(folder)
    (ROOT / "runs").mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="grading-", dir=ROOT / "runs"))  # inside, where notebooks look for the course
    try:
        tasks = []
        for place, (learner, notebooks) in enumerate(sorted(handed_in.items())):
            home = work / str(place)
            home.mkdir()
            for path in notebooks.values():  # all of hers: 10.6 reads what she wrote in the others
                shutil.copyfile(path, home / path.name)
            tasks += [(learner, lesson, home / path.name) for lesson, path in notebooks.items() if lesson in official]
        with ThreadPoolExecutor(jobs) as pool:
            graded = list(pool.map(lambda task: grade_notebook(task[2], official[task[1]], cell_limit, limit), tasks))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    by_task = {(learner, lesson): results for (learner, lesson, _), results in zip(tasks, graded, strict=True)}
    exercises = [(lesson, one) for lesson, some in official.items() for one in some]
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


def main() -> int:
    """Grade, write the table, and print a short one; 2 where there is nothing to grade."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder for each learner, or the notebooks of one")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"), help="the table (default: grades.csv)")
    parser.add_argument("--lessons", nargs="*", default=[], metavar="NN", help="only these (default: all)")
    parser.add_argument("--without", nargs="*", default=[], metavar="NN.N", help="exercises to leave out; 10.6 trains")
    parser.add_argument("--cell-limit", type=float, default=900, help="seconds for a cell (default: 900; 10.6 trains)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a notebook (default: 1800)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks that run at once (default: 1)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what the processes of notebooks are started with
    args = parser.parse_args()
    if args.run:
        run_cells(json.loads(args.run.read_text(encoding="utf-8")))
        return 0
    if args.folder is None or not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder")
    if not submissions(args.folder):
        print(f"grade: no notebook named like 06_itc.ipynb lies in {args.folder}", file=sys.stderr)
        return 2
    try:
        exercises, results = grade(args.folder, args.lessons, args.cell_limit, args.limit, args.jobs, args.without)
        write_table(args.out, exercises, results)
    except OSError as error:
        print(f"grade: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    lessons = list(dict.fromkeys(lesson for lesson, _ in exercises))
    wide = max(map(len, results))
    print(" ".join([" " * wide, *(f"{lesson:>5}" for lesson in lessons)]))
    for learner, row in results.items():
        counts = [[row[one.number].status == DONE for of, one in exercises if of == lesson] for lesson in lessons]
        print(" ".join([f"{learner:{wide}}", *(f"{sum(some)}/{len(some)}".rjust(5) for some in counts)]))
        for number, result in row.items():
            if result.status == STOPPED:
                print(f"  {number} {STOPPED}: {result.message}")
    print(f"the table is in {args.out}")
    return 0


if __name__ == "__main__":
    from minblip2.data.entry import run_command  # only here: the processes of notebooks start without it

    raise SystemExit(run_command("grade", main))

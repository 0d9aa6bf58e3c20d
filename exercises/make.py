"""The exercises, made from the solutions: python exercises/make.py [--check]

Each solutions/NN_name.ipynb becomes exercises/NN_name.ipynb: what stands between ### BEGIN SOLUTION and ### END
SOLUTION gives way to a stub, and outputs are dropped. nbgrader makes the same stubs from the same marks. With --check
nothing is written, and a difference ends with exit code 1. An exercise in which stubs are gone holds somebody's
answers: it is left alone, with exit code 2, unless --force says otherwise.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

from minblip2.data.entry import run_command
from minblip2.data.files import write_beside

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # nbgrader's


def strip(source: str) -> str:
    """A cell without its solutions. Raises ValueError where the marks do not pair up."""
    lines, inside = [], False
    for line in source.split("\n"):
        mark = line.strip()
        if mark in (BEGIN, END):
            if inside == (mark == BEGIN):
                raise ValueError(f"{mark!r} does not pair up in the cell {source[:60]!r}")
            inside = mark == BEGIN
            if inside:
                indent = re.match(r"\s*", line).group()
                lines += [indent + text for text in STUB]
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"{BEGIN!r} without {END!r} in the cell {source[:60]!r}")
    return "\n".join(lines)


def exercise_of(solution: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook that a learner gets."""
    made = nbformat.from_dict(solution)
    made.metadata = {key: made.metadata[key] for key in ("kernelspec", "language_info") if key in made.metadata}
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.source, cell.outputs, cell.execution_count = strip(cell.source), [], None
    return made


def text_of(notebook: nbformat.NotebookNode) -> str:
    """The notebook as it stands in its file."""
    return nbformat.writes(notebook) + "\n"


def main() -> int:
    """Write the exercises, or with --check only compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where an exercise is not its solution's")
    parser.add_argument("--force", action="store_true", help="write over answers as well")
    args = parser.parse_args()
    made = {path.name: text_of(exercise_of(nbformat.read(path, as_version=4)))
            for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.ipynb"))}
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "exercises").glob("*.ipynb")}
    different = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if args.check:
        for name in different:
            print(f"exercises/{name} is not what its solution makes: run make exercises", file=sys.stderr)
        return bool(different)
    answered = [name for name in different if there.get(name, "").count(STUB[1]) < made.get(name, "").count(STUB[1])
                and name in there]
    for name in [] if args.force else answered:
        print(f"exercises/{name} holds answers and was left alone: move it away, or add --force", file=sys.stderr)
    for name in different if args.force else sorted({*different} - {*answered}):
        path = ROOT / "exercises" / name
        if name not in made:
            path.unlink()
        else:
            write_beside(path, lambda partial, text=made[name]: partial.write_text(text, encoding="utf-8"))
        print(f"exercises/{name}: {'written' if name in made else 'removed, it has no solution'}")
    return 2 if answered and not args.force else 0


if __name__ == "__main__":
    raise SystemExit(run_command("make", main))

"""Run the course: python notebooks/course.py [--write] [NN ...]

Every notebook, or those whose names begin with NN, in order, without a window. Executed copies go to runs/course/;
with --write the notebook itself is replaced by its executed self, stamped with a hash of its source. That is how
outputs are made before they are committed; a test compares the hash, so stale outputs do not go unnoticed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from readme import columns, table

ROOT = Path(__file__).resolve().parents[1]
STAMP = "minblip2_source_sha256"


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of all code in a notebook; it changes when a code cell is edited, added, removed or moved."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def choose(folder: Path, prefixes: list[str]) -> list[Path]:
    """The notebooks of a folder in order, those that begin with one of the prefixes if there are any."""
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in notebooks):
            known = ", ".join(path.stem for path in notebooks) or "none"
            raise ValueError(f"no notebook begins with {prefix!r} in {folder.name}/; there are: {known}")
    return [path for path in notebooks if path.name.startswith(tuple(prefixes) or "")]


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook beside its place, then rename it: nobody ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def execute(path: Path, copy: Path) -> nbformat.NotebookNode:
    """Run a notebook in its own folder and keep the executed copy, of a failed run too; the notebook may be written.

    Raises CellExecutionError with the failing cell's traceback, or DeadKernelError.
    """
    notebook = nbformat.read(path, as_version=4)
    total = sum(cell.cell_type == "code" for cell in notebook.cells)

    def progress(cell, cell_index, **_) -> None:
        done = sum(cell.cell_type == "code" for cell in notebook.cells[:cell_index])
        if sys.stdout.isatty():
            print(f"\r{path.stem} ... cell {done + 1} of {total}", end="", flush=True)

    # Times and versions would make every execution differ from the last one in git.
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}}, on_cell_execute=progress,
                            extra_arguments=["--log-level=ERROR"])
    try:
        client.execute()
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                             "language_info": {"name": "python"}, STAMP: source_hash(notebook)}
    finally:
        write(notebook, copy)
    return notebook


def main() -> int:
    """Run what was asked for; 1 when a cell fails, 2 when there is no such notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="beginnings of names, such as 00 (default: all)")
    parser.add_argument("--write", action="store_true", help="put the outputs into the notebooks themselves")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks", help="where they are (default: notebooks)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a Windows console may lack the arrows of the table
    os.environ.setdefault("MINBLIP2_SCALE", "fast")  # the form for a CPU; "full" wants a GPU
    try:
        chosen = choose(args.folder.resolve(), args.notebooks)
    except ValueError as error:
        print(f"course: {error}", file=sys.stderr)
        return 2
    for path in chosen:
        started, copy = time.perf_counter(), ROOT / "runs" / "course" / path.name
        print(f"{path.stem} ... ", end="", flush=True)
        again = f"\r\033[K{path.stem} ... " if sys.stdout.isatty() else ""  # over the line that counted cells
        try:
            notebook = execute(path, copy)
        except (CellExecutionError, DeadKernelError) as error:
            print(f"{again}failed after {time.perf_counter() - started:.0f} s; see {copy.relative_to(ROOT)}")
            print(error, file=sys.stderr)
            return 1
        if args.write:
            write(notebook, path)
        print(f"{again}{time.perf_counter() - started:.0f} s")
    if found := columns(ROOT / "runs", "scenes"):
        print(f"\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

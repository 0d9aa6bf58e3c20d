"""Run the course: python -m minblip2.course.run [--write] [--jobs N] [NN ...]

Every notebook, or those whose names begin with NN, without a window, N at a time. They look at the bridge in
runs/scenes if you have trained it, else at the one that ships; MINBLIP2_RUN=FOLDER names another. Executed copies go
to runs/course/; with --write the notebook itself is replaced by its executed self, stamped with a hash of its source
and the checksum of the bridge, and INSTRUCTORS.md gets the new timings. That is how outputs are made before they are
committed; tests compare both, so stale outputs do not go unnoticed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from ..commands.options import positive
from ..data.entry import run_command
from ..data.files import write_beside, write_json
from ..data.progress import progress_bar
from ..training.shipping import run_checksum
from . import guide, lesson
from .lesson import ROOT
from .readme import MEASURED, put_takes
from .results import columns, results_table

STAMP = "minblip2_source_sha256"
BRIDGE = "minblip2_bridge_sha256"  # which bridge the outputs are of
RUNNING: set[NotebookClient] = set()  # those that run a notebook now


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """Hash of all code in a notebook; it changes when a code cell is edited, added, removed or moved."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def cpu_seconds() -> float:
    """Seconds of CPU time that this process and those it has waited for have used; 0 where the system does not tell."""
    output = os.times()
    return output.user + output.system + output.children_user + output.children_system


def choose(folder: Path, prefixes: list[str]) -> list[Path]:
    """The notebooks of a folder in order, those that begin with one of the prefixes if there are any."""
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in notebooks):
            known = ", ".join(path.stem for path in notebooks) or "none"
            raise ValueError(f"no notebook begins with {prefix!r} in {folder.name}/; there are: {known}")
    return [path for path in notebooks if path.name.startswith(tuple(prefixes) or "")]


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook beside its place, then rename it: nobody ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, lambda partial: nbformat.write(notebook, partial))


def stop_all(pool: ThreadPoolExecutor) -> None:
    """Begin no further notebook, and end the kernels of those that run: they do not hear of Ctrl-C."""
    pool.shutdown(wait=False, cancel_futures=True)
    for client in list(RUNNING):
        if client.km is not None and client.km.provisioner is not None and client.km.provisioner.process is not None:
            client.km.provisioner.process.kill()


def execute(path: Path, copy: Path) -> nbformat.NotebookNode:
    """Run a notebook in its own folder and keep the executed copy, of a failed run too; the notebook may be written.

    Raises CellExecutionError with the failing cell's traceback, or DeadKernelError.
    """
    notebook = nbformat.read(path, as_version=4)
    # Times and versions would make every execution differ from the last one in git.
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}},
                            extra_arguments=["--log-level=ERROR"])
    RUNNING.add(client)
    try:
        client.execute()
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                             "language_info": {"name": "python"}, STAMP: source_hash(notebook),
                             BRIDGE: run_checksum(lesson.RUN)}
    finally:
        RUNNING.discard(client)
        write_notebook(notebook, copy)
    return notebook


def main() -> int:
    """Run what was asked for; 1 when a cell fails, 2 when there is no such notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="beginnings of names, such as 00 (default: all)")
    parser.add_argument("--write", action="store_true", help="put the outputs into the notebooks themselves")
    parser.add_argument("--jobs", type=positive, default=2, metavar="N", help="notebooks that run at once (default: 2)")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks", help="where they are (default: notebooks)")
    args = parser.parse_args()
    os.environ.setdefault("MINBLIP2_SCALE", "fast")  # the form for a CPU; "full" wants a GPU
    if args.write:
        os.environ["MINBLIP2_DRAWN_ONLY"] = "1"  # outputs in git show only photographs that may be handed on
    try:
        chosen = choose(args.folder.resolve(), args.notebooks)
    except ValueError as error:
        print(f"course: {error}", file=sys.stderr)
        return 2
    run = lesson.prepare()
    print(f"course: the notebooks look at the bridge {run_checksum(run)[:12]} in {run.relative_to(ROOT)}"
          if run.is_relative_to(ROOT) else f"course: the notebooks look at the bridge in {run}", flush=True)
    started, used = time.perf_counter(), cpu_seconds()
    os.environ.setdefault("TQDM_DISABLE", "1")  # in the kernels: what is kept of a notebook holds no progress bars
    # Kernels that share cores are fastest with a share of them each.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))

    stopped = threading.Event()

    def run_one(path: Path) -> str | None:
        started, copy = time.perf_counter(), ROOT / "runs" / "course" / path.name
        try:
            notebook = execute(path, copy)
        except (CellExecutionError, DeadKernelError) as error:
            if stopped.is_set():
                return None
            bar.write(f"{path.stem}: failed after {time.perf_counter() - started:.0f} s; see {copy.relative_to(ROOT)}")
            return str(error)
        if args.write:
            write_notebook(notebook, path)
        bar.write(f"{path.stem}: {time.perf_counter() - started:.0f} s")
        return None

    with ThreadPoolExecutor(args.jobs) as pool, progress_bar(total=len(chosen), unit="notebook", leave=False) as bar:
        failures = []
        try:
            for future in as_completed([pool.submit(run_one, path) for path in chosen]):
                failures += filter(None, [future.result()])
                bar.update()
        except KeyboardInterrupt:
            stopped.set()
            stop_all(pool)
            raise
    if failures:
        print(*failures, f"course: {len(failures)} of {len(chosen)} notebooks failed", sep="\n", file=sys.stderr)
        return 1
    taken = dict(wall_minutes=(time.perf_counter() - started) / 60, cpu_minutes=(cpu_seconds() - used) / 60,
                 cores=os.cpu_count(), machine=platform.processor() or platform.machine())
    print(f"\ncourse: {taken['wall_minutes']:.1f} minutes, {taken['cpu_minutes']:.1f} of CPU time, on "
          f"{taken['cores']} cores")
    if args.write and args.folder.resolve() == ROOT / "notebooks":
        guide.write_guide()  # its timings are those of the outputs
        if not args.notebooks:
            write_json(MEASURED / "course.json", taken)
            put_takes()
    if found := columns(ROOT / "runs", "scenes"):
        print(f"\n{results_table(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.course.run", main))

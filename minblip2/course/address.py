"""Where the repository is, written wherever it is told: python -m minblip2.course.address [https://github.com/OWNER/NAME]

The address goes into pyproject.toml, CITATION.cff, the badges of README.md, and the first code cell of every notebook,
which fetches the course from there where it is run without it. Without an argument the address that pyproject.toml has,
or has not, is written everywhere anew: so every notebook gets its first cell.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

from ..data.entry import run_command
from ..data.files import write_beside
from .markers import fill

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("notebooks", "notebooks/bonus", "exercises", "solutions")
CELL_ID = "start"
FUTURE = "from __future__ import annotations\n\n"  # where a notebook has it, it must stand first
ADDRESS = re.compile(r"https://[\w.-]+/[\w.-]+/[\w.-]+?(?:\.git)?/?")
FIRST = re.compile(r"(?:from __future__ .*\n+)?(?:import subprocess\n)?import sys\nfrom pathlib import Path\n\n"
                   r"\w+ = \(folder for folder in ")  # however it was called, whatever its id
OLD = re.compile(r"^(?:root = next\(.*|sys\.path\.insert\(0, str\(root\)\)|sys\.path\[:0\] = \[str\(root\).*)$\n?",
                 re.MULTILINE)

FIND = """folders = (folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "minblip2/course").is_dir())
root = next(folders, {})"""
WITHOUT = f'''import sys
from pathlib import Path

{FIND.format("None")}
sys.path[:0] = [str(root), str(root / "exercises")] if root else sys.exit(
    "This notebook needs the rest of minBLIP-2: fetch the whole repository, and open the notebook inside it.")'''
WITH = f'''import subprocess
import sys
from pathlib import Path

{FIND.format('Path.cwd() / "minBLIP-2"')}
if not root.exists():  # Colab, Kaggle: fetch the course and what it needs; PyTorch stays as it is
    subprocess.run(["git", "clone", "--quiet", "--depth=1", "ADDRESS", root], check=True)
    subprocess.run([sys.executable, root / "minblip2/course/start.py"], check=True)
sys.path[:0] = [str(root), str(root / "exercises")]'''


def first_cell(address: str | None) -> str:
    """The first code cell: it finds the checkout, or fetches it from the address, or says that it is missing."""
    return WITH.replace("ADDRESS", address) if address else WITHOUT


def known(pyproject: str) -> str | None:
    """The address in the text of pyproject.toml, if it has one."""
    found = re.search(r'^Repository = "(.*)"$', pyproject, re.MULTILINE)
    return found and found[1]


def put_first(notebook: nbformat.NotebookNode, source: str) -> bool:
    """Make `source` the first code cell, in place of the one that looked for the checkout before; whether that changes
    it.

    Of a notebook that was executed the counts stay in order; its outputs are stale until it is executed again.
    """
    before = [cell.source for cell in notebook.cells]
    if any(cell.source.startswith(FUTURE.strip()) for cell in notebook.cells if cell.cell_type == "code"):
        source = FUTURE + source
    cells = [cell for cell in notebook.cells if not (cell.cell_type == "code" and FIRST.match(cell.source))]
    for cell in cells:
        if cell.cell_type == "code":
            cell.source = OLD.sub("", re.sub(f"^{FUTURE.strip()}.*\n+", "", cell.source)).rstrip("\n")
    place = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    notebook.cells = [*cells[:place], new_code_cell(source, id=CELL_ID), *cells[place:]]
    changed = [cell.source for cell in notebook.cells] != before
    if changed and any(cell.get("execution_count") for cell in cells):
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        for count, cell in enumerate(code, start=1):
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    return changed


def in_pyproject(text: str, address: str) -> str:
    """pyproject.toml with the address among its URLs."""
    if known(text):
        return re.sub(r'^Repository = ".*"$', f'Repository = "{address}"', text, flags=re.MULTILINE)
    return text.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n')


def in_citation(text: str, address: str) -> str:
    """CITATION.cff with the address of the code."""
    text = re.sub(r"^repository-code: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^(license: .*\n)", rf'\1repository-code: "{address}"\n', text, flags=re.MULTILINE)


def badges(address: str) -> str:
    """The badges of the README: continuous integration, and lesson 00 in Colab where the repository is on GitHub."""
    shown = [f"[![ci]({address}/actions/workflows/ci.yml/badge.svg)]({address}/actions/workflows/ci.yml)"]
    if "//github.com/" in address:
        there = address.partition("//github.com/")[2]
        shown.append("[![open lesson 00 in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
                     f"(https://colab.research.google.com/github/{there}/blob/main/notebooks/00_the_bridge.ipynb)")
    return " ".join(shown)


def main() -> int:
    """Write the address everywhere; 2 when it is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", help="of the repository (default: what pyproject.toml says)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.address and not ADDRESS.fullmatch(args.address):
        print(f"address: {args.address!r} is no address like https://github.com/OWNER/NAME", file=sys.stderr)
        return 2

    def edit(name: str, change) -> None:
        path = args.root / name
        text = path.read_text(encoding="utf-8")
        if (new := change(text)) != text:
            write_beside(path, lambda partial: partial.write_text(new, encoding="utf-8", newline="\n"))
            print(name)

    address = args.address or known((args.root / "pyproject.toml").read_text(encoding="utf-8"))
    if address:
        address = address.rstrip("/").removesuffix(".git")
        edit("pyproject.toml", lambda text: in_pyproject(text, address))
        edit("CITATION.cff", lambda text: in_citation(text, address))
        edit("README.md", lambda text: fill(text, badges(address), "badges"))
    for path in sorted(path for folder in FOLDERS for path in (args.root / folder).glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, 4)
        if put_first(notebook, first_cell(address)):
            write_beside(path, lambda partial, notebook=notebook: nbformat.write(notebook, partial))
            print(path.relative_to(args.root))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("minblip2.course.address", main))

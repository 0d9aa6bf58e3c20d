"""What is where in `minblip2`, read from its files: their docstrings, and the lessons that show them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat

from ..evaluation.tables import markdown
from .lesson import ROOT

# The paper's files stand at the top of minblip2 and in lm/; each room imports them and the rooms named before it.
ROOMS = ("data", "weights", "training", "evaluation")
OPEN = ("course", "bridges", "commands", "__main__")  # import what they like; only `commands` imports `course`
# The whole first line of a cell that shows definitions of a module file, or methods of one of its classes.
HEADER = re.compile(r"# minblip2/((?:\w+/)*\w+)\.py(?:: class (\w+))?")


def module(folder: Path = ROOT / "minblip2") -> dict[str, str]:
    """Every file of the package by its name from there, such as "data/scenes", and its text."""
    return {path.relative_to(folder).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(folder.rglob("*.py"))}


def room(name: str) -> str:
    """The room of a file: "" for the paper's."""
    first = name.split("/")[0]
    return first if first in (*ROOMS, *OPEN) else ""


def purpose(source: str) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    output = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", output, maxsplit=1)[0]


def shown_in(notebooks: Path) -> dict[str, list[str]]:
    """Name of a module file -> the names of the lessons that show definitions of it."""
    found: dict[str, list[str]] = {}
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            header = HEADER.fullmatch(cell.source.split("\n")[0].rstrip()) if cell.cell_type == "code" else None
            if header and path.name not in found.setdefault(header[1], []):
                found[header[1]].append(path.name)
    return found


def _links(files: list[str]) -> str:
    """Links to module files, by their last names."""
    return ", ".join(f"[{name.split('/')[-1]}](minblip2/{name}.py)" for name in files)


def paper(sources: Mapping[str, str], lessons: Mapping[str, list[str]]) -> str:
    """The paper's files as a table in Markdown, in the order in which lessons show them."""
    groups: dict[str, list[str]] = {}
    for name in sources:
        if not room(name) and name != "__init__":
            groups.setdefault(name.split("/")[0], []).append(name)
    rows = []
    for group, names in groups.items():
        packed = f"{group}/__init__" in names  # a folder
        files = [name for name in names if not name.endswith("__init__")]
        seen = sorted({lesson for name in files for lesson in lessons.get(name, ())})
        link = f"[`{group}/`](minblip2/{group})" if packed else f"[`{group}.py`](minblip2/{group}.py)"
        holds = purpose(sources[f"{group}/__init__" if packed else group]) + (f": {_links(files)}" if packed else "")
        rows.append((seen or ["~"], link, holds, ", ".join(f"[{name[:2]}](notebooks/{name})" for name in seen)))
    return markdown(("file", "holds", "lessons"), *(row[1:] for row in sorted(rows)))


def rooms(sources: Mapping[str, str]) -> str:
    """The rooms as a table in Markdown, each importing only the paper's files and the rooms above it."""
    rows = []
    for name in (*ROOMS, "commands", "course", "__main__"):
        files = [file for file in sources if file.startswith(f"{name}/") and not file.endswith("__init__")]
        link = f"[`{name}/`](minblip2/{name})" if files else f"[`{name}.py`](minblip2/{name}.py)"
        rows.append((link, purpose(sources[f"{name}/__init__" if files else name]), _links(files)))
    return markdown(("room", "is for", "files"), *rows)

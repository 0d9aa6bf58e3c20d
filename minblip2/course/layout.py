"""What is where in `minblip2`, read from its files: their docstrings, and the lessons that show them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
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


def core(sources: Mapping[str, str]) -> list[str]:
    """The paper's files: those at the top and the language models, without what only serves or restates them."""
    serving = {"device", "reference", "lm/packed"}
    return [name for name in sources if not room(name) and "__init__" not in name and name not in serving]


def code_lines(source: str) -> int:
    """Lines that hold code: no comments, no docstrings, no blank lines."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines, statement = set(), []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            statement.append(token)
        elif token.type == tokenize.NEWLINE:
            if not all(part.type == tokenize.STRING for part in statement):  # a statement that is but a string
                lines |= {line for part in statement for line in range(part.start[0], part.end[0] + 1)}
            statement = []
    return len(lines)


def purpose(source: str) -> str:
    """The first sentence of a file's docstring, without its full stop."""
    output = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", output, maxsplit=1)[0]


def shown_in(notebooks: Path) -> dict[str, list[str]]:
    """Name of a module file -> the names of the lessons and bonus notebooks that show definitions of it."""
    found: dict[str, list[str]] = {}
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")) + sorted(notebooks.glob("bonus/[0-9][0-9]_*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            header = HEADER.fullmatch(cell.source.split("\n")[0].rstrip()) if cell.cell_type == "code" else None
            name = path.relative_to(notebooks).as_posix()
            if header and name not in found.setdefault(header[1], []):
                found[header[1]].append(name)
    return found


def _links(files: list[str]) -> str:
    """Links to module files, by their last names."""
    return ", ".join(f"[{name.split('/')[-1]}]({name}.py)" for name in files)


def _link(notebook: str) -> str:
    """A link to a notebook by its number, with a plus for a bonus notebook."""
    number = notebook.removeprefix("bonus/")[:2]
    return f"[{number}{'+' * notebook.startswith('bonus/')}](../notebooks/{notebook})"


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
        link = f"[`{group}/`]({group})" if packed else f"[`{group}.py`]({group}.py)"
        holds = purpose(sources[f"{group}/__init__" if packed else group]) + (f": {_links(files)}" if packed else "")
        rows.append((seen or ["~"], link, holds, ", ".join(_link(name) for name in seen)))
    return markdown(("file", "holds", "lessons"), *(row[1:] for row in sorted(rows)))


def rooms(sources: Mapping[str, str]) -> str:
    """The rooms as a table in Markdown, each importing only the paper's files and the rooms above it."""
    rows = []
    for name in (*ROOMS, "commands", "course", "__main__"):
        files = [file for file in sources if file.startswith(f"{name}/") and not file.endswith("__init__")]
        link = f"[`{name}/`]({name})" if files else f"[`{name}.py`]({name}.py)"
        rows.append((link, purpose(sources[f"{name}/__init__" if files else name]), _links(files)))
    return markdown(("room", "is for", "files"), *rows)

"""Rules of the house that can be read off its files. Each function returns what is wrong, in sentences; [] is good."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from minblip2.course.address import CELL_ID
from minblip2.course.exercises import Asked, Call
from minblip2.course.layout import HEADER, OPEN, ROOMS, room
from minblip2.course.lesson import reading_minutes
from minblip2.course.run import STAMP, source_hash

CORE_LINES = 900
LETTERS = set("b h d e q t v s k c n p1 p2 gh gw".split())
EINOPS = {"rearrange", "reduce", "repeat", "einsum", "Rearrange", "Reduce"}
MAGICS = {"matplotlib", "config", "time", "timeit"}
LARGEST, LARGEST_WEIGHTS = 2**20, 2 * 10**6  # bytes; weights are those of the bridge that ships
LESSON_SIZES = {"cells": 60, "code lines": 300, "lines of one cell": 20, "words": 2800, "columns": 100,
                "minutes of reading": 60, "cells of imports before the first idea": 2}
FOREIGN = {  # (?<![\w.~]) so that the middle of a longer path or word does not count
    "a path of one machine": re.compile(r"(?<![\w.~/])/(?:home|Users|root|work)/[\w.-]+|[A-Z]:\\+Users\\+\w"),
    "a package index": re.compile(r"--(?:extra-)?index-url|find-links|registry[ =:]+https?:"),
}
NEARLY_HEADER = re.compile(r"\s*#+\s*(?:\S*/)?minblip2/\w[\w/]*(?:\.py)?\b", re.IGNORECASE)
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
LINK = re.compile(r"""!?\[[^\]]*\]\(\s*<?([^)\s>]+)|<(?:img|a)\b[^>]*?\b(?:src|href)=["']([^"']+)["']""")


def imports(name: str, source: str, names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each file of the package that the file `name` imports, wherever in it; `names`: all files."""
    names, here = set(names), name.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "minblip2"]
        elif not isinstance(node, ast.ImportFrom) or not node.level and (node.module or "").split(".")[0] != "minblip2":
            continue
        else:
            base = here[:len(here) + 1 - node.level] if node.level else []
            base = base + (node.module or "").split(".")[0 if node.level else 1:] if node.module else base
            found = [[*base, alias.name] for alias in node.names]
        for parts in found:  # a name may be a file, or something that a file defines
            path = next((path for end in range(len(parts), 0, -1) if (path := "/".join(parts[:end])) in names), None)
            if path is not None:
                yield node.lineno, path


def layering(sources: Mapping[str, str]) -> list[str]:
    """sources: name of a file -> its text. Imports go from a room to rooms before it, never in a circle."""
    problems, arrows = [], {}
    for name, source in sources.items():
        arrows[name] = {}
        for line, other in imports(name, source, sources):
            arrows[name].setdefault(other, line)
            mine, theirs = room(name), room(other)
            rooms = ("", *ROOMS)
            if theirs == "course" and mine not in OPEN:
                problems.append(f"{name}.py, line {line}: imports {other}, but only `commands` may import `course`")
            elif theirs == "__main__" or (mine not in OPEN and theirs not in OPEN
                                          and rooms.index(theirs) > rooms.index(mine)):
                below = ", ".join(("the paper's files", *ROOMS)[:rooms.index(mine)]) if mine in rooms else "all rooms"
                rule = f"`{mine}` stands on {below}" if mine else "the paper's files import only each other"
                problems.append(f"{name}.py, line {line}: imports {other}, but {rule}")
    while free := [name for name, others in arrows.items() if not others.keys() & (arrows.keys() - {name})]:
        for name in free:
            del arrows[name]
    problems += [f"{name}.py, line {line}: imports {other}, which leads back to it: a circle"
                 for name, others in arrows.items() for other, line in others.items() if other in arrows]
    return problems


def einops_letters(source: str) -> list[str]:
    """Every pattern is written out, in letters of the house."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", getattr(node.func, "id", "")) not in EINOPS:
            continue
        text = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        patterns = [value for value in text if "->" in value]
        if not patterns and not (isinstance(node.func, ast.Attribute) and not text):  # tensor.repeat(2, 3) is torch's
            problems.append(f"line {node.lineno}: the pattern is not written out: {ast.unparse(node)}")
        for pattern in patterns:
            strange = set(re.findall(r"[^\s,()>.\-]+", pattern)) - LETTERS - {"1"}
            if strange:
                problems.append(f"line {node.lineno}: {', '.join(sorted(strange))} in {pattern!r}: see design §9")
    return problems


TEXT_CALLS = {"read_text", "write_text"}
OPENERS = {"open": 1, "fdopen": 1, "TextIOWrapper": None, "NamedTemporaryFile": 0, "TemporaryFile": 0,
           "SpooledTemporaryFile": 1, "FileHandler": None}  # name -> where its mode stands, None: always text
BINARY = {"NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}  # without a mode
NO_FILES = {"Image", "zipfile", "tarfile", "webbrowser", "os", "archive", "zipped", "opener", "request",
            "urllib"}  # whose open
PROCESSES = {"run", "Popen", "check_output", "check_call", "call", "getoutput", "getstatusoutput"}


def unencoded(source: str | ast.Module) -> list[tuple[int, ast.Call]]:
    """Line and call of each place that reads or writes text in whatever encoding the system has."""
    def opens_text(node: ast.Call, name: str, owner: str) -> bool:
        place = OPENERS[name]
        if place is None:
            return len(node.args) < 2  # the second one is the encoding, or a mode, which wants none less
        if name == "open" and isinstance(node.func, ast.Attribute):
            if owner in NO_FILES:
                return False
            place = 1 if owner in ("io", "codecs", "gzip", "bz2", "lzma") else 0  # a path's method knows its path
        mode = next((word.value for word in node.keywords if word.arg == "mode"), None)
        mode = mode if mode is not None else node.args[place] if len(node.args) > place else None
        if mode is None:
            return name not in BINARY and owner not in ("gzip", "bz2", "lzma")
        texts = [part.value for part in ast.walk(mode) if isinstance(part, ast.Constant) and isinstance(part.value,
                                                                                                        str)]
        wanted = [text for text in texts if re.fullmatch(r"[rwaxbt+]{1,3}", text)]
        return any("t" in text for text in wanted) if owner in ("gzip", "bz2", "lzma") else any(
            "b" not in text for text in wanted or [""])

    def is_text(node: ast.Call) -> bool:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(node.func, "value", None)
        owner = getattr(owner, "id", getattr(owner, "attr", ""))
        if name in TEXT_CALLS:
            return not (name == "read_text" and node.args) and not (name == "write_text" and len(node.args) > 1)
        if name in OPENERS:
            return opens_text(node, name, owner)
        asked = {word.arg: getattr(word.value, "value", True) for word in node.keywords}
        return name in PROCESSES and (name.startswith("get") or bool(
            asked.get("text") or asked.get("universal_newlines") or asked.get("errors")))

    tree = ast.parse(source) if isinstance(source, str) else source
    return [(node.lineno, node) for node in ast.walk(tree) if isinstance(node, ast.Call) and is_text(node)
            and not any(word.arg in ("encoding", None) for word in node.keywords)]


def bare_command(source: str) -> bool:
    """Whether a file is run as a command but does not end in sentences, as those that `run_command` runs do."""
    return bool(re.search(r"^if __name__ == .__main__.", source, re.MULTILINE)) and "run_command(" not in source


def docstrings(source: str) -> list[str]:
    """Every public function, class and method says what it is; the stubs of a Protocol leave it to their class."""
    def undocumented(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                if not ast.get_docstring(node) and ast.unparse(node.body[0]) != "...":
                    yield f"line {node.lineno}: {owner}{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    yield from undocumented(node.body, f"{node.name}.")
    tree = ast.parse(source)
    return ([] if ast.get_docstring(tree) else ["the file has no docstring"]) + list(undocumented(tree.body, ""))


def foreign(text: str) -> list[str]:
    """Nothing that is true on one machine only."""
    return [f"{what}: {match.group()}" for what, pattern in FOREIGN.items() for match in pattern.finditer(text)]


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links of a Markdown text that lies in `folder` lead to a file, or to a heading of the text itself."""
    headings = {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
                for title in re.findall(r"^#+\s+(.*)$", text, re.MULTILINE)}
    problems = []
    for match in LINK.finditer(text):
        target, _, anchor = (match.group(1) or match.group(2)).partition("#")
        if re.match(r"[a-z][a-z0-9+.-]*:", target):  # http:, mailto:, data:, attachment:
            continue
        if not (folder / target).exists() if target else anchor not in headings:
            problems.append(f"the link to {match.group(1) or match.group(2)} leads nowhere")
    return problems


def code_cells(notebook) -> list:
    """The code cells that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def code_of(source: str) -> list[str]:
    """The lines of a cell that are code: not empty, no comment."""
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def sizes(notebook) -> list[str]:
    """A lesson fits into an evening: what it has more of than LESSON_SIZES allows."""
    codes = [cell.source for cell in code_cells(notebook)]
    first = next((number for number, source in enumerate(codes) if "import" not in source), 0)
    found = {"cells": len(notebook.cells), "code lines": sum(len(code_of(source)) for source in codes),
             "lines of one cell": max((len(source.splitlines()) for source in codes), default=0),
             "words": len(markdown_of(notebook).split()), "minutes of reading": reading_minutes(notebook.cells),
             "columns": max((len(line) for cell in code_cells(notebook) if cell.get("id") != CELL_ID
                            for line in cell.source.splitlines()), default=0),
             "cells of imports before the first idea": first}
    return [f"{count} {what}, and {LESSON_SIZES[what]} are the most" for what, count in found.items()
            if count > LESSON_SIZES[what]]


def sections(notebook) -> list[str]:
    """Numbered sections follow each other, since exercises, the FAQ and other lessons name them by number."""
    numbers = [int(number) for number in re.findall(r"^## (\d+) · ", markdown_of(notebook), re.MULTILINE)]
    return [] if numbers == list(range(1, len(numbers) + 1)) else [f"the sections are numbered {numbers}"]


def executed(notebook) -> list[str]:
    """All cells ran once, in order, without an error, and something came out."""
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    problems = []
    if counts != list(range(1, len(cells) + 1)):
        problems.append(f"the execution counts are {counts}: run python -m minblip2.course.run --write")
    if cells and not any(cell.outputs for cell in cells):
        problems.append("no cell has an output: run python -m minblip2.course.run --write")
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        problems.append("a cell ended in an error")
    return problems


def stale(notebook) -> list[str]:
    """The outputs were made by the code that stands there."""
    if notebook.metadata.get(STAMP) == source_hash(notebook):
        return []
    return ["the outputs are not of this code: run python -m minblip2.course.run --write"]


def unexecuted(notebook) -> list[str]:
    """No outputs, no counts: an exercise as a learner gets it."""
    return [f"a cell has outputs or a count: {cell.source[:40]!r}"
            for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]


def without_alt(notebook) -> list[str]:
    """Every picture says in words what it shows; viz.show makes such outputs."""
    problems = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            tags = re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", "")))
            if any(kind.startswith("image/") for kind in data) or not all(
                    re.search(r'\balt="[^"]*\w[^"]*"', tag) for tag in tags):
                problems.append(f"a picture without alt text, use viz.show: {cell.source[:40]!r}")
    return problems


def magics(notebook) -> list[str]:
    """Only magics that every kernel here knows, and no shell."""
    found = [line.strip() for cell in code_cells(notebook) for line in cell.source.splitlines()
             if re.match(r"\s*(%{1,2}[a-z]|!)", line)]
    return [f"{line!r} is not among the known magics {sorted(MAGICS)}" for line in found
            if line[0] == "!" or re.match(r"%+(\w+)", line).group(1) not in MAGICS]


def without_magics(source: str) -> str:
    """Code that Python itself can read."""
    return "\n".join(line for line in source.splitlines() if not re.match(r"\s*[%!]", line))


def python_of(notebook) -> str:
    """All code of a notebook as one text, without magics."""
    return "\n".join(without_magics(cell.source) for cell in code_cells(notebook))


def defined(source: str | ast.Module) -> dict[str, list[ast.stmt]]:
    """What a text defines at its top level: name -> the functions, classes and assignments that do, in order."""
    found: dict[str, list[ast.stmt]] = {}
    for node in (ast.parse(source) if isinstance(source, str) else source).body:
        if isinstance(node, DEFINITIONS):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        found.setdefault(name.id, []).append(node)
    return found


def public(source: str) -> list[str]:
    """The functions and classes of a module file that are meant for others, in its order."""
    return [name for name, nodes in defined(source).items() if name[0] != "_" and isinstance(nodes[-1], DEFINITIONS)]


def methods(source: str, owner: str) -> ast.Module:
    """The functions of a class of a module file, as if they stood in a file of their own."""
    return ast.Module([part for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == owner
                       for part in node.body if isinstance(part, DEFINITIONS)], [])


def headed(notebook) -> Iterator[tuple[str, str | None, str]]:
    """The cells that show the module: the file and, for methods, the class that the first line tells, and the code."""
    for cell in code_cells(notebook):
        if header := HEADER.fullmatch(cell.source.splitlines()[0].rstrip()):
            yield header[1], header[2], without_magics(cell.source)


def meaning(node: ast.stmt) -> str:
    """What a definition says, wherever it stands: without comments, and however its code and docstrings are wrapped."""
    for part in ast.walk(node):
        if isinstance(part, DEFINITIONS) and ast.get_docstring(part, clean=False) is not None:
            part.body[0].value.value = " ".join(ast.get_docstring(part).split())
    return ast.dump(node)


def identity(notebook, sources: Mapping[str, str]) -> list[str]:
    """What a cell headed `# minblip2/<file>.py` defines is what that file defines, docstrings included.

    sources: name of a module file -> its text. Such a cell may import, and does nothing else. A
    long class may be shown method by method, under `# minblip2/<file>.py: class <name>`.
    """
    problems = []
    for cell in code_cells(notebook):
        for number, line in enumerate(cell.source.splitlines()):
            nearly = NEARLY_HEADER.fullmatch(line) if number else NEARLY_HEADER.match(line)
            if nearly and (number or not HEADER.fullmatch(line.rstrip())):
                problems.append(f"{line.strip()!r} heads nothing: write '# minblip2/<file>.py' as a cell's first line")
    for file, owner, code in headed(notebook):
        if file not in sources:
            problems.append(f"a cell is headed minblip2/{file}.py, but there is no such file")
            continue
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            problems.append(f"the cell headed minblip2/{file}.py is not Python: line {error.lineno}: {error.msg}")
            continue
        ours, real = defined(tree), defined(methods(sources[file], owner) if owner else sources[file])
        if not ours:
            problems.append(f"a cell is headed minblip2/{file}.py, but defines nothing")
        for name, nodes in ours.items():
            known = {meaning(node) for node in real.get(name, [])}
            if not known:
                problems.append(f"{name} is shown as minblip2/{file}.py's, which does not define it")
            elif any(meaning(node) not in known for node in nodes):
                problems.append(f"{name} is not what minblip2/{file}.py defines: copy it from there, docstring and all")
        others = [node for node in tree.body if not any(node in nodes for nodes in ours.values())]
        problems += [f"the cell headed minblip2/{file}.py also runs {ast.unparse(node).splitlines()[0]!r}: "
                     "move it to a cell of its own"
                     for node in others if not isinstance(node, ast.Import | ast.ImportFrom)]
    return problems


def unheaded(notebook, sources: Mapping[str, str]) -> list[str]:
    """No cell defines under a name of the module what nothing compares with the module."""
    # what `course` draws with and `commands` do is no part of what lessons build
    owner = {name: file for file, source in sources.items() if room(file) not in OPEN for name in public(source)}
    problems = []
    for cell in code_cells(notebook):
        if HEADER.fullmatch(cell.source.splitlines()[0].rstrip()):
            continue
        problems += [f"a cell defines {name} as minblip2/{owner[name]}.py does: head the cell, or choose another name"
                     for name in public(without_magics(cell.source)) if name in owner]
    return problems


def shown(notebooks: Iterable, file: str, source: str) -> tuple[list[str], list[str]]:
    """The public functions and classes of minblip2/<file>.py: those that some notebook shows, and those that none does.

    Says only what stands under the file's header; that it is the module's is for `identity` to say.
    """
    seen = {(owner, name) for notebook in notebooks for name_of_file, owner, code in headed(notebook)
            if name_of_file == file for name in defined(code)}

    def is_shown(name: str) -> bool:
        parts = defined(methods(source, name))  # of a class: whole, or all its methods
        return (None, name) in seen or bool(parts) and all((name, part) in seen for part in parts)

    names = public(source)
    return [name for name in names if is_shown(name)], [name for name in names if not is_shown(name)]


def markdown_of(notebook) -> str:
    """All prose of a notebook as one text."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def uncalled(calls: Iterable[Call], asked: Iterable[Asked], text: str) -> list[str]:
    """A lesson (its `calls` and its Markdown `text`) calls each exercise once, below a heading, with its minutes."""
    calls, problems = list(calls), []
    minutes = {one.number: one.minutes for one in asked}
    for number, wanted in minutes.items():
        mine = [one for one in calls if one.number == number]
        if len(mine) != 1:
            problems.append(f"exercise {number} is called {len(mine)} times, not once: a line of its own in Markdown, "
                            f"> **Stop: exercise {number}**, {wanted} minutes")
        problems += [f"exercise {number} takes {wanted} minutes, and the lesson says {one.minutes}"
                     for one in mine if one.minutes != wanted]
    for one in calls:
        if one.number not in minutes:
            problems.append(f"exercise {one.number} is called, but this lesson has no such exercise")
        if not one.section:
            problems.append(f"exercise {one.number} is called above the first heading")
    if (lines := len(re.findall(r"stop: exercise", text, re.IGNORECASE))) != len(calls):
        problems.append(f"'Stop: exercise' is written {lines} times, but {len(calls)} of them are calls: a call is a "
                        "line that begins > **Stop: exercise 06.2**, 10 minutes")
    return problems


def labelled(problems: Iterable[str], name: object) -> list[str]:
    """Each problem with the file's name before it."""
    return [f"{name}: {problem}" for problem in problems]

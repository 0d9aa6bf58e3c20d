"""Reading answers out of notebooks: what is handed to a check, and the lines that it takes to define it.

A notebook is read as Python reads it, statement by statement, not by its letters. Taken are definitions, imports,
assignments, and blocks that give a needed name its value; nothing that only shows or checks something runs again.
What is left out is told in a sentence with its cell and line.
"""

from __future__ import annotations

import ast
import linecache
import re
import symtable
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

RUNS_ITS_CELL = {"time", "timeit", "capture", "prun"}  # cell magics whose cell is Python


class NotThere(Exception):
    """A notebook does not hold the answer that is looked for."""


@dataclass(frozen=True)
class Statement:
    """A statement at the top of a cell, where it stands, and which names it gives a value, reads now, and reads later.

    Later is what the bodies of functions read: they see the last value of a name, whatever stands below them.
    """

    node: ast.stmt
    source: str
    place: str
    binds: frozenset[str]
    now: frozenset[str]
    later: frozenset[str]


@dataclass
class Reading:
    """The statements of a notebook in order, and a sentence for each thing that was left out."""

    name: str
    statements: list[Statement] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)  # source of cells left out, and why


# --- cells ------------------------------------------------------------------------------------------------------------


def python_of(source: str) -> tuple[str, bool]:
    """A cell's code as Python, line for line, and whether there were magics in it. Raises SyntaxError."""
    try:
        ast.parse(source)
        return source, False
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # what Jupyter itself reads cells with

    cell_magic = re.match(r"\s*%%(\w+)[^\n]*\n", source)
    if cell_magic:
        if cell_magic[1] not in RUNS_ITS_CELL:
            raise SyntaxError(f"%%{cell_magic[1]}", ("", source[:cell_magic.start(1)].count("\n") + 1, 1,
                                                     source.strip().split("\n")[0]))
        source = "\n" * cell_magic.group().count("\n") + source[cell_magic.end():]
    source = re.sub(r"^([ \t]*)%time[ \t]+(?=\S)", r"\1", source, flags=re.MULTILINE)  # what it times counts
    made = "\n" * (len(source) - len(source.lstrip("\n"))) + TransformerManager().transform_cell(source.lstrip("\n"))
    ast.parse(made)
    return made, True


def names_of(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that a statement binds, reads at once, and reads in the bodies of its functions."""
    top = symtable.symtable(source, "a cell", "exec")
    binds = {one.get_name() for one in top.get_symbols() if one.is_assigned() or one.is_imported()}
    now, later = {one.get_name() for one in top.get_symbols() if one.is_referenced()}, set()

    def within(table: symtable.SymbolTable, late: bool) -> None:
        deferred = late or (table.get_type() == "function" and table.get_name() not in
                            ("listcomp", "setcomp", "dictcomp", "genexpr"))
        (later if deferred else now).update(
            one.get_name() for one in table.get_symbols() if one.is_global() and one.is_referenced())
        for child in table.get_children():
            within(child, deferred)

    for child in top.get_children():
        within(child, False)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            root = node
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if isinstance(root, ast.Name) and root.id in now:  # it changes what the name already holds
                binds.add(root.id)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id in binds:
            now.add(node.target.id)
    return binds, now, later


def read(notebook: Path) -> Reading:
    """Everything that a notebook says in Python."""
    found = Reading(notebook.name)
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, 1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        try:
            source, magics = python_of(cell.source)
        except SyntaxError as error:
            text = (error.text or cell.source.split("\n")[(error.lineno or 1) - 1]).strip()
            why = (f"{notebook.name}, cell {number}, is left out: it begins with {error.msg}"
                   if error.msg.startswith("%%") else
                   f"{notebook.name}, cell {number}, line {error.lineno}, is no Python, so the whole cell is left out: "
                   f"`{text}`")
            found.left_out.append(why)
            found.unread.append((cell.source, why))
            continue
        lines = source.split("\n")
        for node in ast.parse(source).body:
            first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])
            text = "\n".join(lines[first - 1:node.end_lineno])
            before = lines[node.lineno - 1].encode()[:node.col_offset].strip()
            behind = lines[node.end_lineno - 1].encode()[node.end_col_offset:].strip()
            if before or behind.startswith(b";"):  # several statements on one line
                text = ast.unparse(node)
            place = f"{notebook.name}, cell {number}, line {first}"
            if magics and any(isinstance(part, ast.Name) and part.id == "get_ipython" for part in ast.walk(node)):
                original = cell.source.split("\n")[first - 1].strip()
                if "=" in original:  # it may give something a value; others only show or install
                    found.left_out.append(f"{place}, is left out, as magics are: `{original}`")
                continue
            binds, now, later = names_of(text)
            found.statements.append(Statement(node, text, place, frozenset(binds), frozenset(now), frozenset(later)))
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


def handed_over(reading: Reading, check: str) -> list[tuple[int, ast.expr | None]]:
    """Each call of a check, by the number of its statement, with what it is given."""
    direct = {alias.asname or alias.name for statement in reading.statements
              if isinstance(statement.node, ast.ImportFrom) and (statement.node.module or "").startswith("checks.")
              for alias in statement.node.names if alias.name == check}
    found = []
    for number, statement in enumerate(reading.statements):
        for node in ast.walk(statement.node):
            if isinstance(node, ast.Call) and (
                    isinstance(node.func, ast.Attribute) and node.func.attr == check
                    and isinstance(node.func.value, ast.Name) and node.func.value.id not in ("self", "own", "pieces")
                    or isinstance(node.func, ast.Name) and node.func.id in direct):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                found.append((number, given[0] if given else None))
    return found


def needed_for(reading: Reading, names: set[str]) -> list[int]:
    """The numbers of the statements that give these names their values, and all that those lean on, in order."""
    binders: dict[str, list[int]] = {}
    for number, statement in enumerate(reading.statements):
        for name in statement.binds:
            binders.setdefault(name, []).append(number)
    needed: set[int] = set()
    wanted: list[tuple[str, int | None]] = [(name, None) for name in names]
    seen = set()
    while wanted:
        name, before = wanted.pop()
        if (name, before) in seen:
            continue
        seen.add((name, before))
        earlier = [number for number in binders.get(name, ()) if before is None or number < before]
        if not earlier and before is not None and binders.get(name):
            earlier = [number for number in binders[name] if number != before]  # cells were run in another order
        if not earlier:
            continue
        number = earlier[-1]
        needed.add(number)
        wanted += [(read, number) for read in reading.statements[number].now]
        wanted += [(read, None) for read in reading.statements[number].later]
    stars = [number for number, statement in enumerate(reading.statements) if isinstance(statement.node, ast.ImportFrom)
             and any(alias.name == "*" for alias in statement.node.names)]
    return sorted(needed | set(stars)) if needed else []


def changed_aside(reading: Reading, needed: Sequence[int]) -> Iterator[str]:
    """Sentences about lines that may change what an answer leans on, such as `sizes.append(3)`, and are left out."""
    held = {name for number in needed for name in reading.statements[number].binds
            if isinstance(reading.statements[number].node, ast.Assign | ast.AnnAssign)}
    for statement in reading.statements:
        call = statement.node.value if isinstance(statement.node, ast.Expr) else None
        method = call.func if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else None
        if method is not None and isinstance(method.value, ast.Name) and method.value.id in held:
            yield f"{statement.place}, is left out, since it defines nothing: `{statement.source.strip()}`"


def missing(reading: Reading, check: str, number: str) -> NotThere:
    """Why there is no answer: the call is commented out, or stands in a cell that could not be read, or nowhere."""
    call = re.compile(rf"\b{check}\s*\(")
    for source, why in reading.unread:
        if call.search(source):
            return NotThere(f"{why}; with it goes what is given to check.{check}")
    return NotThere(f"{reading.name} holds nothing that is given to check.{check} ({number}): its cell is gone, or "
                    "commented out")


@dataclass(frozen=True)
class Answer:
    """What a notebook hands to a check, the code that made it, its names, and sentences about what was left out."""

    value: Any
    source: str
    space: dict[str, Any]
    left_out: tuple[str, ...]


def source_of(reading: Reading, given: ast.expr, check: str) -> tuple[str, list[str]]:
    """The code that defines what is given to a check, and what of the notebook is left out of it though it may matter.

    Raises NotThere where no cell defines it.
    """
    names = {part.id for part in ast.walk(given) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
    needed = needed_for(reading, names)
    known = {name for statement in reading.statements for name in statement.binds}
    if isinstance(given, ast.Name) and given.id not in known:
        whys = [why for source, why in reading.unread if re.search(rf"\b{given.id}\b", source)]
        raise NotThere(f"{reading.name} gives {given.id} to check.{check}, and no cell that can be read defines it"
                       + (f"; {whys[0]}" if whys else ""))
    kept = [number for number in needed if not asks_a_check(reading.statements[number])]
    dropped = [f"{reading.statements[number].place}, is left out, since a check is called in it"
               for number in needed if number not in kept]
    return "\n\n\n".join(reading.statements[number].source for number in kept), [
        *dropped, *changed_aside(reading, kept)]


def asks_a_check(statement: Statement) -> bool:
    """Whether a block calls one of the checks: it would judge again, while it is being judged."""
    return not isinstance(statement.node, ast.FunctionDef | ast.ClassDef) and any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "check" for node in ast.walk(statement.node))


def answer_in(notebook: Path, check: str, number: str = "") -> Answer:
    """What a notebook gives to a check. Raises NotThere; whatever its own lines raise comes out as it is."""
    reading = read(notebook)
    calls = handed_over(reading, check)
    if not calls:
        raise missing(reading, check, number)
    at, given = calls[-1]
    if given is None:
        raise NotThere(f"{reading.statements[at].place}, gives nothing to check.{check}")
    source, left_out = source_of(reading, given, check)
    if len({ast.dump(one) for _, one in calls if one is not None}) > 1:
        left_out.append(f"{reading.statements[at].place}, counts: it is the last of {len(calls)} calls of "
                        f"check.{check}")
    name = ast.unparse(given)
    file = f"<{notebook.name}: {name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # so that errors show its lines
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, file, "exec"), space)  # it is the learner's own notebook
    # what stands unread may be newer than what was read in its place
    bound = {part.id for part in ast.walk(given) if isinstance(part, ast.Name)}
    newer = [why for text, why in reading.unread if any(re.search(rf"\b(def|class)\s+{one}\b", text) for one in bound)]
    return Answer(eval(compile(ast.Expression(given), file, "eval"), space), source, space, (*newer, *left_out))

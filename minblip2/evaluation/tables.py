"""Tables: as Markdown for pages and notebooks, as plain text for a terminal; numbers stand to the right."""

from __future__ import annotations

import re
from collections.abc import Sequence

WIDEST = 80  # characters: a column that holds longer cells is not padded, for no line would show it whole anyway
_FIGURE = r"[-−+~<>≤≥]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: ?(?:%|×|ms|s|min|h|[kMG]B|million|billion|times))?|nan"
_FIGURES = rf"(?:{_FIGURE})(?: ?(?:±|of|to|/) ?(?:{_FIGURE}))*"
NUMBER = re.compile(rf"{_FIGURES}(?: \({_FIGURES}\))?")


def is_number(cell: str) -> bool:
    """Whether a cell is a figure: 12, 1,234, 3e-7, 96.0 %, 92.0 ± 2.8, 63 of 63, 0.5 % (0.1 to 2.8); in bold, too."""
    return bool(NUMBER.fullmatch(cell.strip("*")))


def _columns(rows: Sequence[Sequence[str]], header: Sequence[str] | None) -> list[tuple[int, bool]]:
    """Width of each column and whether it stands to the right, as one does in which nothing but numbers is said."""
    found = []
    for index, cells in enumerate(zip(*rows, strict=True)):
        said = [cell for cell in cells if cell not in ("", "–")]  # a gap is neither a number nor a word
        longest = max(map(len, [*cells, header[index]] if header else cells), default=0)
        found.append((longest if longest <= WIDEST else 0, bool(said) and all(map(is_number, said))))
    return found


def _pad(row: Sequence[str], columns: Sequence[tuple[int, bool]]) -> list[str]:
    """The cells of a row, each as wide as its column."""
    return [cell.rjust(width) if right else cell.ljust(width)
            for cell, (width, right) in zip(row, columns, strict=True)]


def markdown(header: Sequence[object], *rows: Sequence[object]) -> str:
    """A table in Markdown that can be read as it is; a column of numbers only is aligned to the right (`---:`).

    A line break in a cell becomes a space, and `|` is escaped unless it is already. Raises ValueError for rows of
    unequal lengths.
    """
    texts = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(cell).split())) for cell in row] for row in (header, *rows)]
    if rows:
        columns = _columns(texts[1:], texts[0])
    else:
        columns = [(len(cell), False) for cell in texts[0]]
    columns = [(max(width, 4), right) if width else (0, right) for width, right in columns]
    rule = ["-" * max(3, width - 1) + ":" if right else ":" + "-" * max(3, width - 1) for width, right in columns]
    lines = [_pad(texts[0], columns), rule, *(_pad(row, columns) for row in texts[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_text(*rows: Sequence[object]) -> str:
    """A table of plain text, without header: columns two spaces apart, numbers to the right, no space at a line's end.

    Raises ValueError for rows of unequal lengths.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    columns = _columns(texts, None)
    return "\n".join("  ".join(_pad(row, columns)).rstrip() for row in texts)

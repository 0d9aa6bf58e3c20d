"""Parts of Markdown files that commands write: what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import argparse

from ..data.files import write_beside
from .lesson import ROOT

README, GUIDE, RESULTS = ROOT / "README.md", ROOT / "notebooks" / "INSTRUCTORS.md", ROOT / "docs" / "RESULTS.md"
PAGES = {  # part -> the page that holds it
    **dict.fromkeys(("badges", "picture", "photographs", "takes", "summary", "course"), README),
    **dict.fromkeys(("paper", "rooms"), ROOT / "minblip2" / "README.md"),
    **dict.fromkeys(("results", "parity", "benchmarks", "exercises"), RESULTS),
    **dict.fromkeys(("timings", "plans", "errors"), GUIDE)}


def split(text: str, name: str, file: str = "README.md") -> tuple[str, str, str]:
    """A text before, between and after the markers, these left with the outer parts.

    Raises ValueError unless each marker is there once, in order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file} needs {begin} and, below it, {end}, each once: put them where that belongs")
    before, rest = text.split(begin)
    between, after = rest.split(end)
    return before + begin, between.strip(), end + after


def fill(text: str, content: str, name: str, file: str = "README.md") -> str:
    """The text with `content` between the markers. Raises ValueError as `split`."""
    before, _, after = split(text, name, file)
    return f"{before}\n{content}\n{after}"


def read(name: str) -> str:
    """What stands between the markers of a part, on its page. Raises ValueError as `split`."""
    file = PAGES[name]
    return split(file.read_text(encoding="utf-8"), name, file.name)[1]


def put(content: str, name: str) -> None:
    """Put `content` between the markers of a part, on its page. Raises ValueError as `split`."""
    file = PAGES[name]
    filled = fill(file.read_text(encoding="utf-8"), content, name, file.name)
    write_beside(file, lambda partial: partial.write_text(filled, encoding="utf-8"))


def asked_to_write(about: str | None) -> bool:
    """Whether the command line says --write; --help tells what the command is `about`, and ends it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into its page, too")
    return parser.parse_args().write

"""The site in other languages: which pages one has, what of them is translated, and what has gone stale.

`docs/site/locale/LANGUAGE` holds gettext catalogues (LC_MESSAGES, one for each page that is translated), pages that
only this language has (pages), and a few words of the site itself (words.json). A paragraph is looked up by its English
text: when that changes, the site shows the new English text until somebody has looked at the translation again; where
nothing but numbers have changed, which come from runs, the translation follows. Babel, which Sphinx brings, reads and
writes the catalogues.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .lesson import ROOT

if TYPE_CHECKING:
    from babel.messages.catalog import Catalog

LOCALE = ROOT / "docs" / "site" / "locale"
HEADER = "# `python -m minblip2.course.site --renew` keeps this file; translate what is empty or fuzzy."
KEPT = (b"Language", b"Plural-Forms", b"MIME-Version", b"Content-Type", b"Content-Transfer-Encoding")  # of its head
NO_WORDS = re.compile(r"`[^`]*`|<[^>]*>|\]\([^)]*\)|[^A-Za-z]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
CODE = re.compile(r'<div class="cell_input[^"]*"[^>]*>(.*?)</pre>', re.DOTALL)


@dataclass(frozen=True)
class Standing:
    """How far the translation of a page is: a count, and the English paragraphs that are stale or were never done."""

    translated: int
    stale: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def all(self) -> int:
        """Paragraphs of the page that have words."""
        return self.translated + len(self.stale) + len(self.missing)

    def __str__(self) -> str:
        return (f"{self.translated} of {self.all} paragraphs translated, {len(self.stale)} stale, "
                f"{len(self.missing)} never done")


def languages() -> list[str]:
    """The languages that have a folder."""
    return sorted(path.name for path in LOCALE.iterdir() if path.is_dir()) if LOCALE.exists() else []


def catalogues(language: str) -> dict[str, Path]:
    """Pages that a language has catalogues of, by Sphinx's names ("notebooks/00_the_bridge"), and these files."""
    folder = LOCALE / language / "LC_MESSAGES"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.po"))}


def own_pages(language: str) -> list[Path]:
    """Pages that only this language has."""
    return sorted((LOCALE / language / "pages").glob("*.md"))


def pages(language: str) -> set[str]:
    """All pages of a language."""
    return {*catalogues(language), *(path.stem for path in own_pages(language))}


def keep_pages(source: Path, names: Iterable[str]) -> None:
    """Leave of the site's sources these pages only, and in each table of contents what of it is left."""
    names = set(names)
    for path in [*source.rglob("*.md"), *source.rglob("*.ipynb")]:
        if path.relative_to(source).with_suffix("").as_posix() not in names:
            path.unlink()
    index = source / "index.md"

    def left(match: re.Match[str]) -> str:
        head, listed = match[1], match[2].split("\n")
        listed = [name for name in listed if (source / name).is_file()]
        return f"{head}\n\n" + "\n".join(listed) + "\n```\n" if listed else ""
    text = re.sub(r"(```\{toctree\}\n(?::[^\n]*\n)*:[^\n]*)\n\n(.*?)\n```\n", left, index.read_text(encoding="utf-8"),
                  flags=re.DOTALL)
    index.write_text(text, encoding="utf-8", newline="\n")


# --- catalogues -------------------------------------------------------------------------------------------------------


def has_words(text: str) -> bool:
    """Whether there is anything to translate: not in numbers, in `code`, in tags or where links lead."""
    return bool(NO_WORDS.sub("", text))


def read(path: Path, language: str | None = None) -> Catalog:
    """A catalogue. Messages without words are left out: Sphinx collects them, and nobody translates them."""
    from babel.messages.pofile import read_po

    with open(path, "rb") as file:
        catalogue = read_po(file, locale=language)
    for message in list(catalogue):
        if message.id and not has_words(message.id):
            catalogue.delete(message.id)
        message.locations, message.auto_comments = [], []
        message.user_comments = [text for text in message.user_comments if text[:1] != "|"]  # an earlier msgid
    return catalogue


def write(path: Path, catalogue: Catalog) -> None:
    """Write a catalogue without what changes by itself: line numbers, dates, versions."""

    from babel.messages.pofile import write_po

    file, catalogue.header_comment, catalogue.fuzzy = io.BytesIO(), HEADER, False
    write_po(file, catalogue, width=100, no_location=True, include_previous=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    head, blank, rest = file.getvalue().partition(b"\n\n")
    head = [line for line in head.split(b"\n") if not line.startswith(b'"') or line[1:].split(b":")[0] in KEPT]
    path.write_bytes(b"\n".join(head) + blank + rest)


def renew(catalogue: Catalog, template: Catalog) -> Catalog:
    """The catalogue with exactly the messages of the template: what has changed is marked as fuzzy, that is stale."""
    alike = {NUMBER.sub("#", message.id): message for message in catalogue
             if message.id and message.string and not message.fuzzy}
    for message in template:
        old = alike.get(NUMBER.sub("#", message.id)) if message.id and catalogue.get(message.id) is None else None
        if old is not None and (string := other_numbers(old.string, old.id, message.id)):
            catalogue.add(message.id, string)
    catalogue.update(template, update_creation_date=False)
    return catalogue


def other_numbers(string: str, before: str, after: str) -> str | None:
    """A translation of `before` with the numbers of `after`, which is equal but for them; None where it is not clear
    which number is which."""
    pairs = list(zip(NUMBER.findall(before), NUMBER.findall(after), strict=True))
    new = dict(pairs)
    if any(new[old] != number for old, number in pairs) or not set(NUMBER.findall(string)) <= set(new):
        return None
    return NUMBER.sub(lambda match: new[match[0]], string)


def standing(catalogue: Catalog) -> Standing:
    """What of a renewed catalogue is translated."""
    messages = [message for message in catalogue if message.id]
    stale = tuple(message.id for message in messages if message.string and message.fuzzy)
    missing = tuple(message.id for message in messages if not message.string)
    return Standing(len(messages) - len(stale) - len(missing), stale, missing)


def renewed(language: str, templates: Path) -> dict[str, Catalog]:
    """A language's catalogues beside the pages as they are now; `templates`: where Sphinx's gettext builder wrote."""
    return {name: renew(read(path, language), read(templates / f"{name}.pot"))
            for name, path in catalogues(language).items()}


def report(language: str, found: Mapping[str, Standing], every: bool = False) -> str:
    """A line for each page, and with `every` one for each paragraph that has no translation or a stale one."""
    lines = []
    for name, one in found.items():
        lines.append(f"{language}/{name}: {one}")
        if every:
            lines += [f"  stale: {' '.join(text.split())}" for text in one.stale]
            lines += [f"  never done: {' '.join(text.split())}" for text in one.missing]
    return "\n".join(lines)


# --- what was built ---------------------------------------------------------------------------------------------------


def code_cells(page: Path) -> list[str]:
    """The code cells of a built page, as HTML."""
    return CODE.findall(page.read_text(encoding="utf-8"))


def unequal_code(html: Path, language: str) -> list[str]:
    """Pages of a language whose code cells are not those of the English page, to the last character."""
    return [name for name in catalogues(language)
            if code_cells(html / f"{name}.html") != code_cells(html / language / f"{name}.html")]

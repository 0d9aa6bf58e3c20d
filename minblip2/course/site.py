"""The course as a site: python -m minblip2.course.site [--out FOLDER] [--epub] [--translations | --renew]

Sphinx makes it from what is in the repository: the README is its landing page, lessons, bonus notebooks and pages are
taken as they stand, with their outputs; solutions become the pages of the exercises, folded; every public docstring is
in the API reference; each file of code that a page links to is shown. Nothing is executed, nothing is fetched.
What is translated of it stands in a folder of each language, and what of that is stale is counted: `translation`.
`pip install -e '.[site]' -c constraints.txt` brings what it needs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import nbformat

from .. import UserError
from ..data.entry import run_command
from ..data.files import write_json
from . import layout, translation
from .lesson import ROOT
from .live import build_live

if TYPE_CHECKING:
    from babel.messages.catalog import Catalog

HERE = ROOT / "docs" / "site"  # Sphinx's settings and what is not made from other files
PAGES = ("docs/*.md", "notebooks/*.md", "minblip2/README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md",
         "data/photographs/CREDITS.md")
PICTURES = ("notebooks/figures", "data/photographs/images")  # that pages show, or lead to
NOTEBOOKS = ("notebooks/[0-9]*.ipynb", "notebooks/bonus/[0-9]*.ipynb")
FOLDERS = {"exercises": "exercises/index.md", "solutions": "exercises/index.md", "minblip2": "minblip2/README.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*<?([^)\s>#]*)(#[^)\s>]*)?>?\s*\)")
LIVE = '<a href="live/index.html"><strong>Draw something, and let the bridge caption it in your browser.</strong></a>'
ABSENT = {".github/ISSUE_TEMPLATE/bug.yml"}  # what a page may link to although the site has no page for it


def staged(path: str) -> str:
    """Where a file of the repository lies among the site's sources."""
    return path.replace(".github/", "").replace("solutions/", "exercises/")


class Stage:
    """A folder of sources for Sphinx: pages copied, with links turned to where the site has what they lead to."""

    def __init__(self, source: Path):
        self.source, self.code = source, set()

    def target(self, page: str, link: str) -> str | None:
        """What a link of a page leads to on the site, from the site's top; None where the site has nothing."""
        path = os.path.normpath((PurePosixPath(page).parent / link).as_posix()).replace(os.sep, "/")
        if path in FOLDERS:
            return FOLDERS[path]
        if path in ABSENT:
            return None
        if path == "README.md":
            return "index.md"
        if (ROOT / path).is_dir():
            return "minblip2/README.md" if path.startswith("minblip2") else None
        if path.endswith((".ipynb", ".md")):
            return staged(path)
        if path.endswith((".py", ".cff")) or path == "LICENSE":
            self.code.add(path)
            return f"code/{path}.md"
        return staged(path)  # a picture

    def turned(self, text: str, page: str) -> str:
        """A page's Markdown with its links as the site wants them. Raises ValueError for one that leads nowhere."""
        def turn(match: re.Match[str]) -> str:
            picture, label, link, anchor = match.groups()
            if not link or re.match(r"[a-z][a-z0-9+.-]*:", link):
                return match[0]
            if not (ROOT / PurePosixPath(page).parent / link).exists():
                raise ValueError(f"{page}: the link to {link} leads nowhere")
            target = self.target(page, link)
            if target is None:
                return label
            here = PurePosixPath(staged(page) if page != "README.md" else "index.md").parent
            return f"{picture}[{label}]({os.path.relpath(target, here).replace(os.sep, '/')}{anchor or ''})"
        fences = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.MULTILINE | re.DOTALL)
        return "".join(part if part.startswith("```") else LINK.sub(turn, part) for part in fences)

    def write(self, name: str, text: str) -> None:
        """A source file of the site."""
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")

    def page(self, name: str) -> None:
        """A Markdown page of the repository."""
        self.write(staged(name), self.turned((ROOT / name).read_text(encoding="utf-8"), name))

    def notebook(self, name: str, outputs: bool = True) -> None:
        """A notebook with its outputs; cells that say how to start it, and solutions, are folded."""
        notebook = nbformat.read(ROOT / name, 4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.turned(cell.source, name)
                continue
            if "### BEGIN SOLUTION" in cell.source:
                cell.metadata["tags"] = ["hide-input"]
                cell.source = re.sub(r"^ *### (?:BEGIN|END) SOLUTION\n?", "", cell.source, flags=re.MULTILINE)
            elif cell.source.lstrip().startswith("import sys\nfrom pathlib import Path\n\nhere"):
                cell.metadata["tags"] = ["hide-input"]
            cell.outputs = cell.outputs if outputs else []
            for output in cell.outputs:  # Sphinx turns links of pages only
                if text := output.get("data", {}).get("text/markdown"):
                    output["data"]["text/markdown"] = re.sub(r"\.ipynb(#[^)\s]*)?\)", r".html\1)", text)
        path = self.source / staged(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)


def toctree(caption: str, names: list[str], depth: int = 1) -> str:
    """A hidden table of contents for Sphinx."""
    lines = "\n".join(names)
    return f"\n```{{toctree}}\n:hidden:\n:maxdepth: {depth}\n:caption: {caption}\n\n{lines}\n```\n"


def api_pages(stage: Stage) -> list[str]:
    """A page for each file of the module, the paper's first; their names."""
    sources, names = layout.module(), []
    core = [name for name in layout.core(sources)]
    for name in [*core, *(name for name in sources if name not in core)]:
        if name.endswith("__init__") or name in ("__main__", "reference") or layout.room(name) == "course":
            continue
        module = f"minblip2.{name.replace('/', '.')}"
        title = f"# {name}.py\n"
        stage.write(f"api/{name}.md", f"{title}\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n"
                                      "   :member-order: bysource\n```\n")
        names.append(f"{name}.md")
    return names


def write_sources(source: Path, language: str | None = None, outputs: bool = True) -> None:
    """All that Sphinx reads, or what a language has of it. Raises ValueError for a link that leads nowhere.

    Without `outputs` of cells nothing is left but what can be translated.
    """
    stage = Stage(source)
    shutil.copytree(HERE, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("live", "locale"))
    for folder in PICTURES:
        shutil.copytree(ROOT / folder, source / folder, dirs_exist_ok=True)
    names = {kind: sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(kind)) for kind in NOTEBOOKS}
    solved = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("solutions/[0-9]*.ipynb"))
    for name in [*sum(names.values(), []), *solved]:
        stage.notebook(name, outputs)
    own = translation.own_pages(language) if language else []
    for path in own:
        stage.write(path.name, path.read_text(encoding="utf-8"))
    pages = [path.relative_to(ROOT).as_posix() for kind in PAGES for path in sorted(ROOT.glob(kind))]
    for name in pages:
        stage.page(name)
    landing = stage.turned((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
    lessons, bonus = names.values()
    stage.write("index.md", re.sub(r"<!-- .*? -->\n?", "", landing).replace("\n## ", f"\n{LIVE}\n\n## ", 1)
                + toctree("The course", lessons)
                + (toctree("Bonus", bonus) if bonus else "")
                + toctree("Beside it", [*(path.name for path in own), "docs/GLOSSARY.md", "exercises/index.md",
                                        "docs/FAQ.md", "notebooks/PAPER.md", "docs/RESULTS.md",
                                        "notebooks/INSTRUCTORS.md"])
                + toctree("The module", ["docs/INSTALL.md", "docs/COMMANDS.md", "minblip2/README.md", "api/index.md",
                                         "CHANGELOG.md", "CONTRIBUTING.md", "data/photographs/CREDITS.md"]))
    stage.write("exercises/index.md", "# Exercises, solved\n\nOpen `exercises/` beside the lessons to work on them: "
                "there a check answers at once. Here each answer is folded.\n"
                + toctree("Exercises", [PurePosixPath(name).name for name in solved]).replace(":hidden:\n", ""))
    stage.write("api/index.md", "# API\n\nThe paper's files first, then the rooms that serve them.\n"
                + toctree("API", api_pages(stage)).replace(":hidden:\n", ""))
    for name in sorted(stage.code):
        kind = "python" if name.endswith(".py") else "text"
        stage.write(f"code/{name}.md", f"---\norphan: true\n---\n# {PurePosixPath(name).name}\n\n"
                    f"`{name}`\n\n```{{literalinclude}} /code/files/{name}\n:language: {kind}\n:linenos:\n```\n")
        target = source / "code" / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    if language:
        translation.keep_pages(source, translation.pages(language))


def built_pages(html: Path) -> dict[Path, str]:
    """The pages that were built, with their text; not those that the theme brings along."""
    return {path: path.read_text(encoding="utf-8") for path in html.rglob("*.html") if "_static" not in path.parts}


def dead_links(html: Path) -> list[str]:
    """Links of built pages to files or headings that are not there."""
    pages = built_pages(html)
    anchors = {path: set(re.findall(r"""\bid=["']([^"']+)["']""", text)) for path, text in pages.items()}
    problems = []
    for path, text in pages.items():
        for link in set(re.findall(r"""<\w[^<>]*?\s(?:href|src)=["']([^"']+)["']""", text)):  # not in shown code
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
                continue
            file, _, anchor = link.partition("#")
            there = (path.parent / file.partition("?")[0]).resolve() if file.partition("?")[0] else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or anchor and there in anchors and anchor not in anchors[there]:
                problems.append(f"{path.relative_to(html)}: {link}")
    return sorted(problems)


def undrawn_tables(html: Path) -> list[str]:
    """Tables that built pages show as rows of bars, because what rendered them knows no tables."""
    return [f"{path.relative_to(html)}: {found[:60]}" for path, text in built_pages(html).items()
            for found in re.findall(r"<p>(\|[^<]*\|\s*:?[-–—]+)", text)]


def broken_pages(book: Path) -> list[str]:
    """Pages of an EPUB that are no XML, which e-readers refuse."""
    problems = []
    with zipfile.ZipFile(book) as files:
        for name in files.namelist():
            if name.endswith((".xhtml", ".opf", ".ncx")):
                try:
                    ElementTree.fromstring(files.read(name))
                except ElementTree.ParseError as error:
                    problems.append(f"{name}: {error}")
    return problems


def run_sphinx(builder: str, source: Path, target: Path, *options: str) -> None:
    """Let Sphinx build. Raises UserError when it is missing, or warns."""
    try:
        from sphinx.cmd.build import main as sphinx
    except ImportError:
        raise UserError("Sphinx is missing: pip install -e '.[site]' -c constraints.txt") from None
    strict = () if builder == "epub" else ("-W", "--keep-going")
    if sphinx(["-b", builder, *strict, "-q", "-d", str(source) + "-trees", *options, str(source), str(target)]):
        raise UserError(f"Sphinx could not build {source} without a warning: see above")


def renewed_catalogues(out: Path, language: str) -> dict[str, Catalog]:
    """A language's catalogues beside the pages as they are now, by page."""
    source, templates = out / f"messages-{language}", out / f"templates-{language}"
    write_sources(source, language, outputs=False)
    run_sphinx("gettext", source, templates, "-D", f"language={language}")
    return translation.renewed(language, templates)


def build_language(out: Path, language: str) -> None:
    """The pages that a language has, into its folder beside the English ones. Raises UserError when code differs."""
    catalogues = renewed_catalogues(out, language)
    found = {name: translation.standing(one) for name, one in catalogues.items()}
    source, html = out / f"source-{language}", out / "html"
    write_sources(source, language)
    for name, catalogue in catalogues.items():
        translation.write(source / "locale" / language / "LC_MESSAGES" / f"{name}.po", catalogue)
    write_json(source / "standing.json", {name: [one.translated, one.all] for name, one in found.items()})
    run_sphinx("html", source, html / language, "-D", f"language={language}")
    if unequal := translation.unequal_code(html, language):
        raise UserError(f"the code of {', '.join(unequal)} is not that of the English page: build again from nothing")
    print(translation.report(language, found))


def main() -> int:
    """Build, or see to translations; 1 when a link is dead, or with --translations when a paragraph needs somebody."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="where to (default: site)")
    parser.add_argument("--epub", action="store_true", help="make course.epub as well")
    parser.add_argument("--translations", action="store_true", help="only list what is not translated, or stale")
    parser.add_argument("--renew", action="store_true", help="only write today's paragraphs into the catalogues")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    if args.translations or args.renew:
        open_points = 0
        for language in translation.languages():
            catalogues = renewed_catalogues(args.out, language)
            found = {name: translation.standing(one) for name, one in catalogues.items()}
            print(translation.report(language, found, every=True))
            open_points += sum(one.all - one.translated for one in found.values())
            for name, path in translation.catalogues(language).items() if args.renew else ():
                translation.write(path, catalogues[name])
        return int(open_points > 0)
    source, html = args.out / "source", args.out / "html"
    write_sources(source)
    run_sphinx("html", source, html)
    for language in translation.languages():
        build_language(args.out, language)
    if not build_live(HERE / "live", html / "live"):
        print("site: npm is not there, so the live page is left out", file=sys.stderr)
    for what, problems in (("dead links", dead_links(html)), ("tables that are not drawn", undrawn_tables(html))):
        if problems:
            print(f"site: {what}:\n" + "\n".join(problems), file=sys.stderr)
            return 1
    if args.epub:
        run_sphinx("epub", source, args.out / "epub")
        book = args.out / "epub" / "minBLIP-2.epub"
        if problems := broken_pages(book):
            print("site: pages of the book that no reader opens:\n" + "\n".join(problems), file=sys.stderr)
            return 1
        print(f"site: the book is {book}")
    print(f"site: open {html / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command("site", main))

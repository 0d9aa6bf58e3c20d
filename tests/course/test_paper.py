"""The map from the paper to the code holds: every row names a section that is there and code that is there."""

import re
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import nbformat
import pytest

from benchmarks import ablations
from minblip2.course.ablation_figures import interval

from . import gates

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SECTIONS = re.compile(r"\[(\d\d)\]\((\w+\.ipynb)\)((?:,? §\d+)+)")
CODE = re.compile(r"`(minblip2\.[\w.]+)`")


def tables(text):
    """The rows of each table of a Markdown text, its header row left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]])
    return found


MAP, DEVIATIONS = tables((NOTEBOOKS / "PAPER.md").read_text(encoding="utf-8"))


@cache
def prose(name):
    return gates.markdown_of(nbformat.read(NOTEBOOKS / name, 4))


def problems(row):
    """What a row names that is not there."""
    lessons = SECTIONS.findall(" ".join(row))
    found = [] if lessons else ["no lesson is named"]
    for number, name, sections in lessons:
        if not name.startswith(number) or not (NOTEBOOKS / name).exists():
            found.append(f"there is no lesson {number} in {name}")
            continue
        found += [f"{name} has no section {section}" for section in re.findall(r"\d+", sections)
                  if not re.search(rf"^## {section} · ", prose(name), re.MULTILINE)]
    for name in CODE.findall(" ".join(row)):
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            found.append(f"there is no {name}")
    return found


@pytest.mark.parametrize("row", MAP, ids=lambda row: f"{row[0]}: {row[1]}")
def test_a_row_of_the_map_resolves(row):
    assert len(row) == 5 and all(row), "paper, what, lesson, code and original"
    assert CODE.findall(row[3]) and problems(row) == []


@pytest.mark.parametrize("row", DEVIATIONS, ids=lambda row: row[0])
def test_a_deviation_has_an_effect_and_is_shown(row):
    assert len(row) == 5 and all(row), "what, theirs, ours, effect, lesson"
    assert problems(row) == []


@pytest.mark.parametrize("row, said", [
    (["§1", "x", "[05](05_qformer.ipynb) §99", "`minblip2.qformer.QFormer`", "y"], "no section 99"),
    (["§1", "x", "[06](05_qformer.ipynb) §1", "`minblip2.qformer.QFormer`", "y"], "no lesson 06"),
    (["§1", "x", "[05](05_qformer.ipynb) §1", "`minblip2.qformer.Nobody`", "y"], "no minblip2.qformer.Nobody"),
    (["§1", "x", "lesson 05", "`minblip2.qformer.QFormer`", "y"], "no lesson is named")])
def test_a_row_that_does_not_resolve_is_noticed(row, said):
    assert said in " ".join(problems(row))


def test_the_map_covers_the_paper_and_its_links_resolve():
    named = " ".join(row[0] for row in MAP)
    sections = [f"§3.{i}" for i in range(1, 5)]
    for part in ("Figure 1", "Figure 2", "Figure 3", "Figure 5", "Table 2", "Table 5", *sections):
        assert part in named, f"the map leaves out {part}"
    assert gates.broken_links((NOTEBOOKS / "PAPER.md").read_text(encoding="utf-8"), NOTEBOOKS) == []
    assert all(re.fullmatch(r"\d\d_\w+\.ipynb", name) for row in MAP for _, name, _ in SECTIONS.findall(row[2]))


def test_what_lesson_14_measured_beside_table_6_is_the_files():
    lines = {(line["name"], line["seed"]): line["results"] for line in ablations.known(ablations.RESULTS)}
    mean, half = interval([lines["without ITG", seed]["itm_t2i_r1"] - lines[ablations.BASE, seed]["itm_t2i_r1"]
                           for seed in range(3)])
    (row,) = (row for row in MAP if row[0] == "Table 6")
    assert f"{mean:+.1f} ± {half:.1f}".replace("-", "−") in row[1]

"""The instructors' guide is that of the notebooks: timings, plans, and what learners are told most."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import progress
from minblip2.course import guide, markers, run
from minblip2.course.lesson import ROOT

from . import gates
from .exercises import lesson07
from .exercises.table import commonest


def test_the_guide_tells_the_timings_of_the_notebooks():
    text, known = guide.GUIDE.read_text(encoding="utf-8"), guide.lessons()
    stale = "INSTRUCTORS.md is older than the notebooks' outputs: run python -m minblip2.course.guide"
    assert markers.read("timings") == guide.timings(known), stale
    assert markers.read("plans") == guide.plans(known), stale
    assert sum(len(one.exercises) for one in known.values()) > 50
    assert gates.broken_links(text, guide.GUIDE.parent) == []


def test_plans_name_every_lesson_once():
    term = [number for _, numbers, _ in guide.PLANS["a term"] for number in numbers]
    assert term == sorted(set(term)) and set(guide.lessons()) <= set(term)
    for sessions in guide.PLANS.values():
        numbers = [number for _, some, _ in sessions for number in some]
        assert numbers == sorted(set(numbers)), "a plan goes through the lessons in order"


def test_lessons_are_read_from_their_outputs(tmp_path):
    (tmp_path / "solutions").mkdir()
    made = new_notebook(cells=[new_markdown_cell("# 03 · Thing\n\nText."), new_code_cell("x")])
    run.write_notebook(made, tmp_path / "notebooks" / "03_thing.ipynb")
    with pytest.raises(ValueError, match="03_thing.ipynb does not tell its minutes"):
        guide.lessons(tmp_path)
    said = "Reading: about **7 minutes**, at 150 words a minute. Computing: **90 seconds** on the machine that ran it."
    made.cells[1].outputs = [new_output("display_data", {"text/markdown": said})]
    run.write_notebook(made, tmp_path / "notebooks" / "03_thing.ipynb")
    asked = new_notebook(cells=[new_markdown_cell("*Write · difficulty ●○○○○ · importance ●●●●● · about 15 minutes*"),
                                new_markdown_cell("*Find · difficulty ●●○○○ · importance ●●●○○ · about 4 minutes*")])
    run.write_notebook(asked, tmp_path / "solutions" / "03_thing.ipynb")
    (found,) = guide.lessons(tmp_path).values()
    assert found == guide.Lesson("Thing", 7, 90, ((5, 15), (3, 4)))
    assert found.minutes("all") == 27.5 and found.minutes("most") == 23.5


def test_the_guide_quotes_a_message_for_every_exercise():
    rows = markers.read("errors").splitlines()[2:]
    quoted = dict(re.fullmatch(r"\| (\S+ \S+) +\| (.+) \|", row).groups() for row in rows)
    assert list(quoted) == [each.name for exercises in progress.lessons().values() for each in exercises]
    parts = [said for _, said in lesson07.ANSWERS["sample_negatives"].rejected]
    assert any(part in quoted["07.1 sample_negatives"] for part in parts), "no wrong answer gets this message"


def test_the_commonest_message_is_quoted():
    output = [("b", "a b c | d. Read again: x."), ("z", "z. Read again: y."), ("b", "u b v. Read again: x.")]
    assert commonest(output) == "a b c | d."


def test_outputs_in_git_are_made_on_drawn_scenes():
    text = (ROOT / "notebooks" / "15_coco_on_one_gpu.ipynb").read_text(encoding="utf-8")
    said = [form for form in re.findall(r"\*\*This run of the notebook:\*\* ([^.]*)\. Device", text) if "{" not in form]
    assert said == ["the drawn scenes and the course's own bridge"], "execute it by minblip2.course.run --write"

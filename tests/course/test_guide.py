"""The instructors' guide is that of the notebooks: timings, plans, and the messages to wrong answers."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import progress
from minblip2.course import exercises, guide, markers, photographs, run
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


def solutions():
    """Two exercises to lesson 03."""
    return new_notebook(cells=[
        new_markdown_cell("## 03.1 One\n\n*Write · difficulty ●○○○○ · importance ●●●●● · about 15 minutes*\n\nDo."),
        new_markdown_cell("## 03.2 Two\n\n*Find · difficulty ●●○○○ · importance ●●●○○ · about 4 minutes, or 5*")])


def test_lessons_are_read_from_their_outputs(tmp_path):
    (tmp_path / "solutions").mkdir()
    made = new_notebook(cells=[new_markdown_cell("# 03 · Thing\n\nText."), new_code_cell("x")])
    run.write_notebook(made, tmp_path / "notebooks" / "03_thing.ipynb")
    with pytest.raises(ValueError, match="03_thing.ipynb does not tell its minutes"):
        guide.lessons(tmp_path)
    said = "Reading: about **7 minutes**, at 150 words a minute. Computing: **90 seconds** on the machine that ran it."
    made.cells[1].outputs = [new_output("display_data", {"text/markdown": said})]
    run.write_notebook(made, tmp_path / "notebooks" / "03_thing.ipynb")
    run.write_notebook(solutions(), tmp_path / "solutions" / "03_thing.ipynb")
    (found,) = guide.lessons(tmp_path).values()
    assert found == guide.Lesson("Thing", 7, 90, (
        exercises.Asked("03.1", "One", "Write", 15, 1, 5), exercises.Asked("03.2", "Two", "Find", 4, 2, 3)))
    assert found.minutes("all") == 27.5 and found.minutes("most") == 23.5


def test_the_guide_quotes_a_message_for_every_exercise():
    rows = markers.read("errors").splitlines()[2:]
    quoted = dict(re.fullmatch(r"\| (\S+ \S+) +\| (.+) \|", row).groups() for row in rows)
    assert list(quoted) == [each.name for some in progress.lessons().values() for each in some]
    parts = [said for _, said in lesson07.ANSWERS["sample_negatives"].rejected]
    assert any(part in quoted["07.3 sample_negatives"] for part in parts), "no wrong answer gets this message"


def test_the_commonest_message_is_quoted():
    output = [("b", "a b c | d. Read again: x."), ("z", "z. Read again: y."), ("b", "u b v. Read again: x.")]
    assert commonest(output) == "a b c | d."


def test_outputs_in_git_show_what_the_kept_run_said():
    text = (ROOT / "notebooks" / "15_photographs.ipynb").read_text(encoding="utf-8")
    assert f"**What answers here:** {photographs.source(None)}." in text, "execute it by minblip2.course.run --write"


# --- exercises and their lessons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lesson", progress.lessons())
def test_all_is_told_about_every_exercise(lesson):
    asked = exercises.asked_in(exercises.notebook_of(lesson, "solutions"))
    assert [one.number for one in asked] == [each.number for each in progress.lessons()[lesson]]
    assert asked == exercises.asked_in(exercises.notebook_of(lesson, "exercises"))
    for one in asked:
        assert one.title and one.kind and 0 < one.minutes <= 30 and 1 <= one.difficulty <= 5


def test_the_notebook_of_a_lesson_is_found_or_its_absence_told(tmp_path):
    assert exercises.notebook_of("06").name == "06_itc.ipynb"
    with pytest.raises(ValueError, match="holds 0 notebooks of lesson 06"):
        exercises.notebook_of("06", root=tmp_path)


def test_every_exercise_is_called_once_in_its_lesson():
    problems = []
    for lesson in [*guide.lessons()][1:]:  # lesson 00 asks nothing
        path = exercises.notebook_of(lesson)
        asked = exercises.asked_in(exercises.notebook_of(lesson, "solutions"))
        problems += gates.labelled(
            gates.uncalled(exercises.calls_in(path), asked, "\n".join(exercises.prose(path))), path.name)
    assert problems == []


FIRST, SECOND = "> **Stop: exercise 03.1**, 15 minutes. Then go on.", "> **Stop: exercise 03.2**, 4 minutes (a bug)."


@pytest.mark.parametrize("text, said", [
    (f"## 1. A\n{FIRST}\n\n### B\n\n{SECOND}", None), (f"## 1. A\n{FIRST}", "03.2 is called 0 times"),
    (f"## 1. A\n{FIRST}\n{SECOND}\n{SECOND}", "03.2 is called 2 times"),
    (f"## 1. A\n{FIRST}\n{SECOND.replace('4', '5')}", "takes 4 minutes, and the lesson says 5"),
    (f"## 1. A\n{FIRST}\n{SECOND}\n{SECOND.replace('.2', '.3')}", "has no such exercise"),
    (f"{FIRST}\n## 1. A\n{SECOND}", "above the first heading"),
    (f"## 1. A\n{FIRST}\n{SECOND}\n\nStop: exercise 03.1 was fun", "written 3 times, but 2"),
    (f"## 1. A\n{FIRST}\n```\n# B\n{SECOND}\n```", "03.2 is called 0 times")])
def test_calls_are_found_and_missing_ones_noticed(text, said, tmp_path):
    run.write_notebook(solutions(), tmp_path / "solutions.ipynb")
    run.write_notebook(new_notebook(cells=[new_markdown_cell("# 03 · Thing"), new_code_cell(f'"""{FIRST}"""'),
                                           new_markdown_cell(text)]), tmp_path / "lesson.ipynb")
    calls = exercises.calls_in(tmp_path / "lesson.ipynb")
    problems = gates.uncalled(calls, exercises.asked_in(tmp_path / "solutions.ipynb"), text)
    if said is None:
        assert problems == [] and calls == [exercises.Call("03.1", 15, "1. A"), exercises.Call("03.2", 4, "B")]
    else:
        assert any(said in problem for problem in problems), problems

"""Grading a class: blank notebooks get nothing, solved ones everything, wrong answers less, whatever they do.

Once with nbgrader's own commands, once with exercises/grade.py. Both run notebooks in folders below runs/, from where
they find the course, and not the learner's progress.
"""

import ast
import csv
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

import checks
import grade
import make
import progress
from minblip2 import UserError
from minblip2.course.exercises import asked_in

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = sorted((ROOT / "solutions").glob("[0-9][0-9]_*.ipynb"))
# A right answer to 10.6 that needs no training: the captions with which the exam is drawn.
LOOKED_UP = "def my_bridge():\n    return lambda pictures: own.exam()[2][:len(pictures)]"
WRONG, SOLVED, BLANK = "wrong", "solved", "blank"


@pytest.fixture
def below_runs():
    (ROOT / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="test-grading-", dir=ROOT / "runs"))
    yield folder
    shutil.rmtree(folder)


def answer_cells(notebook):
    """Name of an exercise -> its answer's cell, and the name under which the answer is handed to the check."""
    by_id = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
    return {name.removesuffix("-check"): (by_id[name.removesuffix("-check")],
                                          ast.parse(cell.source).body[-1].value.args[0].id)
            for name, cell in by_id.items() if name.endswith("-check")}


def handed_in(path, how):
    """A notebook as somebody hands it in: as it was given out, with the solutions, or with a wrong answer to each."""
    solution = nbformat.read(path, as_version=4)
    if how == BLANK:
        return make.exercise_of(solution)
    lesson = path.name[:2]
    answers = f"from tests.course.exercises.lesson{lesson} import ANSWERS"
    for name, (cell, given) in answer_cells(solution).items():
        if how == WRONG:
            cell.source = f"{answers}\n\n{given} = ANSWERS[{name!r}].rejected[0][0]"
        elif name == "own_bridge":
            cell.source = LOOKED_UP
    return solution


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_an_exercise_is_worth_as_many_points_as_its_difficulty_has_dots(path):
    dots = {one.number: one.difficulty for one in asked_in(path)}
    assert {one.number: one.points for one in grade.asked_in(nbformat.read(path, as_version=4))} == dots


def points_of(path):
    return sum(one.points for one in grade.asked_in(nbformat.read(path, as_version=4)))


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_nbgrader_gives_points_for_what_is_done_and_for_nothing_else(path, below_runs, monkeypatch):
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[test]' brings it")
    from nbgrader.api import Gradebook
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    # nbgrader calls alembic by its name, as it does where the environment is activated
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    config = Config()
    config.CourseDirectory.root = str(below_runs)
    config.CourseDirectory.course_id = "minblip2"
    config.Execute.timeout = 300
    api = NbGraderAPI(config=config)
    (below_runs / "source" / path.stem).mkdir(parents=True)
    shutil.copyfile(path, below_runs / "source" / path.stem / path.name)
    made = api.generate_assignment(path.stem)
    assert made["success"], made
    released = nbformat.read(below_runs / "release" / path.stem / path.name, as_version=4)
    before = [cell.source for cell in make.exercise_of(nbformat.read(path, as_version=4)).cells]
    assert [cell.source for cell in released.cells] == before, "nbgrader's stubs are ours"
    scores = {}
    for how in (BLANK, SOLVED, WRONG):
        place = below_runs / "submitted" / how / path.stem
        place.mkdir(parents=True)
        nbformat.write(handed_in(path, how), place / path.name)
        graded = api.autograde(path.stem, how)
        assert graded["success"], graded
        with Gradebook(f"sqlite:///{below_runs / 'gradebook.db'}") as book:
            submission = book.find_submission(path.stem, how)
            scores[how] = submission.score
            assert submission.max_score == points_of(path) and not submission.needs_manual_grade
    assert scores == {BLANK: 0, SOLVED: points_of(path), WRONG: 0}


def test_nbgraders_validator_tells_a_learner_that_something_is_missing(below_runs):
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[test]' brings it")
    from nbgrader.validator import Validator

    path = SOLUTIONS[5]
    for how, failures in ((BLANK, len(progress.lessons()[path.name[:2]])), (SOLVED, 0)):
        nbformat.write(handed_in(path, how), below_runs / path.name)
        found = Validator(ignore_checksums=True).validate(str(below_runs / path.name))
        assert len(found.get("failed", [])) == failures, found


# --- without nbgrader -------------------------------------------------------------------------------------------------

NEVER_ENDS = "    while True:\n        pass"
ENDS_ALL = "    import os\n    os._exit(0)"
LEAVES = "    import sys\n    sys.exit()"


@pytest.fixture
def in_the_background():
    """As a shell starts what it sends to the background: SIGINT is ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_folder_becomes_a_table(tmp_path, monkeypatch, capsys, in_the_background):
    monkeypatch.setattr(checks, "PROGRESS", tmp_path / "progress.json")
    path = next(one for one in SOLUTIONS if one.name.startswith("06"))
    asked = grade.asked_in(nbformat.read(path, as_version=4))
    for learner, how in (("ada", SOLVED), ("ben", BLANK), ("cleo", WRONG)):
        (tmp_path / "class" / learner / "week 6").mkdir(parents=True)
        nbformat.write(handed_in(path, how), tmp_path / "class" / learner / "week 6" / path.name)
    rough = nbformat.read(path, as_version=4)
    for (cell, _), body in zip(answer_cells(rough).values(), (NEVER_ENDS, ENDS_ALL, LEAVES), strict=False):
        cell.source = cell.source.split("    ### BEGIN SOLUTION")[0] + body
    for cell in rough.cells:  # a learner who has thrown a check away, and changed another
        if cell.metadata.get("nbgrader", {}).get("grade_id") == f"{asked[3].name}-check":
            cell.source = "print('✓ 06.4 which_bug: done')"
    rough.cells = [cell for cell in rough.cells
                   if cell.metadata.get("nbgrader", {}).get("grade_id") != f"{asked[2].name}-check"]
    (tmp_path / "class" / "dan").mkdir()
    nbformat.write(rough, tmp_path / "class" / "dan" / path.name)
    out = tmp_path / "grades.csv"
    monkeypatch.setattr("sys.argv", ["grade.py", str(tmp_path / "class"), "--out", str(out), "--lessons", "06",
                                     "--cell-limit", "30", "--jobs", "2"])
    assert grade.main() == 0
    with out.open(encoding="utf-8") as file:
        table = {row["learner"]: row for row in csv.DictReader(file)}
    columns = [f"{one.number} {one.name}" for one in asked]
    points = str(sum(one.points for one in asked))
    assert [table["ada"][name] for name in columns] == [checks.DONE] * 4 and table["ada"]["points"] == points
    assert [table["ben"][name] for name in columns] == [checks.OPEN] * 4 and table["ben"]["points"] == "0"
    assert [table["cleo"][name] for name in columns] == [checks.WRONG] * 4 and table["cleo"]["done"] == "0"
    assert [table["dan"][name] for name in columns] == [checks.WRONG, grade.STOPPED, checks.WRONG, checks.DONE]
    said = capsys.readouterr().out
    assert "dan" in said and "06.2 stopped: your code ended the process" in said and "1/4" in said
    assert not (tmp_path / "progress.json").exists() and not list((ROOT / "runs").glob("grading-*"))


def test_what_does_not_even_stop_when_it_is_told_to_is_ended(tmp_path, below_runs):
    path = next(one for one in SOLUTIONS if one.name.startswith("13"))
    notebook = nbformat.read(path, as_version=4)
    asked = grade.asked_in(notebook)
    cell, _ = answer_cells(notebook)[asked[0].name]
    cell.source = cell.source.split("    ### BEGIN SOLUTION")[0] + (
        "    import signal\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + NEVER_ENDS)
    nbformat.write(notebook, below_runs / path.name)
    results = grade.grade_notebook(below_runs / path.name, asked, cell_limit=40, limit=600)
    assert results[asked[0].name] == grade.Result(grade.STOPPED, "took too long")
    assert [results[one.name].status for one in asked[1:]] == [checks.DONE] * 3


def test_a_clock_that_is_set_ends_nobody(below_runs):
    """A machine that wakes up, or that is told the time, shows files of long ago."""
    file = below_runs / "06_itc.ipynb"
    cell = "import os, time\nos.utime(os.environ['MINBLIP2_GRADING'], (0, 0))\ntime.sleep(2)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), file)
    results = grade.grade_notebook(file, [grade.Asked("x", "06.1", "raise ValueError('judged')", 1)], 30, 600)
    assert results == {"x": grade.Result(checks.WRONG, "ValueError: judged")}


def test_what_uses_up_the_time_of_a_notebook_costs_the_others_nothing(below_runs):
    """A loop that stops when it is told to, twice, and then an honest cell that needs more than is left."""
    loop, honest = "import time\ntime.sleep(60)", "import time\ntime.sleep(15)\nmy_y = 1"
    cells = [nbformat.v4.new_code_cell(source) for source in (loop, loop, honest)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), below_runs / "06_itc.ipynb")
    asked = [grade.Asked("y", "06.2", "raise ValueError(f'judged {my_y}')", 1)]
    results = grade.grade_notebook(below_runs / "06_itc.ipynb", asked, cell_limit=20, limit=45)
    assert results == {"y": grade.Result(checks.WRONG, "ValueError: judged 1")}


def test_what_lies_beside_a_notebook_and_how_it_was_saved_do_not_matter(tmp_path, monkeypatch):
    """A module of the learner's own, a mark at the beginning of the file, a name in capitals."""
    (tmp_path / "class" / "mia").mkdir(parents=True)
    (tmp_path / "class" / "mia" / "my_parts.py").write_text("answer = 7\n", encoding="utf-8")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("from my_parts import answer")])
    (tmp_path / "class" / "mia" / "06_ITC.IPYNB").write_text(nbformat.writes(notebook), encoding="utf-8-sig")
    monkeypatch.setattr(grade, "asked_in", lambda notebook: [grade.Asked("x", "06.1", "raise ValueError(answer)", 1)])
    _, results = grade.grade(grade.submissions(tmp_path / "class"), ["06"], 60, 120, 1)
    assert results["mia"]["06.1"] == grade.Result(checks.WRONG, "ValueError: 7")


def test_a_table_that_cannot_be_written_is_told_before_anybody_is_graded(tmp_path, monkeypatch, capsys):
    (tmp_path / "mia").mkdir()
    (tmp_path / "mia" / "06_itc.ipynb").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(grade, "grade", lambda *given: pytest.fail("it has begun"))
    monkeypatch.setattr("sys.argv", ["grade.py", str(tmp_path), "--out", str(tmp_path / "no" / "grades.csv")])
    assert grade.main() == 2 and "cannot be written: No such file" in capsys.readouterr().err


def test_a_cell_that_failed_is_named_where_its_answer_is_missed(below_runs):
    notes = below_runs / "notes.jsonl"
    lines = [dict(begins=0, of=None), dict(ends=0, late=False, error="SyntaxError: expected ':'"),
             dict(begins=1, of="x"), dict(ends=1, late=False, error="NameError: name 'my_x' is not defined"),
             dict(begins=2, of="y"), dict(ends=2, late=False, error="NameError: name 'my_y' is not defined")]
    notes.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found, _ = grade.read_notes(notes)
    assert found["x"].message.endswith("not defined (a cell above stopped with SyntaxError: expected ':')")
    assert found["y"].message.endswith("not defined") and found["y"].status == checks.OPEN


def marked(source, name="x"):
    """A check's cell, with nbgrader's marks, whatever stands in it."""
    return nbformat.v4.new_code_cell(source, metadata={"nbgrader": {"grade": True, "grade_id": f"{name}-check"}})


ASKED = [grade.Asked("x", "06.1", "check.x(my_x)", 1), grade.Asked("y", "06.2", "check.y(my_y)", 1)]


def test_a_check_that_is_left_out_does_not_run():
    cells = [nbformat.v4.new_code_cell("my_x = 1"), marked("check.x(my_x)"), marked("check.y(my_y)", "y")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert grade.cells_to_run(notebook, ASKED, set(), without=["06.2"]) == [
        (0, "my_x = 1", None), (1, "check.x(my_x)", "x")]
    notebook.cells = notebook.cells[:1]
    assert grade.cells_to_run(notebook, ASKED, set(), without=["06.2"])[1:] == [(1, "check.x(my_x)", "x")]


def test_of_a_check_that_was_copied_the_last_counts():
    """JupyterLab copies nbgrader's marks with a cell, and gives them to both halves of one that is split."""
    cells = [nbformat.v4.new_code_cell("my_x = 1"), marked("check.x(my_x)"), marked("half = 3"),
             nbformat.v4.new_code_cell("my_x = 2"), marked("print('done')")]
    assert grade.cells_to_run(nbformat.v4.new_notebook(cells=cells), ASKED[:1], set()) == [
        (0, "my_x = 1", None), (2, "half = 3", None), (3, "my_x = 2", None), (4, "check.x(my_x)", "x")]


def test_a_learner_who_improves_a_copy_gets_the_grade_of_the_copy(below_runs):
    file = below_runs / "06_itc.ipynb"
    judge = "raise ValueError(f'judged {answer}')"
    cells = [nbformat.v4.new_code_cell("answer = 1"), marked(judge), nbformat.v4.new_code_cell("answer = 2"),
             marked(judge)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
    results = grade.grade_notebook(file, [grade.Asked("x", "06.1", judge, 1)], 30, 600)
    assert results == {"x": grade.Result(checks.WRONG, "ValueError: judged 2")}


def test_every_folder_is_a_learner_and_what_is_not_recognised_is_named(tmp_path, capsys):
    for name in ("mia/06_itc.ipynb", "ned/mueller_02_masks.ipynb", "ova/18_more.ipynb", ".git/06_itc.ipynb"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "pia" / "06_itc.ipynb").mkdir(parents=True)
    assert grade.submissions(tmp_path) == {
        "mia": {"06": tmp_path / "mia" / "06_itc.ipynb"}, "ned": {}, "ova": {}, "pia": {}}
    said = capsys.readouterr().err
    assert all(f"{name} is not looked at: it is not named" in said
               for name in ("ned/mueller_02_masks.ipynb", "ova/18_more.ipynb", "pia/06_itc.ipynb"))


def test_one_bad_notebook_costs_nobody_else_the_grade(tmp_path, monkeypatch, capsys):
    for learner in ("mia", "ned", "ova"):
        (tmp_path / learner).mkdir()
    for learner in ("mia", "ned"):
        (tmp_path / learner / "06_itc.ipynb").write_text("{}", encoding="utf-8")

    def graded(path, official, *_):
        if path.parent.name == "0":
            raise AttributeError("no such thing")
        return {one.name: grade.Result(checks.DONE) for one in official}

    monkeypatch.setattr(grade, "grade_notebook", graded)
    out = tmp_path / "grades.csv"
    monkeypatch.setattr("sys.argv", ["grade.py", str(tmp_path), "--out", str(out), "--lessons", "6",
                                     "--without", "06.2"])
    assert grade.main() == 0
    with out.open(encoding="utf-8") as file:
        table = {row["learner"]: row for row in csv.DictReader(file)}
    names = [name for name in table["mia"] if name.startswith("06")]
    assert [name[:4] for name in names] == ["06.1", "06.3", "06.4"]
    assert [{table[learner][name] for name in names} for learner in ("mia", "ned", "ova")] == [
        {grade.FAILED}, {checks.DONE}, {grade.ABSENT}]
    said = capsys.readouterr().out
    assert said.count("  06 could not be graded: 06_itc.ipynb: AttributeError: no such thing") == 1
    assert "3/3" in said and "ova     -\n  no notebook" in said
    with (tmp_path / "grades-messages.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0] == {"learner": "mia", "exercise": names[0], "status": grade.FAILED,
                                          "message": "06_itc.ipynb: AttributeError: no such thing"}


def test_marks_and_notes_that_are_broken_are_passed_over(below_runs):
    notes = below_runs / "notes.jsonl"
    notes.write_text('{"begins": 1, "of": "x"}\n}garbage\n[1]\n3\n{"status": "done"}\n'
                     '{"exercise": "06.1 x", "status": "done", "message": ""}\n'
                     '{"ends": 1, "late": false, "error": ""}\n',
                     encoding="utf-8")
    assert grade.read_notes(notes) == ({"x": grade.Result(checks.DONE)}, None)
    for broken in (None, 3, {"grade_id": None, "grade": True}, {"grade_id": [], "grade": True}):
        cell = nbformat.v4.new_code_cell("a = 1")
        cell.metadata["nbgrader"] = broken
        assert grade.cells_to_run(nbformat.v4.new_notebook(cells=[cell]), ASKED[:1], set()) == [
            (0, "a = 1", None), (1, "check.x(my_x)", "x")]


def test_lessons_and_exercises_that_do_not_exist_are_refused():
    official = {"06": ASKED, "07": [grade.Asked("z", "07.1", "", 1)]}
    assert grade.chosen(official, ["6"], ["6.1"]) == (["06"], ["06.1"])
    assert grade.chosen(official, [], []) == (["06", "07"], [])
    with pytest.raises(UserError, match="no lesson 66 .* 06, 07$"):
        grade.chosen(official, ["66"], [])
    with pytest.raises(UserError, match=r"no exercise 06.9; give --without some of 06.1, 06.2$"):
        grade.chosen(official, [], ["6.9"])


def test_of_several_notebooks_of_a_lesson_the_plain_one_counts(tmp_path, capsys):
    for name in ("06_itc-Copy1.ipynb", "06_itc.ipynb", "notes.ipynb"):
        (tmp_path / "eve").mkdir(exist_ok=True)
        (tmp_path / "eve" / name).write_text(json.dumps({}), encoding="utf-8")
    assert grade.submissions(tmp_path) == {"eve": {"06": tmp_path / "eve" / "06_itc.ipynb"}}
    assert "Copy1.ipynb is not looked at" in capsys.readouterr().err
    results = grade.grade_notebook(tmp_path / "eve" / "06_itc.ipynb", [grade.Asked("x", "06.1", "", 1)], 1, 1)
    assert results["x"].status == grade.ABSENT

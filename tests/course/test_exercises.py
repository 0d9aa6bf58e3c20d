"""The checks are fair: every right answer passes, every wrong one is told what is wrong with it, and nothing leaks."""

import random
from importlib import import_module
from pathlib import Path

import einops
import nbformat
import numpy as np
import pytest
import torch

import checks
import make
import progress

ROOT = Path(__file__).resolve().parents[2]
LESSONS = progress.lessons()
ANSWERS = {lesson: import_module(f"tests.course.exercises.lesson{lesson}").ANSWERS for lesson in LESSONS}
EXERCISES = [pytest.param(each, ANSWERS[lesson].get(each.__name__), id=each.name.replace(" ", "-"))
             for lesson, exercises in LESSONS.items() for each in exercises]
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def draws(monkeypatch, request):
    """A check draws anew each time; here it starts from the test's name, so that a failure can be looked at again."""
    seed, drawn = random.seed, random.Random(request.node.name)
    monkeypatch.setattr(random, "seed", lambda *given: seed(*(given or (drawn.random(),))))


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_exercise_has_answers(lesson):
    names = [each.__name__ for each in LESSONS[lesson]]
    assert sorted(ANSWERS[lesson]) == sorted(names), "answers without exercise, or exercises without answers"
    assert [each.number for each in LESSONS[lesson]] == [f"{lesson}.{i + 1}" for i in range(len(names))]


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_right_answers_pass(exercise, answers):
    assert len(answers.accepted) >= 2
    for answer in answers.accepted:
        for _ in range(3):  # a check draws anew each time
            assert exercise.verdict(answer) == checks.Verdict(checks.DONE, "")


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_wrong_answers_are_told_what_is_wrong(exercise, answers):
    assert len(answers.rejected) >= 4
    for answer, said in answers.rejected:
        for _ in range(3):
            verdict = exercise.verdict(answer)
            assert verdict.status == checks.WRONG and said in verdict.message, (said, verdict)
            assert exercise.reads in verdict.message


def disguised(answer, change):
    """A right answer whose tensors are changed before they are handed over."""
    def changed(value):
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, tuple | list):
            made = [changed(part) for part in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        return value

    if isinstance(answer, type):
        return type(answer.__name__, (answer,), {
            "forward": lambda self, *args, **kwargs: changed(answer.forward(self, *args, **kwargs))})
    return lambda *args, **kwargs: changed(answer(*args, **kwargs))


def gives_tensors(exercise, answer):
    """Whether an answer hands over any tensor in the course of its check."""
    seen = []
    exercise.verdict(disguised(answer, lambda value: seen.append(value) or value))
    return bool(seen)


def mean_of(value):
    mean = value.float().mean().item()
    return torch.full_like(value, mean if value.is_floating_point() else mean > 0.5)


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_stubs_do_not_pass(exercise, answers):
    right = answers.accepted[0]
    stubs = {"nothing": lambda *args, **kwargs: None, "its input": lambda *args, **kwargs: args[0] if args else None,
             "numpy": disguised(right, lambda value: value.detach().numpy())}
    if gives_tensors(exercise, right):
        stubs |= {"zeros": disguised(right, torch.zeros_like), "the mean": disguised(right, mean_of),
                  "another shape": disguised(right, lambda value: value[None])}
    else:
        del stubs["numpy"]
    for name, stub in stubs.items():
        assert exercise.verdict(stub).status == checks.WRONG, name


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_what_is_unfinished_or_raises_is_told(exercise, answers):
    def unfinished(*args, **kwargs):
        raise NotImplementedError()

    def raises(*args, **kwargs):
        raise KeyError("oh")

    assert exercise.verdict(unfinished).status == checks.OPEN
    verdict = exercise.verdict(raises)
    assert verdict.status == checks.WRONG and "KeyError" in verdict.message
    assert exercise.verdict(None).status == checks.WRONG


def at_einsum(image, text):
    return einops.einsum(image, text, "b q e, n e -> b m")  # the learner's line; what raises lies in einops


def in_the_module(model, prompts, pad, steps):
    return model.embed(prompts[0])  # a list


@pytest.mark.parametrize("lesson, name, answer, where", [
    ("06", "similarity", at_einsum, "in at_einsum"), ("04", "write_on", in_the_module, "in in_the_module"),
    ("06", "similarity", lambda image: image, "at the call, before its first line")])
def test_an_error_is_told_at_the_learners_line(lesson, name, answer, where):
    (exercise,) = [each for each in LESSONS[lesson] if each.__name__ == name]
    message = exercise.verdict(answer).message
    assert "stopped with" in message and where in message and "\n" not in message
    assert "the learner's line" in message or "a list" in message or "at the call" in message


def test_groups_on_paper_are_compared_and_not_told(capsys):
    lesson12 = import_module("checks.lesson12")
    right = [lesson12.slow_group(-far, False, 8, 64) for far in lesson12.BY_HAND]

    def unfinished():
        raise NotImplementedError

    for answer in (unfinished, lambda: right[:3], lambda: right[:-1] + [8], lambda: right):
        lesson12.on_paper(answer)
    assert capsys.readouterr().out.splitlines() == [
        "○ on paper: nothing yet", f"✗ on paper: {right[:3]}; asked for are 8 groups",
        "✗ on paper: 7 of 8; think again of 500", "✓ on paper: 8 of 8"]


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_random_numbers_stay_the_learners(exercise, answers):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    exercise.verdict(answers.accepted[0])
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_a_call_tells_and_remembers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "PROGRESS", tmp_path / "runs" / "progress.json")

    @checks.exercise("99.1", "nothing")
    def two(answer):
        checks.expect(answer == 2, f"you say {answer}.")

    two(3), two(2)
    output = capsys.readouterr().out
    assert "✗ 99.1 two: not right yet\n  you say 3. Read again: nothing." in output and "✓ 99.1 two: done" in output
    assert checks.progress() == {"99.1 two": checks.DONE}
    (tmp_path / "runs" / "progress.json").write_text("{", encoding="utf-8")
    assert checks.progress() == {}


# --- solutions and exercises ------------------------------------------------------------------------------------------


def test_exercises_are_made_from_solutions(monkeypatch):
    monkeypatch.setattr("sys.argv", ["make.py", "--check"])
    assert make.main() == 0, "run make exercises"


def test_a_changed_exercise_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "solutions").mkdir(), (tmp_path / "exercises").mkdir()
    cell = nbformat.v4.new_code_cell("x = 1\n### BEGIN SOLUTION\ny = 2\n### END SOLUTION")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "solutions" / "00_a.ipynb")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    for args, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr("sys.argv", ["make.py", *args])
        assert make.main() == code
    made = tmp_path / "exercises" / "00_a.ipynb"
    assert "y = 2" not in made.read_text(encoding="utf-8")
    assert "raise NotImplementedError()" in made.read_text(encoding="utf-8")
    made.write_text(made.read_text(encoding="utf-8").replace("x = 1", "x = 3"), encoding="utf-8")
    assert make.main() == 1


def test_answers_are_not_written_over(tmp_path, monkeypatch, capsys):
    (tmp_path / "solutions").mkdir(), (tmp_path / "exercises").mkdir()
    cell = nbformat.v4.new_code_cell("### BEGIN SOLUTION\ny = 2\n### END SOLUTION")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "solutions" / "00_a.ipynb")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["make.py"])
    assert make.main() == 0
    made = tmp_path / "exercises" / "00_a.ipynb"
    stub = made.read_text(encoding="utf-8")
    made.write_text(stub.replace("raise NotImplementedError()", "y = 3"), encoding="utf-8")
    assert make.main() == 2 and "y = 3" in made.read_text(encoding="utf-8")
    assert "00_a.ipynb holds answers" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["make.py", "--force"])
    assert make.main() == 0 and made.read_text(encoding="utf-8") == stub


@pytest.mark.parametrize("source", ["### BEGIN SOLUTION", "### END SOLUTION",
                                    "### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION"])
def test_marks_that_do_not_pair_up_are_refused(source):
    with pytest.raises(ValueError, match="SOLUTION"):
        make.strip(source)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_every_exercise_is_asked(path):
    source = path.read_text(encoding="utf-8")
    for each in LESSONS[path.stem[:2]]:
        assert f"check.{each.__name__}(" in source and each.number in source, f"{each.name} is not asked"


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_nbgrader_makes_the_same_stubs(path):
    pytest.importorskip("nbgrader", reason="nbgrader is not installed; with it, its stubs are compared with ours")
    from nbgrader.preprocessors import ClearSolutions

    solution = nbformat.read(path, as_version=4)
    theirs, _ = ClearSolutions().preprocess(nbformat.from_dict(solution), {})
    ours = make.exercise_of(solution)
    assert [cell.source for cell in ours.cells] == [cell.source for cell in theirs.cells]

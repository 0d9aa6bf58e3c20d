"""The checks are fair: every right answer passes, every wrong one is told what is wrong with it, and nothing leaks."""

import os
import random
import re
import sys
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
from minblip2.course import exercises

from .exercises import drawn_from

ROOT = Path(__file__).resolve().parents[2]
LESSONS = progress.lessons()
ANSWERS = {lesson: import_module(f"tests.course.exercises.lesson{lesson}").ANSWERS for lesson in LESSONS}
EXERCISES = [pytest.param(each, ANSWERS[lesson].get(each.__name__), id=each.name.replace(" ", "-"))
             for lesson, exercises in LESSONS.items() for each in exercises]
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
SEEDS = int(os.environ.get("MINBLIP2_SEEDS", 3))  # draws of every check; a verdict may change with none of 40


@pytest.fixture(autouse=True)
def draws(request):
    """A check draws anew each time; here it starts from the test's name, so that a failure can be looked at again."""
    with drawn_from(request.node.name):
        yield


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_exercise_has_answers(lesson):
    names = [each.__name__ for each in LESSONS[lesson]]
    assert sorted(ANSWERS[lesson]) == sorted(names), "answers without exercise, or exercises without answers"
    assert [each.number for each in LESSONS[lesson]] == [f"{lesson}.{i + 1}" for i in range(len(names))]


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_right_answers_pass(exercise, answers):
    assert len(answers.accepted) >= 2
    for answer in answers.accepted:
        for _ in range(SEEDS):  # a check draws anew each time
            assert exercise.verdict(answer) == checks.Verdict(checks.DONE, "")


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_wrong_answers_are_told_what_is_wrong(exercise, answers):
    assert len(answers.rejected) >= 4
    for answer, said in answers.rejected:
        for _ in range(SEEDS):
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
    if any(not gives_tensors(exercise, one) for one in answers.accepted):
        del stubs["numpy"]  # asked for are numbers, and NumPy's are numbers
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


def test_buckets_on_paper_are_compared_and_not_told(capsys):
    lesson12 = import_module("checks.lesson12")
    right = [lesson12.slow_bucket(-far, False, 8, 64) for far in lesson12.BY_HAND]

    def unfinished():
        raise NotImplementedError

    for answer in (unfinished, lambda: right[:3], lambda: right[:-1] + [8], lambda: right):
        lesson12.on_paper(answer)
    assert capsys.readouterr().out.splitlines() == [
        "○ on paper: nothing yet", f"✗ on paper: {right[:3]}; the exercise asks for 8 buckets",
        "✗ on paper: 7 of 8; think again of 500", "✓ on paper: 8 of 8"]


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_random_numbers_stay_the_learners(exercise, answers):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    exercise.verdict(answers.accepted[0])
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("exercise, answers", EXERCISES)
def test_where_it_is_graded_only_what_is_done_passes(exercise, answers, monkeypatch, capsys):
    monkeypatch.setattr(checks, "GRADED", True)

    def unfinished(*args, **kwargs):
        raise NotImplementedError()

    exercise(answers.accepted[0])
    for wrong in (unfinished, *(answer for answer, _ in answers.rejected)):
        with pytest.raises(checks.NotDone, match=exercise.number):
            exercise(wrong)


# --- what happens in the learner's code -------------------------------------------------------------------------------


@checks.exercise("99.1", "nothing")
def two(answer):
    """Whether a function of a tensor gives 2."""
    checks.expect(checks.a_number(answer(torch.ones(2, 3))) == 2, "it is not 2.")


def test_torchs_missing_kernels_are_errors_and_not_blanks():
    def of_bools(x):
        yes = (x > 0)[None]
        return torch.bmm(yes, yes.mT)

    def softmax_of_ids(x):
        return torch.softmax(x.long(), dim=0)

    def not_mine(x):
        return torch.nn.Module()(x)  # torch's own stub

    for answer in (of_bools, softmax_of_ids, not_mine):
        verdict = two.verdict(answer)
        assert verdict.status == checks.WRONG and f"in {answer.__name__}, line" in verdict.message
        assert "x (2, 3)" in verdict.message
        assert "NotImplementedError" in verdict.message or "RuntimeError" in verdict.message  # torch 2.6, for `bmm`
    assert "yes (1, 2, 3) of bool" in two.verdict(of_bools).message


def blank(x):
    """As it was given."""
    # YOUR CODE HERE
    raise NotImplementedError()


def below(x):
    """Finished, but for a line too many."""
    y = x.sum() - 4
    y = y.item()
    # YOUR CODE HERE
    raise NotImplementedError()


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        raise NotImplementedError


def test_a_stub_is_open_and_one_below_finished_code_is_told():
    assert two.verdict(blank) == checks.Verdict(checks.OPEN, "")
    assert two.verdict(lambda x: Layer()(x)) == checks.Verdict(checks.OPEN, "")
    verdict = two.verdict(below)
    line = below.__code__.co_firstlineno + 5
    assert verdict.status == checks.OPEN and f"still stands in below, line {line}, below what you" in verdict.message


def test_what_the_check_cannot_do_is_not_blamed_on_the_learner(monkeypatch):
    monkeypatch.setattr(checks, "LIBRARY_PATHS", (*checks.LIBRARY_PATHS, __file__))  # here stands the check

    @checks.exercise("99.2", "nothing")
    def divides(answer):
        return 1 / answer(torch.ones(1))

    message = divides.verdict(eval("lambda x: 0")).message
    assert message.startswith("the check stopped with ZeroDivisionError") and "not in a line of yours" in message
    assert "answer(torch.ones(1))" in message
    assert divides.verdict(eval("lambda: 0")).message.startswith("your code stopped with TypeError")


def test_endings_of_all_kinds_are_verdicts():
    def leaves(x):
        sys.exit()

    def deeper(x):
        return deeper(x)

    def stopped_by_hand(x):
        raise KeyboardInterrupt

    def trains_itself(x):
        model = torch.nn.Linear(1, 1)
        model.train = lambda mode=True: model.train(mode)
        model.train()

    for answer, said in ((leaves, "SystemExit"), (deeper, "RecursionError"), (trains_itself, "RecursionError"),
                         (stopped_by_hand, "stopped in stopped_by_hand, line")):
        verdict = two.verdict(answer)
        assert verdict.status == checks.WRONG and said in verdict.message and "\n" not in verdict.message
    assert "raise KeyboardInterrupt. Does what you wrote come to an end?" in two.verdict(stopped_by_hand).message


@pytest.mark.parametrize("right", [2, 2.0, np.int64(2), np.float32(2), np.array(2), torch.tensor(2), torch.tensor(2.0)])
def test_scalars_of_all_kinds_are_numbers(right):
    assert two.verdict(lambda x: right).status == checks.DONE
    assert checks.a_number(right, whole=True) == 2


@pytest.mark.parametrize("wrong, said", [
    (None, "return"), ("2", "str"), (True, "bool"), (np.bool_(True), "bool"), ([2], "list"), (torch.ones(1), "Tensor")])
def test_what_is_no_number_is_told_what_it_is(wrong, said):
    verdict = two.verdict(lambda x: wrong)
    assert verdict.status == checks.WRONG and said in verdict.message
    with pytest.raises(checks.Wrong, match="whole"):
        checks.a_number(2.5, whole=True)


def test_what_a_notebook_has_set_does_not_reach_a_check():
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            seen = []
            two.verdict(lambda x: seen.append((x.dtype, torch.is_grad_enabled())) or 2)
            assert seen == [(torch.float32, True)] and torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("exercise", [each for exercises in LESSONS.values() for each in exercises],
                         ids=lambda each: each.number)
def test_where_to_read_is_there(exercise):
    for lesson, where in re.findall(r"lesson (\d\d), ((?:(?!lesson).)+)", exercise.reads):
        headings = re.findall(r"^#{2,3} (.+)$", "\n".join(exercises.prose(exercises.notebook_of(lesson))), re.MULTILINE)
        numbers = {heading.split(" · ")[0] for heading in headings}
        assert (named := set(re.findall(r"\d+", where))) and named <= numbers
        assert set(re.findall(r"'(.+?)'", where)) <= set(headings)


# --- what is remembered -----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A progress file of its own, in which verdicts are recorded though a test runs."""
    monkeypatch.setattr(checks, "PROGRESS", tmp_path / "runs" / "progress.json")
    monkeypatch.delenv("PYTEST_VERSION", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "progress.json"


def test_a_call_tells_and_remembers_and_what_is_done_stays_done(kept, capsys):
    two(lambda x: 3)
    assert checks.progress() == {"99.1 two": checks.WRONG}
    two(lambda x: 2), two(lambda x: 3), two(blank)
    output = capsys.readouterr().out
    assert "✗ 99.1 two: not right yet\n  it is not 2. Read again: nothing." in output and "✓ 99.1 two: done" in output
    assert checks.progress() == {"99.1 two": checks.DONE}
    kept.write_text("{", encoding="utf-8")
    assert checks.progress() == {}


def test_nothing_is_remembered_of_tests_solutions_and_grading(kept, monkeypatch):
    monkeypatch.setenv("PYTEST_VERSION", "9")
    two(lambda x: 2)
    monkeypatch.delenv("PYTEST_VERSION")
    monkeypatch.chdir(ROOT / "solutions")
    two(lambda x: 2)
    monkeypatch.chdir(kept.parent.parent)
    monkeypatch.setattr(checks, "GRADED", True)
    two(lambda x: 2)
    assert not kept.exists()


def test_a_verdict_is_told_though_it_cannot_be_written(kept, capsys):
    kept.parent.write_text("a file where the folder should be")
    two(lambda x: 2)
    output = capsys.readouterr().out
    assert output.startswith("✓ 99.1 two: done\n") and "cannot be written" in output and output.count("\n") == 2


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

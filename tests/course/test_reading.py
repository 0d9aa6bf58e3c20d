"""Answers are read out of notebooks as Python reads them, and what is left out is told with its cell and line."""

import ast

import nbformat
import pytest

import own
import reading
from checks import OPEN, lesson10

CALL = "check.sequence(sequence)"
RIGHT = "def sequence(queries, projection, prompt, text):\n    return torch.cat([projection(queries).to(text.dtype), " \
        "prompt, text], dim=1)"


def notebook(folder, *cells, name="10_stage2.ipynb"):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(made, folder / name)
    return folder / name


def value_of(folder, *cells, check="answer"):
    return reading.answer_in(notebook(folder, *cells), check)


def test_a_definition_brings_what_it_leans_on_and_nothing_else(tmp_path):
    found = value_of(
        tmp_path, "import math\nimport torch", "unused = 1 / 0", "def half(x):\n    return x / math.pi\n",
        "%time half(2)", "def half(x):  # a second thought\n    return x / 2", "def open(", "raise SystemExit",
        "size = 4\n\n@torch.no_grad()\ndef answer(x):\n    return half(x) * size", "check.answer(answer)")
    assert not any(word in found.source for word in ("unused", "math", "SystemExit", "check"))
    source = found.source
    assert source.index("second thought") < source.index("size = 4") < source.index("@torch.no_grad()\ndef answer")
    assert found.value(3) == 6


@pytest.mark.parametrize("call", [
    "check.answer(answer)", "check.answer( answer )", "check.answer(\n    answer\n)", "check.answer(given=answer)",
    "c.answer(answer)", "verdict = check.answer(answer)", "check.answer(answer)  # at last", "check . answer (answer);",
    "answer; check.answer(answer)", "if True:\n    check.answer(answer)", "check.answer((answer))",
    "%%time\ncheck.answer(answer)", "from checks.lesson10 import answer as judge\njudge(answer)",
    "%time check.answer(answer)"])
def test_a_call_is_found_however_it_is_written(tmp_path, call):
    assert value_of(tmp_path, "def answer():\n    return 7", call).value() == 7


def test_an_expression_may_be_handed_over(tmp_path):
    assert value_of(tmp_path, "factor = 3", "check.answer(lambda x: factor * x)").value(2) == 6
    cells = "class Mine:\n    def answer(self):\n        return 5", "mine = Mine()", "check.answer(mine.answer)"
    assert value_of(tmp_path, *cells).value() == 5


@pytest.mark.parametrize("cells, gives", [
    (["sizes = [1]", "sizes += [2]", "def answer():\n    return sizes"], [1, 2]),
    (["table = {}", "table['a'] = 1", "def answer():\n    return table"], {"a": 1}),
    (["class Box:\n    pass", "Box.kept = 4", "def answer():\n    return Box.kept"], 4),
    (["x = 2", "x = x * 5", "def answer():\n    return x"], 10),
    (["if 1 > 0:\n    size = 3\nelse:\n    size = 4", "def answer():\n    return size"], 3),
    (["try:\n    import json\nexcept ImportError:\n    json = None", "def answer():\n    return json.dumps(1)"], "1"),
    (["total = 0\nfor i in range(4):\n    total += i", "def answer():\n    return total"], 6),
    (["a, b = 1, 2; c = a + b", "def answer():\n    return c"], 3),
    (["def answer():\n    return later()", "def later():\n    return 9"], 9),
    (["from math import *", "def answer():\n    return floor(2.5)"], 2),
    (["x = 1 / 0", "def answer(x=2):\n    return [x for x in (x,)][0]"], 2),
    (["x = (7\n     % 4)", "def answer():\n    return x"], 3),
    (["%matplotlib inline\nx = 3\n!echo 3", "def answer():\n    return x"], 3),
    (["%%time\nx = 8", "def answer():\n    return x"], 8)])
def test_whatever_gives_a_needed_name_its_value_is_taken(tmp_path, cells, gives):
    assert value_of(tmp_path, *cells, "check.answer(answer)").value() == gives


@pytest.mark.parametrize("cells, said", [
    ([RIGHT], r"10_stage2.ipynb holds nothing that is given to check.sequence \(10.1\): its cell is gone"),
    ([RIGHT, f"# {CALL}"], "its cell is gone, or commented out"),
    ([RIGHT, "check.sequence()"], "cell 2, line 1, gives nothing to check.sequence"),
    ([CALL], "gives sequence to check.sequence, and no cell that can be read defines it"),
    ([RIGHT.replace("dim=1)", "dim=1"), CALL], r"defines it; 10_stage2.ipynb, cell 1, line \d, is no Python"),
    ([RIGHT, f"x = (\n{CALL}"], "cell 2, line 1, is no Python, so the whole cell is left out: .* goes what is given"),
    ([f"%%writefile a.py\n{RIGHT}", CALL], "cell 1, is left out: it begins with %%writefile")])
def test_why_there_is_no_answer_is_told_with_cell_and_line(tmp_path, cells, said):
    with pytest.raises(reading.NotThere, match=said):
        reading.answer_in(notebook(tmp_path, *cells), "sequence", "10.1")


def test_what_is_left_out_though_it_may_matter_is_told(tmp_path):
    found = value_of(tmp_path, "sizes = []", "print(sizes)\nsizes.append(3)", "x = !ls",
                     "def answer():\n    return sizes", "check.answer(answer)", "def answer(:\n    return 2")
    assert found.left_out == (
        "10_stage2.ipynb, cell 6, line 1, is no Python, so the whole cell is left out: `def answer(:`",
        "10_stage2.ipynb, cell 2, line 2, is left out, since it defines nothing: `sizes.append(3)`")
    twice = value_of(tmp_path, "def answer():\n    return 1", "def other():\n    return 2", "check.answer(answer)",
                     "check.answer(other)")
    assert twice.value() == 2 and "cell 4, line 1, counts: it is the last of 2 calls" in twice.left_out[0]


def test_statements_know_what_they_read_now_and_what_later():
    binds, now, later = reading.names_of("@dec\ndef f(a=size):\n    return g(a) + [i for i in more]")
    assert (binds, now, later) == ({"f"}, {"dec", "size"}, {"g", "more"})
    assert reading.names_of("x.y[z] = 1") == ({"x"}, {"x", "z"}, set())
    assert ast.parse(reading.python_of("%time x\ny = 1")[0]).body[1].lineno == 2


# --- which notebook ---------------------------------------------------------------------------------------------------


def test_a_copy_beside_the_notebook_is_not_read(tmp_path):
    notebook(tmp_path, "import torch\n" + RIGHT, CALL)
    notebook(tmp_path, "import torch\ndef sequence(*given):\n    return 1", CALL, name="10_stage2-Copy1.ipynb")
    piece = own.judged(lesson10.sequence, tmp_path)
    assert piece.yours and piece.left_out == ("10_stage2-Copy1.ipynb is not read: 10_stage2.ipynb is there",)
    assert piece.left_out[0] in own.Pieces([piece]).table()
    (tmp_path / "10_stage2.ipynb").unlink()
    piece = own.judged(lesson10.sequence, tmp_path)
    assert not piece.yours and piece.left_out == ("10_stage2-Copy1.ipynb is read, since there is no 10_stage2.ipynb",)
    notebook(tmp_path, RIGHT, CALL, name="10_stage2 (1).ipynb")
    piece = own.judged(lesson10.sequence, tmp_path)
    assert piece.status == OPEN and "there is no notebook of lesson 10" in piece.message and len(piece.left_out) == 2


def test_side_by_side_folders_are_read_where_it_is_graded(tmp_path, monkeypatch):
    (tmp_path / "10_stage2").mkdir(), (tmp_path / "06_itc").mkdir()
    notebook(tmp_path / "06_itc", "x = 1", name="06_itc.ipynb")
    assert own.notebook_of(tmp_path / "10_stage2", "06")[0] is None
    monkeypatch.setattr(own, "GRADED", True)
    assert own.notebook_of(tmp_path / "10_stage2", "06")[0] == tmp_path / "06_itc" / "06_itc.ipynb"
    assert own.notebook_of(own.ROOT / "exercises", "06")[0] == own.ROOT / "exercises" / "06_itc.ipynb"

"""The course runs: every notebook in a kernel of its own, executed copies stamped with a hash of their code."""

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from minblip2.course import run

from . import gates


def test_runner_writes_an_executed_copy_and_stamps_it(tmp_path):
    source, copy = tmp_path / "00_a.ipynb", tmp_path / "out" / "00_a.ipynb"
    run.write_notebook(new_notebook(cells=[new_code_cell("import os"), new_code_cell("1 + 1")]), source)
    made = run.execute(source, copy)
    assert gates.executed(made) + gates.stale(nbformat.read(copy, 4)) == []
    assert [path.name for path in copy.parent.iterdir()] == ["00_a.ipynb"]  # no half-written file stays


def test_runner_tells_the_failing_cell(tmp_path):
    run.write_notebook(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "00_a.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run.execute(tmp_path / "00_a.ipynb", tmp_path / "copy.ipynb")
    assert (tmp_path / "copy.ipynb").exists()


def test_runner_chooses(tmp_path):
    for name in ("01_b", "00_a", "draft"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in run.choose(tmp_path, [])] == ["00_a", "01_b"]
    assert [path.stem for path in run.choose(tmp_path, ["01"])] == ["01_b"]
    with pytest.raises(ValueError, match="no notebook begins with '07'"):
        run.choose(tmp_path, ["00", "07"])


def test_runner_goes_on_after_a_failure_and_tells_all(tmp_path, monkeypatch, capsys):
    for name, code in (("00_a", "1 / 0"), ("01_b", "1 + 1"), ("02_c", "[][1]")):
        run.write_notebook(new_notebook(cells=[new_code_cell(code)]), tmp_path / "folder" / f"{name}.ipynb")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["run", "--folder", str(tmp_path / "folder"), "--jobs", "1"])
    assert run.main() == 1
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said and "IndexError" in said and "2 of 3 notebooks failed" in said
    assert len(list((tmp_path / "runs" / "course").iterdir())) == 3

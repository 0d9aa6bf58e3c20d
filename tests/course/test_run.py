"""The course runs: every notebook in a kernel of its own, executed copies stamped with a hash of their code."""

import os
import signal
import subprocess
import sys
import time

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


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_stops_what_runs_and_begins_nothing_else(tmp_path):
    for name in ("00_a", "01_b"):
        code = f"import time\nopen('{name}.begun', 'w').close()\ntime.sleep(600)"
        run.write_notebook(new_notebook(cells=[new_code_cell(code)]), tmp_path / f"{name}.ipynb")
    command = [sys.executable, "-m", "minblip2.course.run", "--folder", str(tmp_path), "--jobs", "1"]
    course = subprocess.Popen(command, cwd=run.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(1200):
            if (tmp_path / "00_a.begun").exists():
                break
            time.sleep(0.1)
        course.send_signal(signal.SIGINT)
        said, _ = course.communicate(timeout=60)
    finally:
        course.kill()
    assert course.returncode == 130 and "stopped" in said and "failed" not in said, said
    assert not (tmp_path / "01_b.begun").exists()

"""Progress bars where they belong, and output that no letter can end."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minblip2.data import progress
from minblip2.data.progress import forgiving_output, progress_bar

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TQDM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(progress, "in_kernel", lambda: False)


def test_a_bar_fits_80_columns_and_stays(capsys):
    for _ in (bar := progress_bar(range(1200), desc="ViT from boxes", unit="step")):
        bar.set_postfix(loss="123.456")
    out, err = capsys.readouterr()
    assert out == "" and "1200/1200" in err and "loss=123.456]" in err, "all of it is to be seen"
    assert max(len(line) for line in err.replace("\r", "\n").split("\n")) < 80


@pytest.mark.parametrize("columns, most", [(60, 59), (200, 79)])
def test_a_narrow_terminal_is_not_overrun(monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert progress_bar(range(3)).ncols == most


def test_in_a_notebook_it_is_no_error_and_vanishes(monkeypatch, capsys):
    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    list(progress_bar(range(3), desc="train"))
    out, err = capsys.readouterr()
    assert err == "" and "train" in out and out.endswith("\r") and out.split("\r")[-2].strip() == ""


def test_a_kernel_is_known_by_its_shell(monkeypatch):
    monkeypatch.undo()
    code = ("import types, sys\nfrom minblip2.data.progress import in_kernel\nassert not in_kernel()\n"
            "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: None)\nassert not in_kernel()\n"
            "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))\n"
            "assert in_kernel()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_environment_may_switch_bars_off(hidden):
    code = f"from minblip2.data.progress import progress_bar\nprint(list(progress_bar(range(2), hidden={hidden})))"
    for off in ("1", ""):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                              encoding="utf-8", env=os.environ | ({"TQDM_DISABLE": off} if off else {}))
        assert done.stdout.strip() == "[0, 1]" and (done.stderr == "") == bool(off or hidden)


def test_the_environment_may_set_the_width(monkeypatch):
    assert progress_bar(range(2), ncols=30).ncols == 30
    done = subprocess.run([sys.executable, "-c", "from minblip2.data.progress import progress_bar\n"
                           "print(progress_bar(range(2)).ncols)"], cwd=ROOT, capture_output=True, text=True, check=True,
                          encoding="utf-8", env=os.environ | {"TQDM_NCOLS": "50"})
    assert done.stdout.strip() == "50"


def test_output_that_cannot_be_printed_is_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    with pytest.raises(UnicodeEncodeError):
        print("image → text", flush=True)
    forgiving_output()
    print("image → text", flush=True)
    assert raw.getvalue() == b"image ? text" + os.linesep.encode()
    monkeypatch.setattr(sys, "stdout", object())
    forgiving_output()  # whatever a notebook has put there


def test_every_entry_point_survives_a_narrow_encoding():
    """A table of results through a pipe that knows ASCII only, as a Windows pipe knows only its code page."""
    code = ("import sys\nfrom minblip2 import __main__\nfrom minblip2.commands import evaluate\n"
            "evaluate.run = lambda args: evaluate.print_figures({'itc_i2t_r1': 1.5})\n"
            "sys.argv = ['minblip2', 'evaluate']\nsys.exit(__main__.main())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and b"image ? text" in done.stdout, done.stderr

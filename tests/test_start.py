"""The first cell of every notebook, where there is a checkout and where there is none; and what it installs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minblip2.course import address, start
from minblip2.course import run as course

from .course import gates

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for folder in address.FOLDERS for path in (ROOT / folder).glob("[0-9][0-9]_*.ipynb"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TOLD = "\nprint(root)\nimport minblip2, checks\nprint(minblip2.__file__)"


def run(cell, folder, **settings):
    """The cell in a process of its own, without the path that tests have."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    return subprocess.run([sys.executable, "-c", cell], cwd=folder, capture_output=True, text=True, encoding="utf-8",
                          env=environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_notebook_begins_with_the_first_cell(path):
    first = gates.code_cells(nbformat.read(path, 4))[0]
    wanted = address.first_cell(address.known(PYPROJECT))
    assert first.source.removeprefix(address.FUTURE) == wanted, "run python -m minblip2.course.address"


@pytest.mark.parametrize("future", ["", address.FUTURE], ids=["plain", "future"])
def test_a_first_cell_takes_the_place_of_the_one_before_whatever_its_id(future):
    old = future + address.first_cell(None).replace("folders", "here")
    notebook = new_notebook(cells=[new_markdown_cell("# A"), new_code_cell(old, id="another"), new_code_cell("x = 1")])
    for source in (address.first_cell(None), address.first_cell("https://example.org/a/b"), address.first_cell(None)):
        assert address.put_first(notebook, source) and not address.put_first(notebook, source)
        assert [cell.source for cell in notebook.cells] == ["# A", future + source, "x = 1"]


@pytest.mark.parametrize("cell", [address.WITHOUT, address.WITH], ids=["no address", "address"])
def test_the_first_cell_is_short(cell):
    lines = [line for line in cell.splitlines() if line]
    assert len(lines) <= 9 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("where", [".", "notebooks", "exercises", "solutions", "tests/course/exercises"])
@pytest.mark.parametrize("known", [None, "https://example.org/a/b"])
def test_it_finds_the_checkout_from_every_folder(where, known):
    done = run(address.first_cell(known) + TOLD, ROOT / where)
    assert done.stdout.splitlines() == [str(ROOT), str(ROOT / "minblip2" / "__init__.py")], done.stderr


def test_without_a_checkout_it_says_so_in_a_sentence(tmp_path):
    done = run(address.first_cell(None), tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == ("This notebook needs the rest of minBLIP-2: fetch the whole repository, and open "
                                   "the notebook inside it.")


def test_in_a_kernel_it_is_that_sentence_too(tmp_path):
    path = tmp_path / "00_a.ipynb"
    course.write_notebook(new_notebook(cells=[new_code_cell(address.first_cell(None))]), path)
    with pytest.raises(course.CellExecutionError, match=r"SystemExit\S* This notebook needs the rest of minBLIP-2"):
        course.execute(path, tmp_path / "copy.ipynb")


def test_with_an_address_it_fetches_the_course_once(tmp_path):
    """From a repository on disk, which takes the same path."""
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in ("minblip2/__init__.py", "minblip2/course/start.py", "minblip2/course/__init__.py", "pyproject.toml",
                 "exercises/checks/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(source)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    away = tmp_path / "away"
    away.mkdir()
    cell = address.first_cell(source.as_uri())
    for _ in range(2):
        done = run(cell + TOLD.replace(", checks", ""), away)
        there = [str(away / "minBLIP-2"), str(away / "minBLIP-2/minblip2/__init__.py")]
        assert done.stdout.splitlines()[-2:] == there, done.stdout + done.stderr
        shutil.rmtree(source, ignore_errors=True)  # the second time it is there


# --- what is installed ------------------------------------------------------------------------------------------------


def test_requirements_are_those_of_the_package():
    wanted = start.requirements(PYPROJECT)
    output = {re.match(r"[\w.-]+", line)[0].lower(): line for line in metadata.requires("minblip2") or []
              if "extra ==" not in line} if installed("minblip2") else {}
    assert dict(wanted)["torch"] == "2.6" and len(wanted) == 10
    assert not output or set(output) == {name.lower() for name, _ in wanted}


def installed(name):
    return start.installed(name)


@pytest.mark.parametrize("there, lowest, lacks", [
    (None, "0.8", True), ("0.7.9", "0.8", True), ("0.8", "0.8", False), ("0.10.1", "0.8", False),
    ("2.11.0+cu128", "2.6", False), ("2.5.1", "2.6", True), ("2.6.0a0+gitabc", "2.6", False)])
def test_what_is_missing_or_too_old(monkeypatch, there, lowest, lacks):
    monkeypatch.setattr(start, "installed", lambda name: there)
    assert start.missing([("einops", lowest)]) == ([f"einops>={lowest}"] if lacks else [])


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A fresh virtual environment that has a PyTorch of its own, another than the pinned one, and nothing else."""
    folder = tmp_path_factory.mktemp("colab") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                               capture_output=True, text=True, encoding="utf-8").stdout.strip())
    assert site != Path(sysconfig.get_path("purelib"))
    about = site / "torch-2.11.0+cu128.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu128\n", encoding="utf-8")
    (about / "RECORD").write_text("", encoding="utf-8")
    (about / "INSTALLER").write_text("pip\n", encoding="utf-8")
    return python, about


def test_where_pytorch_is_there_no_byte_of_it_is_installed_again(colab, tmp_path):
    python, _ = colab
    report = tmp_path / "report.json"
    done = subprocess.run([python, ROOT / "minblip2" / "course" / "start.py", "--dry-run", "--report", report],
                          capture_output=True, text=True, encoding="utf-8")
    if re.search("NewConnectionError|Temporary failure|No matching distribution found for (numpy|einops)", done.stderr):
        pytest.skip("the package index does not answer")
    assert done.returncode == 0, done.stderr
    record = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {one["metadata"]["name"].lower() for one in record}
    assert {"einops", "numpy", "tokenizers", "safetensors"} <= names
    assert not {name for name in names if name == "torch" or name.startswith(("nvidia", "cuda", "triton"))}


def test_where_there_is_no_pytorch_it_says_so(colab):
    python, about = colab
    away = about.with_name("moved")
    about.rename(away)
    try:
        done = subprocess.run([python, ROOT / "minblip2" / "course" / "start.py"], capture_output=True, text=True,
                              encoding="utf-8")
    finally:
        away.rename(about)
    assert done.returncode == 2 and "The course needs PyTorch (torch>=2.6)" in done.stdout and done.stderr == ""


# --- the address ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """What the address is written into."""
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    old = 'import sys\n\nroot = next(folder for folder in (Path.cwd(),) if (folder / "x").exists())\n'
    cells = [new_markdown_cell("# 00"), new_code_cell(old + "sys.path.insert(0, str(root))", execution_count=1),
             new_code_cell("x = 1", execution_count=2)]
    course.write_notebook(new_notebook(cells=cells), tmp_path / "notebooks" / "00_a.ipynb")
    return tmp_path


def write_address(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["address", *map(str, words)])
    return address.main()


def texts(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file()}


def test_the_address_is_written_everywhere_and_changed_everywhere(copy, monkeypatch):
    for url in ("https://github.com/ada/course", "https://github.com/bob/other"):
        assert write_address(monkeypatch, url + ".git", "--root", copy) == 0
        found = texts(copy)
        assert f'Repository = "{url}"\n' in found["pyproject.toml"] and address.known(found["pyproject.toml"]) == url
        assert f'repository-code: "{url}"\n' in found["CITATION.cff"]
        assert f"]({url}/actions" in found["README.md"] and "colab.research.google.com/github/" in found["README.md"]
        cells = gates.code_cells(nbformat.read(copy / "notebooks" / "00_a.ipynb", 4))
        assert [cell.source for cell in cells] == [address.first_cell(url), "import sys", "x = 1"]
        assert [cell.execution_count for cell in cells] == [1, 2, 3] and url in cells[0].source
    assert write_address(monkeypatch, "--root", copy) == 0 and texts(copy) == found, "again, it changes nothing"
    assert "/ada/" not in "".join(found.values())


def test_without_an_address_only_the_cells_are_written(copy, monkeypatch):
    before = texts(copy)
    if address.known(before["pyproject.toml"]):
        pytest.skip("this repository has an address")
    assert write_address(monkeypatch, "--root", copy) == 0
    after = texts(copy)
    assert {name for name in before if before[name] != after[name]} == {"00_a.ipynb"}
    assert gates.code_cells(nbformat.read(copy / "notebooks" / "00_a.ipynb", 4))[0].source == address.WITHOUT


@pytest.mark.parametrize("url", ["github.com/a/b", "https://github.com/a", "http://github.com/a/b", "https://x.o/a b/c",
                                 'https://github.com/a/b"c'])
def test_what_is_no_address_is_refused(copy, monkeypatch, capsys, url):
    before = texts(copy)
    assert write_address(monkeypatch, url, "--root", copy) == 2 and "is no address" in capsys.readouterr().err
    assert texts(copy) == before

"""What a user gets: a wheel with the package and nothing else, one version everywhere, results and their provenance."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import minblip2
from benchmarks import provenance
from minblip2 import UserError

ROOT = Path(__file__).resolve().parents[1]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands():
    """The modules with a main of their own whose docstring tells how to call them."""
    for path in (path for package in ("minblip2", "benchmarks", "tests") for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        called = rf"python -m {re.escape(name.removesuffix('.__main__'))}(?![.\w])"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        if mains and re.search(called, ast.get_docstring(tree) or ""):
            yield name


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_is_help_and_nothing_else(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    said = capsys.readouterr()
    assert ended.value.code == 0 and said.out.startswith("usage: ") and not said.err


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what it is made from, without network."""
    pytest.importorskip("setuptools", reason="the build backend is not installed, and is not fetched by tests")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "minblip2", source / "minblip2", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('out'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, encoding="utf-8")
    if done.returncode and "setuptools" in done.stderr.splitlines()[-1]:
        pytest.skip(f"this setuptools cannot build it: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return source / "out" / done.stdout.splitlines()[-1]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "minblip2"
    paths = [*package.rglob("*.py"), *(path for path in (package / "bridges").rglob("*") if path.is_file())]
    files = {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}
    about = {name for name in names if name.split("/")[0] == f"minblip2-{minblip2.__version__}.dist-info"}
    assert set(names) - about == files
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_the_wheel_runs_where_there_is_no_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = ("import sys; sys.path.insert(0, 'site'); import minblip2, importlib, pkgutil\n"
            "assert 'site' in minblip2.__file__, minblip2.__file__\n"
            "[importlib.import_module(one.name) for one in pkgutil.walk_packages(minblip2.__path__, 'minblip2.')]\n"
            "sys.argv = ['minblip2', '--help']\n"
            "sys.exit(importlib.import_module('minblip2.__main__').main())")
    done = subprocess.run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else
                          [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "{train,caption,ask" in done.stdout, done.stderr


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    output = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert f"Version: {minblip2.__version__}\n" in output and "Requires-Python: >=3.10" in output
    urls = re.findall(r"^Project-URL: (.*)", output, re.MULTILINE)
    assert urls and all(re.fullmatch(r"\w+, https://(arxiv\.org|github\.com)/\S+", url) for url in urls), urls
    assert "Description-Content-Type: text/markdown" in output


def test_one_version_everywhere():
    version = minblip2.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"),
                     re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == version, "the changelog's newest entry is another version"
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# --- results with their provenance ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """What a finished run leaves, as far as figures go."""
    folder = tmp_path / "laptop"
    for stage, seconds in (("stage1", 120.0), ("stage2", 30.0)):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "seconds.json").write_text(json.dumps({"seconds": seconds, "from_step": 0}), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"recipe": "laptop", "data": "nowhere"}), encoding="utf-8")
    (folder / "results-val.json").write_text(json.dumps({"images": 5} | dict.fromkeys(provenance.ROAD, 12.5)),
                                             encoding="utf-8")
    return folder


def test_results_are_kept_with_their_provenance(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["provenance", str(run), "--data", "5 pictures", "--commit", "abc"])
    assert provenance.main() == 0 and "wrote results/laptop.json" in capsys.readouterr().out
    kept = provenance.read_results(tmp_path / "results" / "laptop.json")
    assert kept["stage2_cider"] == 12.5 and kept["minutes_stage1"] == 2 and kept["minutes_stage2"] == 0.5
    assert kept["commit"] == "abc" and kept["data"] == "5 pictures" and torch.__version__ in kept["machine"]
    assert "road" not in kept
    for words in (["--new", "a"], [], ["--new", "b"], ["--new", "b"]):
        monkeypatch.setattr(sys, "argv", ["provenance", str(run), "--data", "5 pictures", *words])
        assert provenance.main() == 0
    road = provenance.read_results(tmp_path / "results" / "laptop.json")["road"]
    assert [try_["what was new"] for try_ in road] == ["a", "b"] and road[1]["CIDEr-D"] == 12.5
    capsys.readouterr()
    (run / "results-val.json").unlink()
    assert provenance.main() == 2 and "minblip2 evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(machine=None), dict(minutes_stage1="long"), dict(data=3)], ids=str)
def test_results_without_provenance_are_refused(tmp_path, change):
    good = {"commit": "a", "machine": "b", "minutes_stage1": 1.5, "minutes_stage2": 2, "data": "c", "stage2_cider": 1.0}
    (tmp_path / "x.json").write_text(json.dumps(good), encoding="utf-8")
    assert provenance.read_results(tmp_path / "x.json")["stage2_cider"] == 1.0
    (tmp_path / "x.json").write_text(json.dumps(good | change), encoding="utf-8")
    with pytest.raises(UserError, match=f"has no {next(iter(change))}"):
        provenance.read_results(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({name: good[name] for name in provenance.PROVENANCE}), encoding="utf-8")
    with pytest.raises(UserError, match="holds no figure"):
        provenance.read_results(tmp_path / "x.json")


def test_the_results_in_git_can_be_read():
    paths = [path for path in provenance.RESULTS.glob("*.json") if path.stem in ("laptop", "gpu", "scenes")]
    assert paths
    for path in paths:
        assert provenance.read_results(path)["images"] > 0

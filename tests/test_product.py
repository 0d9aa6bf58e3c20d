"""What a user gets: a wheel with the package and nothing else, one version everywhere, guides that say what is so."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import course
import guide
import minblip2
import readme
from benchmarks import provenance
from minblip2 import UserError
from minblip2.__main__ import parser
from minblip2.course import lesson

from . import gates
from .exercises import lesson07
from .exercises.table import commonest

ROOT = Path(__file__).resolve().parents[1]


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
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    if done.returncode and "setuptools" in done.stderr.splitlines()[-1]:
        pytest.skip(f"this setuptools cannot build it: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return source / "out" / done.stdout.splitlines()[-1]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minblip2").rglob("*.py")}
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
                          [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
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
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == version, "the changelog's newest entry is another version"
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


# --- the instructors' guide -------------------------------------------------------------------------------------------


def between(text, marks):
    return text.partition(marks[0])[2].partition(marks[1])[0].strip()


def test_the_guide_tells_the_timings_of_the_notebooks():
    text, known = guide.GUIDE.read_text(encoding="utf-8"), guide.lessons()
    stale = "INSTRUCTORS.md is older than the notebooks' outputs: run python notebooks/guide.py"
    assert between(text, guide.TIMINGS) == guide.timings(known), stale
    assert between(text, guide.PLANS_AT) == guide.plans(known), stale
    assert sum(len(one.exercises) for one in known.values()) > 50
    assert gates.broken_links(text, guide.GUIDE.parent) == []


def test_plans_name_every_lesson_once():
    term = [number for _, numbers, _ in guide.PLANS["a term"] for number in numbers]
    assert term == sorted(set(term)) and set(guide.lessons()) <= set(term)
    for sessions in guide.PLANS.values():
        numbers = [number for _, some, _ in sessions for number in some]
        assert numbers == sorted(set(numbers)), "a plan goes through the lessons in order"


def test_lessons_are_read_from_their_outputs(tmp_path):
    (tmp_path / "solutions").mkdir()
    made = new_notebook(cells=[new_markdown_cell("# 03 · Thing\n\nText."), new_code_cell("x")])
    course.write(made, tmp_path / "notebooks" / "03_thing.ipynb")
    with pytest.raises(ValueError, match="03_thing.ipynb does not tell its minutes"):
        guide.lessons(tmp_path)
    said = "Reading: about **7 minutes**, at 150 words a minute. Computing: **90 seconds** on the machine that ran it."
    made.cells[1].outputs = [new_output("display_data", {"text/markdown": said})]
    course.write(made, tmp_path / "notebooks" / "03_thing.ipynb")
    asked = new_notebook(cells=[new_markdown_cell("*Write · difficulty ●○○○○ · importance ●●●●● · about 15 minutes*"),
                                new_markdown_cell("*Find · difficulty ●●○○○ · importance ●●●○○ · about 4 minutes*")])
    course.write(asked, tmp_path / "solutions" / "03_thing.ipynb")
    (found,) = guide.lessons(tmp_path).values()
    assert found == guide.Lesson("Thing", 7, 90, ((5, 15), (3, 4)))
    assert found.minutes("all") == 27.5 and found.minutes("most") == 23.5


def test_the_guide_quotes_a_message_for_every_exercise():
    rows = between(guide.GUIDE.read_text(encoding="utf-8"), ("<!-- errors -->", "<!-- /errors -->")).splitlines()[2:]
    quoted = dict(re.fullmatch(r"\| (\S+ \S+) \| (.+) \|", row).groups() for row in rows)
    import progress

    assert list(quoted) == [each.name for exercises in progress.lessons().values() for each in exercises]
    parts = [said for _, said in lesson07.ANSWERS["sample_negatives"].rejected]
    assert any(part in quoted["07.1 sample_negatives"] for part in parts), "no wrong answer gets this message"


def test_the_commonest_message_is_quoted():
    output = [("b", "a b c | d. Read again: x."), ("z", "z. Read again: y."), ("b", "u b v. Read again: x.")]
    assert commonest(output) == "a b c \\| d."


# --- the README -------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
QUESTIONS = [row.strip("|").split(" | ") for row in README.splitlines()
             if re.match(r"\| [^|]+ \| \[\d\d\]\(notebooks/", row)]


@pytest.mark.parametrize("question, answer", QUESTIONS, ids=lambda text: text.strip()[:60])
def test_every_question_has_an_answer_that_is_there(question, answer):
    named = re.findall(r"\[(\d\d)\]\((notebooks/\w+\.ipynb)\)((?:,? §\d+)+|, opening)", answer)
    assert named and len(named) == answer.count("]("), f"a lesson without a section: {answer}"
    for number, path, where in named:
        prose = gates.markdown_of(nbformat.read(ROOT / path, 4))
        assert path.startswith(f"notebooks/{number}_")
        for section in re.findall(r"\d+", where):
            assert re.search(rf"^## {section} · ", prose, re.MULTILINE), f"{path} has no section {section}"


def test_the_readme_lists_every_lesson_and_guide():
    assert len(QUESTIONS) > 25
    for path in [*sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), guide.GUIDE, guide.GUIDE.with_name("PAPER.md")]:
        assert f"](notebooks/{path.name})" in README, f"README does not lead to {path.name}"
    assert "](CHANGELOG.md)" in README


def test_every_command_of_the_readme_is_one():
    shown = re.findall(r"^python -m minblip2 (\w+)((?: --?[\w-]+)*)", README, re.MULTILINE)
    assert {name for name, _ in shown} == {"train", "caption", "retrieve", "attend", "evaluate", "ask"}
    grammar = parser()
    for line in re.findall(r"^python -m minblip2 (.+?)(?:\s+#.*)?$", README, re.MULTILINE):
        grammar.parse_args(shlex.split(line))


def test_kept_figures_are_a_column_with_their_provenance(tmp_path):
    figures = {"images": 5, "stage2_cider": 12.5, "commit": "abc", "machine": "m", "minutes_stage1": 2.0,
               "minutes_stage2": 0.6, "data": "five pictures"}
    (tmp_path / "laptop.json").write_text(json.dumps(figures))
    output = readme.kept(tmp_path)
    assert list(output) == ["laptop"] and "12.5" in readme.table({"laptop, val": [output["laptop"]]})
    assert readme.provenance(output) == ("*laptop: five pictures; 2 minutes of stage 1 and 1 of stage 2 on m; "
                                         "commit abc.*")


# --- results with their provenance ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """What a finished run leaves, as far as figures go."""
    folder = tmp_path / "laptop"
    for stage, seconds in (("stage1", 120.0), ("stage2", 30.0)):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "seconds.json").write_text(json.dumps({"seconds": seconds, "from_step": 0}))
    (folder / "run.json").write_text(json.dumps({"recipe": "laptop", "data": "nowhere"}))
    (folder / "results-val.json").write_text(json.dumps({"images": 5} | dict.fromkeys(provenance.ROAD, 12.5)))
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
    (tmp_path / "x.json").write_text(json.dumps(good))
    assert provenance.read_results(tmp_path / "x.json")["stage2_cider"] == 1.0
    (tmp_path / "x.json").write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=f"has no {next(iter(change))}"):
        provenance.read_results(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({name: good[name] for name in provenance.PROVENANCE}))
    with pytest.raises(UserError, match="holds no figure"):
        provenance.read_results(tmp_path / "x.json")


def test_the_results_in_git_can_be_read():
    paths = [path for path in provenance.RESULTS.glob("*.json") if path.stem in ("laptop", "gpu", "scenes")]
    assert paths
    for path in paths:
        assert provenance.read_results(path)["images"] > 0


# --- no photograph in git ---------------------------------------------------------------------------------------------


def test_outputs_in_git_are_made_on_drawn_scenes():
    text = (lesson.ROOT / "notebooks" / "15_coco_on_one_gpu.ipynb").read_text(encoding="utf-8")
    said = [form for form in re.findall(r"\*\*This run of the notebook:\*\* ([^.]*)\. Device", text) if "{" not in form]
    assert said == ["the drawn scenes and the course's own bridge"], "run it with course.py --write, which sees to that"

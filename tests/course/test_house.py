"""The rules of the house hold; and no rule is blind: each sees what breaks it."""

import re
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minblip2.course import layout
from minblip2.course.lesson import ROOT
from minblip2.course.run import BRIDGE, STAMP, source_hash
from minblip2.training.shipping import SHIPPED, run_checksum

from . import gates

MODULE = layout.module()
NOTEBOOKS = [path for folder in ("notebooks", "notebooks/bonus", "solutions", "exercises")
             for path in sorted((ROOT / folder).glob("*.ipynb"))]
LESSONS = ("notebooks", "bonus")
# files whose lesson is written: notebooks show all that they define
SHOWN = ("attention", "masks", "vit", "lm/protocol", "lm/opt", "lm/llama", "lm/t5", "data/tokenizer", "generation",
         "qformer", "stage1", "stage2", "training/distributed", "data/features", "data/batches", "training/loop",
         "training/experts", "evaluation/metrics", "evaluation/grounding")


def files():
    """What is in git or would go into it with `git add .`."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


# --- the module -------------------------------------------------------------------------------------------------------


def test_imports_go_down():
    assert gates.layering(MODULE) == []
    seen = {name for _, name in gates.imports("stage1", MODULE["stage1"], MODULE)}
    assert seen >= {"masks", "attention", "qformer"}  # the gate does see imports


def test_core_is_small():
    lines = {name: layout.code_lines(MODULE[name]) for name in layout.core(MODULE)}
    assert sum(lines.values()) < gates.CORE_LINES, lines


def test_axis_letters():
    for name, text in MODULE.items():
        assert gates.labelled(gates.einops_letters(text), f"{name}.py") == []
    for path in NOTEBOOKS:
        assert gates.labelled(gates.einops_letters(gates.python_of(nbformat.read(path, 4))), path.name) == []


def test_public_names_have_docstrings():
    for name, text in MODULE.items():
        assert gates.labelled(gates.docstrings(text), f"{name}.py") == []


# --- all files --------------------------------------------------------------------------------------------------------


def test_files_are_small_and_belong_to_no_machine():
    problems = []
    for path in files():
        content, name = path.read_bytes(), path.relative_to(ROOT)
        if len(content) > (gates.LARGEST_WEIGHTS if path.suffix == ".safetensors" else gates.LARGEST):
            problems.append(f"{name}: {len(content)} bytes")
        if b"\0" not in content and name.parts[-1] != "gates.py":  # gates.py spells out what it looks for
            problems += gates.labelled(gates.foreign(content.decode("utf-8")), name)
    assert problems == []


def test_pins_are_exact_and_whole():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(line.split(";")[0].count("==") == 1 and "+" not in line and "@" not in line for line in pins), pins
    assert "torch==2.13.0" in pins


def test_every_command_ends_in_a_sentence():
    """But for two that run before anything is installed, and the download, which says more of the disk."""
    bare = [path.relative_to(ROOT).as_posix() for folder in ("minblip2", "benchmarks", "data", "exercises")
            for path in sorted((ROOT / folder).rglob("*.py")) if gates.bare_command(path.read_text(encoding="utf-8"))]
    assert bare == ["minblip2/course/setup_size.py", "minblip2/course/start.py", "data/download.py"]
    assert gates.bare_command('if __name__ == "__main__":\n    main()') and not gates.bare_command("x = 1")


# --- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_notebook(path):
    nb = nbformat.read(path, 4)
    problems = gates.magics(nb) + gates.without_alt(nb) + gates.broken_links(gates.markdown_of(nb), path.parent)
    problems += gates.unexecuted(nb) if path.parent.name == "exercises" else gates.executed(nb) + gates.stale(nb)
    assert problems == []


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.parent.name != "exercises"],
                         ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_is_shown_was_computed_with_the_bridge_that_ships(path):
    nb = nbformat.read(path, 4)
    assert nb.metadata[BRIDGE] == run_checksum(SHIPPED)
    assert [output.text for cell in gates.code_cells(nb) for output in cell.outputs
            if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_notebook_shows_is_the_module(path):
    nb = nbformat.read(path, 4)
    assert gates.identity(nb, MODULE) == []
    if path.parent.name in LESSONS:  # an exercise may well ask for a function of the module
        assert gates.unheaded(nb, MODULE) == []


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.parent.name == "notebooks"],
                         ids=lambda path: path.name)
def test_a_lesson_fits_into_an_evening_and_says_where_it_stands(path):
    nb = nbformat.read(path, 4)
    assert gates.sizes(nb) == [] and gates.sections(nb) == []
    assert re.search(r"^here\(", gates.python_of(nb), re.MULTILINE), "the lesson does not show where it stands"
    assert "$$" in gates.markdown_of(nb), "the lesson has no formula"


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.parent.name == "bonus"],
                         ids=lambda path: path.name)
def test_a_bonus_notebook_takes_no_longer_to_read_than_a_lesson(path):
    assert [problem for problem in gates.sizes(nbformat.read(path, 4)) if "minutes of reading" in problem] == []


def test_each_bonus_notebook_is_named_in_a_lesson():
    prose = {path: gates.markdown_of(nbformat.read(path, 4)) for path in NOTEBOOKS if path.parent.name == "notebooks"}
    assert [path.name for path in NOTEBOOKS if path.parent.name == "bonus"
            and not any(f"](bonus/{path.name})" in text for text in prose.values())] == []


@pytest.mark.parametrize("file", SHOWN)
def test_lessons_show_all_of_the_module(file):
    lessons = [nbformat.read(path, 4) for path in NOTEBOOKS if path.parent.name in LESSONS]
    assert gates.shown(lessons, file, MODULE[file])[1] == []


# --- no rule is blind -------------------------------------------------------------------------------------------------

TREE = dict.fromkeys(("__init__", "qformer", "stage1", "lm/opt", "data/__init__", "data/coco", "training/loop",
                      "evaluation/measure", "course/viz", "__main__"), "")
REAL = {"a": '''
def double(x):
    """Twice x."""
    return 2 * x


class Box:
    """A box."""

    def open(self):
        """Open it."""
'''}
DOUBLE = '# minblip2/a.py\ndef double(x):\n    """Twice x."""\n    return 2 * x'
OPEN = '# minblip2/a.py: class Box\ndef open(self):\n    """Open it."""'


def notebook(*sources, output=None):
    """A notebook as if just executed."""
    cells = [new_code_cell(source, execution_count=count) for count, source in enumerate(sources, start=1)]
    cells[-1].outputs = [output] if output else []
    made = new_notebook(cells=[new_markdown_cell(""), *cells])
    made.metadata[STAMP] = source_hash(made)
    return made


def html(text):
    return new_output("display_data", {"text/html": text})


@pytest.mark.parametrize("name, line", [
    ("qformer", "from .data import coco"), ("qformer", "import minblip2.data.coco"),
    ("lm/opt", "from ..data.coco import CocoCaptions"), ("data/coco", "def f():\n    from ..training import loop"),
    ("evaluation/measure", "from ..course import viz"), ("data/coco", "from .. import __main__")])
def test_imports_up_are_noticed(name, line):
    (problem,) = gates.layering(TREE | {name: line})
    assert problem.startswith(f"{name}.py, line {line.count(chr(10)) + 1}: imports ")


def test_circles_are_noticed():
    circle = gates.layering(TREE | {"qformer": "from .stage1 import Stage1", "stage1": "from . import qformer"})
    assert len(circle) == 2 and all("a circle" in problem for problem in circle)


def test_code_lines_are_counted():
    source = '"""Doc\n\nstring."""\n\n# comment\nx = [1,  # one\n     2]\n'
    source += 'def f():\n    """Doc."""\n    return """a\nb"""\n'
    assert layout.code_lines(source) == 5  # two of the list, def, return and the string's second line


BAD_RUN = notebook("x", output=new_output("error", ename="E", evalue="", traceback=[]))
OLD = notebook("x = 1")
OLD.cells[1].source = "x = 2"


@pytest.mark.parametrize("problems", [
    gates.einops_letters("rearrange(x, 'b (h x) -> b h x')"), gates.einops_letters("rearrange(x, pattern)"),
    gates.docstrings('"""File."""\nclass A:\n    """Doc."""\n    def run(self): pass\n    def _own(self): pass'),
    gates.foreign("see /wo" "rk/main"), gates.foreign("--index" "-url x"),
    gates.broken_links("# Title\n[a](#title) [b](README.md) ![c](https://a.org/x) [d](no.png)", ROOT),
    gates.executed(notebook("x = 1")), gates.executed(BAD_RUN), gates.unexecuted(notebook("x = 1")), gates.stale(OLD),
    gates.without_alt(notebook("show()", output=html('<img alt=" " src="data:image/png;base64,AAAA">'))),
    gates.without_alt(notebook("show()", output=new_output("display_data", {"image/png": "AAAA"}))),
    gates.magics(notebook("x = 1\n!pip install x")), gates.magics(notebook("%load_ext autoreload")),
    gates.unheaded(notebook("def double(x): return x\ndef _own(): pass"), REAL)], ids=str)
def test_what_breaks_a_rule_is_noticed(problems):
    assert len(problems) == 1


@pytest.mark.parametrize("source, said", [
    (DOUBLE.replace("2 *", "3 *"), "double is not what minblip2/a.py defines"),
    (DOUBLE.replace("Twice", "Two times"), "double is not what"),
    ('# minblip2/a.py\nclass Box:\n    """A box."""', "Box is not what"),
    (OPEN.replace("Open", "Shut"), "open is not what"), (DOUBLE.replace("double", "treble"), "does not define it"),
    (DOUBLE.replace("a.py", "b.py"), "there is no such file"), ("# minblip2/a.py\nimport math", "defines nothing"),
    (f"{DOUBLE}\nprint(7)", "also runs 'print(7)'"), (f"x = 1\n{DOUBLE}", "heads nothing"),
    (DOUBLE.replace(".py", ".py, shortened"), "heads nothing")])
def test_what_is_not_the_module_is_noticed(source, said):
    assert gates.identity(notebook(DOUBLE, OPEN), REAL) == []
    assert gates.identity(notebook(DOUBLE.replace("Twice x.", "Twice\n    x.")), REAL) == []  # wrapped, as code may be
    (problem,) = gates.identity(notebook(source), REAL)
    assert said in problem


def test_what_no_lesson_shows_is_noticed():
    assert gates.shown([notebook(DOUBLE)], "a", REAL["a"]) == (["double"], ["Box"])
    assert gates.shown([notebook(OPEN)], "a", REAL["a"]) == (["Box"], ["double"])  # all its methods are the class


def test_sizes_see_what_is_too_large():
    assert gates.sizes(notebook("import a\nimport b", "a.run()")) == []
    assert gates.sizes(notebook("import a", "a.run()\n" * 21)) == ["21 lines of one cell, and 20 are the most"]
    assert gates.sizes(notebook(*["a = 1"] * 60)) == ["61 cells, and 60 are the most"]
    assert gates.sizes(notebook(*["import a"] * 3, "a.run()")) == [
        "3 cells of imports before the first idea, and 2 are the most"]
    assert gates.sizes(notebook("a = 1  # " + "x" * 92)) == ["101 columns, and 100 are the most"]
    assert gates.sizes(notebook(*["# why\n\n" + "a = 1\n" * 16] * 19)) == ["304 code lines, and 300 are the most"]
    long = notebook("a = 1")
    long.cells[0].source = "word " * 2801
    assert gates.sizes(long) == ["2801 words, and 2800 are the most"]
    long.cells[0].source, long.cells[1].source = "word " * 2200, "a + " * 2200 + "a"  # code is read, too
    assert "94 minutes of reading, and 60 are the most" in gates.sizes(long)


def test_a_section_that_went_missing_is_noticed():
    lesson = notebook("a = 1")
    for prose, problems in (("## 1 · One\n\n### A\n\n## 2 · Two\n\n## What you can do now", []), ("", []),
                            ("## 2 · Two", ["the sections are numbered [2]"]),
                            ("## 1 · One\n\n## 3 · Three", ["the sections are numbered [1, 3]"])):
        lesson.cells[0].source = prose
        assert gates.sections(lesson) == problems

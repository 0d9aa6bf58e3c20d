"""The rules of the house hold, and each rule would notice if it were broken."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import course
import readme

from . import gates

ROOT = Path(__file__).resolve().parents[1]
MODULE = gates.module(ROOT / "minblip2")
NOTEBOOKS = [path for folder in ("notebooks", "solutions", "exercises")
             for path in sorted((ROOT / folder).glob("*.ipynb"))]
# files whose lesson is written: notebooks show all that they define
SHOWN = ("attention", "masks", "vit", "lm/protocol", "lm/opt", "lm/llama", "lm/t5", "data/tokenizer", "generation",
         "qformer", "stage1", "stage2", "training/distributed", "data/features", "data/batches", "training/loop",
         "training/experts", "evaluation/metrics", "evaluation/grounding")
PICTURE = "data:image/png;base64,AAAA"


def files():
    """What is in git or would go into it with `git add .`."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def notebook(*sources, prose="", output=None):
    """A notebook as if just executed."""
    cells = [new_code_cell(source, execution_count=count) for count, source in enumerate(sources, start=1)]
    if output:
        cells[-1].outputs = [output]
    made = new_notebook(cells=[new_markdown_cell(prose), *cells])
    made.metadata[course.STAMP] = course.source_hash(made)
    return made


def html(text):
    return new_output("display_data", {"text/html": text})


# --- the module -------------------------------------------------------------------------------------------------------


def test_imports_go_down():
    assert gates.layering(MODULE) == []
    seen = {name for _, name in gates.imports("stage1", MODULE["stage1"], MODULE)}
    assert seen >= {"masks", "attention", "qformer"}  # the gate does see imports


TREE = dict.fromkeys(("__init__", "qformer", "stage1", "lm/opt", "data/__init__", "data/coco", "training/loop",
                      "evaluation/measure", "course/viz", "__main__"), "")


@pytest.mark.parametrize("name, line", [
    ("qformer", "from .data.coco import CocoCaptions"), ("qformer", "from .data import coco"),
    ("qformer", "import minblip2.data.coco"), ("qformer", "from minblip2.data import coco"),
    ("lm/opt", "from ..data.coco import CocoCaptions"), ("data/coco", "from ..training import loop"),
    ("data/coco", "def f():\n    from ..training.loop import train"),
    ("training/loop", "from ..evaluation.measure import retrieval"),
    ("evaluation/measure", "from ..course import viz"), ("stage1", "from .course.viz import png"),
    ("data/coco", "from .. import __main__")])
def test_imports_up_are_noticed(name, line):
    (problem,) = gates.layering(TREE | {name: line})
    assert problem.startswith(f"{name}.py, line {line.count(chr(10)) + 1}: imports ")


def test_circles_are_noticed():
    circle = gates.layering(TREE | {"qformer": "from .stage1 import Stage1", "stage1": "from . import qformer"})
    assert len(circle) == 2 and all("a circle" in problem for problem in circle)
    down = {"__main__": "from .course import viz", "course/viz": "from ..evaluation import measure",
            "data/coco": "from .. import UserError, qformer"}
    assert gates.layering(TREE | down) == []


def test_core_is_small():
    lines = {name: gates.code_lines(MODULE[name]) for name in gates.core(MODULE)}
    assert sum(lines.values()) < gates.CORE_LINES, lines


def test_code_lines_count_code():
    source = '"""Doc\n\nstring."""\n\n# comment\nx = [1,  # one\n     2]\n'
    source += 'def f():\n    """Doc."""\n    return """a\nb"""\n'
    assert gates.code_lines(source) == 5  # two of the list, def, return and the string's second line


def test_axis_letters():
    for name, text in MODULE.items():
        assert gates.labelled(gates.einops_letters(text), f"{name}.py") == []
    for path in NOTEBOOKS:
        assert gates.labelled(gates.einops_letters(gates.python_of(nbformat.read(path, 4))), path.name) == []


@pytest.mark.parametrize("source", ["rearrange(x, 'b (h x) -> b h x')", "einsum(x, y, 'b i, b j -> i j')",
                                    "einops.reduce(x, 'batch s -> s', 'sum')", "rearrange(x, pattern)"])
def test_other_letters_are_noticed(source):
    assert len(gates.einops_letters(source)) == 1


def test_good_patterns_pass():
    good = "rearrange(x, 'b 1 (gh p1) ... -> b gh p1 ()', p1=2)\nx.repeat(2, 3)\nreduce(x, 'b s e -> b e', 'mean')"
    assert gates.einops_letters(good) == []


def test_public_names_have_docstrings():
    for name, text in MODULE.items():
        assert gates.labelled(gates.docstrings(text), f"{name}.py") == []


def test_missing_docstrings_are_noticed():
    source = '"""File."""\nclass A:\n    """Doc."""\n    def run(self): pass\n    def _own(self): pass\ndef f(): pass\n'
    source += 'class P(Protocol):\n    """Doc."""\n    def stub(self): ...\n'
    assert gates.docstrings(source) == ["line 4: A.run has no docstring", "line 6: f has no docstring"]
    assert gates.docstrings("x = 1") == ["the file has no docstring"]


# --- all files --------------------------------------------------------------------------------------------------------


def test_files_are_small_and_belong_to_no_machine():
    problems = []
    for path in files():
        content, name = path.read_bytes(), path.relative_to(ROOT)
        if len(content) > gates.LARGEST:
            problems.append(f"{name}: {len(content)} bytes")
        if b"\0" not in content and name.parts[-1] != "gates.py":  # gates.py spells out what it looks for
            problems += gates.labelled(gates.foreign(content.decode("utf-8")), name)
    assert problems == []


@pytest.mark.parametrize("parts", [("/home", "/ada/x"), ("see /wo", "rk/main"), ("C:\\Us", "ers\\ada"),
                                   ("--index", "-url x"), ("'/ro", "ot/.cache'")])
def test_machine_paths_are_noticed(parts):
    assert len(gates.foreign("".join(parts))) == 1


def test_other_paths_pass():
    assert gates.foreign("~/.cache, ../home/x, /etc/passwd, homework/a, https://a.org/home/b, $ROOT/wo" "rk/x") == []


def test_pins_are_exact_and_whole():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(line.split(";")[0].count("==") == 1 and "+" not in line and "@" not in line for line in pins), pins
    assert "torch==2.13.0" in pins


# --- notebooks and README ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_notebook(path):
    nb = nbformat.read(path, 4)
    problems = gates.magics(nb) + gates.without_alt(nb) + gates.broken_links(gates.markdown_of(nb), path.parent)
    problems += gates.unexecuted(nb) if path.parent.name == "exercises" else gates.executed(nb) + gates.stale(nb)
    assert problems == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_notebook_shows_is_the_module(path):
    nb = nbformat.read(path, 4)
    assert gates.identity(nb, MODULE) == []
    if path.parent.name == "notebooks":  # an exercise may well ask for a function of the module
        assert gates.unheaded(nb, MODULE) == []


@pytest.mark.parametrize("file", SHOWN)
def test_lessons_show_all_of_the_module(file):
    lessons = [nbformat.read(path, 4) for path in NOTEBOOKS if path.parent.name == "notebooks"]
    assert gates.shown(lessons, file, MODULE[file])[1] == []


def test_readme_links():
    assert gates.broken_links((ROOT / "README.md").read_text(encoding="utf-8"), ROOT) == []


def test_sections_that_the_readme_names_are_there():
    named = re.findall(r"\]\((notebooks/\w+\.ipynb)\)((?:,? §\d+)+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    for path, sections in named:
        prose = gates.markdown_of(nbformat.read(ROOT / path, 4))
        for number in re.findall(r"\d+", sections):
            assert re.search(rf"^## {number} · ", prose, re.MULTILINE), f"{path} has no section {number}"


def test_broken_links_are_noticed():
    text = "# My title\n[a](#my-title) [b](README.md) [c](https://a.org/x) ![d](no.png) <img src='no.png'> [e](#no)"
    assert len(gates.broken_links(text, ROOT)) == 3


def test_a_good_notebook_passes_every_gate():
    nb = notebook("%matplotlib inline", "x = 1", output=html(f'<img alt="A cat." src="{PICTURE}">'))
    assert gates.executed(nb) + gates.stale(nb) + gates.without_alt(nb) + gates.magics(nb) == []


def test_missing_outputs_are_noticed():
    nb = notebook("x = 1", "x")
    assert len(gates.executed(nb)) == 1  # counts but no output
    nb.cells[1].execution_count = 2
    assert len(gates.executed(nb)) == 2  # and out of order
    assert gates.executed(notebook("x", output=new_output("error", ename="E", evalue="", traceback=[])))


def test_outputs_in_exercises_are_noticed():
    assert len(gates.unexecuted(notebook("x = 1"))) == 1
    assert gates.unexecuted(new_notebook(cells=[new_code_cell("x = 1")])) == []


def test_stale_outputs_are_noticed():
    nb = notebook("x = 1", "x")
    nb.cells[0].source = "prose does not matter"
    assert gates.stale(nb) == []
    nb.cells[1].source = "x = 2"
    assert len(gates.stale(nb)) == 1


@pytest.mark.parametrize("output", [html(f'<img src="{PICTURE}">'), html(f'<img alt=" " src="{PICTURE}">'),
                                    new_output("display_data", {"image/png": "AAAA"})])
def test_pictures_without_alt_are_noticed(output):
    assert len(gates.without_alt(notebook("show()", output=output))) == 1


@pytest.mark.parametrize("line", ["%load_ext autoreload", "!pip install x", "%%bash", "  !ls"])
def test_other_magics_are_noticed(line):
    assert len(gates.magics(notebook(f"x = 1\n{line}"))) == 1
    assert gates.magics(notebook("x = 7 % 2\n%time x")) == []


REAL = '''"""File."""
SIZE: int = 3


def double(x):
    """Twice x."""
    # why
    return 2 * x


class Box:
    """A box."""

    def open(self):
        """Open it."""


def _own(): pass
'''
OPEN = '# minblip2/a.py: class Box\ndef open(self):\n    """Open it."""'
DOUBLE = '# minblip2/a.py\ndef double(x):\n    """Twice x."""\n    return 2 * x'


@pytest.mark.parametrize("source", [
    DOUBLE, "# minblip2/a.py\n%time\nimport math\nfrom x import y\n\nSIZE: int = 3\ndef _own(): pass",
    '# minblip2/a.py\nclass Box:\n    """A box."""\n    def open(self):\n        """Open it."""', OPEN, "x = 1",
    "def other(): pass", "# see minblip2/a.py\nx = 1", "y = 2  # minblip2/a.py"])
def test_the_module_shown_passes(source):
    assert gates.identity(notebook(source), {"a": REAL}) + gates.unheaded(notebook(source), {"a": REAL}) == []


@pytest.mark.parametrize("source, said", [
    (DOUBLE.replace("2 *", "3 *"), "double is not what minblip2/a.py defines"),
    (DOUBLE.replace("Twice", "Two times"), "double is not what"), (DOUBLE.replace("(x)", "(x: int)"), "double is not"),
    (DOUBLE.replace("def", "@cache\ndef"), "double is not what"),
    (f"{DOUBLE}\n{DOUBLE[16:].replace('2 *', '3 *')}", "double is not what"),
    ("# minblip2/a.py\nSIZE: int = 4", "SIZE is not what"),
    ('# minblip2/a.py\nclass Box:\n    """A box."""', "Box is not what"),
    (DOUBLE.replace("a.py", "b.py"), "there is no such file"),
    (DOUBLE.replace("double", "treble"), "which does not define it"),
    (OPEN.replace("Open", "Shut"), "open is not what"), (OPEN.replace("Box", "Bag"), "which does not define it"),
    (DOUBLE.replace(".py", ".py: class Box"), "which does not define it"),
    ("# minblip2/a.py\nimport math", "defines nothing"), ("# minblip2/a.py", "defines nothing"),
    ("# minblip2/a.py\ndef double(x:", "is not Python"), (f"{DOUBLE}\nprint(7)", "also runs 'print(7)'"),
    (f"x = 1\n{DOUBLE}", "heads nothing"), (DOUBLE.replace("# m", "#m"), "heads nothing"),
    (DOUBLE.replace(".py", ""), "heads nothing"), (DOUBLE.replace(".py", ".py, shortened"), "heads nothing")])
def test_what_is_not_the_module_is_noticed(source, said):
    (problem,) = gates.identity(notebook(source), {"a": REAL})
    assert said in problem


def test_the_indentation_of_a_docstring_does_not_count():
    inside = 'class Box:\n    def open(self):\n        """Open it.\n\n        All the way.\n        """'
    alone = '# minblip2/a.py: class Box\ndef open(self):\n    """Open it.\n\n    All the way.\n    """'
    assert gates.identity(notebook(alone), {"a": inside}) == []
    assert len(gates.identity(notebook(alone.replace("All", "Half")), {"a": inside})) == 1


def test_names_of_the_module_without_a_header_are_noticed():
    (problem,) = gates.unheaded(notebook("def double(x): return x\ndef _own(): pass\nSIZE = 4"), {"a": REAL})
    assert "double as minblip2/a.py does" in problem


def test_shown_definitions_are_listed():
    lessons = [notebook("x = 1", DOUBLE), notebook(DOUBLE.replace("a.py", "b.py").replace("double", "Box"))]
    assert gates.shown(lessons, "a", REAL) == (["double"], ["Box"])
    assert gates.shown([notebook(OPEN)], "a", REAL) == (["Box"], ["double"])  # all its methods are the class
    assert gates.public(REAL) == ["double", "Box"]


# --- the runner and the results table ---------------------------------------------------------------------------------


def test_runner_writes_an_executed_copy_and_stamps_it(tmp_path):
    source, copy = tmp_path / "00_a.ipynb", tmp_path / "out" / "00_a.ipynb"
    course.write(new_notebook(cells=[new_code_cell("import os"), new_code_cell("1 + 1")]), source)
    made = course.execute(source, copy)
    assert gates.executed(made) + gates.stale(nbformat.read(copy, 4)) == []
    assert [path.name for path in copy.parent.iterdir()] == ["00_a.ipynb"]  # no half-written file stays


def test_runner_tells_the_failing_cell(tmp_path):
    course.write(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "00_a.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        course.execute(tmp_path / "00_a.ipynb", tmp_path / "copy.ipynb")
    assert (tmp_path / "copy.ipynb").exists()


def test_runner_chooses(tmp_path):
    for name in ("01_b", "00_a", "draft"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in course.choose(tmp_path, [])] == ["00_a", "01_b"]
    assert [path.stem for path in course.choose(tmp_path, ["01"])] == ["01_b"]
    with pytest.raises(ValueError, match="no notebook begins with '07'"):
        course.choose(tmp_path, ["00", "07"])


def test_results_table(tmp_path):
    for name, value in (("scenes", 90.0), ("scenes-seed1", 94.0), ("other", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results-val.json").write_text(f'{{"images": 500, "pointing": {value}, "secret": 1}}')
    found = readme.columns(tmp_path, "scenes")
    assert list(found) == ["scenes, val (2 seeds)"]
    assert "| 92.0 ± 2.8 |" in " ".join(readme.table(found).split()) and "secret" not in readme.table(found)
    filled = readme.fill(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb", "new")
    assert filled == f"a\n{readme.BEGIN}\nnew\n{readme.END}\nb" == readme.fill(filled, "new")


def test_the_sentence_under_the_picture_counts_and_has_its_place():
    sentence = readme.under_picture([True, False, True], "we see")
    assert "first 3 scenes" in sentence and "2 of the 3 captions are right" in sentence and '"we see"' in sentence
    assert sentence in readme.fill((ROOT / "README.md").read_text(encoding="utf-8"), sentence, *readme.UNDER_PICTURE)


@pytest.mark.parametrize("text", ["", readme.BEGIN, f"{readme.END} {readme.BEGIN}", 2 * f"{readme.BEGIN}{readme.END}"])
def test_a_readme_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="README.md needs"):
        readme.fill(text, "table")

"""The pages say what is so: what is where, results, questions, commands; their tables are written by commands."""

import json
import re
import shlex

import nbformat
import pytest

from minblip2.__main__ import parser
from minblip2.course import guide, layout, markers, readme, results
from minblip2.course.exercises import Asked
from minblip2.course.lesson import ROOT
from minblip2.evaluation.tables import markdown, plain_text
from minblip2.training.shipping import SHIPPED

from . import gates

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "minblip2" / "README.md", ROOT / ".github" / "CONTRIBUTING.md",
                      *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
QUESTIONS = [row.strip("|").split(" | ") for row in PAGES["docs/FAQ.md"].splitlines()
             if re.match(r"\| [^|]+ \| \[\d\d\]\(\.\./notebooks/", row)]


# --- what is where ----------------------------------------------------------------------------------------------------


def test_what_is_where_is_read_from_the_module():
    sources, stale = layout.module(), "the page is older than the module: run python -m minblip2.course.readme"
    assert markers.read("paper") == layout.paper(sources, layout.shown_in(ROOT / "notebooks")), stale
    assert markers.read("rooms") == layout.rooms(sources), stale


def test_every_file_of_the_module_is_in_the_tables_once():
    linked = re.findall(r"\]\(([\w/]+)\.py\)", markers.read("paper") + markers.read("rooms"))
    assert sorted(linked) == [name for name in sorted(layout.module()) if not name.endswith("__init__")]


def test_a_file_without_docstring_or_lesson_has_its_row():
    made = layout.paper({"a": '"""What a is\n(as told). More."""', "b": "", "lm/__init__": '"""All."""', "lm/c": ""},
                        {"lm/c": ["04_x.ipynb"], "b": ["bonus/01_y.ipynb"]})
    rows = [" ".join(line.split()) for line in made.splitlines()[2:]]
    assert rows == ["| [`lm/`](lm) | All: [c](lm/c.py) | [04](../notebooks/04_x.ipynb) |",
                    "| [`b.py`](b.py) | | [01+](../notebooks/bonus/01_y.ipynb) |",
                    "| [`a.py`](a.py) | What a is (as told) | |"]


# --- links, questions, commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_and_sections_that_pages_name_are_there(name):
    folder = (ROOT / name).parent
    assert gates.broken_links(PAGES[name], folder) == []
    for path, sections in re.findall(r"\]\(((?:\.\./)?notebooks/\w+\.ipynb)\)((?:,? §\d+)+)", PAGES[name]):
        prose = gates.markdown_of(nbformat.read(folder / path, 4))
        for number in re.findall(r"\d+", sections):
            assert re.search(rf"^## {number}(?: ·|\.) ", prose, re.MULTILINE), f"{path} has no section {number}"


def test_the_landing_page_takes_three_minutes():
    words = re.sub(r"```.*?```|\]\([^)]*\)|<!--.*?-->", " ", README, flags=re.DOTALL)
    assert len(re.findall(r"\w[\w'’-]*", words)) <= 900
    for name, text in PAGES.items():
        wide = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
                if len(line) > 90]
        assert wide == [], f"{name}: GitHub shows 90 columns of code"


@pytest.mark.parametrize("question, answer", QUESTIONS, ids=lambda text: text.strip()[:60])
def test_every_question_has_an_answer_that_is_there(question, answer):
    named = re.findall(r"\[(\d\d|[a-z ]+)\]\(\.\./(notebooks/(?:bonus/)?\w+\.ipynb)\)((?:,? §\d+)+|, opening)", answer)
    assert named and len(named) == answer.count("]("), f"a lesson without a section: {answer}"
    for number, path, where in named:
        prose = gates.markdown_of(nbformat.read(ROOT / path, 4))
        assert path.startswith(f"notebooks/{number}_" if number.isdecimal() else "notebooks/bonus/")
        for section in re.findall(r"\d+", where):
            assert re.search(rf"^## {section}(?: ·|\.) ", prose, re.MULTILINE), f"{path} has no section {section}"


def test_the_readme_lists_every_lesson_and_guide():
    assert len(QUESTIONS) > 25
    for path in [*sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), guide.GUIDE, guide.GUIDE.with_name("PAPER.md")]:
        assert f"](notebooks/{path.name})" in README, f"README does not lead to {path.name}"
    pages = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
    for other in ("CHANGELOG.md", "minblip2/README.md", *pages):
        assert f"]({other})" in README, f"README does not lead to {other}"


def test_every_command_of_the_pages_is_one():
    text, grammar = "\n".join(PAGES.values()), parser()
    shown = set(re.findall(r"^python -m minblip2 (\w+)", text, re.MULTILINE))
    assert shown == {"train", "caption", "retrieve", "attend", "evaluate", "ask", "export", "demo"}
    for line in re.findall(r"^python -m minblip2 (.+?)(?:\s+#.*)?$", text, re.MULTILINE):
        grammar.parse_args(shlex.split(line))


# --- results and the picture ------------------------------------------------------------------------------------------


def test_results_table(tmp_path):
    for name, value in (("scenes", 90.0), ("scenes-seed1", 94.0), ("other", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results-val.json").write_text(f'{{"images": 500, "pointing": {value}, "secret": 1}}')
    found = results.columns(tmp_path, "scenes")
    assert list(found) == ["scenes, val (2 seeds)"]
    made = results.results_table(found)
    assert "| 92.0 ± 2.8 |" in " ".join(made.split()) and "secret" not in made


def test_kept_seeds_are_a_column_of_means(tmp_path):
    assert results.seeds(tmp_path) == {}
    runs = [{"seed": seed, "results": {"pointing": value}} for seed, value in ((0, 90.0), (1, 94.0))]
    (tmp_path / "seeds.json").write_text(json.dumps({"recipe": "scenes", "split": "test", "runs": runs}))
    found = results.seeds(tmp_path)
    assert list(found) == ["scenes, test (2 seeds)"] and "92.0 ± 2.8" in results.results_table(found)


def test_the_sentence_under_the_picture_counts_and_has_its_place():
    sentence = readme.under_picture([True, False, True], "we see")
    assert "first 3 scenes" in sentence and "2 of 3\nright" in sentence and '"we see"' in sentence
    assert sentence in markers.fill(README, sentence, "picture")


def test_kept_figures_are_a_column_with_their_provenance(tmp_path):
    figures = {"images": 5, "stage2_cider": 12.5, "commit": "abc", "machine": "m", "minutes_stage1": 2.0,
               "minutes_stage2": 0.6, "data": "five pictures"}
    (tmp_path / "laptop.json").write_text(json.dumps(figures))
    output = results.kept(tmp_path)
    assert list(output) == ["laptop"] and "12.5" in results.results_table({"laptop, val": [output["laptop"]]})
    assert results.provenance(output) == ("*laptop: five pictures; 2 minutes of stage 1 and 1 of stage 2 on m; "
                                       "commit abc.*")


# --- markers and tables -----------------------------------------------------------------------------------------------


def test_a_part_is_replaced_between_its_markers():
    filled = markers.fill("a\n<!-- x -->\nold\n<!-- /x -->\nb", "new", "x")
    assert filled == "a\n<!-- x -->\nnew\n<!-- /x -->\nb" == markers.fill(filled, "new", "x")
    assert markers.split(filled, "x")[1] == "new"


@pytest.mark.parametrize("text", ["", "<!-- x -->", "<!-- /x --> <!-- x -->", 2 * "<!-- x --><!-- /x -->"])
def test_a_readme_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="README.md needs"):
        markers.fill(text, "table", "x")


def test_every_command_that_writes_a_table_has_its_place():
    for name in markers.PAGES:
        assert markers.read(name) or name == "badges"  # until the address is known


def test_the_summary_and_the_minutes_are_those_of_today():
    stale = "README.md is older than what it tells: run python -m minblip2.course.readme"
    assert markers.read("course") == readme.with_minutes(markers.read("course"), guide.lessons()), stale
    shipped, photographs = (json.loads(path.read_text(encoding="utf-8")) for path in (
        SHIPPED / "results-val.json", readme.MEASURED / "laptop.json"))
    assert markers.read("summary") == readme.headlines(shipped, photographs, *readme.seeds().values()), stale


def test_minutes_are_put_beside_their_lessons():
    asked = tuple(Asked("00.1", "T", "Write", minutes, 1, 1) for minutes in (10, 8))
    lesson = guide.Lesson("Title", reading=30, computing=9, exercises=asked)
    made = readme.with_minutes("| lesson | what | reading | exercises |\n| :- | :- | -: | -: |\n| [00 T](x) | y | | |",
                               {"00": lesson})
    assert [" ".join(line.split()) for line in made.splitlines()[2:]] == ["| [00 T](x) | y | 30 | 18 |",
                                                                        "| all | 1 h | 30 | 18 |"]


def test_numbers_stand_to_the_right_and_words_to_the_left():
    figures = ["12", -0.5, "1,234", "3e-7", "96.0 %", "92.0 ± 2.8", "63 of 63", "0.5 % (0.1 to 2.8)", "**7**", "", "–"]
    made = markdown(["what", "figures", "mixed"], *([f"row {i}", figure, 1] for i, figure in enumerate(figures)),
                    ["last", 2, "none"])
    lines = made.splitlines()
    assert [cell.strip("- ") for cell in lines[1].strip("|").split("|")] == [":", ":", ":"]
    assert lines[1].count("-: |") == 1 and lines[1].startswith("| :-") and lines[1].endswith("- |")
    assert len({len(line) for line in lines}) == 1 and lines[2].endswith("          12 | 1     |")


def test_cells_cannot_break_a_table():
    assert markdown(["a"], ["x|y\nz"], ["p\\|q"]) == "| a      |\n| :----- |\n| x\\|y z |\n| p\\|q   |"
    assert markdown(["a"], ["x" * 200]).splitlines()[:2] == ["| a |", "| :--- |"]  # no line of blanks for a long cell
    for render in (markdown, plain_text):
        with pytest.raises(ValueError, match="argument 2 is"):
            render(["a", "b"], ["c"], ["d", "e"])


def test_plain_text_is_aligned_alike():
    assert plain_text(["images", 500], ["R@1", "97.5"], ["", ""]) == "images   500\nR@1     97.5\n"

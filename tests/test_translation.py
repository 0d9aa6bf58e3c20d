"""The site in other languages: what is stale is counted and shown in English, and code is the same everywhere."""

import hashlib
import html
import io
import json
import re
import shutil

import nbformat
import pytest

from minblip2.course import site, translation
from minblip2.course.exercises import prose
from minblip2.course.lesson import ROOT

pofile = pytest.importorskip("babel.messages.pofile", reason="Babel is not installed: it comes with the extra course")
ALL = [(language, path) for language in translation.languages()
       for path in translation.catalogues(language).values()]


def catalogue(**strings):
    """A catalogue of messages and their translations, by numbers of ours."""
    text = "".join(f'msgid {json.dumps(message)}\nmsgstr {json.dumps(string, ensure_ascii=False)}\n\n'
                   for message, string in strings.values())
    return pofile.read_po(io.BytesIO(text.encode()), locale="ko")


LONG = "The bridge has seen each of these colours and each of these shapes."
CHANGED = "The bridge has seen each of these colours, and each of those shapes too."


def test_what_is_translated_stale_and_never_done_is_counted():
    known = catalogue(a=("A red star", "빨간 별"), b=(LONG, "이 색과 모양을 보았습니다."), c=("Gone", "없어짐"))
    today = catalogue(a=("A red star", ""), b=(CHANGED, ""), c=("Of which nobody has heard", ""))
    found = translation.standing(translation.renew(known, today))
    assert found == translation.Standing(1, (CHANGED,), ("Of which nobody has heard",))
    assert str(found) == "1 of 3 paragraphs translated, 1 stale, 1 never done"
    said = translation.report("ko", {"index": found}, every=True).split("\n")
    assert said == [f"ko/index: {found}", f"  stale: {CHANGED}", "  never done: Of which nobody has heard"]


@pytest.mark.parametrize("before, string, after, follows", [
    ("97 % of 500 pictures", "500장 가운데 97 %", "98 % of 1,000 pictures", "1,000장 가운데 98 %"),
    ("difference 4e-06", "차이 4e-06", "difference 3.5e-07", "차이 3.5e-07"),
    ("3 of 3 are right", "셋 중 3", "2 of 3 are right", None),  # which of the two is it?
    ("two of 5", "5 가운데 2", "two of 6", None)])  # a 2 that the English text does not have
def test_a_translation_follows_numbers_where_it_is_clear_how(before, string, after, follows):
    known = translation.renew(catalogue(a=(before, string)), catalogue(a=(after, "")))
    message = known.get(after)
    assert (message.string == follows and not message.fuzzy) if follows else message.fuzzy or not message.string
    assert translation.standing(known).translated == int(follows is not None)


@pytest.mark.parametrize("text, has", [("39", False), ("`gh` `gw`", False), ("[00](../notebooks/00_a.ipynb)", False),
                                       ("</details>", False), ("<summary>Answer</summary>", True), ("MIT", True)])
def test_what_has_no_words_is_not_counted(text, has):
    assert translation.has_words(text) == has


def test_a_catalogue_is_written_without_what_changes_by_itself(tmp_path):
    known = catalogue(a=("A red star", "빨간 별"))
    translation.write(tmp_path / "a.po", known)
    written = (tmp_path / "a.po").read_text(encoding="utf-8")
    assert "빨간 별" in written and not re.search(r"\d{4}-\d\d-\d\d|Babel", written)
    translation.write(tmp_path / "b.po", translation.read(tmp_path / "a.po", "ko"))
    assert (tmp_path / "b.po").read_text(encoding="utf-8") == written


def test_only_pages_of_the_language_are_left(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("a.md", "docs/b.md", "docs/c.ipynb"):
        (tmp_path / name).write_text("text")
    (tmp_path / "index.md").write_text("# T\n" + site.toctree("One", ["a.md", "docs/b.md"])
                                       + site.toctree("Two", ["docs/c.ipynb"]))
    translation.keep_pages(tmp_path, {"index", "docs/b"})
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["b.md", "index.md"]
    assert (tmp_path / "index.md").read_text().rstrip() + "\n" == "# T\n" + site.toctree("One", ["docs/b.md"])


def test_a_page_whose_code_differs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "catalogues", lambda language: {"same": None, "other": None})
    cell = '<div class="cell_input docutils container"><div class="highlight"><pre>{}</pre></div></div>'
    for folder, code in ((tmp_path, "a = 1"), (tmp_path / "ko", "a = 2")):
        folder.mkdir(exist_ok=True)
        (folder / "same.html").write_text("<p>" + cell.format("b = 1"))
        (folder / "other.html").write_text(cell.format("b = 1") + cell.format(code))
    assert translation.unequal_code(tmp_path, "ko") == ["other"]


# --- the catalogues that are here -------------------------------------------------------------------------------------


@pytest.mark.parametrize("language, path", ALL, ids=[path.stem for _, path in ALL])
def test_a_translation_keeps_links_code_and_formulas(language, path):
    for message in translation.read(path, language):
        if not message.id or not message.string or message.fuzzy:  # what is stale is not shown
            continue
        for kind in (r"\]\(([^)]+)\)", r"`([^`]+)`", r"\$([^$]+)\$"):
            kept = [sorted(re.findall(kind, text)) for text in (message.id, message.string)]
            assert kept[0] == kept[1], f"{message.id!r}: {kind}"
        assert message.id.endswith("\n") == message.string.endswith("\n"), message.id
        # In Markdown a ** between a sign and a letter opens and closes nothing, so a Korean particle may not follow it.
        assert not re.search(r"[^\w\s*]\*\*\w|\w\*\*[^\w\s*]\w+\*\*", message.string), message.string


@pytest.mark.parametrize("language", translation.languages())
def test_a_language_has_words_and_pages(language):
    words = json.loads((translation.LOCALE / language / "words.json").read_text(encoding="utf-8"))
    assert words["name"] and words["partly"].format(left=1, all=2)
    assert {"index", "notebooks/00_the_bridge", "docs/GLOSSARY"} <= translation.pages(language)


def test_the_glossary_has_sixty_terms_and_the_lessons_that_use_them():
    rows = [line for line in (ROOT / "docs" / "GLOSSARY.md").read_text(encoding="utf-8").split("\n")
            if line.startswith("| ") and not line.startswith("| term")]
    assert len(rows) >= 60 and all(re.search(r"\| \[\d\d\]\(\.\./notebooks/\d\d_\w+\.ipynb\) \|$", row) for row in rows)
    terms = [row.split(" | ")[0][2:] for row in rows]
    assert len(set(terms)) == len(terms)
    lessons = [re.search(r"(\w+)\.ipynb\) \|$", row)[1] for row in rows]
    texts = {name: re.sub(r"[\s*]+", " ", " ".join(prose(ROOT / "notebooks" / f"{name}.ipynb"))).lower()
             for name in set(lessons)}
    for name, term in zip(lessons, terms, strict=True):
        text = texts[name]
        long, short = re.sub(r" \(.*\)", "", term).lower(), re.findall(r"\((.*)\)", term.lower())
        assert all(word in text for word in long.split(", ")) or short and short[0] in text, f"{name} has no {term!r}"
    known = translation.read(translation.catalogues("ko")["docs/GLOSSARY"], "ko")
    for term in terms:  # the field's Korean word, with the English one in brackets
        string, short = known.get(term).string, re.sub(r" \(.*\)", "", term)
        assert string == term or short in re.search(r"\((.*)\)", string)[1], term


# --- as Sphinx builds them --------------------------------------------------------------------------------------------


def digest(text):
    """The hash of code, whatever colours it in a page."""
    plain = html.unescape(re.sub(r"<[^>]*>", "", text)).strip()
    return hashlib.sha256(plain.encode()).hexdigest()


def test_a_stale_paragraph_is_english_again_and_code_is_the_notebooks(tmp_path, monkeypatch, capsys):
    pytest.importorskip("myst_nb", reason="Sphinx is not installed: it comes with the extra site")
    shutil.copytree(translation.LOCALE, tmp_path / "locale")
    lesson = tmp_path / "locale" / "ko" / "LC_MESSAGES" / "notebooks" / "00_the_bridge.po"
    text = lesson.read_text(encoding="utf-8")
    assert text.count('msgid "Ask it"') == 1
    lesson.write_text(text.replace('msgid "Ask it"', 'msgid "Ask them"'), encoding="utf-8")
    monkeypatch.setattr(translation, "LOCALE", tmp_path / "locale")
    monkeypatch.setattr(translation, "unequal_code", lambda html, language: [])  # there is no English page here
    site.build_language(tmp_path, "ko")
    page = (tmp_path / "html" / "ko" / "notebooks" / "00_the_bridge.html").read_text(encoding="utf-8")
    said = re.search(r"ko/notebooks/00_the_bridge: (\d+) of (\d+) paragraphs translated, (\d+) stale, (\d+) never done",
                     capsys.readouterr().out)
    done, all_of_it, stale, missing = map(int, said.groups())
    assert done + stale + missing == all_of_it and stale + missing >= 1
    assert ">Ask it<" in page and "물어보기" not in page
    assert f"{all_of_it}개 가운데 {stale + missing}개" in page  # the page says so, too
    cells = [cell.source for cell in nbformat.read(ROOT / "notebooks" / "00_the_bridge.ipynb", 4).cells
             if cell.cell_type == "code"]
    shown = translation.code_cells(tmp_path / "html" / "ko" / "notebooks" / "00_the_bridge.html")
    assert [digest(one) for one in shown] == [digest(html.escape(cell)) for cell in cells]

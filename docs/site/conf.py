"""Settings of the site, which `python -m minblip2.course.site` builds: read by Sphinx."""

import json
import posixpath
import re
from html import escape, unescape
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from minblip2 import __version__
from minblip2.course import translation

project, author, release, version = "minBLIP-2", "the minBLIP-2 authors", __version__, __version__
copyright = "the minBLIP-2 authors, MIT"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # of outputs: plain CommonMark knows no tables
nb_mime_priority_overrides = [("html", "text/html", 0), ("epub", "text/html", 0)]
myst_enable_extensions = ["dollarmath", "html_image", "attrs_inline"]
myst_heading_anchors = 3
exclude_patterns = ["code/files/**"]
suppress_warnings = ["mystnb.unknown_mime_type"]
default_role = "code"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
html_theme = "sphinx_book_theme"
html_title = "minBLIP-2"
html_theme_options = {"show_toc_level": 2, "use_download_button": True, "home_page_in_toc": True,
                      "show_navbar_depth": 1, "navbar_persistent": []}
html_theme_options["article_header_end"] = ["languages.html", "article-header-buttons.html"]
html_static_path, html_css_files = ["_static"], ["site.css"]
html_last_updated_fmt = None
epub_tocscope, epub_show_urls, epub_css_files = "includehidden", "no", ["site.css"]
NO_HEADER = re.compile(r"<th\b([^>]*)>\s*(?:<p></p>)?\s*</th>")  # heads nothing: readers of screens expect a plain cell
templates_path = ["_templates"]
locale_dirs = ["locale"]
gettext_compact, gettext_uuid, gettext_additional_targets = False, False, ["raw"]


def plain(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code` in it: an asterisk or an underscore in them is only that."""
    lines[:] = ["".join(part if part.startswith("`") else re.sub(r"([*_|])", r"\\\1", part)
                        for part in re.split(r"(`[^`]*`)", line)) for line in lines]


class InEnglish(SphinxPostTransform):
    """A link to a page that is not translated leads to the English one."""

    default_priority = 8  # before MyST looks for the page

    def run(self, **options):
        """Called by Sphinx."""
        for node in list(self.document.findall(addnodes.pending_xref)):
            target, _, anchor = node.get("reftarget", "").partition("#")
            if self.config.language == "en" or node["reftype"] != "myst" or node["refdomain"] == "doc":
                continue
            if target.endswith((".md", ".ipynb")):
                here = posixpath.dirname(self.env.docname)
                page = posixpath.splitext(posixpath.normpath(posixpath.join(here, target)))[0] + ".html"
                link = posixpath.relpath(page, posixpath.join(self.config.language, here)) + (anchor and f"#{anchor}")
                node.replace_self(nodes.reference("", "", *node.children, refuri=link))


def closed(body):
    """A page's HTML as XML, which books for e-readers are made of."""
    body = re.sub(r"""<(img|br|hr|input)((?:[^<>"']|"[^"]*"|'[^']*')*?)\s*/?>""", r"<\1\2/>", body)
    body = re.sub(r"&(?!(?:amp|lt|gt|quot|apos);)(\w+);", lambda match: unescape(match[0]), body)
    return re.sub(r"&(?!#?\w+;)", "&amp;", body)


def page_context(app, name, template, context, doctree):
    """The same page in other languages, and how much of it is translated."""
    language, found = app.config.language, {}
    if language != "en":  # a page that only this language has leads to the first English one
        found["en"] = "English", name if name in translation.catalogues(language) else "index"
    for other in set(translation.languages()) - {language}:
        if name in translation.catalogues(other):
            found[other] = words(other)["name"], f"{other}/{name}"
    here = posixpath.dirname(name if language == "en" else f"{language}/{name}") or "."
    context["language_links"] = [dict(code=code, name=called, url=posixpath.relpath(f"{page}.html", here))
                                 for code, (called, page) in sorted(found.items())]
    if "body" not in context:
        return
    context["body"] = NO_HEADER.sub(r"<td\1></td>", context["body"])
    if app.builder.name == "epub":
        context["body"] = closed(context["body"])
    standing = Path(app.srcdir) / "standing.json"
    if standing.exists():
        done, all_of_it = json.loads(standing.read_text(encoding="utf-8")).get(name, (0, 0))
        if done < all_of_it:
            note = escape(words(language)["partly"].format(left=all_of_it - done, all=all_of_it))
            context["body"] = f'<p class="admonition note">{note}</p>' + context["body"]


def words(language):
    """The site's own words in a language."""
    return json.loads((translation.LOCALE / language / "words.json").read_text(encoding="utf-8"))


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain)
    app.connect("html-page-context", page_context)
    app.add_post_transform(InEnglish)

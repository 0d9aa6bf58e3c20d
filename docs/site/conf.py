"""Settings of the site, which `python -m minblip2.course.site` builds: read by Sphinx."""

import re

from minblip2 import __version__

project, author, release = "minBLIP-2", "the minBLIP-2 authors", __version__
copyright = "the minBLIP-2 authors, MIT"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
nb_execution_mode = "off"
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
html_last_updated_fmt = None


def plain(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code` in it: an asterisk or an underscore in them is only that."""
    lines[:] = ["".join(part if part.startswith("`") else re.sub(r"([*_|])", r"\\\1", part)
                        for part in re.split(r"(`[^`]*`)", line)) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain)

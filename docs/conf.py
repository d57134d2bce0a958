"""The Sphinx configuration of the documentation, which `make docs` builds into docs/_build.

The source folder is the repository's root, so that a link between its Markdown files is the same on
the site and on a code host. Rooms of the package are imported by autodoc and by
`scripts/config_page.py`.
"""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import flowrl  # noqa: E402, F401 - first of all, since it silences what other imports say

project = "FlowRL"
author = "The FlowRL authors"
project_copyright = author
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
SHOWN = ("docs", "experiments", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
exclude_patterns = [
    *(path.name for path in ROOT.iterdir() if path.name not in SHOWN),
    "docs/_build",
]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}

html_theme = "furo"
html_title = "FlowRL"
html_extra_path = ["site_root"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add the generated reference to its page; samples are reached from their studies alone."""
    if docname == "docs/reference/configuration":
        from config_page import page

        source[0] += page()
    if docname.endswith("/samples"):
        source[0] = f"---\norphan: true\n---\n\n{source[0]}"


def as_restructured(
    app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]
) -> None:
    """Turn docstrings, which are plain text with `code`, into reStructuredText."""
    for number, line in enumerate(lines):
        parts = re.sub(r"(?<!`)`(?!`)", "``", line).split("``")
        for place in range(0, len(parts), 2):
            parts[place] = re.sub(r"([*|_\\])", r"\\\1", parts[place])
        lines[number] = line if line.startswith("    ") else "``".join(parts)
    # An indented formula needs a line that announces it.
    for number in reversed(range(len(lines))):
        is_first = number > 0 and not lines[number - 1].strip()
        if is_first and lines[number].startswith("    "):
            lines[number:number] = ["::", ""]


def setup(app: Sphinx) -> None:
    """Connect what is done to pages and docstrings."""
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_restructured)

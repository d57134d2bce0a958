"""What the HTML pages of FlowRL share: one file that works offline, with style, script and pictures
inside it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

COLOURS = 8
"""Of the style sheet, for curves, conditions and columns: `c0` to `c7`."""


def document(title: str, lead: str, body: str, script: str = "") -> str:
    """The page as text; `lead` stands below its title, and stays in view as that does."""
    css = Path(__file__).with_suffix(".css").read_text()
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{css}</style></head><body>"
        f"<header><h1>{escape(title)}</h1>{lead}</header><main>{body}</main><script>{script}</script></body></html>\n"
    )


def section(title: str, note: str, content: str, level: int = 2) -> str:
    """Content below a heading and a note, which may be empty."""
    head = f"<h{level}>{escape(title)}</h{level}>"
    return f"<section>{head}{paragraph(note) if note else ''}{content}</section>"


def paragraph(note: str) -> str:
    """A remark in plain text."""
    return f"<p class=note>{escape(note)}</p>"


def table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls sideways where it is wide; `heads` are HTML, `rows` the HTML of their
    cells.
    """
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    rows = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class=scroll><table>{rows}</table></div>"


def embedded(png: bytes) -> str:
    """The address of a picture that is inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()

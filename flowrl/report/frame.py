"""The frame that FlowRL's HTML pages share: templates that give one file, which works offline, with
style, script and pictures inside it.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = 8
"""The style sheet has so many for curves, conditions and columns: `c0` to `c7`."""


def fill(template: Path, **values: Any) -> str:
    """Fill a template, which may extend base.html and import macros.html, with plain values.

    Texts are escaped wherever they stand; what is markup already comes as `markupsafe.Markup`.
    Raises `jinja2.UndefinedError` for a value that the template asks for and is not given.
    """
    # A template that names a value nobody gave would otherwise leave a gap in the page.
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def embedded(picture: bytes, kind: str = "png") -> str:
    """Return the address of a picture that is inside the page, from the bytes of its file, a PNG or
    of another kind that browsers show.
    """
    text = base64.b64encode(picture).decode()
    return f"data:image/{kind};base64,{text}"

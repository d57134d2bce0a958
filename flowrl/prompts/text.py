"""Prompts are read from a text file, one a line."""

from __future__ import annotations

from flowrl.errors import UserError
from flowrl.prompts.lines import checked_text, holds_objects, read_lines
from flowrl.types import Prompt
from flowrl.values.bounds import Text


def text_prompts(*, path: Text) -> list[Prompt]:
    """Read the lines of a text file that are not blank, without the spaces around them.

    Raises UserError for a file that cannot be read as text, and for one with a JSON object a line.
    """
    lines = read_lines(path)
    if holds_objects(path, lines):
        raise UserError(
            f"prompts path={path}: a file of JSON objects; take data=jsonl, geneval or geneval2 "
            "for it"
        )
    prompts = []
    for number, line in lines:
        text = checked_text(line.strip(), f"prompts {path} line {number}")
        prompts.append(Prompt(text))
    return prompts

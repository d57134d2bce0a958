"""Prompts from a text file, one a line."""

from __future__ import annotations

from pathlib import Path

from flowrl.bounds import Text
from flowrl.errors import UserError
from flowrl.types import Prompt


def text_prompts(*, path: Text) -> list[Prompt]:
    """The non-empty lines of a UTF-8 file. Raises ValueError where there is no file or nothing in it."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"prompts path={path}: no such file; give a text file with one prompt a line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt(line) for line in lines if line]
    if not prompts:
        raise UserError(f"prompts path={path}: the file holds no prompt")
    return prompts

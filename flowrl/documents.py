"""JSON and YAML files read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from flowrl.errors import UserError

Kind = TypeVar("Kind", dict, list)
NAMES = {dict: "an object", list: "a list"}


def read_text(path: Path, remedy: str) -> str:
    """A UTF-8 file, without a byte-order mark. Raises UserError with `remedy` for other bytes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1}); {remedy}") from error


def parse_json(text: str, kind: type[Kind], place: str, remedy: str) -> Kind:
    """The JSON value of a text. Raises UserError, which names `place`, for no JSON and for a value of another kind."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); {remedy}") from error
    if not isinstance(value, kind):
        raise UserError(f"{place}: {NAMES[kind]} was expected, not {type(value).__name__}; {remedy}")
    return value


def read_json(path: Path, kind: type[Kind], remedy: str) -> Kind:
    """The JSON object or list of a file. Raises UserError, which names the file and tells `remedy`."""
    return parse_json(read_text(path, remedy), kind, str(path), remedy)

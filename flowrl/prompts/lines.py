"""The lines of a file of prompts are decoded and numbered here, and what cannot be a prompt is
refused, naming its line.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from flowrl.errors import UserError

OBJECTS = (".jsonl", ".ndjson", ".jsonlines")
"""Endings of the names of files with one JSON object a line."""
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
"""Endings of tables, whose lines are no prompts."""
PARQUET = b"PAR1"
"""The first bytes of a parquet file, whatever its name."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BYTE_ORDER_MARK = "\ufeff"
REMEDY = "save its prompts as UTF-8, one a line (.txt), or one JSON object a line (.jsonl)"


def read_lines(path: str) -> list[tuple[int, str]]:
    """Read the lines of a file that are not blank, with their numbers from 1.

    Byte-order marks are left out, wherever files that were put together have them. Raises UserError
    for a file that is not there, is a table, holds no line, or is not text in UTF-8 or, with its
    mark, UTF-16.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "no such file"
        raise UserError(
            f"prompts path={path}: {kind}; give a file with one prompt, or one JSON object, a line"
        )
    data = file.read_bytes()
    kind = "parquet" if data.startswith(PARQUET) else file.suffix.lower()
    if kind in ("parquet", *TABLES):
        readable = "" if "parquet" not in kind else "take data=hub for it, or "
        raise UserError(f"prompts path={path}: a table ({kind}); {readable}{REMEDY}")
    # Not str.splitlines, which also breaks lines at characters that may stand within a prompt.
    text = _decoded(path, data).replace(BYTE_ORDER_MARK, "")
    lines = re.split(r"\r\n|\r|\n", text)
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts path={path}: the file holds no prompt")
    return numbered


def _decoded(path: str, data: bytes) -> str:
    """Decode a file. Raises UserError, naming the line, where it is not text."""
    # UTF-16 is known by its mark alone: nearly any bytes would decode as it.
    encoding = "utf-16" if data.startswith(UTF16) else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        kind = f"not {encoding.upper()} (byte 0x{data[error.start]:02x})"
        if b"\0" in data:
            kind = "binary"
        raise UserError(f"prompts {path} line {line}: {kind}; {REMEDY}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"prompts {path} line {line}: binary, or UTF-16 without its mark; {REMEDY}")
    return text


def holds_objects(path: str, lines: list[tuple[int, str]]) -> bool:
    """Tell whether a file holds JSON objects, by its name or because all of its lines are some."""
    has_name = path.lower().endswith(OBJECTS)
    return has_name or all(_is_object(line) for _, line in lines)


def _is_object(line: str) -> bool:
    # Most lines of text are told by their first character, without an attempt to read them.
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def checked_text(text: Any, place: str) -> str:
    """Return a prompt's text, which may be any but an empty one that can be written as UTF-8.
    Raises UserError, naming `place`, for anything else.
    """
    if not isinstance(text, str):
        raise UserError(f"{place}: {text!r:.40} is no prompt; give a text")
    if not text.strip():
        raise UserError(f"{place}: the prompt is empty; give a text, or leave the line out")
    check_characters(text, place)
    return text


def check_characters(text: str, place: str) -> None:
    """Raise UserError for a NUL, and for half of a surrogate pair, which no tokenizer, file or
    server takes.
    """
    if match := re.search("[\0\ud800-\udfff]", text):
        code = ord(match[0])
        raise UserError(
            f"{place}: the character \\u{code:04x} cannot be part of a prompt; leave it out"
        )

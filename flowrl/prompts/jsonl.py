"""Prompts with metadata from a file of JSON objects, one a line: any such file, GenEval's and GenEval2's among them.

GenEval (arXiv 2310.11513) has `prompt`, `tag` and `include`; GenEval2 (arXiv 2512.16853) has `prompt`, `atom_count`,
`vqa_list` (pairs of a question and its answer) and `skills`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl.bounds import Text
from flowrl.errors import UserError
from flowrl.types import Prompt

FAMILIES = ("family", "tag", "atom_count")
"""Keys of the task family: our own, GenEval's and GenEval2's."""


def family_key(path: str) -> str | None:
    """Which of `FAMILIES` the objects of a file have, by its first line; None for none of them."""
    first = jsonl_prompts(path=path, text="prompt", family=None, required=[])[0]
    return next((key for key in FAMILIES if key in first.metadata), None)


def jsonl_prompts(*, path: Text, text: Text, family: Text | None, required: Sequence[Text]) -> list[Prompt]:
    """`text` names the key of the prompt, `family` that of the task family, which a number names as KEY_NUMBER.

    Every other key is metadata. Raises ValueError, naming the line, for one that is no object or lacks a key.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"prompts path={path}: no such file; give a file with one JSON object a line")
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    keys = [text, *required, *([family] if family else [])]
    prompts = [_prompt(line, f"{path} line {number}", text, family, keys) for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts path={path}: the file holds no prompt")
    return prompts


def _prompt(line: str, place: str, text: str, family: str | None, keys: Sequence[str]) -> Prompt:
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"prompts {place}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"prompts {place}: a JSON object was expected")
    if lacking := [key for key in keys if key not in data]:
        raise UserError(f"prompts {place}: no {lacking[0]!r}; it has {', '.join(map(repr, data))}")
    kind = data[family] if family else ""
    name = kind if isinstance(kind, str) else f"{family}_{kind}"
    # A family is one segment of a metric's name.
    return Prompt(str(data[text]), name.replace("/", "_"), {key: data[key] for key in data if key != text})

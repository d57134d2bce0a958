"""The kind of a file of prompts is seen from its name or its lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowrl.prompts.jsonl import family_key, jsonl_prompts, names_pictures
from flowrl.prompts.lines import holds_objects, read_lines
from flowrl.prompts.pictures import IMAGE
from flowrl.prompts.text import text_prompts
from flowrl.types import Prompt


def prompt_set(path: str) -> dict[str, Any]:
    """Describe a file as a prompt set of the configuration: lines of text, or JSON objects with the
    task families they name.
    """
    if not holds_objects(path, read_lines(path)):
        return {"_target_": _import_path(text_prompts), "path": path}
    described: dict[str, Any] = {
        "_target_": _import_path(jsonl_prompts),
        "path": path,
        "text": "prompt",
        "family": family_key(path),
        "required": [],
    }
    # Said where it matters alone: what was evaluated on other files stays as it was described.
    return described | {"image": IMAGE} if names_pictures(path) else described


def _import_path(function: Callable[..., Any]) -> str:
    # Written out, the name would be wrong once the function moves.
    return f"{function.__module__}.{function.__qualname__}"


def file_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a file of either kind. Raises UserError for a file of neither."""
    if holds_objects(path, read_lines(path)):
        return jsonl_prompts(
            path=path, text="prompt", family=family_key(path), required=[], image=IMAGE
        )
    return text_prompts(path=path)

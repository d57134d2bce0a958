"""The kind of a file of prompts is seen from its name or its lines."""

from __future__ import annotations

from typing import Any

from flowrl.prompts.jsonl import family_key, jsonl_prompts
from flowrl.prompts.lines import holds_objects, read_lines
from flowrl.prompts.text import text_prompts
from flowrl.types import Prompt


def prompt_set(path: str) -> dict[str, Any]:
    """Describe a file as a prompt set of the configuration: lines of text, or JSON objects with the
    task families they name.
    """
    if not holds_objects(path, read_lines(path)):
        return {"_target_": f"{text_prompts.__module__}.{text_prompts.__qualname__}", "path": path}
    return {
        "_target_": f"{jsonl_prompts.__module__}.{jsonl_prompts.__qualname__}",
        "path": path,
        "text": "prompt",
        "family": family_key(path),
        "required": [],
    }


def file_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a file of either kind."""
    if holds_objects(path, read_lines(path)):
        return jsonl_prompts(path=path, text="prompt", family=family_key(path), required=[])
    return text_prompts(path=path)

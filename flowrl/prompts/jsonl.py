"""Prompts with metadata are read from a file of JSON objects, one a line: any such file, GenEval's
and GenEval2's among them.

GenEval (arXiv 2310.11513) has `prompt`, `tag` and `include`; GenEval2 (arXiv 2512.16853) has
`prompt`, `atom_count`, `vqa_list` (pairs of a question and its answer) and `skills`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.prompts.lines import check_characters, checked_text, read_lines
from flowrl.prompts.pictures import IMAGE, with_pictures
from flowrl.types import Prompt
from flowrl.values.bounds import Text
from flowrl.values.texts import are_pairs, are_texts

FAMILIES = ("family", "tag", "atom_count")
"""Keys of the task family: our own, GenEval's and GenEval2's."""


def family_key(path: str) -> str | None:
    """Return the first of `FAMILIES` that an object of the file has, None where none has any."""
    prompts = jsonl_prompts(path=path, text="prompt", family=None, required=[])
    for key in FAMILIES:
        # One object is enough: others that lack the key are named where the file is read with it.
        if any(key in prompt.metadata for prompt in prompts):
            return key
    return None


def names_pictures(path: str) -> bool:
    """Tell whether an object of the file names a picture that its prompt says how to edit."""
    prompts = jsonl_prompts(path=path, text="prompt", family=None, required=[])
    return any(prompt.metadata.get(IMAGE) is not None for prompt in prompts)


def jsonl_prompts(
    *,
    path: Text,
    text: Text,
    family: Text | None,
    required: Sequence[Text],
    image: Text | None = None,
) -> list[Prompt]:
    """Read prompts: `text` names the key of the prompt, `family` that of the task family, which a
    number names as KEY_NUMBER, and `image` that of a picture that the prompt says how to edit, by
    its path from the file's folder.

    Every other key is metadata, but for `mask`, of the part of such a picture that is to be kept.
    Raises UserError, naming the line, for one that is no object, lacks a key, or has a value of
    another kind than its key means, and for a picture that cannot be read.
    """
    keys = [text, *required]
    if family:
        keys.append(family)
    prompts = []
    for number, line in read_lines(path):
        place = f"prompts {path} line {number}"
        prompt = prompt_of(read_object_line(line, place), place, text, family, keys)
        if image is not None:
            prompt = with_pictures(prompt, image, Path(path).expanduser().parent, place)
        prompts.append(prompt)
    # The usual key may be absent, as where no prompt has a picture; another one was typed.
    if image not in (None, IMAGE) and not any(prompt.image for prompt in prompts):
        raise UserError(
            f"prompts {path}: image={image}, but no line has a picture by the key {image!r}; name "
            "the lines' own, or null"
        )
    return prompts


def prompt_of(
    data: Mapping[str, Any], place: str, text: str, family: str | None, keys: Sequence[str]
) -> Prompt:
    """Make a prompt of an object that must have all `keys`. Raises UserError, naming `place`, for
    one that is none.
    """
    for key in keys:
        if key not in data:
            present = ", ".join(map(repr, data))
            raise UserError(f"{place}: no {key!r}; it has {present}")
    _check_questions(data, place)
    prompt = checked_text(data[text], f"{place}: {text!r}")
    name = _family_name(family, data[family], place) if family else ""
    # The family's key stays in the metadata, where a reward may read it.
    metadata = {key: value for key, value in data.items() if key != text}
    return Prompt(prompt, name, metadata)


def read_object_line(line: str, place: str) -> dict[str, Any]:
    """Read a line as a JSON object whose texts can be part of a prompt."""
    try:
        data: Any = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); a line must be one whole object") from error
    if not isinstance(data, dict):
        raise UserError(f"{place}: a JSON object was expected, not {type(data).__name__}")
    # Not the line itself, which may spell such characters, as \ud800.
    check_characters(json.dumps(data, ensure_ascii=False), place)
    return data


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and other programs do not."""
    raise ValueError(f"{name} is no JSON number")


def _family_name(key: str, value: Any, place: str) -> str:
    """Name a task family, as one segment of a metric's name."""
    # To Python a boolean is a number too.
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(
            f"{place}: {key!r}: {value!r:.40} is no task family; give a text or a number"
        )
    name = value if isinstance(value, str) else f"{key}_{value}"
    # A slash would begin another group of metrics.
    return name.replace("/", "_")


def _check_questions(data: Mapping[str, Any], place: str) -> None:
    """Check what a judge is asked, which would otherwise fail in the middle of training."""
    questions = data.get("vqa_list", [])
    if not are_pairs(questions):
        raise UserError(f"{place}: 'vqa_list' must be a list of pairs of texts, [question, answer]")
    if not are_texts(data.get("skills", [])):
        raise UserError(
            f"{place}: 'skills' must be a list of texts, one for each question, or be left out"
        )

"""The configuration of a run as strangers may read it: without secrets, trackers, addresses of
servers and places on the machine that it ran on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.description import plain_name

LEFT_OUT = ("logger", "resume", "run_dir", "trust_folder")
"""Keys at the top of a configuration that say where and for whom a run was made, not how."""

SERVER = "http://SERVER"
"""What stands for an address that is none of the hub's."""

_SECRET = re.compile(r"(token|password|passwd|secret|credentials?|(api|access|private)_?key)$")
_TOKEN = re.compile(r"\b(hf_|sk-|wandb_v1_|gh[pousr]_)\w[\w-]{15,}")
_ADDRESS = re.compile(r"\b[a-z][a-z+]*://[^\s'\"]+")
_HUB = re.compile(r"https://(huggingface\.co|arxiv\.org)(/|$)")
_ROOTED = re.compile(r"(~|\.\.?[/\\]|/|\\\\|[A-Za-z]:[/\\])")
_PATH_WITHIN = re.compile(r"(?<![\w.:/\\*)\]}-])(~?/[^\s'\",;()\[\]]+|[A-Za-z]:[/\\][^\s'\",;]+)")


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration for strangers: texts are cleaned by `clean`, values under the names of
    secrets become null, and the keys of `LEFT_OUT` are gone.
    """
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
    result = _cleaned(kept, "")
    assert isinstance(result, dict)
    return result


def _cleaned(value: Any, key: str) -> Any:
    """Clean a value and all below it; `key` is the last one above it."""
    if isinstance(value, Mapping):
        return {name: _cleaned(below, str(name)) for name, below in value.items()}
    if isinstance(value, list):
        return [_cleaned(below, key) for below in value]
    if not isinstance(value, str):
        return value
    return None if _SECRET.search(key.lower()) else clean(value)


def clean(text: str) -> str:
    """Return a text without tokens, addresses of servers and the folders of rooted paths: of a path
    its last segment stays.
    """
    if _ROOTED.match(text) and "\n" not in text:
        return plain_name(text)
    text = _TOKEN.sub("TOKEN", text)
    text = _ADDRESS.sub(_of_address, text)
    return _PATH_WITHIN.sub(lambda match: plain_name(match[0]), text)


def _of_address(match: re.Match[str]) -> str:
    """Return what stands for an address: itself where it is public."""
    address = match[0]
    if address.startswith("file:"):
        return plain_name(address)
    return address if _HUB.match(address) else SERVER


def refuse_places(files: Iterable[Path], places: Iterable[Path]) -> None:
    """Raise UserError where a file that is about to be published holds the path of one of the
    places, such as the home folder.
    """
    # The root of all paths says nothing of a machine.
    texts = [str(place).encode() for place in places if len(place.parts) > 1]
    for file in files:
        content = file.read_bytes()
        for text in texts:
            if text in content:
                raise UserError(
                    f"{file} holds {text.decode()}, a place on this machine; nothing is "
                    "published: take it out of the run's files, then push again"
                )

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
from flowrl.runs.secrets import is_secret

LEFT_OUT = (
    *("logger", "resume", "run_dir", "trust_folder"),
    *("condition", "sweep", "tags"),  # which repeat what was typed
)
"""Keys at the top of a configuration that say where and for whom a run was made, not how."""

SERVER = "http://SERVER"
"""What stands for an address that is none of the hub's."""

_TOKEN = re.compile(r"\b(hf_|sk-|wandb_v1_|gh[pousr]_)\w[\w-]{15,}")
_BEARER = re.compile(r"(?i)\bbearer\s+\S+")
_ADDRESS = re.compile(r"(?i)\b[a-z][a-z0-9+.-]*://[^\s'\"]+|\b\d{1,3}(\.\d{1,3}){3}(:\d+)?\b")
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
    if is_secret(key):
        return None
    if isinstance(value, Mapping):
        return {name: _cleaned(below, str(name)) for name, below in value.items()}
    if isinstance(value, list):
        return [_cleaned(below, key) for below in value]
    if not isinstance(value, str):
        return value
    return clean(value)


def clean(text: str) -> str:
    """Return a text without tokens, addresses of servers and the folders of rooted paths: of a path
    its last segment stays.
    """
    if _ROOTED.match(text) and "\n" not in text:
        return plain_name(text)
    text = _BEARER.sub("TOKEN", _TOKEN.sub("TOKEN", text))
    text = _ADDRESS.sub(_of_address, text)
    return _PATH_WITHIN.sub(lambda match: plain_name(match[0]), text)


def _of_address(match: re.Match[str]) -> str:
    """Return what stands for an address: itself where it is public."""
    address = match[0]
    if address.startswith("file:"):
        return plain_name(address)
    # What follows the question mark may be a key.
    return address.partition("?")[0] if _HUB.match(address) else SERVER


def refuse_places(files: Iterable[Path], places: Iterable[Path]) -> None:
    """Raise UserError where a file that is about to be published holds the path of one of the
    places, such as the home folder.
    """
    # The root of all paths says nothing of a machine.
    rooted = [place for place in places if len(place.parts) > 1]
    for file in files:
        content = _told_by(file)
        for place in rooted:
            # A longer name that begins alike, such as me/data-lora of /data, is no such place.
            name = re.escape(str(place).encode())
            if re.search(rb"(?<![\w.-])" + name + rb"(?![\w.-])", content):
                raise UserError(
                    f"{file} holds {place}, a place on this machine; nothing is "
                    "published: take it out of the run's files, then push again"
                )


def _told_by(file: Path) -> bytes:
    """Read what a file says in text: of weights the head alone, whose numbers hold any bytes."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))

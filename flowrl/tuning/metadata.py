"""The metadata of LoRA files: what a LoRA was trained on and how, under `flowrl.` keys in every
format, and under those of ModelSpec in ComfyUI's.

Names of keys and architectures: ModelSpec (Stability AI) in version 1.0.1 of its use by kohya's
sd-scripts, and of architectures those that sd-scripts, musubi-tuner and SwarmUI read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowrl import __version__
from flowrl.runs.description import base_model_of, method_of, plain_name, reward_of
from flowrl.runs.files import grant_usual_mode, replacing
from flowrl.values.sizes import known_size

PREFIX = "flowrl."
BASE = f"{PREFIX}base_model"
METHOD = f"{PREFIX}method"
REWARD = f"{PREFIX}reward"
NAME = f"{PREFIX}name"
RESOLUTION = f"{PREFIX}resolution"
VERSION = f"{PREFIX}version"

ARCHITECTURES: Mapping[str, str] = {
    "stabilityai/stable-diffusion-3.5-medium": "stable-diffusion-v3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "stable-diffusion-v3.5-large",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev",
    "black-forest-labs/FLUX.2-dev": "Flux.2-dev",
    "black-forest-labs/FLUX.2-klein-4B": "Flux.2-klein-4b",
    "black-forest-labs/FLUX.2-klein-9B": "Flux.2-klein-9b",
    # A distilled model has the layers of the one that it came from.
    "black-forest-labs/FLUX.2-klein-base-4B": "Flux.2-klein-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "Flux.2-klein-9b",
}
"""The architectures of base models, as programs that load LoRA files name them."""

USAGE = "No trigger words: prompt as with the base model, at strength 1."

Notes = Mapping[str, str]
"""The `flowrl.` keys of a file, with their texts."""


def notes_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a LoRA file says of the run with this configuration, without a date or a path, so
    that equal runs write equal files.
    """
    notes = {VERSION: __version__}
    if not config:
        return notes
    notes[BASE] = base_model_of(config)
    notes[METHOD] = method_of(config).name
    notes[REWARD] = reward_of(config)
    if size := known_size(config):
        height, width = size
        notes[RESOLUTION] = f"{width}x{height}"  # in ModelSpec's order
    if name := config.get("name"):
        notes[NAME] = str(name)
    return notes


def only_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's `flowrl.` keys; none of a file that another program wrote."""
    return {key: value for key, value in metadata.items() if key.startswith(PREFIX)}


def modelspec(notes: Notes, day: str) -> dict[str, str]:
    """Return the keys of ModelSpec for a LoRA whose file was written on that day; none where its
    base model is not known, since the architecture is required.
    """
    base = notes.get(BASE)
    if base is None:
        return {}
    name = plain_name(base)
    method = notes.get(METHOD)
    title = notes.get(NAME, f"{name} LoRA")
    by = f" by {method}" if method else ""
    reward = f", reward {notes[REWARD]}" if REWARD in notes else ""
    fields = {
        "sai_model_spec": "1.0.1",
        # A base model that no program lists is one of its own.
        "architecture": f"{ARCHITECTURES.get(base, name.removeprefix('embedded:'))}/lora",
        "implementation": "diffusers",  # by whose names the layers go
        "title": title,
        "description": f"LoRA of {base}, trained{by}{reward}, with FlowRL.",
        "date": day,
        "usage_hint": USAGE,
    }
    if RESOLUTION in notes:
        fields["resolution"] = notes[RESOLUTION]
    return {f"modelspec.{key}": value for key, value in fields.items()}


def day_of(file: Path) -> str:
    """Return the day, by UTC, on which a file was last written."""
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).date().isoformat()


def stamp(file: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to a whole safetensors file, or leave it as it is; its tensors and its other
    metadata stay.

    The head is sorted, which the library writes in any order, so that equal content is an equal
    file.
    """
    with file.open("rb") as opened, replacing(file) as partial:
        # The format: the length of the head in eight bytes, the head as JSON, the tensors, whose
        # places count from there.
        length = int.from_bytes(opened.read(8), "little")
        head = json.loads(opened.read(length))
        head["__metadata__"] = {**head.get("__metadata__", {}), **metadata}
        text = json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of eight
        with partial.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(opened, target)
        grant_usual_mode(partial)

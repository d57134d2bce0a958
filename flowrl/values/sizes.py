"""The size of pictures: a configuration has one number of pixels for squares, or a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def height_and_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of `model.resolution`, in this order."""
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution
    return height, width


def known_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the pictures of a saved configuration; None where it has neither
    `model.resolution` nor both in `model.call`, or one of another kind, as a private model may.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        return None
    call = model.get("call") or {}
    resolution = model.get("resolution", [call.get("height"), call.get("width")])
    sides = [resolution] if isinstance(resolution, int) else resolution
    if not isinstance(sides, Sequence) or not all(isinstance(side, int) for side in sides):
        return None
    return (sides[0], sides[-1]) if 1 <= len(sides) <= 2 else None


def in_words(height: int, width: int) -> str:
    """Return a size as a text has it: "512", or "384 x 512 (height x width)"."""
    return str(height) if height == width else f"{height} x {width} (height x width)"

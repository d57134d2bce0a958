"""A run's record tells whether its model draws pictures or clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.runs.files import PARITY, read_object


def num_frames_of(config: Mapping[str, Any], folder: Path) -> int | None:
    """Return how many frames a clip has that the model of the run in `folder` draws, which may be
    one alone; None where its pipeline draws pictures.

    The check of a derived model recorded what the pipeline drew, whatever its call was given. Where
    an earlier version's record does not say so, the call's own number of frames tells. Raises
    UserError for a damaged record.
    """
    path = folder / PARITY
    if path.is_file():
        record = read_object(path, "restore it, or push another run")
        for check in record.get("checks") or ():
            if "num_frames" in check:
                frames: int | None = check["num_frames"]
                return frames
    call = (config.get("model") or {}).get("call") or {}
    asked: int | None = call.get("num_frames")
    return asked


def is_moving(num_frames: int | None) -> bool:
    """Tell whether so many frames are a clip: a single one is a picture."""
    return num_frames is not None and num_frames > 1

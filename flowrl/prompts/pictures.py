"""Pictures that come with prompts are found, read once to see that they can be, and known by their
content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.errors import UserError
from flowrl.images.pictures import read_upright
from flowrl.types import PictureFile, Prompt

IMAGE = "image"
"""The key of a prompt's picture, unless a configuration names another one."""

MASK = "mask"
"""The key of the part of a picture that an edit should keep, a picture that is white there."""


def with_pictures(prompt: Prompt, key: str, folder: Path, place: str) -> Prompt:
    """Return the prompt with its picture and mask, where its metadata name any by paths from
    `folder`; they are no metadata then.

    Raises UserError, naming `place`, for a value that is no path, for a file that is missing or
    cannot be read as a picture, and for a mask of another size than its picture.
    """
    value = prompt.metadata.get(key)
    if value is None:
        return prompt
    image, size = _picture(value, key, folder, place)
    mask = None
    if prompt.metadata.get(MASK) is not None:
        mask, mask_size = _picture(prompt.metadata[MASK], MASK, folder, place)
        if mask_size != size:
            sizes = [f"{width} x {height}" for width, height in (mask_size, size)]
            raise UserError(
                f"{place}: {MASK!r} is {sizes[0]} pixels and {key!r} {sizes[1]}; give one size"
            )
    metadata = {name: value for name, value in prompt.metadata.items() if name not in (key, MASK)}
    return replace(prompt, metadata=metadata, image=image, mask=mask)


def sources_of(prompts: Sequence[Prompt]) -> list[Image.Image]:
    """Read the picture of each prompt; none where one or more have none."""
    files = [prompt.image for prompt in prompts if prompt.image is not None]
    if len(files) < len(prompts):
        return []
    return [read_upright(Path(file.path)) for file in files]


def _picture(value: Any, key: str, folder: Path, place: str) -> tuple[PictureFile, tuple[int, int]]:
    """Return a picture by its path from the folder, and its width and height."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{place}: {key!r}: {value!r:.40} is no path of a picture")
    path = folder / Path(value).expanduser()
    try:
        stat = path.stat()
        digest, size = _examine(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"{place}: {key!r}: {path}: {error.strerror}; paths go from the folder of the prompts' "
            "file"
        ) from error
    except UserError as error:
        raise UserError(f"{place}: {key!r}: {error}") from error
    return PictureFile(str(path), digest), size


@cache
def _examine(path: Path, num_bytes: int, changed: int) -> tuple[str, tuple[int, int]]:
    """Return a digest of a file, and the size of its picture, which is read whole: what cannot be
    would fail in the middle of a run. The other arguments tell another content of the same path.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest(), read_upright(path).size

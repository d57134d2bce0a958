"""Reward servers and their clients say this to each other: JSON with images as base64 PNG, never
pickle.

A request is `{"images": [PNG, ...], "prompts": [{"text": ..., "family": ..., "metadata": {...}},
...]}`, its images all of one size. The answer is `{"values": [...], "parts": {name: [...]},
"reasons": [...], "applies": [...]}`, one entry a sample: a value is a number, or null where the
sample is missing, and its reason then says why; `applies` is false where the scorer has nothing to
say about the prompt, and may be left out where it never is. Images are rounded to 8 bits on the
way, as they are wherever images are saved.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from pydantic_core import from_json
from torch import Tensor

from flowrl.errors import UserError
from flowrl.rewards.images import to_pictures
from flowrl.rewards.outputs import REASON
from flowrl.rewards.png import decode, read_size
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput

VALUE_BYTES = 100
"""About what a JSON value takes in Python, also an empty object, which is three bytes in the file.
"""

TEXT_BYTES = 4
"""Bytes that a character takes at most."""


class TooLarge(ValueError):
    """A request over one of the server's limits."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read: its images as base64 PNG, not yet decoded, their common width and
    height, and their prompts.

    `num_bytes` is what it takes in memory once it is decoded.
    """

    encoded: list[str]
    size: tuple[int, int]
    prompts: list[Prompt]
    num_bytes: int

    def pixels(self) -> UInt8[Tensor, "B 3 H W"]:
        """Decode the images as they were sent. Raises UserError for one that is damaged."""
        width, height = self.size
        pixels = torch.empty(len(self.encoded), 3, height, width, dtype=torch.uint8)
        for row, encoded in zip(pixels, self.encoded, strict=True):
            row.copy_(decode(encoded))
        return pixels

    def images(self) -> Float[Tensor, "B 3 H W"]:
        """Decode the images to [0, 1], four times as large. Raises UserError for a damaged one."""
        return to_unit(self.pixels())


def to_unit(pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Scale pixels to the images in [0, 1] that scorers take."""
    return pixels.float().div_(255)


def png(picture: Image.Image) -> str:
    """Write a picture as base64 PNG, lightly compressed: the network is faster than zlib's higher
    levels.
    """
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def request(images: Images, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Write the request that a client sends; the images have one size."""
    encoded = [png(picture) for picture in to_pictures(images)]
    asked = []
    for prompt in prompts:
        entry = {
            "text": prompt.text,
            "family": prompt.family,
            "metadata": dict(prompt.metadata),
        }
        asked.append(entry)
    return {"images": encoded, "prompts": asked}


def read_request(
    body: bytes | bytearray,
    *,
    max_images: int,
    max_image_bytes: int,
    max_decoded_bytes: int,
) -> Asked:
    """Read a request's body.

    What it will take in memory is counted from the images' headers, before any is decoded: 3 bytes
    a pixel, however few bits the file has for it. Raises TooLarge where that is more than
    `max_decoded_bytes`, where an image takes more than `max_image_bytes`, or where there are more
    images than `max_images`; UserError for a body that is no request.
    """
    # Every entry of a list and every pair of an object follows one of these. Counted before they
    # are parsed, since parsing is what takes the memory.
    num_values = body.count(b",") + body.count(b"[") + body.count(b"{")
    values = VALUE_BYTES * num_values
    if values > max_decoded_bytes:
        raise TooLarge(
            f"JSON values of {values} bytes in one request, more than "
            f"max_decoded_bytes={max_decoded_bytes}"
        )
    images, prompts = _images_and_prompts(_json(body))
    if len(images) > max_images:
        raise TooLarge(
            f"{len(images)} images in one request, more than max_images={max_images}; send fewer "
            "at a time"
        )
    sizes = [read_size(image) for image in images]
    areas = [3 * width * height for width, height in sizes]
    largest = max(areas)
    if largest > max_image_bytes:
        width, height = sizes[areas.index(largest)]
        raise TooLarge(
            f"an image of {width} x {height} takes {largest} bytes decoded, more than "
            f"max_image_bytes={max_image_bytes}; send smaller ones"
        )
    # What is no image may all be texts.
    num_encoded = sum(len(image) for image in images)
    texts = TEXT_BYTES * (len(body) - num_encoded)
    num_bytes = sum(areas) + texts + values
    if num_bytes > max_decoded_bytes:
        raise TooLarge(
            f"a request that takes {num_bytes} bytes decoded, more than "
            f"max_decoded_bytes={max_decoded_bytes}; send fewer images at a time"
        )
    if len(set(sizes)) > 1:
        raise UserError("the images of one request must have one size")
    return Asked(
        encoded=images,
        size=sizes[0],
        prompts=[_prompt(prompt) for prompt in prompts],
        num_bytes=num_bytes,
    )


def _images_and_prompts(data: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the lists of a request, which have one length and are not empty."""
    images = data.get("images")
    prompts = data.get("prompts")
    if isinstance(images, list) and isinstance(prompts, list) and 0 < len(images) == len(prompts):
        return images, prompts
    raise UserError("a request has `images` and `prompts`, lists of one length, at least 1")


def _json(body: bytes | bytearray) -> dict[str, Any]:
    """Read the JSON object in a body. Raises UserError for anything else."""
    try:
        data = from_json(body)  # json.loads would hold the body's text a second time
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"a JSON object was expected, not {type(data).__name__}")
    return data


def _prompt(data: Any) -> Prompt:
    """Read a prompt, whose family and metadata may be left out. Raises UserError for anything
    else.
    """
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise UserError("a prompt is an object with a `text`")
    family = data.get("family", "")
    metadata = data.get("metadata", {})
    if not isinstance(family, str) or not isinstance(metadata, dict):
        raise UserError("a prompt's `family` is a text and its `metadata` an object")
    return Prompt(data["text"], family, metadata)


def answer(output: RewardOutput) -> dict[str, Any]:
    """Write the answer that a server sends: null for what is missing or not a number."""
    info = output.info or [{}] * len(output.values)
    values = output.values.masked_fill(~output.is_valid, torch.nan)
    return {
        "values": _or_null(values),
        "parts": {name: _or_null(part) for name, part in output.parts.items()},
        "reasons": [entry.get(REASON) for entry in info],
        "applies": output.is_judged.tolist(),
    }


def _or_null(values: Float[Tensor, "B"]) -> list[float | None]:
    """Return numbers for JSON, which has neither NaN nor infinity."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def read_answer(body: bytes, count: int) -> RewardOutput:
    """Read the scores in an answer to `count` images. Raises UserError, saying what is wrong, for
    anything else.

    A value that is null, NaN or infinite makes its sample missing, with the server's reason where
    it gave one.
    """
    data = _json(body)
    values = _numbers(data.get("values"), count, "values")
    parts = _parts(data.get("parts", {}), count)
    reasons = data.get("reasons") or [None] * count
    if not isinstance(reasons, list) or len(reasons) != count:
        raise UserError(f"`reasons` must be a list of {count}")
    applies = _flags(data.get("applies", [True] * count), count)
    # A sample that the scorer has nothing to say about is not missing.
    is_valid = values.isfinite() | ~applies
    info: list[Mapping[str, Any]] = [{}] * count
    missing_rows = (~is_valid).nonzero().flatten().tolist()
    for row in missing_rows:
        info[row] = {REASON: str(reasons[row] or "the server gave no number")}
    # Their place is held by a finite number, which nothing reads.
    values = values.nan_to_num(0.0, 0.0, 0.0)
    return RewardOutput(
        values=values,
        is_valid=is_valid,
        parts=parts,
        info=info,
        applies=applies[:, None],  # one column, as of a single reward term
    )


def _parts(data: Any, count: int) -> dict[str, Float[Tensor, "B"]]:
    """Read the parts of `count` samples. A slash in a name would open a level among metrics."""
    if not isinstance(data, dict) or any("/" in name for name in data):
        raise UserError("`parts` must be an object of lists, its names without a slash")
    return {str(name): _numbers(part, count, f"part {name}") for name, part in data.items()}


def _flags(data: Any, count: int) -> Bool[Tensor, "B"]:
    """Read one boolean a sample."""
    is_list = isinstance(data, list) and len(data) == count
    if not is_list or not all(isinstance(flag, bool) for flag in data):
        raise UserError(f"`applies` must be a list of {count} booleans")
    return torch.tensor(data)


def _numbers(data: Any, count: int, name: str) -> Float[Tensor, "B"]:
    """Read one number a sample, NaN for null."""
    if not isinstance(data, list):
        raise UserError(f"{count} images, but {name}: {type(data).__name__}")
    if len(data) != count:
        raise UserError(f"{count} images, but {name}: {len(data)} entries")
    numbers = [_number(value, name) for value in data]
    return torch.tensor(numbers)


def _number(value: Any, name: str) -> float:
    if value is None:
        return math.nan
    # To Python true is a number, 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be numbers or null, not {value!r:.40}")
    try:
        return float(value)
    except OverflowError as error:  # whole numbers of JSON have no bound
        raise UserError(f"{name}: {error}") from error

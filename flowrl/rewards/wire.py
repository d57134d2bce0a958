"""What reward servers and their clients say to each other: JSON with images as base64 PNG, never
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
"""What a character takes at most."""


class TooLarge(ValueError):
    """A request over one of the server's limits."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its images as base64 PNG, not yet decoded, their common width and height, and
    their prompts.

    `num_bytes` is what it takes in memory once it is decoded.
    """

    encoded: list[str]
    size: tuple[int, int]
    prompts: list[Prompt]
    num_bytes: int

    def pixels(self) -> UInt8[Tensor, "B 3 H W"]:
        """The images as they were sent. Raises UserError for one that is damaged."""
        width, height = self.size
        pixels = torch.empty(len(self.encoded), 3, height, width, dtype=torch.uint8)
        for row, encoded in zip(pixels, self.encoded, strict=True):
            row.copy_(decode(encoded))
        return pixels

    def images(self) -> Float[Tensor, "B 3 H W"]:
        """The images in [0, 1], four times as large. Raises UserError for one that is damaged."""
        return to_unit(self.pixels())


def to_unit(pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """The images in [0, 1] that scorers take."""
    return pixels.float().div_(255)


def png(picture: Image.Image) -> str:
    """A picture as base64 PNG. Lightly compressed: the network is faster than zlib's higher
    levels.
    """
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def request(images: Images, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a client sends."""
    asked = [{"text": p.text, "family": p.family, "metadata": dict(p.metadata)} for p in prompts]
    return {"images": [png(picture) for picture in to_pictures(images)], "prompts": asked}


def read_request(
    body: bytes | bytearray, *, max_images: int, max_image_bytes: int, max_decoded_bytes: int
) -> Asked:
    """What a request's body asks for.

    What it will take in memory is counted from the images' headers, before any is decoded: 3 bytes
    a pixel, however few bits the file has for it. Raises TooLarge where that is more than
    `max_decoded_bytes`, where an image takes more than `max_image_bytes`, or where there are more
    images than `max_images`; UserError for a body that is no request.
    """
    values = VALUE_BYTES * (body.count(b",") + body.count(b"[") + body.count(b"{"))
    if values > max_decoded_bytes:  # before they are parsed
        raise TooLarge(
            f"JSON values of {values} bytes in one request, more than "
            f"max_decoded_bytes={max_decoded_bytes}"
        )
    data = _json(body)
    images = data.get("images")
    prompts = data.get("prompts")
    if (
        not isinstance(images, list)
        or not isinstance(prompts, list)
        or not images
        or len(images) != len(prompts)
    ):
        raise UserError("a request has `images` and `prompts`, lists of one length, at least 1")
    if len(images) > max_images:
        raise TooLarge(
            f"{len(images)} images in one request, more than max_images={max_images}; send fewer "
            "at a time"
        )
    sizes = [read_size(image) for image in images]
    areas = [3 * width * height for width, height in sizes]
    texts = TEXT_BYTES * (len(body) - sum(len(image) for image in images))
    if max(areas) > max_image_bytes:
        width, height = sizes[areas.index(max(areas))]
        raise TooLarge(
            f"an image of {width} x {height} takes {max(areas)} bytes decoded, more than "
            f"max_image_bytes={max_image_bytes}; send smaller ones"
        )
    num_bytes = sum(areas) + texts + values
    if num_bytes > max_decoded_bytes:
        raise TooLarge(
            f"a request that takes {num_bytes} bytes decoded, more than "
            f"max_decoded_bytes={max_decoded_bytes}; "
            "send fewer images at a time"
        )
    if len(set(sizes)) > 1:
        raise UserError("the images of one request must have one size")
    return Asked(images, sizes[0], [_prompt(prompt) for prompt in prompts], num_bytes)


def _json(body: bytes | bytearray) -> dict[str, Any]:
    try:
        data = from_json(body)  # json.loads would hold the body's text a second time
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"a JSON object was expected, not {type(data).__name__}")
    return data


def _prompt(data: Any) -> Prompt:
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise UserError("a prompt is an object with a `text`")
    family = data.get("family", "")
    metadata = data.get("metadata", {})
    if not isinstance(family, str) or not isinstance(metadata, dict):
        raise UserError("a prompt's `family` is a text and its `metadata` an object")
    return Prompt(data["text"], family, metadata)


def answer(output: RewardOutput) -> dict[str, Any]:
    """What a server sends back: null for what is missing or not a number."""
    info = output.info or [{}] * len(output.values)
    values = [
        v if ok else None
        for v, ok in zip(output.values.tolist(), output.is_valid.tolist(), strict=True)
    ]
    return {
        "values": [_finite(value) for value in values],
        "parts": {
            name: [_finite(value) for value in part.tolist()] for name, part in output.parts.items()
        },
        "reasons": [entry.get(REASON) for entry in info],
        "applies": _applies(output).tolist(),
    }


def _applies(output: RewardOutput) -> Bool[Tensor, "B"]:
    return (
        torch.ones(len(output.values), dtype=torch.bool)
        if output.applies is None
        else output.applies.any(1)
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_answer(body: bytes, count: int) -> RewardOutput:
    """The scores in an answer to `count` images. Raises UserError, saying what is wrong, for
    anything else.

    A value that is null, NaN or infinite makes its sample missing, with the server's reason where
    it gave one.
    """
    data = _json(body)
    values = _numbers(data.get("values"), count, "values")
    parts = data.get("parts", {})
    if not isinstance(parts, dict) or any("/" in name for name in parts):
        raise UserError("`parts` must be an object of lists, its names without a slash")
    reasons = data.get("reasons") or [None] * count
    if not isinstance(reasons, list) or len(reasons) != count:
        raise UserError(f"`reasons` must be a list of {count}")
    applies = data.get("applies", [True] * count)
    if (
        not isinstance(applies, list)
        or len(applies) != count
        or not all(isinstance(each, bool) for each in applies)
    ):
        raise UserError(f"`applies` must be a list of {count} booleans")
    is_valid = values.isfinite() | ~torch.tensor(applies)
    info: list[Mapping[str, Any]] = []
    for reason, ok in zip(reasons, is_valid.tolist(), strict=True):
        info.append({} if ok else {REASON: str(reason or "the server gave no number")})
    tensors = {str(name): _numbers(part, count, f"part {name}") for name, part in parts.items()}
    values = values.nan_to_num(0.0, 0.0, 0.0)
    return RewardOutput(values, is_valid, tensors, info, applies=torch.tensor(applies)[:, None])


def _numbers(data: Any, count: int, name: str) -> Float[Tensor, "B"]:
    if not isinstance(data, list) or len(data) != count:
        given = f"{len(data)} entries" if isinstance(data, list) else type(data).__name__
        raise UserError(f"{count} images, but {name}: {given}")
    if odd := [
        value
        for value in data
        if isinstance(value, bool) or not isinstance(value, int | float | None)
    ]:
        raise UserError(f"{name} must be numbers or null, not {odd[0]!r:.40}")
    try:
        return torch.tensor([math.nan if value is None else float(value) for value in data])
    except OverflowError as error:
        raise UserError(f"{name}: {error}") from error

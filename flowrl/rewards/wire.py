"""What reward servers and their clients say to each other: JSON with images as base64 PNG, never pickle.

A request is `{"images": [PNG, ...], "prompts": [{"text": ..., "family": ..., "metadata": {...}}, ...]}`, its images
all of one size. The answer is `{"values": [...], "parts": {name: [...]}, "reasons": [...], "applies": [...]}`, one
entry a sample: a value is a number, or null where the sample is missing, and its reason then says why; `applies` is
false where the scorer has nothing to say about the prompt, and may be left out where it never is. Images are
rounded to 8 bits on the way, as they are wherever images are saved.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from flowrl.errors import UserError
from flowrl.pictures import to_rgb
from flowrl.rewards.images import to_pictures
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput


class TooLarge(ValueError):
    """A request over one of the server's limits."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its images, of which only the headers are read, and their prompts."""

    files: list[PngImageFile]
    prompts: list[Prompt]

    def images(self) -> Float[Tensor, "B 3 H W"]:
        """The images in [0, 1]. Raises ValueError for one that is damaged. To be called once: files are read away."""
        return torch.stack([_decode(file) for file in self.files]).float().div_(255)


def png(picture: Image.Image) -> str:
    """A picture as base64 PNG. Lightly compressed: the network is faster than zlib's higher levels."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def request(images: Images, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a client sends."""
    asked = [{"text": p.text, "family": p.family, "metadata": dict(p.metadata)} for p in prompts]
    return {"images": [png(picture) for picture in to_pictures(images)], "prompts": asked}


def read_request(body: bytes, *, max_images: int, max_pixels: int) -> Asked:
    """What a request's body asks for.

    The pixels of all images are counted from their headers, before any is decoded. Raises TooLarge where there are more
    than `max_pixels`, or more images than `max_images`, and ValueError for a body that is no request.
    """
    data = _json(body)
    images, prompts = data.get("images"), data.get("prompts")
    if not isinstance(images, list) or not isinstance(prompts, list) or not images or len(images) != len(prompts):
        raise UserError("a request has `images` and `prompts`, lists of one length, at least 1")
    if len(images) > max_images:
        raise TooLarge(f"{len(images)} images in one request, more than max_images={max_images}; send fewer at a time")
    files = [_open(image) for image in images]
    num_pixels = sum(file.width * file.height for file in files)
    if num_pixels > max_pixels:
        raise TooLarge(f"{num_pixels} pixels in one request, more than max_pixels={max_pixels}; send fewer at a time")
    if len({file.size for file in files}) > 1:
        raise UserError("the images of one request must have one size")
    return Asked(files, [_prompt(prompt) for prompt in prompts])


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"a JSON object was expected, not {type(data).__name__}")
    return data


def _open(image: Any) -> PngImageFile:
    """The image with its header read and its pixels not yet decoded."""
    try:
        return PngImageFile(io.BytesIO(base64.b64decode(image, validate=True)))
    except Exception as error:  # whatever the parser makes of bytes that a stranger chose
        raise UserError(f"not a base64 PNG: {error}") from error


def _decode(file: PngImageFile) -> UInt8[Tensor, "3 H W"]:
    try:
        pixels = np.array(to_rgb(file))
    except Exception as error:  # as above
        raise UserError(f"damaged PNG: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _prompt(data: Any) -> Prompt:
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise UserError("a prompt is an object with a `text`")
    family, metadata = data.get("family", ""), data.get("metadata", {})
    if not isinstance(family, str) or not isinstance(metadata, dict):
        raise UserError("a prompt's `family` is a text and its `metadata` an object")
    return Prompt(data["text"], family, metadata)


def answer(output: RewardOutput) -> dict[str, Any]:
    """What a server sends back: null for what is missing or not a number."""
    info = output.info or [{}] * len(output.values)
    values = [v if ok else None for v, ok in zip(output.values.tolist(), output.is_valid.tolist(), strict=True)]
    return {
        "values": [_finite(value) for value in values],
        "parts": {name: [_finite(value) for value in part.tolist()] for name, part in output.parts.items()},
        "reasons": [entry.get(REASON) for entry in info],
        "applies": _applies(output).tolist(),
    }


def _applies(output: RewardOutput) -> Bool[Tensor, "B"]:
    return torch.ones(len(output.values), dtype=torch.bool) if output.applies is None else output.applies.any(1)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_answer(body: bytes, count: int) -> RewardOutput:
    """The scores in an answer to `count` images. Raises ValueError, saying what is wrong, for anything else.

    A value that is null, NaN or infinite makes its sample missing, with the server's reason where it gave one.
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
    if not isinstance(applies, list) or len(applies) != count or not all(isinstance(each, bool) for each in applies):
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
    if odd := [value for value in data if isinstance(value, bool) or not isinstance(value, int | float | None)]:
        raise UserError(f"{name} must be numbers or null, not {odd[0]!r:.40}")
    try:
        return torch.tensor([math.nan if value is None else float(value) for value in data])
    except OverflowError as error:
        raise UserError(f"{name}: {error}") from error

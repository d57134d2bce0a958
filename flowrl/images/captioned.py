"""Real images with captions, of which a policy is trained on the latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """A real image and the text that describes it.

    `name` is told where the image is refused, `size` is its height and width in pixels, and `read`
    gives it in 8-bit RGB.
    """

    caption: str
    name: str
    size: tuple[int, int]
    read: Callable[[], Image.Image]


def fitted(picture: Image.Image, height: int, width: int) -> Float32[np.ndarray, "3 H W"]:
    """Return a picture in [0, 1] at a size in pixels: scaled until it covers that, and cut off
    evenly on both sides where it is longer.

    A picture of that size is not resampled.
    """
    pixels = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 255

"""Pictures of whatever mode are turned into 8-bit RGB, and read from files, with errors that name
the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, ImageSequence

from flowrl.errors import UserError

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are read, of those that Pillow knows: some others start a program or are no pictures
of pixels.
"""

FRAME_MILLISECONDS = 125
"""How long a frame of a clip is shown: pipelines do not say how fast theirs are meant to run."""

TILE = 256
"""Side of the squares in which pixels are copied, so that what a conversion takes does not grow
with the picture.
"""


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture in 8-bit RGB; 16-bit greys are scaled, where Pillow's own conversion would
    cut them off at 255.

    Raises UserError for greys of 32 bits, whose range nobody knows.
    """
    if picture.mode.startswith("I;16"):
        grey = np.empty((picture.height, picture.width), np.uint8)
        for rows, columns, tile in _tiles(picture):
            # 32 bits hold the product of a 16-bit level with 255; half the divisor rounds it.
            levels = np.asarray(tile).astype(np.uint32)
            grey[rows, columns] = (levels * 255 + 32767) // 65535
        picture = Image.fromarray(grey)
    elif picture.mode in ("I", "F"):
        raise UserError(
            f"32-bit levels (mode {picture.mode}) have no known range; save it with 8 or 16 bits"
        )
    return picture.convert("RGB")


def to_pixels(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels in RGB, as `to_rgb` has them, without a second picture of their size.

    Raises UserError as `to_rgb` does.
    """
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    for rows, columns, tile in _tiles(picture):
        pixels[rows, columns] = np.asarray(to_rgb(tile))
    return pixels


def _tiles(picture: Image.Image) -> Iterator[tuple[slice, slice, Image.Image]]:
    """Cut the picture into squares, with the rows, columns and content of each."""
    for top in range(0, picture.height, TILE):
        for left in range(0, picture.width, TILE):
            bottom = min(top + TILE, picture.height)
            right = min(left + TILE, picture.width)
            tile = picture.crop((left, top, right, bottom))
            yield slice(top, bottom), slice(left, right), tile


def is_picture(path: Path) -> bool:
    """Tell whether a file's name says that it is a picture which this Pillow can read."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in _known()


def _known() -> list[str]:
    """Return those of `KINDS` that this Pillow was built with."""
    # Pillow registers its formats when it first needs them, and `Image.OPEN` is empty before.
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def picture_size(path: Path) -> tuple[int, int]:
    """Read width and height from the file's header alone. Raises UserError, naming the file."""
    try:
        with _quietly(path) as picture:
            return picture.size
    except Exception as error:  # A decoder raises anything on a damaged file.
        raise _refusal(path, error) from error


def read_rgb(path: Path) -> Image.Image:
    """Read the picture of a file in 8-bit RGB, the first one where it holds several. Raises
    UserError, naming the file.
    """
    try:
        with _quietly(path) as picture:
            return to_rgb(picture)
    except Exception as error:  # A decoder raises anything, as above.
        raise _refusal(path, error) from error


def read_frames(path: Path) -> list[Image.Image]:
    """Read the frames of a moving picture in 8-bit RGB; one where it does not move.

    Its writer keeps frames that are equal and follow each other as one, which is shown for as long:
    they are several again here, unless they are all of the clip. Raises UserError, naming the file.
    """
    frames = []
    try:
        with _quietly(path) as picture:
            for frame in ImageSequence.Iterator(picture):
                # Some formats know how long a frame is shown only once they have read it.
                pixels = to_rgb(frame)
                shown = frame.info.get("duration", FRAME_MILLISECONDS)
                frames += [pixels] * max(round(shown / FRAME_MILLISECONDS), 1)
    except Exception as error:  # A decoder raises anything, as above.
        raise _refusal(path, error) from error
    return frames


def read_upright(path: Path) -> Image.Image:
    """Read the picture of a file in 8-bit RGB as it is seen, turned where its camera noted so.
    Raises UserError, naming the file.
    """
    try:
        with _quietly(path) as picture:
            return to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # A decoder raises anything, as above.
        raise _refusal(path, error) from error


def _quietly(path: Path) -> Image.Image:
    """Open a picture, without Pillow's warning of a large one: of those that are too large it
    raises an error.
    """
    with warnings.catch_warnings():
        # Pillow warns above about 90 megapixels, and refuses twice as many.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=_known())


def _refusal(path: Path, error: Exception) -> UserError:
    """Say in one line why a file is no picture."""
    match error:
        case FileNotFoundError():
            reason = "no such file"
        case Image.UnidentifiedImageError():
            reason = "damaged, or no picture"
        case _:
            # Messages of decoders may have several lines, or none.
            message = " ".join(str(error).split())
            reason = message or type(error).__name__
    return UserError(f"{path}: cannot be read as a picture ({reason}); mend or remove it")

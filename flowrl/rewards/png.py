"""PNG files from strangers are read: their size without decoding, and their pixels without anything
else that a file can hold.

Pillow inflates texts and colour profiles, up to 64 MiB of them a file, and takes the last of
several headers. Here a file has one header, which says what its pixels will take, and Pillow is
shown only the chunks that pixels depend on.
"""

from __future__ import annotations

import base64
import io
import struct

import torch
from jaxtyping import UInt8
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from flowrl.errors import UserError
from flowrl.images.pictures import to_pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">8sI4sII5sI")
"""The first 33 bytes of a file: the signature, and the IHDR chunk with width and height."""

PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

FREE_CHUNKS = 64
"""Chunks that any file may have. Beyond, chunks must have 1 KiB on average: each costs time,
however small it is.
"""


def read_size(encoded: object) -> tuple[int, int]:
    """Read width and height in pixels from the header of a base64 PNG. Raises UserError for
    anything else.
    """
    if not isinstance(encoded, str):
        raise UserError(f"not a base64 PNG: {type(encoded).__name__}")
    try:
        # Base64 writes 3 bytes as 4 letters, and 33 bytes without a rest.
        num_letters = 4 * HEADER.size // 3
        start = base64.b64decode(encoded[:num_letters], validate=True)
        signature, length, kind, width, height, _, _ = HEADER.unpack(start)
    except (ValueError, struct.error) as error:
        raise UserError(f"not a base64 PNG: {error}") from error
    if signature != SIGNATURE or (length, kind) != (13, b"IHDR") or 0 in (width, height):
        raise UserError("not a base64 PNG: no header at its start")
    return width, height


def decode(encoded: str) -> UInt8[Tensor, "3 H W"]:
    """Return the pixels of a base64 PNG as RGB, 0 to 255. Raises UserError for a file that is
    damaged.
    """
    try:
        file = _pixel_chunks(base64.b64decode(encoded, validate=True))
        pixels = to_pixels(PngImageFile(io.BytesIO(file)))
    except UserError:
        raise
    except Exception as error:  # whatever the parser makes of bytes that a stranger chose
        raise UserError(f"damaged PNG: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pixel_chunks(data: bytes) -> bytes:
    """Return the file without the chunks that pixels do not depend on: texts, profiles, further
    frames.
    """
    view = memoryview(data)  # its slices are no copies
    pieces = [memoryview(SIGNATURE)]
    position = len(SIGNATURE)
    num_chunks = 0
    # A chunk is its length, its kind, so many bytes, and a checksum: 12 bytes besides its content.
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + length + 12
        num_chunks += 1
        if num_chunks > FREE_CHUNKS + position // 1024:
            raise UserError(
                f"damaged PNG: {num_chunks} chunks in its first {position} bytes, less than 1 KiB "
                "each"
            )
        if kind == b"IHDR" and num_chunks > 1:
            raise UserError("damaged PNG: a second header")
        if kind in PIXEL_CHUNKS:
            pieces.append(view[position:end])
        position = end
    return b"".join(pieces)

"""The frames of a clip, [F, 3, H, W] in the order of time, are chosen, evenly spread, and written
as one moving picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.images.pictures import FRAME_MILLISECONDS


def evenly(total: int, count: int | None) -> list[int]:
    """Return the numbers of `count` of `total` frames, evenly spread with the first and the last
    among them; of one, the middle frame; all frames where None or more are wanted.
    """
    if count is None or count >= total:
        return list(range(total))
    if count == 1:
        return [total // 2]
    gaps = count - 1
    # Whole numbers, halves rounded up.
    return [(2 * number * (total - 1) + gaps) // (2 * gaps) for number in range(count)]


def save_moving(
    frames: Sequence[Image.Image], target: Path | BytesIO, kind: str, **options: Any
) -> None:
    """Write pictures of one size as a moving one, which is shown again and again.

    `kind` is one of Pillow's formats that move, such as PNG, WEBP or GIF, and `options` are what
    Pillow's writer of that format takes.
    """
    first, *others = frames
    first.save(
        target,
        format=kind,
        save_all=True,
        append_images=others,
        duration=FRAME_MILLISECONDS,
        loop=0,
        **options,
    )

"""Pictures of a run are captioned grids of images with scores, before and after side by side. A
clip is a strip of some of its frames, or moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowrl.images.clips import evenly, save_moving

CELL = 128
"""Side of a drawn image, in pixels."""
STRIP = 4
"""Frames of a clip that stand beside each other, evenly spread."""
GAP = 2
"""Pixels between the frames of a strip."""
MOVING = 16
"""Frames of a clip that are shown after each other, evenly spread."""
LINE = 15
"""Height of a line of text, in pixels."""
MARGIN = 6
CAPTION_LINES = 2
"""Lines of a caption that are drawn; a longer one is cut."""
INK = (40, 40, 40)
GOOD = (20, 120, 50)
BAD = (180, 50, 40)
PAPER = (255, 255, 255)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Turn one image in [0, 1] into 8-bit RGB; values beyond are cut off."""
    levels = (image.clamp(0, 1) * 255).round().byte()
    pixels = levels.permute(1, 2, 0)  # [H, W, 3], as Pillow takes it
    return Image.fromarray(pixels.cpu().numpy())


Column = tuple[str, Float[Tensor, "N *F 3 H W"], Sequence[float]]
"""A title, images or clips, and their scores."""


def save_sample(image: Float[Tensor, "*F 3 H W"], path: Path, **options: Any) -> None:
    """Write an image as a PNG, and a clip as one that moves and loses nothing; `options` are what
    Pillow's writer takes.
    """
    if image.ndim == 4:
        save_moving([to_pil(frame) for frame in image], path, "PNG", **options)
    else:
        to_pil(image).save(path, **options)


def strip(clip: Float[Tensor, "F 3 H W"]) -> Image.Image:
    """Put `STRIP` frames of a clip beside each other, in the order of time."""
    return _beside([to_pil(clip[number]) for number in evenly(len(clip), STRIP)])


def _beside(frames: Sequence[Image.Image]) -> Image.Image:
    width, height = frames[0].size
    row = Image.new("RGB", (len(frames) * (width + GAP) - GAP, height), PAPER)
    for place, frame in enumerate(frames):
        row.paste(frame, (place * (width + GAP), 0))
    return row


def moving(
    captions: Sequence[str], columns: Sequence[Column], *, per_row: int
) -> list[Image.Image]:
    """Draw `comparison` of clips at `MOVING` times, each with one frame of every clip."""
    num_frames = columns[0][1].shape[1]
    sheets = []
    for number in evenly(num_frames, MOVING):
        at_one_time = [(title, clips[:, number], scores) for title, clips, scores in columns]
        sheets.append(comparison(captions, at_one_time, per_row=per_row))
    return sheets


def comparison(
    captions: Sequence[str],
    columns: Sequence[Column],
    *,
    per_row: int,
    sources: Sequence[Image.Image] = (),
) -> Image.Image:
    """Draw captioned samples, each as one image per column (such as before and after) with its
    score underneath; of clips their strips, and fewer side by side.

    A column is (title, images, scores), all with one entry per caption; `per_row` samples stand
    side by side. A score of NaN is missing. `sources` are the pictures that were edited, one per
    caption or none, which stand first.
    """
    font = ImageFont.load_default(size=12)
    # A strip is as wide as its frames.
    across = min(columns[0][1].shape[1], STRIP) if columns[0][1].ndim == 5 else 1
    per_row = max(per_row // across, 1)
    # The size of one sample: its caption, its images beside each other, and their scores.
    cell = across * (CELL + GAP) - GAP
    before = CELL + MARGIN if sources else 0
    width = before + len(columns) * (cell + MARGIN) + 2 * MARGIN
    height = CELL + 4 * LINE + 2 * MARGIN
    num_rows = math.ceil(len(captions) / per_row)
    sheet = Image.new("RGB", (per_row * width, num_rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        row, place = divmod(i, per_row)
        left = place * width + MARGIN
        top = row * height + MARGIN
        lines = _wrap(caption, font, width - 2 * MARGIN)
        for line, text in enumerate(lines[:CAPTION_LINES]):
            draw.text((left, top + line * LINE), text, INK, font)
        # Images stand at one height, whether their caption fills its lines or not.
        top += CAPTION_LINES * LINE
        if sources:
            sheet.paste(_reduced(sources[i]), (left, top + 2))
            draw.text((left, top + CELL + 4), "source", INK, font)
        for j, (title, images, scores) in enumerate(columns):
            x = left + before + j * (cell + MARGIN)
            sheet.paste(_thumbnail(images[i]), (x, top + 2))
            score = scores[i]
            text = f"{title} {_score_text(score)}"
            draw.text((x, top + CELL + 4), text, _ink(score), font)
    return sheet


def _thumbnail(image: Float[Tensor, "*F 3 H W"]) -> Image.Image:
    """Fit an image into a cell, and the frames of a clip into as many."""
    if image.ndim == 4:
        numbers = evenly(len(image), STRIP)
        return _beside([_thumbnail(image[number]) for number in numbers])
    return _reduced(to_pil(image))


def _reduced(picture: Image.Image) -> Image.Image:
    picture = enlarged(picture)
    # Nearest neighbours would drop most pixels of a large image.
    picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return picture


def enlarged(picture: Image.Image, side: int = CELL) -> Image.Image:
    """Return a picture that is small enlarged by a whole factor, as far as it fits a square of
    `side` pixels; its own pixels stay sharp.
    """
    factor = max(1, side // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _score_text(score: float) -> str:
    # The z of the format writes a small negative score as 0.00, not as -0.00.
    return "missing" if math.isnan(score) else f"{score:z.2f}"


def _ink(score: float) -> tuple[int, int, int]:
    """Choose the colour of a score; a missing one stands in neutral ink."""
    if score >= 1:
        return GOOD
    return BAD if score < 0.5 else INK


def _wrap(text: str, font: Font, width: float) -> list[str]:
    """Break a text into lines of at most `width` pixels, between words alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        is_first = not lines[-1]
        # A word that is wider than a line stands on one of its own.
        if is_first or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save(sheet: Image.Image, path: Path) -> None:
    """Write a PNG, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_sheets(sheets: Sequence[Image.Image], path: Path) -> None:
    """Write sheets of one size as a moving GIF, which trackers show, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_moving(sheets, path, "GIF")

"""Pictures of a run are captioned grids of images with scores, before and after side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128
"""Side of a drawn image, in pixels."""
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


def comparison(
    captions: Sequence[str],
    columns: Sequence[tuple[str, Float[Tensor, "N 3 H W"], Sequence[float]]],
    *,
    per_row: int,
    sources: Sequence[Image.Image] = (),
) -> Image.Image:
    """Draw captioned samples, each as one image per column (such as before and after) with its
    score underneath.

    A column is (title, images, scores), all with one entry per caption; `per_row` samples stand
    side by side. A score of NaN is missing. `sources` are the pictures that were edited, one per
    caption or none, which stand first.
    """
    font = ImageFont.load_default(size=12)
    # The size of one sample: its caption, its images beside each other, and their scores.
    num_cells = len(columns) + bool(sources)
    width = num_cells * (CELL + MARGIN) + 2 * MARGIN
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
        for j, (title, images, scores) in enumerate(columns, start=bool(sources)):
            x = left + j * (CELL + MARGIN)
            sheet.paste(_thumbnail(images[i]), (x, top + 2))
            score = scores[i]
            text = f"{title} {_score_text(score)}"
            draw.text((x, top + CELL + 4), text, _ink(score), font)
    return sheet


def _thumbnail(image: Float[Tensor, "3 H W"]) -> Image.Image:
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

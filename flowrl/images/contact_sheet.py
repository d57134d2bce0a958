"""Pictures of a run are captioned grids of images with scores, before and after side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128
LINE = 15
MARGIN = 6
INK = (40, 40, 40)
GOOD = (20, 120, 50)
BAD = (180, 50, 40)
PAPER = (255, 255, 255)


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Turn one image in [0, 1] into 8-bit RGB."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def comparison(
    captions: Sequence[str],
    columns: Sequence[tuple[str, Float[Tensor, "N 3 S S"], Sequence[float]]],
    *,
    per_row: int,
) -> Image.Image:
    """Draw captioned samples, each as one image per column (such as before and after) with its
    score underneath.

    A column is (title, images, scores), all with one entry per caption; `per_row` samples stand
    side by side. A score of NaN is missing.
    """
    font = ImageFont.load_default(size=12)
    width = len(columns) * (CELL + MARGIN) + 2 * MARGIN
    height = CELL + 4 * LINE + 2 * MARGIN
    num_rows = -(-len(captions) // per_row)
    sheet = Image.new("RGB", (per_row * width, num_rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left = (i % per_row) * width + MARGIN
        top = (i // per_row) * height + MARGIN
        for line, text in enumerate(_wrap(caption, font, width - 2 * MARGIN)[:2]):
            draw.text((left, top + line * LINE), text, INK, font)
        for j, (title, images, scores) in enumerate(columns):
            x = left + j * (CELL + MARGIN)
            sheet.paste(
                to_pil(images[i]).resize((CELL, CELL), Image.Resampling.NEAREST),
                (x, top + 2 * LINE + 2),
            )
            text = f"{title} {_score_text(scores[i])}"
            draw.text((x, top + 2 * LINE + CELL + 4), text, _ink(scores[i]), font)
    return sheet


def _score_text(score: float) -> str:
    return "missing" if math.isnan(score) else f"{score:z.2f}"


def _ink(score: float) -> tuple[int, int, int]:
    """Choose the colour of a score; a missing one stands in neutral ink."""
    if score >= 1:
        return GOOD
    return BAD if score < 0.5 else INK


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save(sheet: Image.Image, path: Path) -> None:
    """Write a PNG, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)

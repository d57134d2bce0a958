"""Pairs of images that a reward must put in order are rendered on the spot, for
`scripts/reward_doctor.py` to score.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from flowrl.shapes.grammar import Caption, Phrase
from flowrl.shapes.render import lay_out, render
from flowrl.types import Prompt

WORDS = ("HELLO", "Coffee", "Open 24 hours", "EXIT", "Library", "Fresh bread")
SIDE = 256
"""Pixels of every picture but the shapes world's."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, with an image that fits it, one that fits worse, and what tells them apart."""

    kind: str
    prompt: Prompt
    good: Image.Image
    bad: Image.Image


def pairs() -> list[Pair]:
    """Draw all pairs: `shapes`, `text`, `size` (few bytes against many), `sharpness`, `content`."""
    drawn = [
        Pair("shapes", Prompt(good.text), _scene(good), _scene(bad)) for good, bad in _captions()
    ]
    for i, word in enumerate(WORDS):
        prompt = Prompt(f'a white sign that says "{word}"')
        drawn.append(Pair("text", prompt, sign(word), sign(misspell(word, 1 + i % 3))))
    for shade in (60, 120, 180):
        drawn.append(Pair("size", Prompt("a plain wall"), _flat(shade), _noise(shade)))
    for seed in range(3):
        texture = _texture(seed)
        blurred = texture.filter(ImageFilter.GaussianBlur(3))
        drawn.append(Pair("sharpness", Prompt("a photo of a stone wall"), texture, blurred))
    drawings = (("a red circle", "red", "ellipse"), ("a blue square", "blue", "rectangle"))
    for (text, colour, shape), (_, other_colour, other_shape) in zip(
        drawings, reversed(drawings), strict=True
    ):
        good = _drawing(colour, shape)
        bad = _drawing(other_colour, other_shape)
        drawn.append(Pair("content", Prompt(f"{text} on a white background"), good, bad))
    return drawn


def sign(text: str) -> Image.Image:
    """Draw black text, centred on white and as large as fits."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    size = 80
    while draw.textlength(text, ImageFont.load_default(size)) > 0.9 * SIDE:
        size -= 2
    draw.text((SIDE / 2, SIDE / 2), text, "black", ImageFont.load_default(size), anchor="mm")
    return picture


def misspell(word: str, count: int) -> str:
    """Return `word` with `count` letters replaced by others, which is its edit distance from it."""
    places = [place for place, letter in enumerate(word) if letter.isalpha()]
    wrong = list(word)
    for place in places[:: max(1, len(places) // count)][:count]:
        wrong[place] = "k" if word[place].lower() != "k" else "w"
    return "".join(wrong)


def _captions() -> list[tuple[Caption, Caption]]:
    def caption(count: int, colour: str, shape: str) -> Caption:
        return Caption((Phrase(count, colour, shape),))

    return [
        (caption(1, "red", "circle"), caption(1, "blue", "circle")),
        (caption(3, "green", "square"), caption(2, "green", "square")),
        (caption(2, "purple", "triangle"), caption(2, "purple", "cross")),
    ]


def _scene(caption: Caption) -> Image.Image:
    pixels = render([lay_out(caption, random.Random(0))])[0]
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _flat(shade: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))


def _noise(shade: int) -> Image.Image:
    values = np.random.default_rng(shade).normal(shade, 60, (SIDE, SIDE, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _texture(seed: int) -> Image.Image:
    """Draw noise whose spectrum falls as 1/f, as that of photographs does."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None, :])
    frequency[0, 0] = 1.0
    values = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / frequency).real
    values = 128 + 45 * (values - values.mean()) / values.std()
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def _drawing(colour: str, shape: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    getattr(ImageDraw.Draw(picture), shape)((64, 64, 192, 192), fill=colour)
    return picture

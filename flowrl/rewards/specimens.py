"""Pairs of images that a reward must put in order are rendered on the spot, for
`scripts/reward_doctor.py` to score.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """A prompt, with an image that fits it, one that fits worse, and what tells them apart.

    `kind` is one of those that `pairs` lists; a reward need only order the kinds it is made for.
    """

    kind: str
    prompt: Prompt
    good: Image.Image
    bad: Image.Image


def pairs() -> list[Pair]:
    """Draw all pairs: `shapes`, `text`, `size` (few bytes against many), `sharpness`, `content`,
    `objects`.

    Every call draws the same pixels.
    """
    return [
        *_shape_pairs(),
        *_text_pairs(),
        *_size_pairs(),
        *_sharpness_pairs(),
        *_content_pairs(),
        *_object_pairs(),
    ]


def _shape_pairs() -> list[Pair]:
    """Draw scenes of the shapes world, against scenes of another caption."""
    drawn = []
    for good, bad in _captions():
        pair = Pair(
            kind="shapes",
            prompt=Prompt(good.text),
            good=_scene(good),
            bad=_scene(bad),
        )
        drawn.append(pair)
    return drawn


def _text_pairs() -> list[Pair]:
    """Draw signs, against signs with one to three wrong letters."""
    drawn = []
    for i, word in enumerate(WORDS):
        num_wrong = 1 + i % 3
        pair = Pair(
            kind="text",
            prompt=Prompt(f'a white sign that says "{word}"'),
            good=sign(word),
            bad=sign(misspell(word, num_wrong)),
        )
        drawn.append(pair)
    return drawn


def _size_pairs() -> list[Pair]:
    """Draw plain areas, against noise of the same mean."""
    prompt = Prompt("a plain wall")
    drawn = []
    for shade in (60, 120, 180):
        drawn.append(Pair("size", prompt, good=_flat(shade), bad=_noise(shade)))
    return drawn


def _sharpness_pairs() -> list[Pair]:
    """Draw textures, against the same ones blurred."""
    prompt = Prompt("a photo of a stone wall")
    drawn = []
    for seed in range(3):
        texture = _texture(seed)
        blurred = texture.filter(ImageFilter.GaussianBlur(3))
        drawn.append(Pair("sharpness", prompt, good=texture, bad=blurred))
    return drawn


def _content_pairs() -> list[Pair]:
    """Draw two things, each against the other."""
    circle = _drawing("red", "ellipse")
    square = _drawing("blue", "rectangle")
    return [
        Pair(
            kind="content",
            prompt=Prompt("a red circle on a white background"),
            good=circle,
            bad=square,
        ),
        Pair(
            kind="content",
            prompt=Prompt("a blue square on a white background"),
            good=square,
            bad=circle,
        ),
    ]


def _object_pairs() -> list[Pair]:
    """Draw objects of COCO's classes, with GenEval's metadata: one against none, two against one,
    and two against the same ones the other way round. They are drawings, which detectors of
    photographs may not know.
    """
    left, middle, right = ((x, SIDE // 2) for x in (64, 128, 192))
    stop = {"class": "stop sign", "count": 1}
    clock = {"class": "clock", "count": 1}
    clocks = {"class": "clock", "count": 2}
    beside = clock | {"position": ["left of", 0]}
    return [
        Pair(
            kind="objects",
            prompt=_task("a photo of a stop sign", "single_object", stop),
            good=_objects(stop_signs=[middle]),
            bad=_flat(200),
        ),
        Pair(
            kind="objects",
            prompt=_task("a photo of two clocks", "counting", clocks),
            good=_objects(clocks=[left, right]),
            bad=_objects(clocks=[middle]),
        ),
        Pair(
            kind="objects",
            prompt=_task("a photo of a clock left of a stop sign", "position", stop, beside),
            good=_objects(clocks=[left], stop_signs=[right]),
            bad=_objects(clocks=[right], stop_signs=[left]),
        ),
    ]


def _task(text: str, tag: str, *include: Mapping[str, Any]) -> Prompt:
    return Prompt(text, tag, {"tag": tag, "include": list(include)})


def sign(text: str) -> Image.Image:
    """Draw black text, centred on white and as large as fits."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    size = 80
    while draw.textlength(text, ImageFont.load_default(size)) > 0.9 * SIDE:
        size -= 2
    font = ImageFont.load_default(size)
    centre = (SIDE / 2, SIDE / 2)
    # The anchor "mm" is the middle of the text, both ways.
    draw.text(centre, text, "black", font, anchor="mm")
    return picture


def misspell(word: str, count: int) -> str:
    """Return `word` with `count` letters replaced by others, which is its edit distance from it."""
    places = [place for place, letter in enumerate(word) if letter.isalpha()]
    # The wrong letters are spread over the word.
    stride = max(1, len(places) // count)
    chosen = places[::stride][:count]
    wrong = list(word)
    for place in chosen:
        wrong[place] = "k" if word[place].lower() != "k" else "w"
    return "".join(wrong)


def _captions() -> list[tuple[Caption, Caption]]:
    """List captions with others that differ in one word: colour, number, shape."""

    def caption(count: int, colour: str, shape: str) -> Caption:
        return Caption((Phrase(count, colour, shape),))

    return [
        (caption(1, "red", "circle"), caption(1, "blue", "circle")),
        (caption(3, "green", "square"), caption(2, "green", "square")),
        (caption(2, "purple", "triangle"), caption(2, "purple", "cross")),
    ]


def _scene(caption: Caption) -> Image.Image:
    scene = lay_out(caption, random.Random(0))
    pixels = render([scene])[0]  # [H, W, 3] in [0, 1]
    levels = (pixels * 255).round().astype(np.uint8)
    return Image.fromarray(levels)


def _objects(
    *, clocks: Sequence[tuple[int, int]] = (), stop_signs: Sequence[tuple[int, int]] = ()
) -> Image.Image:
    """Draw objects at their centres on light grey, each 104 pixels wide."""
    picture = _flat(200)
    draw = ImageDraw.Draw(picture)
    for centre in clocks:
        draw.circle(centre, 52, "white", "black", width=6)
        for minutes in range(0, 60, 5):
            draw.line([_on_dial(centre, minutes, 40), _on_dial(centre, minutes, 46)], "black", 3)
        draw.line([centre, _on_dial(centre, 50, 24)], "black", 6)
        draw.line([centre, _on_dial(centre, 10, 36)], "black", 4)
    for centre in stop_signs:
        draw.regular_polygon((*centre, 56), 8, fill="#b01e2d", outline="white")
        draw.text(centre, "STOP", "white", ImageFont.load_default(34), anchor="mm")
    return picture


def _on_dial(centre: tuple[int, int], minutes: int, radius: float) -> tuple[float, float]:
    """Return the point of a clock's face that a hand of this length shows these minutes with."""
    angle = 2 * math.pi * minutes / 60
    return (centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle))


def _flat(shade: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))


def _noise(shade: int) -> Image.Image:
    rng = np.random.default_rng(shade)
    values = rng.normal(shade, 60, (SIDE, SIDE, 3))
    levels = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels)


def _texture(seed: int) -> Image.Image:
    """Draw noise whose spectrum falls as 1/f, as that of photographs does."""
    rng = np.random.default_rng(seed)
    along = np.fft.fftfreq(SIDE)
    frequency = np.hypot(along[:, None], along[None, :])
    frequency[0, 0] = 1.0  # the mean's, which is set below
    spectrum = np.fft.fft2(rng.normal(size=(SIDE, SIDE))) / frequency
    values = np.fft.ifft2(spectrum).real
    shades = 128 + 45 * (values - values.mean()) / values.std()
    pixels = shades.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def _drawing(colour: str, shape: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw_shape = getattr(ImageDraw.Draw(picture), shape)
    draw_shape((64, 64, 192, 192), fill=colour)
    return picture

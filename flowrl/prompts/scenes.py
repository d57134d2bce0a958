"""Scenes of the shapes world with their true captions: real images for the embedded model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from flowrl.images.captioned import CaptionedImage
from flowrl.prompts.shapes import shapes_prompts
from flowrl.shapes.grammar import parse
from flowrl.shapes.render import IMAGE_SIZE, lay_out, render
from flowrl.values.bounds import Prompts, Seed, Text
from flowrl.values.check import checked


@checked("regularizer.images")
def rendered_scenes(
    *,
    split: Literal["held_in", "held_out"],
    count: Prompts,
    seed: Seed,
    families: Sequence[Text] | None = None,
) -> list[CaptionedImage]:
    """Draw `count` captions as `shapes_prompts` does, and a scene that each of them describes.

    Raises UserError for a family that the split does not have.
    """
    prompts = shapes_prompts(split=split, count=count, seed=seed, families=families)
    rng = random.Random(f"scenes {split} {seed}")
    layouts = [lay_out(parse(prompt.text), rng) for prompt in prompts]
    pixels = (render(layouts) * 255).round().astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return [
        CaptionedImage(prompt.text, f"scene {number}", size, partial(Image.fromarray, scene))
        for number, (prompt, scene) in enumerate(zip(prompts, pixels, strict=True))
    ]

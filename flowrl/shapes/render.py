"""The renderer of the shapes world: lay out the objects of a caption and draw them anti-aliased.

Coordinates are pixels, x to the right and y downwards, pixel centres at half integers. A shape of radius r is a
signed distance function; its coverage of a pixel is `clip(1/2 - distance, 0, 1)`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from flowrl.shapes.grammar import COLOURS, SHAPES, Caption

IMAGE_SIZE = 32
BACKGROUND = np.array([0.93, 0.93, 0.93], dtype=np.float32)
PALETTE = np.array(
    [
        [0.86, 0.12, 0.12],
        [0.10, 0.62, 0.16],
        [0.12, 0.22, 0.90],
        [0.96, 0.82, 0.05],
        [0.60, 0.12, 0.72],
        [0.05, 0.78, 0.84],
    ],
    dtype=np.float32,
)
SQUARE, CROSS_ARM, TRIANGLE_BASE = 0.9, 0.36, 0.8
"""Half side of a square, half width of a cross's arm, height of a triangle's base line, all per radius."""

_GAP = 2.0


@dataclass(frozen=True, slots=True)
class Placed:
    """One object of a scene: indices into SHAPES and COLOURS, centre and radius in pixels."""

    shape: int
    colour: int
    x: float
    y: float
    radius: float


def distance(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to the outline of SHAPES[shape], negative inside; broadcasts x, y, radius."""
    x_abs, y_abs = np.abs(x), np.abs(y)
    name = SHAPES[shape]
    if name == "circle":
        return np.hypot(x, y) - radius
    if name == "square":
        return np.maximum(x_abs, y_abs) - SQUARE * radius
    if name == "triangle":
        slope = 1 + TRIANGLE_BASE
        side = (slope * x_abs - (y + radius)) / np.hypot(slope, 1.0)
        return np.maximum(side, y - TRIANGLE_BASE * radius)
    arm = CROSS_ARM * radius
    return np.minimum(np.maximum(x_abs - radius, y_abs - arm), np.maximum(x_abs - arm, y_abs - radius))


def coverage(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Fraction of a unit pixel at offset (x, y) from the centre that the shape covers, in [0, 1]."""
    return np.clip(0.5 - distance(shape, x, y, radius), 0.0, 1.0)


def lay_out(caption: Caption, rng: random.Random) -> list[Placed]:
    """Place the caption's objects without overlap, fulfilling its relation; unspecified colours are drawn."""
    largest = 6.0 if caption.num_objects <= 2 else 4.8
    while True:
        for _ in range(40):
            scene = _try_layout(caption, largest, rng)
            if scene is not None:
                return scene
        largest *= 0.97


def _try_layout(caption: Caption, largest: float, rng: random.Random) -> list[Placed] | None:
    scene: list[Placed] = []
    first_phrase: list[Placed] = []
    for index, phrase in enumerate(caption.phrases):
        colour = COLOURS.index(phrase.colour) if phrase.colour else rng.randrange(len(COLOURS))
        for _ in range(phrase.count):
            radius = rng.uniform(0.8 * largest, largest)
            edge = radius + 1.0
            placed = Placed(
                SHAPES.index(phrase.shape),
                colour,
                rng.uniform(edge, IMAGE_SIZE - edge),
                rng.uniform(edge, IMAGE_SIZE - edge),
                radius,
            )
            if any(_overlap(placed, other) for other in scene):
                return None
            if index == 1 and caption.relation and not all(_holds(caption.relation, a, placed) for a in first_phrase):
                return None
            scene.append(placed)
        if index == 0:
            first_phrase = list(scene)
    return scene


def _overlap(a: Placed, b: Placed) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) < a.radius + b.radius + _GAP


def _holds(relation: str, a: Placed, b: Placed) -> bool:
    gap = a.radius + b.radius + _GAP
    offset = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[relation]
    return offset >= gap


def render(scenes: list[list[Placed]]) -> np.ndarray:
    """Draw scenes: float32 images in [0, 1], shape (scenes, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    images = np.tile(BACKGROUND, (len(scenes), IMAGE_SIZE, IMAGE_SIZE, 1))
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    owner = np.array([i for i, scene in enumerate(scenes) for _ in scene], dtype=int)
    objects = [placed for scene in scenes for placed in scene]
    for shape in range(len(SHAPES)):
        chosen = [i for i, placed in enumerate(objects) if placed.shape == shape]
        if not chosen:
            continue
        x, y, radius = (
            np.array([getattr(objects[i], name) for i in chosen], dtype=np.float32)[:, None, None]
            for name in ("x", "y", "radius")
        )
        alpha = coverage(shape, grid[None, None, :] - x, grid[None, :, None] - y, radius)[..., None]
        colour = PALETTE[[objects[i].colour for i in chosen]][:, None, None, :]
        np.add.at(images, owner[chosen], alpha * (colour - BACKGROUND))
    return np.clip(images, 0.0, 1.0)

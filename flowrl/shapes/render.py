"""The renderer of the shapes world lays out the objects of a caption and draws them anti-aliased.

Coordinates are pixels, x to the right and y downwards, pixel centres at half integers. A shape of
radius r is a signed distance function; its coverage of a pixel is `clip(1/2 - distance, 0, 1)`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from flowrl.errors import UserError
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
SQUARE = 0.9
CROSS_ARM = 0.36
TRIANGLE_BASE = 0.8
"""Half side of a square, half width of a cross's arm, height of a triangle's base line, all per
radius.
"""

RADII = (4.8, 6.0)
"""Smallest and largest radius of an object, in pixels."""

_CELL = IMAGE_SIZE / 2
_CELLS = tuple(product(range(2), repeat=2))
_MARGIN = 1.0
"""Pixels left free at the border of a cell."""
_DIRECTIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
"""The axis of each relation, x or y, and the sign with which it grows from the first object to the
second.
"""


@dataclass(frozen=True, slots=True)
class Placed:
    """One object of a scene, told by indices into SHAPES and COLOURS, its centre and its radius in
    pixels.
    """

    shape: int
    colour: int
    x: float
    y: float
    radius: float


def distance(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Compute the signed distance in pixels to the outline of SHAPES[shape], negative inside;
    broadcasts x, y, radius.
    """
    x_abs = np.abs(x)
    y_abs = np.abs(y)
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
    across = np.maximum(x_abs - radius, y_abs - arm)
    upright = np.maximum(x_abs - arm, y_abs - radius)
    return np.minimum(across, upright)


def coverage(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Compute the fraction of a unit pixel at offset (x, y) from the centre that the shape covers,
    in [0, 1].
    """
    return np.clip(0.5 - distance(shape, x, y, radius), 0.0, 1.0)


def lay_out(caption: Caption, rng: random.Random) -> list[Placed]:
    """Place the caption's objects in cells of a two by two grid, jittered, fulfilling its relation.

    Unspecified colours are drawn, one per phrase. Raises UserError for a caption that no assignment
    of cells fulfils, such as three objects left of a fourth.
    """
    owners: list[int] = []
    for index, phrase in enumerate(caption.phrases):
        owners += [index] * phrase.count
    cells_of = permutations(_CELLS, len(owners))
    options = [cells for cells in cells_of if _holds(caption.relation, cells, owners)]
    if not options:
        raise UserError(f"no layout fulfils {caption.text!r}")
    colours = []
    for phrase in caption.phrases:
        if phrase.colour:
            colours.append(COLOURS.index(phrase.colour))
        else:
            colours.append(rng.randrange(len(COLOURS)))
    scene = []
    for index, (column, row) in zip(owners, rng.choice(options), strict=True):
        radius = rng.uniform(*RADII)
        play = _CELL / 2 - radius - _MARGIN
        x = _CELL * (column + 0.5) + rng.uniform(-play, play)
        y = _CELL * (row + 0.5) + rng.uniform(-play, play)
        shape = SHAPES.index(caption.phrases[index].shape)
        scene.append(Placed(shape, colours[index], x, y, radius))
    return scene


def _holds(relation: str | None, cells: Sequence[tuple[int, ...]], owners: list[int]) -> bool:
    """Tell whether every object of the first phrase stands in `relation` to every object of the
    second.
    """
    if relation is None:
        return True
    axis, sign = _DIRECTIONS[relation]
    positions: tuple[list[int], list[int]] = ([], [])
    for cell, owner in zip(cells, owners, strict=True):
        positions[owner].append(sign * cell[axis])
    first, second = positions
    return max(first) < min(second)


def render(scenes: list[list[Placed]]) -> np.ndarray:
    """Draw scenes: float32 images in [0, 1], shape (scenes, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    images = np.tile(BACKGROUND, (len(scenes), IMAGE_SIZE, IMAGE_SIZE, 1))
    for shape in range(len(SHAPES)):
        owners: list[int] = []
        objects: list[Placed] = []
        for index, scene in enumerate(scenes):
            shaped = [placed for placed in scene if placed.shape == shape]
            owners += [index] * len(shaped)
            objects += shaped
        if objects:
            _add_objects(images, shape, owners, objects)
    return np.clip(images, 0.0, 1.0)


def _add_objects(images: np.ndarray, shape: int, owners: list[int], objects: list[Placed]) -> None:
    """Add objects of one shape to the images with the numbers `owners`, one each."""
    pixel = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    x = _column([placed.x for placed in objects])
    y = _column([placed.y for placed in objects])
    radius = _column([placed.radius for placed in objects])
    alpha = coverage(shape, pixel[None, None, :] - x, pixel[None, :, None] - y, radius)
    colour = PALETTE[[placed.colour for placed in objects]][:, None, None, :]
    np.add.at(images, np.array(owners), alpha[..., None] * (colour - BACKGROUND))


def _column(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None, None]

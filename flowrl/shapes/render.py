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
"""Side of an image, in pixels."""
BACKGROUND = np.array([0.93, 0.93, 0.93], dtype=np.float32)
"""RGB of the light grey behind all objects."""
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
"""RGB of each of the grammar's COLOURS, in their order: [colours, 3]."""
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
"""The cells of the two by two grid, as (column, row)."""
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

    The shape's centre is at the origin. Outside of a corner the number is the larger of the
    distances to the two lines that meet there, a little less than that to the corner.
    """
    x_abs = np.abs(x)
    y_abs = np.abs(y)
    name = SHAPES[shape]
    if name == "circle":
        return np.hypot(x, y) - radius
    if name == "square":
        return np.maximum(x_abs, y_abs) - SQUARE * radius
    if name == "triangle":
        # The tip is at (0, -radius). From there the sides fall by 1 + TRIANGLE_BASE radii while
        # they spread by one, to the base line; y + radius is the depth below the tip.
        slope = 1 + TRIANGLE_BASE
        side = (slope * x_abs - (y + radius)) / np.hypot(slope, 1.0)
        base = y - TRIANGLE_BASE * radius
        return np.maximum(side, base)
    # A cross is the union of two bars, and a union's distance is the smaller of both.
    arm = CROSS_ARM * radius
    across = np.maximum(x_abs - radius, y_abs - arm)
    upright = np.maximum(x_abs - arm, y_abs - radius)
    return np.minimum(across, upright)


def coverage(shape: int, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Compute the fraction of a unit pixel at offset (x, y) from the centre that the shape covers,
    in [0, 1].

    The fraction is exact where the outline crosses the pixel straight and parallel to a side.
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
    # There are at most 24 ways to put four objects into four cells, so all are tried.
    assignments = permutations(_CELLS, len(owners))
    options = [cells for cells in assignments if _holds(caption.relation, cells, owners)]
    if not options:
        raise UserError(f"no layout fulfils {caption.text!r}")

    # Colours are drawn before places, so that a seed always gives the same scenes.
    colours = []
    for phrase in caption.phrases:
        if phrase.colour:
            colours.append(COLOURS.index(phrase.colour))
        else:
            colours.append(rng.randrange(len(COLOURS)))
    cells = rng.choice(options)
    scene = []
    for index, (column, row) in zip(owners, cells, strict=True):
        radius = rng.uniform(*RADII)
        # The object stays within its cell, so that no two ever touch.
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
    # The numbers of the cells along the axis, for the objects of either phrase.
    positions: tuple[list[int], list[int]] = ([], [])
    for cell, owner in zip(cells, owners, strict=True):
        positions[owner].append(sign * cell[axis])
    first, second = positions
    return max(first) < min(second)


def render(scenes: list[list[Placed]]) -> np.ndarray:
    """Draw scenes: float32 images in [0, 1], shape (scenes, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    # One call draws all objects of a shape, whatever their scenes, since numpy is slow in calls and
    # pretraining draws very many images.
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
    centre = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    x = _per_object([placed.x for placed in objects])
    y = _per_object([placed.y for placed in objects])
    radius = _per_object([placed.radius for placed in objects])
    across = centre[None, None, :] - x
    down = centre[None, :, None] - y
    alpha = coverage(shape, across, down, radius)  # [objects, IMAGE_SIZE, IMAGE_SIZE]
    tints = [placed.colour for placed in objects]
    colour = PALETTE[tints][:, None, None, :]
    # Blending over the background adds alpha (colour - background). An image with several of the
    # objects needs `add.at`, since `images[owners] +=` would keep only the last one's.
    change = alpha[..., None] * (colour - BACKGROUND)
    np.add.at(images, np.array(owners), change)


def _per_object(values: list[float]) -> np.ndarray:
    """Return one number an object as [objects, 1, 1], float32, against which pixels broadcast."""
    return np.array(values, dtype=np.float32)[:, None, None]

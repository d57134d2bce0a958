"""The verifier of the shapes world: find the objects of an image and answer each atom of a caption.

Objects are connected regions of one palette colour whose soft mask matches a shape template of the
same area. Everything is vectorised over the batch; scipy labels the regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from flowrl.errors import UserError
from flowrl.shapes.grammar import COLOURS, SHAPES, Caption, Phrase
from flowrl.shapes.render import (
    BACKGROUND,
    CROSS_ARM,
    IMAGE_SIZE,
    PALETTE,
    SQUARE,
    TRIANGLE_BASE,
    coverage,
)

MIN_AREA = 9.0
"""Regions below this many pixels are dust, not objects."""
MIN_OVERLAP = 0.72
"""A region is a clean shape when its soft intersection over union with the best template is at
least this.
"""
OFF_PALETTE = 0.22
"""A pixel is off the palette when its RGB distance to every background-colour blend exceeds this.
"""
RELATION_MARGIN = 2.0
"""Pixels by which centroids must differ for a spatial relation to hold."""

_WINDOW = 9
_UNIT_AREA = np.array(
    [
        np.pi,
        4 * SQUARE**2,
        (1 + TRIANGLE_BASE),
        8 * CROSS_ARM - 4 * CROSS_ARM**2,
    ]
)
_TRIANGLE_CENTROID = -1 + 2 * (1 + TRIANGLE_BASE) / 3
_CENTROID = np.array([0.0, 0.0, _TRIANGLE_CENTROID, 0.0])


@dataclass(frozen=True, slots=True)
class Found:
    """One region of an image: indices into SHAPES (of the best template) and COLOURS, centroid,
    area in pixels.
    """

    shape: int
    colour: int
    x: float
    y: float
    area: float
    overlap: float

    @property
    def is_clean(self) -> bool:
        return self.overlap >= MIN_OVERLAP


@dataclass(frozen=True, slots=True)
class Verdict:
    """The score of one image: value of each atom in [0, 1], the objects found, the share of
    off-palette pixels.
    """

    atoms: dict[str, float]
    objects: tuple[Found, ...]
    off_palette: float

    @property
    def soft(self) -> float:
        return sum(self.atoms.values()) / len(self.atoms)

    @property
    def geometric(self) -> float:
        return float(
            np.prod([max(value, 1e-3) for value in self.atoms.values()]) ** (1 / len(self.atoms))
        )

    @property
    def strict(self) -> float:
        return float(all(value >= 1.0 for value in self.atoms.values()))


def find_objects(images: np.ndarray) -> tuple[list[list[Found]], np.ndarray]:
    """Objects of each image and the fraction of its pixels off the palette, shape (images,).

    `images` is float, shape (images, height, width, 3), in [0, 1]; NaN counts as background of no
    colour and other sizes are resampled to IMAGE_SIZE. Raises UserError for anything that is not
    such an array.
    """
    pixels = _as_pixels(images)
    direction = PALETTE - BACKGROUND
    offset = pixels - BACKGROUND
    squared = (direction**2).sum(-1)
    alpha = offset @ direction.T / squared
    clipped = np.clip(alpha, 0.0, 1.1)
    offset_squared = (offset**2).sum(-1)[..., None]
    residual = offset_squared - 2 * clipped * alpha * squared + clipped**2 * squared
    nearest = residual.argmin(-1)
    is_off = np.take_along_axis(residual, nearest[..., None], -1)[..., 0] > OFF_PALETTE**2
    alpha = np.take_along_axis(clipped, nearest[..., None], -1)[..., 0]
    alpha = np.where(is_off, 0.0, np.minimum(alpha, 1.0))
    return _regions(alpha, nearest), is_off.mean((1, 2))


def _as_pixels(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or images.dtype.kind != "f":
        raise UserError(
            "images must be a non-empty float array of shape (images, height, width, 3), "
            f"not {images.dtype} {images.shape}"
        )
    pixels = np.nan_to_num(images.astype(np.float32), nan=-1.0, posinf=2.0, neginf=-1.0).clip(
        -1.0, 2.0
    )
    if pixels.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        scale = (1, IMAGE_SIZE / pixels.shape[1], IMAGE_SIZE / pixels.shape[2], 1)
        pixels = ndimage.zoom(pixels, scale, order=1, grid_mode=True, mode="nearest")
    return pixels


def _regions(alpha: np.ndarray, colour: np.ndarray) -> list[list[Found]]:
    """Label same-coloured regions over the batch and describe each one."""
    num_images = len(alpha)
    solid = alpha > 0.5
    layers = np.where(solid, colour + 1, 0)
    # One slice per (image, colour): regions of different images or colours never touch.
    volume = layers[:, None] == np.arange(1, len(COLOURS) + 1)[None, :, None, None]
    connect = np.zeros((3, 3, 3), dtype=bool)
    connect[1] = [[False, True, False], [True, True, True], [False, True, False]]
    labels, count = ndimage.label(volume.reshape(-1, IMAGE_SIZE, IMAGE_SIZE), connect)
    result: list[list[Found]] = [[] for _ in range(num_images)]
    if not count:
        return result
    flat = labels.reshape(num_images, len(COLOURS), IMAGE_SIZE, IMAGE_SIZE).max(1)
    sizes = np.bincount(flat.ravel(), minlength=count + 1)
    index = np.flatnonzero(sizes >= 0.6 * MIN_AREA)
    index = index[index > 0]
    if not len(index):
        return result
    boxes = ndimage.find_objects(labels)
    slices = [boxes[i - 1] for i in index]
    image = np.array([box[0].start // len(COLOURS) for box in slices])
    tint = np.array([box[0].start % len(COLOURS) for box in slices])
    centre_x = np.array([(box[2].start + box[2].stop) / 2 for box in slices])
    centre_y = np.array([(box[1].start + box[1].stop) / 2 for box in slices])
    # The soft edge of a region belongs to it: grow every label by one pixel where no other region
    # is.
    grown = np.where(flat > 0, flat, ndimage.maximum_filter(flat, size=(1, 3, 3)))
    side = 2 * _WINDOW + 1
    corner_x, corner_y = (np.floor(centre).astype(int) - _WINDOW for centre in (centre_x, centre_y))
    columns = corner_x[:, None] + np.arange(side)
    rows = corner_y[:, None] + np.arange(side)
    inside = ((rows >= 0) & (rows < IMAGE_SIZE))[:, :, None] & (
        (columns >= 0) & (columns < IMAGE_SIZE)
    )[:, None, :]
    where = (
        image[:, None, None],
        rows.clip(0, IMAGE_SIZE - 1)[:, :, None],
        columns.clip(0, IMAGE_SIZE - 1)[:, None, :],
    )
    is_own = (
        inside & (grown[where] == index[:, None, None]) & (colour[where] == tint[:, None, None])
    )
    mask = np.where(is_own, alpha[where], 0.0)
    x = columns[:, None, :] + 0.5
    y = rows[:, :, None] + 0.5
    area = np.maximum(mask.sum((1, 2)), 1e-6)
    mean_x = (mask * x).sum((1, 2)) / area
    mean_y = (mask * y).sum((1, 2)) / area
    overlaps = _template_overlaps(mask, x, y, mean_x, mean_y, area)
    best = overlaps.argmax(0)
    for i in np.flatnonzero(area >= MIN_AREA):
        found = Found(
            int(best[i]),
            int(tint[i]),
            float(mean_x[i]),
            float(mean_y[i]),
            float(area[i]),
            float(overlaps[best[i], i]),
        )
        result[image[i]].append(found)
    return result


def _template_overlaps(
    mask: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    mean_x: np.ndarray,
    mean_y: np.ndarray,
    area: np.ndarray,
) -> np.ndarray:
    """Soft intersection over union of each region with the template of each shape, shape (shapes,
    regions).
    """
    overlaps = np.empty((len(SHAPES), len(mask)))
    for shape in range(len(SHAPES)):
        radius = np.sqrt(area / _UNIT_AREA[shape])
        centre_y = mean_y - _CENTROID[shape] * radius
        template = coverage(
            shape, x - mean_x[:, None, None], y - centre_y[:, None, None], radius[:, None, None]
        )
        overlaps[shape] = np.minimum(mask, template).sum((1, 2)) / np.maximum(mask, template).sum(
            (1, 2)
        )
    return overlaps


def verify(images: np.ndarray, captions: Sequence[Caption]) -> list[Verdict]:
    """Score images against captions, one each. See `find_objects` for the image format.

    Atoms per phrase: shape (share of its objects present in that shape), colour (share also in that
    colour), count (1 - |found - n| / n, where n > 1); per caption: relation (0 or 1) and extras (as
    count, over all objects, unclean regions included). GenEval scores presence, colour, count and
    position alike; `extras` closes the gap that drawing everything would satisfy every presence
    test.
    """
    if len(images) != len(captions):
        raise UserError(f"{len(images)} images for {len(captions)} captions")
    objects, off_palette = find_objects(images)
    return [
        Verdict(_atoms(found, caption), tuple(found), float(off))
        for found, caption, off in zip(objects, captions, off_palette, strict=True)
    ]


def _atoms(objects: list[Found], caption: Caption) -> dict[str, float]:
    clean = [found for found in objects if found.is_clean]
    atoms: dict[str, float] = {}
    for i, phrase in enumerate(caption.phrases):
        same_shape = sum(p.count for p in caption.phrases if p.shape == phrase.shape)
        shaped = sum(found.shape == SHAPES.index(phrase.shape) for found in clean)
        atoms[f"shape_{i}"] = min(shaped, same_shape) / same_shape
        matching = len(_matching(clean, phrase))
        if phrase.colour:
            atoms[f"colour_{i}"] = min(matching, phrase.count) / phrase.count
        if phrase.count > 1:
            atoms[f"count_{i}"] = _count_score(matching, phrase.count)
    if caption.relation:
        atoms["relation"] = _relation_score(clean, caption)
    atoms["extras"] = _count_score(len(objects), caption.num_objects)
    return atoms


def _matching(objects: list[Found], phrase: Phrase) -> list[Found]:
    shape = SHAPES.index(phrase.shape)
    colour = phrase.colour and COLOURS.index(phrase.colour)
    return [found for found in objects if found.shape == shape and colour in (None, found.colour)]


def _count_score(found: int, wanted: int) -> float:
    return max(0.0, 1.0 - abs(found - wanted) / wanted)


def _relation_score(objects: list[Found], caption: Caption) -> float:
    first, second = (_matching(objects, phrase) for phrase in caption.phrases)
    if not first or not second:
        return 0.0
    x, y = (
        float(
            np.mean([getattr(f, axis) for f in second]) - np.mean([getattr(f, axis) for f in first])
        )
        for axis in "xy"
    )
    offset = {"left of": x, "right of": -x, "above": y, "below": -y}[str(caption.relation)]
    return float(offset > RELATION_MARGIN)

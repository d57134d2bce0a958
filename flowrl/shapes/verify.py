"""The verifier of the shapes world finds the objects of an image and answers a caption's atoms.

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
class FoundObject:
    """One region of an image, told by indices into SHAPES (of the best template) and COLOURS, its
    centroid, its area in pixels and its overlap with the template.
    """

    shape: int
    colour: int
    x: float
    y: float
    area: float
    overlap: float

    @property
    def is_clean(self) -> bool:
        """Tell whether the region matches a shape template."""
        return self.overlap >= MIN_OVERLAP


@dataclass(frozen=True, slots=True)
class Verdict:
    """The score of one image, which holds the value of each atom in [0, 1], the objects found and
    the share of off-palette pixels.
    """

    atoms: dict[str, float]
    objects: tuple[FoundObject, ...]
    off_palette: float

    @property
    def soft(self) -> float:
        """Return the mean over atoms."""
        return sum(self.atoms.values()) / len(self.atoms)

    @property
    def geometric(self) -> float:
        """Return the geometric mean over atoms, each of them at least 0.001."""
        product = np.prod([max(value, 1e-3) for value in self.atoms.values()])
        return float(product ** (1 / len(self.atoms)))

    @property
    def strict(self) -> float:
        """Return 1 where every atom holds, and 0 elsewhere."""
        return float(all(value >= 1.0 for value in self.atoms.values()))

    @property
    def clean_share(self) -> float:
        """Return the share of the objects that match a shape template, NaN where there is none."""
        if not self.objects:
            return float("nan")
        return sum(found.is_clean for found in self.objects) / len(self.objects)


def find_objects(images: np.ndarray) -> tuple[list[list[FoundObject]], np.ndarray]:
    """Find the objects of each image, and the fraction of its pixels off the palette, shape
    (images,).

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
    """Return images as float32 of IMAGE_SIZE, without NaN and within [-1, 2]."""
    images = np.asarray(images)
    has_shape = images.ndim == 4 and images.shape[-1] == 3 and 0 not in images.shape
    if not has_shape or images.dtype.kind != "f":
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


def _regions(alpha: np.ndarray, colour: np.ndarray) -> list[list[FoundObject]]:
    """Label same-coloured regions over the batch and describe each one."""
    objects: list[list[FoundObject]] = [[] for _ in alpha]
    labels = _label(alpha > 0.5, colour)
    flat = labels.reshape(len(alpha), len(COLOURS), IMAGE_SIZE, IMAGE_SIZE).max(1)
    numbers = np.flatnonzero(np.bincount(flat.ravel()) >= 0.6 * MIN_AREA)
    numbers = numbers[numbers > 0]
    if not len(numbers):
        return objects
    all_boxes = ndimage.find_objects(labels)
    boxes = [all_boxes[number - 1] for number in numbers]
    layer = np.array([box[0].start for box in boxes])
    image = layer // len(COLOURS)
    tint = layer % len(COLOURS)
    rows = _window([box[1] for box in boxes])
    columns = _window([box[2] for box in boxes])
    # The soft edge of a region belongs to it: grow every label by one pixel where no other region
    # is.
    grown = np.where(flat > 0, flat, ndimage.maximum_filter(flat, size=(1, 3, 3)))
    place = (
        image[:, None, None],
        rows.clip(0, IMAGE_SIZE - 1)[:, :, None],
        columns.clip(0, IMAGE_SIZE - 1)[:, None, :],
    )
    is_inside = _is_pixel(rows)[:, :, None] & _is_pixel(columns)[:, None, :]
    is_labelled = grown[place] == numbers[:, None, None]
    is_tinted = colour[place] == tint[:, None, None]
    mask = np.where(is_inside & is_labelled & is_tinted, alpha[place], 0.0)
    x = columns[:, None, :] + 0.5
    y = rows[:, :, None] + 0.5
    area = np.maximum(mask.sum((1, 2)), 1e-6)
    mean_x = (mask * x).sum((1, 2)) / area
    mean_y = (mask * y).sum((1, 2)) / area
    overlaps = _template_overlaps(mask, x, y, mean_x, mean_y, area)
    best = overlaps.argmax(0)
    for i in np.flatnonzero(area >= MIN_AREA):
        found = FoundObject(
            int(best[i]),
            int(tint[i]),
            float(mean_x[i]),
            float(mean_y[i]),
            float(area[i]),
            float(overlaps[best[i], i]),
        )
        objects[image[i]].append(found)
    return objects


def _label(is_solid: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Number the connected regions of one colour, shape (images x colours, IMAGE_SIZE, IMAGE_SIZE);
    0 is no region.
    """
    # One slice per (image, colour): regions of different images or colours never touch.
    layers = np.where(is_solid, colour + 1, 0)
    volume = layers[:, None] == np.arange(1, len(COLOURS) + 1)[None, :, None, None]
    connect = np.zeros((3, 3, 3), dtype=bool)
    connect[1] = [[False, True, False], [True, True, True], [False, True, False]]
    labels, _ = ndimage.label(volume.reshape(-1, IMAGE_SIZE, IMAGE_SIZE), connect)
    return labels


def _window(extents: Sequence[slice]) -> np.ndarray:
    """Return the pixel numbers of a window around the middle of each extent, shape (regions,
    2 _WINDOW + 1); some of them may lie outside of the image.
    """
    middle = np.array([(extent.start + extent.stop) / 2 for extent in extents])
    corner = np.floor(middle).astype(int) - _WINDOW
    return corner[:, None] + np.arange(2 * _WINDOW + 1)


def _is_pixel(number: np.ndarray) -> np.ndarray:
    return (number >= 0) & (number < IMAGE_SIZE)


def _template_overlaps(
    mask: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    mean_x: np.ndarray,
    mean_y: np.ndarray,
    area: np.ndarray,
) -> np.ndarray:
    """Compute the soft intersection over union of each region with the template of each shape,
    shape (shapes, regions).
    """
    overlaps = np.empty((len(SHAPES), len(mask)))
    for shape in range(len(SHAPES)):
        radius = np.sqrt(area / _UNIT_AREA[shape])
        centre_y = mean_y - _CENTROID[shape] * radius
        template = coverage(
            shape, x - mean_x[:, None, None], y - centre_y[:, None, None], radius[:, None, None]
        )
        intersection = np.minimum(mask, template).sum((1, 2))
        overlaps[shape] = intersection / np.maximum(mask, template).sum((1, 2))
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
        Verdict(_atoms(image_objects, caption), tuple(image_objects), float(share))
        for image_objects, caption, share in zip(objects, captions, off_palette, strict=True)
    ]


def _atoms(objects: list[FoundObject], caption: Caption) -> dict[str, float]:
    """Answer each atom of a caption by the objects of an image."""
    clean = [found for found in objects if found.is_clean]
    atoms: dict[str, float] = {}
    for i, phrase in enumerate(caption.phrases):
        num_wanted = sum(other.count for other in caption.phrases if other.shape == phrase.shape)
        num_shaped = sum(found.shape == SHAPES.index(phrase.shape) for found in clean)
        atoms[f"shape_{i}"] = min(num_shaped, num_wanted) / num_wanted
        num_matching = len(_matching(clean, phrase))
        if phrase.colour:
            atoms[f"colour_{i}"] = min(num_matching, phrase.count) / phrase.count
        if phrase.count > 1:
            atoms[f"count_{i}"] = _count_score(num_matching, phrase.count)
    if caption.relation:
        atoms["relation"] = _relation_score(clean, caption)
    atoms["extras"] = _count_score(len(objects), caption.num_objects)
    return atoms


def _matching(objects: list[FoundObject], phrase: Phrase) -> list[FoundObject]:
    """Return the objects of a phrase's shape, in its colour where it names one."""
    shape = SHAPES.index(phrase.shape)
    shaped = [found for found in objects if found.shape == shape]
    if not phrase.colour:
        return shaped
    colour = COLOURS.index(phrase.colour)
    return [found for found in shaped if found.colour == colour]


def _count_score(num_found: int, num_wanted: int) -> float:
    return max(0.0, 1.0 - abs(num_found - num_wanted) / num_wanted)


def _relation_score(objects: list[FoundObject], caption: Caption) -> float:
    """Return 1 where the mean positions of the two phrases' objects stand in the caption's
    relation, and 0 elsewhere.
    """
    first, second = (_matching(objects, phrase) for phrase in caption.phrases)
    if not first or not second:
        return 0.0
    right = float(np.mean([found.x for found in second]) - np.mean([found.x for found in first]))
    down = float(np.mean([found.y for found in second]) - np.mean([found.y for found in first]))
    offsets = {"left of": right, "right of": -right, "above": down, "below": -down}
    return float(offsets[str(caption.relation)] > RELATION_MARGIN)

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
"""Pixels on either side of a region's middle that are looked at: an object has a radius of six."""
_UNIT_AREA = np.array(
    [
        np.pi,
        4 * SQUARE**2,
        (1 + TRIANGLE_BASE),
        8 * CROSS_ARM - 4 * CROSS_ARM**2,
    ]
)
"""Area of each of SHAPES, per squared radius."""
_TRIANGLE_CENTROID = -1 + 2 * (1 + TRIANGLE_BASE) / 3
"""A triangle's centroid lies two thirds of the way from its tip, at -1, to its base line."""
_CENTROID = np.array([0.0, 0.0, _TRIANGLE_CENTROID, 0.0])
"""Height of the centroid of each of SHAPES below the centre that it is drawn around, per radius."""


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
        # Without the floor, one atom that fails would hide how many others hold.
        values = [max(value, 1e-3) for value in self.atoms.values()]
        product = np.prod(values)
        return float(product ** (1 / len(values)))

    @property
    def strict(self) -> float:
        """Return 1 where every atom holds, and 0 elsewhere."""
        return float(all(value >= 1.0 for value in self.atoms.values()))

    @property
    def clean_share(self) -> float:
        """Return the share of the objects that match a shape template, NaN where there is none."""
        if not self.objects:
            return float("nan")
        num_clean = sum(found.is_clean for found in self.objects)
        return num_clean / len(self.objects)


def find_objects(images: np.ndarray) -> tuple[list[list[FoundObject]], np.ndarray]:
    """Find the objects of each image, and the fraction of its pixels off the palette, shape
    (images,).

    `images` is float, shape (images, height, width, 3), in [0, 1]; NaN counts as a pixel off the
    palette, and other sizes are resampled to IMAGE_SIZE. Raises UserError for anything that is not
    such an array.
    """
    pixels = _as_pixels(images)
    alpha, nearest, is_off = _unblend(pixels)
    return _regions(alpha, nearest), is_off.mean((1, 2))


def _unblend(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Explain each pixel as background (1 - alpha) + colour alpha, with the best palette colour.

    Return alpha in [0, 1], the colour's index, and True where no blend is near enough, with alpha 0
    there; all of shape (images, height, width).
    """
    direction = PALETTE - BACKGROUND  # [colours, 3]
    squared = (direction**2).sum(-1)
    offset = pixels - BACKGROUND  # [images, height, width, 3]
    # The least squares solution: alpha = <offset, direction> / |direction|^2 for every colour. A
    # pixel may be a little stronger than the palette, but not far beyond it.
    alpha = offset @ direction.T / squared
    clipped = np.clip(alpha, 0.0, 1.1)
    # |offset - clipped direction|^2, multiplied out so that no array has a pixel's three channels
    # for each of the colours.
    offset_squared = (offset**2).sum(-1)[..., None]
    residual = offset_squared - 2 * clipped * alpha * squared + clipped**2 * squared
    nearest = residual.argmin(-1)
    is_off = _pick(residual, nearest) > OFF_PALETTE**2
    alpha = np.minimum(_pick(clipped, nearest), 1.0)
    return np.where(is_off, 0.0, alpha), nearest, is_off


def _pick(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Take from the last axis of `values` the entry that `index` names, one for each pixel."""
    return np.take_along_axis(values, index[..., None], -1)[..., 0]


def _as_pixels(images: np.ndarray) -> np.ndarray:
    """Return images as float32 of IMAGE_SIZE, without NaN and within [-1, 2]."""
    images = np.asarray(images)
    has_shape = images.ndim == 4 and images.shape[-1] == 3 and 0 not in images.shape
    if not has_shape or images.dtype.kind != "f":
        raise UserError(
            "images must be a non-empty float array of shape (images, height, width, 3), "
            f"not {images.dtype} {images.shape}"
        )
    # Black that is beyond black is off the palette, so that a NaN never counts for an object.
    finite = np.nan_to_num(images.astype(np.float32), nan=-1.0, posinf=2.0, neginf=-1.0)
    pixels = finite.clip(-1.0, 2.0)
    height, width = pixels.shape[1:3]
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        scale = (1, IMAGE_SIZE / height, IMAGE_SIZE / width, 1)
        # `grid_mode` takes pixels as squares, not as points, as every picture's scaling does.
        pixels = ndimage.zoom(pixels, scale, order=1, grid_mode=True, mode="nearest")
    return pixels


def _regions(alpha: np.ndarray, colour: np.ndarray) -> list[list[FoundObject]]:
    """Label same-coloured regions over the batch and describe each one.

    `alpha` and `colour` are of shape (images, IMAGE_SIZE, IMAGE_SIZE). Arrays of regions have one
    entry a region first, whichever image it is from; then the rows and columns of its window.
    """
    objects: list[list[FoundObject]] = [[] for _ in alpha]
    labels = _label(alpha > 0.5, colour)
    # A pixel has one colour, so that at most one of its layers has a label: the largest.
    flat = labels.reshape(len(alpha), len(COLOURS), IMAGE_SIZE, IMAGE_SIZE).max(1)
    # Pixels that are solid are fewer than a region's area with its soft edge; what is too small for
    # an object by far is not looked at further.
    num_pixels = np.bincount(flat.ravel())
    numbers = np.flatnonzero(num_pixels >= 0.6 * MIN_AREA)
    numbers = numbers[numbers > 0]
    if not len(numbers):
        return objects
    # scipy counts labels from 1. A box is a slice of layers, one of rows and one of columns.
    all_boxes = ndimage.find_objects(labels)
    boxes = [all_boxes[number - 1] for number in numbers]
    layer = np.array([box[0].start for box in boxes])
    image = layer // len(COLOURS)
    tint = layer % len(COLOURS)
    rows = _window([box[1] for box in boxes])
    columns = _window([box[2] for box in boxes])
    # The soft edge of a region belongs to it: grow every label by one pixel where no other region
    # is.
    neighbours = ndimage.maximum_filter(flat, size=(1, 3, 3))
    grown = np.where(flat > 0, flat, neighbours)
    # Windows may reach beyond the image: they read its border there, and `is_inside` drops it.
    place = (
        image[:, None, None],
        rows.clip(0, IMAGE_SIZE - 1)[:, :, None],
        columns.clip(0, IMAGE_SIZE - 1)[:, None, :],
    )
    is_inside = _is_pixel(rows)[:, :, None] & _is_pixel(columns)[:, None, :]
    is_labelled = grown[place] == numbers[:, None, None]
    is_tinted = colour[place] == tint[:, None, None]
    mask = np.where(is_inside & is_labelled & is_tinted, alpha[place], 0.0)
    # The area and the centroid are the mask's moments of order zero and one.
    x = columns[:, None, :] + 0.5
    y = rows[:, :, None] + 0.5
    area = np.maximum(mask.sum((1, 2)), 1e-6)
    mean_x = (mask * x).sum((1, 2)) / area
    mean_y = (mask * y).sum((1, 2)) / area
    overlaps = _template_overlaps(mask, x, y, mean_x, mean_y, area)
    best = overlaps.argmax(0)
    best_overlap = overlaps.max(0)
    for i in np.flatnonzero(area >= MIN_AREA):
        found = FoundObject(
            shape=int(best[i]),
            colour=int(tint[i]),
            x=float(mean_x[i]),
            y=float(mean_y[i]),
            area=float(area[i]),
            overlap=float(best_overlap[i]),
        )
        objects[image[i]].append(found)
    return objects


def _label(is_solid: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Number the connected regions of one colour, shape (images x colours, IMAGE_SIZE, IMAGE_SIZE);
    0 is no region.
    """
    # One slice per (image, colour): regions of different images or colours never touch. Colours
    # count from 1 here, as 0 is no colour.
    layers = np.where(is_solid, colour + 1, 0)
    numbers = np.arange(1, len(COLOURS) + 1)
    volume = layers[:, None] == numbers[None, :, None, None]
    # Within a slice, a pixel's neighbours are the four beside it: corners that touch do not join.
    connect = np.zeros((3, 3, 3), dtype=bool)
    connect[1] = [[False, True, False], [True, True, True], [False, True, False]]
    labels, _ = ndimage.label(volume.reshape(-1, IMAGE_SIZE, IMAGE_SIZE), connect)
    return labels


def _window(extents: Sequence[slice]) -> np.ndarray:
    """Return the pixel numbers of a window around the middle of each extent, shape (regions,
    2 _WINDOW + 1); some of them may lie outside of the image.
    """
    middle = np.array([(extent.start + extent.stop) / 2 for extent in extents])
    # Floor, so that all windows have one size, whether a middle lies in a pixel or between two.
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

    The soft overlap is sum min(mask, template) / sum max(mask, template), with the template of the
    region's area and centroid.
    """
    overlaps = np.empty((len(SHAPES), len(mask)))
    for shape in range(len(SHAPES)):
        radius = np.sqrt(area / _UNIT_AREA[shape])
        centre_y = mean_y - _CENTROID[shape] * radius
        across = x - mean_x[:, None, None]
        down = y - centre_y[:, None, None]
        template = coverage(shape, across, down, radius[:, None, None])
        intersection = np.minimum(mask, template).sum((1, 2))
        union = np.maximum(mask, template).sum((1, 2))
        overlaps[shape] = intersection / union
    return overlaps


def verify(images: np.ndarray, captions: Sequence[Caption]) -> list[Verdict]:
    """Score images against captions, one each. See `find_objects` for the image format.

    Atoms per phrase: shape (share of its objects present in that shape), colour (share also in that
    colour), count (1 - |found - n| / n, where n > 1); per caption: relation (0 or 1) and extras (as
    count, over all objects, unclean regions included). GenEval scores presence, colour, count and
    position alike; `extras` closes the gap that drawing everything would satisfy every presence
    test. Raises UserError unless there are as many captions as images.
    """
    if len(images) != len(captions):
        raise UserError(f"{len(images)} images for {len(captions)} captions")
    objects, off_palette = find_objects(images)
    verdicts = []
    for image_objects, caption, share in zip(objects, captions, off_palette, strict=True):
        atoms = _atoms(image_objects, caption)
        verdicts.append(Verdict(atoms, tuple(image_objects), float(share)))
    return verdicts


def _atoms(objects: list[FoundObject], caption: Caption) -> dict[str, float]:
    """Answer each atom of a caption by the objects of an image."""
    clean = [found for found in objects if found.is_clean]
    atoms: dict[str, float] = {}
    for i, phrase in enumerate(caption.phrases):
        # The shape's atom leaves colours to their own: a red and a blue circle ask for two circles.
        shape = SHAPES.index(phrase.shape)
        num_shaped = sum(found.shape == shape for found in clean)
        num_wanted = _num_wanted(caption, phrase.shape)
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


def _num_wanted(caption: Caption, shape: str) -> int:
    """Count the objects of a shape that a caption asks for, in all of its phrases."""
    return sum(phrase.count for phrase in caption.phrases if phrase.shape == shape)


def _matching(objects: list[FoundObject], phrase: Phrase) -> list[FoundObject]:
    """Return the objects of a phrase's shape, in its colour where it names one."""
    shape = SHAPES.index(phrase.shape)
    shaped = [found for found in objects if found.shape == shape]
    if not phrase.colour:
        return shaped
    colour = COLOURS.index(phrase.colour)
    return [found for found in shaped if found.colour == colour]


def _count_score(num_found: int, num_wanted: int) -> float:
    """Return 1 - |found - wanted| / wanted, at least 0."""
    error = abs(num_found - num_wanted) / num_wanted
    return max(0.0, 1.0 - error)


def _relation_score(objects: list[FoundObject], caption: Caption) -> float:
    """Return 1 where the mean positions of the two phrases' objects stand in the caption's
    relation, and 0 elsewhere.
    """
    first, second = (_matching(objects, phrase) for phrase in caption.phrases)
    if not first or not second:
        return 0.0
    first_x, first_y = _mean_position(first)
    second_x, second_y = _mean_position(second)
    right = second_x - first_x
    down = second_y - first_y
    # How far the relation holds, in pixels; y grows downwards.
    offsets = {"left of": right, "right of": -right, "above": down, "below": -down}
    return float(offsets[str(caption.relation)] > RELATION_MARGIN)


def _mean_position(objects: Sequence[FoundObject]) -> tuple[float, float]:
    """Return the mean of the objects' centroids, as x and y in pixels."""
    x = np.mean([found.x for found in objects])
    y = np.mean([found.y for found in objects])
    return float(x), float(y)

"""Detections of objects in pictures: what a detector returns, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels from the picture's upper left corner."""

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""

COCO = tuple(" ".join(_NAMES.split()).split(", "))
"""COCO's 80 classes in its order, under GenEval's names: mouse, remote and keyboard are a
`computer mouse`, a `tv remote` and a `computer keyboard`.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """An object of the class `name`, with the detector's confidence from 0 to 1.

    `mask` is true on the object's pixels, None where the detector only gives boxes.
    """

    name: str
    score: float
    box: Box
    mask: Bool[np.ndarray, "H W"] | None = None


@runtime_checkable
class Detector(Protocol):
    """A callable that finds the objects of its classes, `names`, in RGB pictures.

    It returns a list for each picture, in any order, and may leave out what it is no surer of than
    `min_score`. One with weights is a `torch.nn.Module`, so that they are frozen and moved.
    """

    names: Sequence[str]

    def __call__(
        self, pictures: Sequence[Image.Image], min_score: float
    ) -> list[list[Detection]]: ...


def overlap(a: Box, b: Box) -> float:
    """Compute the intersection over union of two boxes, as GenEval does: both edges count as
    pixels, so that a side is a pixel longer than the difference of its edges.
    """
    shared = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    intersection = _area(shared)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union else 0.0


def _area(box: Box) -> float:
    left, top, right, bottom = box
    return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)


def counted_by_name(
    detections: Sequence[Detection], *, threshold: float, max_overlap: float, max_objects: int
) -> dict[str, list[Detection]]:
    """Return the detections that count, by class, the surest first.

    Those with a score above `threshold` do. Of two of a class whose `overlap` is at least
    `max_overlap`, the surer one alone does (non-maximum suppression); 1 suppresses none, not even
    equal boxes. `max_objects` of a class do at most. Published code takes the surest `max_objects`
    before it suppresses, which is the same at its `max_overlap` of 1; a detector that finds an
    object many times would have few objects left.
    """
    by_name: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score <= threshold:
            break
        kept = by_name.setdefault(detection.name, [])
        if len(kept) < max_objects and not _is_suppressed(detection, kept, max_overlap):
            kept.append(detection)
    return by_name


def _is_suppressed(detection: Detection, kept: Sequence[Detection], max_overlap: float) -> bool:
    if max_overlap == 1:
        return False
    return any(overlap(detection.box, other.box) >= max_overlap for other in kept)

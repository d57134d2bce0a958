"""CLIP names the colours of detected objects, as in GenEval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from flowrl.rewards.clip import CLIP
from flowrl.rewards.detection import Detection
from flowrl.rewards.geneval_task import COLOURS

TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
"""GenEval's, whose features are averaged."""

GREY = (0x99, 0x99, 0x99)
"""The colour in place of what is not the object, where there is a mask."""


@runtime_checkable
class NamesColours(Protocol):
    """A callable that names the colour of each picture of an object, one of ten; `names` are the
    objects' classes.
    """

    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]: ...


class Colours(CLIP):
    """The one of ten colours whose texts CLIP finds nearest to a picture of an object.

    A colour's feature is the mean of the unit vectors of its `TEMPLATES`, made a unit vector; the
    texts of a class are encoded once. Published code takes OpenAI's ViT-L/14 in open_clip under
    autocast to float16; this is the same network in transformers, and in float32 differs by its
    rounding.
    """

    place = "colours."

    def forward(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        if not crops:
            return []
        unique = sorted(set(names))
        row_of = {name: row for row, name in enumerate(unique)}
        texts = self._features_of_colours(unique)[[row_of[name] for name in names]]
        cosines = (self.image_features(crops)[:, None] * texts).sum(-1)  # [objects, colours]
        return [COLOURS[number] for number in cosines.argmax(-1).tolist()]

    @cached_property
    def _known(self) -> dict[str, Float[Tensor, "colours D"]]:
        """The unit vectors of all colours by class, at most as many as the detector has classes."""
        return {}

    def _features_of_colours(self, names: Sequence[str]) -> Float[Tensor, "classes colours D"]:
        """Return the unit vectors of all colours for each class."""
        features = []
        for name in names:
            # By itself, so that its bits do not depend on the classes that came before or with it.
            if name not in self._known:
                self._known[name] = self._encode_class(name).detach()
            # Since then the network may have moved.
            features.append(self._known[name].to(self.model.device))
        return torch.stack(features)

    def _encode_class(self, name: str) -> Float[Tensor, "colours D"]:
        """Return the unit vectors of all colours of a class."""
        texts = []
        for colour in COLOURS:
            texts += [template.format(colour=colour, name=name) for template in TEMPLATES]
        features = self.text_features(texts).unflatten(0, (len(COLOURS), len(TEMPLATES)))
        return normalize(features.mean(1), dim=-1)


def cut_out(picture: Image.Image, detection: Detection) -> Image.Image:
    """Cut an object's box out of a picture, at least a pixel of it; what the mask leaves out
    becomes `GREY` before.
    """
    if detection.mask is not None:
        background = Image.new("RGB", picture.size, GREY)
        picture = Image.composite(picture, background, Image.fromarray(detection.mask))
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left = min(max(left, 0), picture.width - 1)
    top = min(max(top, 0), picture.height - 1)
    right = min(max(right, left + 1), picture.width)
    bottom = min(max(bottom, top + 1), picture.height)
    return picture.crop((left, top, right, bottom))

"""The fidelity of an edited picture to its source, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowrl.images.pictures import read_upright
from flowrl.rewards.images import to_pictures
from flowrl.rewards.protocol import Images
from flowrl.types import PictureFile, Prompt, RewardOutput
from flowrl.values.check import checked


class Preserve:
    """1 - the mean error of an image's pixels from the picture that its prompt edits, which is
    stretched to the image's size.

    Levels are in [0, 1], and so is the score; `error` is `absolute` or `squared`. Where the prompt
    has a mask, a pixel counts as much as that is white: what the edit is to change is not known
    without one, so that the score is then of the whole picture, and best where nothing is edited.
    It has nothing to say about prompts without a picture, nor about those whose mask is black.
    Parts: both errors.
    """

    only_computes = True

    reads_pictures = True

    part_names = ("absolute_error", "squared_error")

    @checked("reward")
    def __init__(self, *, error: Literal["absolute", "squared"]) -> None:
        self.error = error

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        absolute = torch.full((len(prompts),), torch.nan)
        squared = torch.full((len(prompts),), torch.nan)
        sources: dict[tuple[str, tuple[int, int]], tuple[Tensor, Tensor]] = {}
        for i, (picture, prompt) in enumerate(zip(to_pictures(images), prompts, strict=True)):
            if prompt.image is None:
                continue
            # A group's prompts have one source.
            key = (" ".join(prompt.digests), picture.size)
            if key not in sources:
                sources[key] = _source(prompt.image, prompt.mask, picture.size)
            source, weights = sources[key]
            if float(weights.sum()) > 0:
                difference = (_levels(picture) - source).abs()
                absolute[i] = _mean(difference, weights)
                squared[i] = _mean(difference.square(), weights)
        errors = absolute if self.error == "absolute" else squared
        applies = ~errors.isnan()
        return RewardOutput(
            values=torch.where(applies, 1 - errors, 0.0),
            is_valid=torch.ones(len(prompts), dtype=torch.bool),
            parts={"absolute_error": absolute, "squared_error": squared},
            applies=applies[:, None],  # one column, as of a single reward term
        )


def _source(
    image: PictureFile, mask: PictureFile | None, size: tuple[int, int]
) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, "1 H W"]]:
    """Read a picture at a width and height, with the weight of each of its pixels."""
    source = _levels(_stretched(read_upright(Path(image.path)), size))
    if mask is None:
        return source, torch.ones_like(source[:1])
    grey = read_upright(Path(mask.path)).convert("L")
    return source, _levels(_stretched(grey, size))


def _stretched(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)


def _levels(picture: Image.Image) -> Float[Tensor, "C H W"]:
    return pil_to_tensor(picture).float() / 255


def _mean(errors: Float[Tensor, "3 H W"], weights: Float[Tensor, "1 H W"]) -> Float[Tensor, ""]:
    """Return the mean over pixels by their weights, and over colours; in float64, so that the order
    of sums does not show.
    """
    weighted = (errors.double() * weights).sum() / (3 * weights.double().sum())
    return weighted.float()

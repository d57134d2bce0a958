"""Rewards whose gradient leads back to the images, and pictures prepared for networks without a
detour over 8 bits, which has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from flowrl.errors import UserError
from flowrl.rewards.clips import Frames
from flowrl.types import Prompt

KNOWN = (
    "aesthetic",
    "clip_score",
    "pickscore",
    "hpsv2",
    "image_reward",
    "shapes_proxy",
    "a mixture of these (others in it at weight 0)",
)
"""The options of `reward=` that have a gradient."""


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward with a gradient, which a loss of kind direct needs."""

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        """Return the values that a call gives for images in [0, 1], up to their rounding to 8 bits,
        in float32 with a graph that leads to the images.

        Every prompt has a value: there is no missing one, and none to which nothing applies.
        """
        ...


def score_with_graph(
    reward: object,
    images: Float[Tensor, "B *F 3 H W"],
    prompts: Sequence[Prompt],
    frames: Frames | None,
) -> Float[Tensor, "B"]:
    """Return a reward's values with a graph; of clips those of the frames that `frames` chooses,
    reduced as it says.

    Raises UserError where the reward has no gradient, and for clips without `frames`.
    """
    if not isinstance(reward, DifferentiableReward):
        raise UserError(no_gradient(type(reward).__name__))
    if images.ndim == 4:
        return reward.score_with_graph(images, prompts)
    if frames is None:
        raise UserError("frames: say how clips are scored, as by count: 4 and reduce: mean")
    numbers = frames.numbers(images.shape[1])
    # The first frames of all clips, then the second ones, and so on.
    shown = images[:, numbers].transpose(0, 1).flatten(0, 1)
    values = reward.score_with_graph(shown, [*prompts] * len(numbers))
    return frames.over_time(values.unflatten(0, (len(numbers), len(prompts))))


def no_gradient(name: str) -> str:
    """Say that a reward of that name has no gradient, and which ones have."""
    return (
        f"reward: {name} has no gradient with respect to its images (score_with_graph), which the "
        f"loss needs; choose {', '.join(KNOWN[:-1])} or {KNOWN[-1]}, or another loss"
    )


def resize(images: Float[Tensor, "B 3 H W"], size: int | Sequence[int]) -> Float[Tensor, "B 3 h w"]:
    """Resize images bicubically with antialiasing, as PIL does but for its rounding to 8 bits, so
    that overshoots are cut off at 0 and 1.

    `size` is height and width, or the shorter side.
    """
    target = [size] if isinstance(size, int) else list(size)
    mode = InterpolationMode.BICUBIC
    return functional.resize(images, target, mode, antialias=True).clamp(0, 1)


def normalise(
    images: Float[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B 3 H W"]:
    """Subtract each channel's mean, and divide by its standard deviation."""
    return functional.normalize(images, list(mean), list(std))


def fit_inside(images: Float[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 S S"]:
    """Resize images so that their longer side is `side`, and pad them to a square with black, as
    open_clip does with `resize_mode="longest"`.
    """
    height, width = images.shape[-2:]
    ratio = max(height, width) / side
    resized = resize(images, [round(height / ratio), round(width / ratio)])
    down, across = (side - length for length in resized.shape[-2:])
    padding = [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2]
    return functional.pad(resized, padding)

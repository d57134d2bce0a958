"""Clips are shown to scorers of images frame by frame, and the frames' scores become one a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.advantages import weighted_sum
from flowrl.images.clips import evenly
from flowrl.rewards.images import to_tensor
from flowrl.rewards.outputs import REASON, concatenate
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count
from flowrl.values.check import check_fields

Ask = Callable[[Images, Sequence[Prompt]], RewardOutput]
"""A scorer of images that is asked for all of them at once, and raises for none."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of a clip that a scorer of images is shown, and how their scores become the
    clip's.

    `count` frames are evenly spread over the clip, the first and the last among them; None takes
    all. With `reduce` mean or min, values, parts and each term of a mixture are that of the frames;
    with first or last, that frame alone is shown.
    """

    count: Count | None
    reduce: Literal["mean", "min", "first", "last"]

    def __post_init__(self) -> None:
        check_fields(self, "frames")

    def numbers(self, total: int) -> list[int]:
        """Return the numbers of the frames that are shown, of `total`."""
        match self.reduce:
            case "first":
                return [0]
            case "last":
                return [total - 1]
        return evenly(total, self.count)

    def over_time(self, values: Float[Tensor, "N B *R"]) -> Float[Tensor, "B *R"]:
        """Reduce the values of N frames of each clip; NaN where a frame's is."""
        return values.amin(0) if self.reduce == "min" else values.mean(0)


@dataclass(frozen=True)
class Clips:
    """Clips, with how a scorer of images is to see them."""

    values: Float[Tensor, "B F 3 H W"]
    frames: Frames

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.values)

    def __getitem__(self, rows: slice | Sequence[int]) -> Clips:
        """Return the clips of these rows."""
        return Clips(self.values[rows], self.frames)


def as_clips(images: Images | Clips) -> Float[Tensor, "B F 3 H W"]:
    """Return clips for a scorer that asks for whole ones; an image is a clip of one frame."""
    if isinstance(images, Clips):
        return images.values
    pixels = images if isinstance(images, Tensor) else to_tensor(images)
    return pixels[:, None]


def score_frames(
    ask: Ask, whole_groups: bool, clips: Clips, prompts: Sequence[Prompt]
) -> RewardOutput:
    """Show a scorer of images the frames of clips by `ask`, and return the scores of the clips.

    All frames are shown in one call, but with `whole_groups`, to a scorer that compares the images
    of a prompt: it is shown those of one time, and then those of the next. A clip is missing where
    one of the frames is.
    """
    numbers = clips.frames.numbers(clips.values.shape[1])
    if whole_groups:
        outputs = [ask(clips.values[:, number], prompts) for number in numbers]
        output = concatenate(outputs)
    else:
        # The first frames of all clips, then the second ones, and so on.
        frames = clips.values[:, numbers].transpose(0, 1).flatten(0, 1)
        output = ask(frames, [*prompts] * len(numbers))
    return _of_clips(output, numbers, clips.frames)


def _of_clips(output: RewardOutput, numbers: Sequence[int], frames: Frames) -> RewardOutput:
    """Reduce the output for the frames of these numbers, those of all clips by time."""
    shape = (len(numbers), len(output.values) // len(numbers))

    def reduced(values: Tensor) -> Tensor:
        return frames.over_time(values.unflatten(0, shape).float())

    terms = None if output.terms is None else reduced(output.terms.cpu())
    # What applies follows from the prompt, and so is the same at all times.
    applies = None if output.applies is None else output.applies.unflatten(0, shape)[0]
    if terms is None:
        values = reduced(output.values)
    else:
        judged = terms if applies is None else terms.masked_fill(~applies.cpu(), torch.nan)
        values = weighted_sum(judged, terms.new_tensor(output.weights))
    return RewardOutput(
        values,
        output.is_valid.unflatten(0, shape).all(0),
        {name: reduced(part) for name, part in output.parts.items()},
        _info_of_clips(output.info, numbers),
        terms=terms,
        weights=output.weights,
        applies=applies,
    )


def _info_of_clips(
    info: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> list[Mapping[str, Any]]:
    """Return an entry a clip: those of its frames by their numbers, and why the first missing one
    is missing.
    """
    count = len(info) // len(numbers)
    entries: list[Mapping[str, Any]] = []
    for clip in range(count):
        of_frames = {str(number): info[i * count + clip] for i, number in enumerate(numbers)}
        entry: dict[str, Any] = {"frames": of_frames} if any(of_frames.values()) else {}
        for number, told in of_frames.items():
            if REASON in told:
                entry.setdefault(REASON, f"frame {number}: {told[REASON]}")
        entries.append(entry)
    return entries

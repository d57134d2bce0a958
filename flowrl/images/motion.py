"""The numbers of the hacking panel for images and clips; what moves in a clip is measured beside.

A clip that stands still is the first hack of any reward that looks at frames.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.images.image_statistics import MEANINGS, panel

MOTION_MEANINGS = {
    "motion": "mean absolute change of a pixel from a frame to the next; 0 where nothing moves",
    "motion_variation": (
        "how uneven the motion is: the standard deviation over time of a clip's changes from frame "
        "to frame, over their mean; 0 where nothing moves"
    ),
}
"""Of clips alone."""

ALL_MEANINGS = MEANINGS | MOTION_MEANINGS


def looks_of(images: Float[Tensor, "B *F 3 H W"]) -> dict[str, Float[Tensor, "B"]]:
    """Compute the panel of each image, or of each clip its mean over the frames and the motion,
    named as in `ALL_MEANINGS`; NaN where a pixel is no number.
    """
    if images.ndim == 4:
        return panel(images)
    num_frames = images.shape[1]
    # Frame by frame, since a clip's share of a batch may be large.
    frames = [panel(images[:, number]) for number in range(num_frames)]
    looks = {name: torch.stack([frame[name] for frame in frames]).mean(0) for name in MEANINGS}
    return looks | motion(images)


def motion(clips: Float[Tensor, "B F 3 H W"]) -> dict[str, Float[Tensor, "B"]]:
    """Compute the two numbers of clips of two frames or more, in float32.

    With m_t the mean over channels and pixels of |x_(t+1) - x_t|, they are the mean of m_t over
    time, and its population standard deviation over time as a share of that mean.
    """
    changes = [
        (clips[:, number + 1].float() - clips[:, number].float()).abs().mean((1, 2, 3))
        for number in range(clips.shape[1] - 1)
    ]
    by_time = torch.stack(changes, 1)  # [B, F - 1]
    mean = by_time.mean(1)
    variation = by_time.std(1, correction=0) / mean
    # A clip that stands still has no variation; NaN stays NaN.
    return {"motion": mean, "motion_variation": variation.where(mean != 0, 0.0)}

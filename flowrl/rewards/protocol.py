"""The interface of a reward is stated here, and what it returns is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowrl.errors import UserError
from flowrl.types import Prompt, RewardOutput

Images = Float[Tensor, "B 3 H W"] | Sequence[Image.Image]
"""Images in [0, 1], or 8-bit pictures; both give the same scores, see `flowrl.rewards.images`. A
scorer that asks for whole clips is given [B, F, 3, H, W] in their place.
"""


@runtime_checkable
class Reward(Protocol):
    """A callable that scores images against prompts, one each.

    Higher is better. A sample that cannot be scored is marked missing in the output; raising marks
    the whole call missing. A prompt that the reward has nothing to say about is marked in `applies`
    of the output instead. `parts` of the output are logged and evaluated under their names and
    never trained on; a class whose scores always have the same ones names them in `part_names`, so
    that a launch knows them before weights load. A scorer with weights of its own is a
    `torch.nn.Module`, so that it is frozen and moved.

    A scorer that compares the images of a prompt with each other says so by `whole_groups = True`.
    It is asked for one prompt at a time, with all of that prompt's images that are finite:
    `batch.group_size` of them in training, `evaluation.images_per_prompt` in evaluation.

    Where the model draws clips, a scorer is shown some frames of each as if they were images, and
    their scores are reduced to one a clip, as the keys below `frames` say. One that judges motion
    says so by `whole_clips = True`, and is given clips, [B, F, 3, H, W] in [0, 1]; an image is a
    clip of one frame. One that asks others by `flowrl.rewards.attempt.attempt` says
    `hands_on = True`, and is given `flowrl.rewards.clips.Clips` to hand on, so that each of them
    sees what it asks for.

    A scorer that only computes, waiting for nothing and nobody, may say so by
    `only_computes = True`. On a CPU it is then called in the rollout's own thread, since two that
    compute there would push each other off the same cores; no time limit holds for it.

    A scorer that reads `prompt.image` says so by `reads_pictures = True`, and is not served, since
    servers are not sent the pictures that prompts edit.
    """

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput: ...


def asks_for_whole_groups(reward: Reward) -> bool:
    """Tell whether a scorer compares the images of a prompt with each other."""
    return bool(getattr(reward, "whole_groups", False))


def asks_for_whole_clips(reward: Reward) -> bool:
    """Tell whether a scorer is given clips, in place of some of their frames."""
    return bool(getattr(reward, "whole_clips", False))


def hands_on(reward: Reward) -> bool:
    """Tell whether a scorer hands what it is given on to others."""
    return bool(getattr(reward, "hands_on", False))


def only_computes(reward: Reward) -> bool:
    """Tell whether a scorer computes and waits for nothing, so that it cannot hang."""
    return bool(getattr(reward, "only_computes", False))


def check_output(output: RewardOutput, count: int) -> RewardOutput:
    """Return the output as it is. Raises UserError unless it has `count` samples throughout."""
    columns = {"values": output.values, "is_valid": output.is_valid, **output.parts}
    for name, values in columns.items():
        if values.shape != (count,):
            raise UserError(f"{count} images, but {name} of shape {tuple(values.shape)}")
    shape = (count, len(output.weights))
    for name, table in {"terms": output.terms, "applies": output.applies}.items():
        if table is not None and table.shape != shape:
            raise UserError(
                f"{count} images and {shape[1]} weights, but {name} of shape {tuple(table.shape)}"
            )
    return output

"""The interface of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from flowrl.types import Prompt, RewardOutput


@runtime_checkable
class Reward(Protocol):
    """Scores images in [0, 1] against prompts, one each.

    Higher is better. A sample that cannot be scored is marked missing in the output; raising marks the whole call
    missing. `parts` of the output are logged and evaluated under their names and never trained on.
    """

    def __call__(self, images: Float[Tensor, "B 3 S S"], prompts: Sequence[Prompt]) -> RewardOutput: ...

"""A reward is asked for some of the prompts only, such as an OCR where there is text to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from flowrl.rewards.attempt import attempt
from flowrl.rewards.clips import Clips
from flowrl.rewards.protocol import (
    Images,
    Reward,
    asks_for_whole_clips,
    asks_for_whole_groups,
    only_computes,
)
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Text, Told
from flowrl.values.check import checked

Values = Annotated[
    Sequence[str | float | bool],
    MinLen(1),
    Told("a list of the values of reward.key that the reward is for"),
]


class Routed(nn.Module):
    """`reward` on the prompts whose `key` is one of `values`; it does not apply to the others and
    never sees them.

    `key` is `family`, the prompt's task family, or a key of its metadata. Where the reward does not
    apply, a sample is neither missing nor zero: a mixture sums the rewards that do, and advantages
    compare within a prompt anyway. Values are compared as text, so 3 is "3"; booleans are JSON's
    words true and false. A key that is absent or null has no value. Where the reward raises, or
    gives the wrong length, its own prompts are missing, and no others.
    """

    hands_on = True

    @checked("reward")
    def __init__(self, *, reward: Reward, key: Text, values: Values) -> None:
        super().__init__()
        self.reward = reward
        self.whole_groups = asks_for_whole_groups(reward)
        self.whole_clips = asks_for_whole_clips(reward)
        self.only_computes = only_computes(reward)
        self.key = key
        self.values = frozenset(map(_text, values))
        self.name = f"reward for {key} in {sorted(self.values)}"

    def forward(self, images: Images | Clips, prompts: Sequence[Prompt]) -> RewardOutput:
        rows = [row for row, prompt in enumerate(prompts) if self.is_for(prompt)]
        nowhere = torch.zeros(len(prompts), dtype=torch.bool)
        unscored = torch.full((len(prompts),), torch.nan)
        if not rows:
            return RewardOutput(unscored, ~nowhere, applies=nowhere[:, None])
        output = self._score(rows, images, prompts)
        index = torch.tensor(rows)

        def spread(values: Tensor) -> Tensor:
            return unscored.index_copy(0, index, values.float().cpu())

        parts = {name: spread(values) for name, values in output.parts.items()}
        info: list[Mapping[str, Any]] = []
        if output.info:
            by_row = dict(zip(rows, output.info, strict=False))
            info = [by_row.get(row, {}) for row in range(len(prompts))]
        return RewardOutput(
            spread(output.values),
            (~nowhere).index_copy(0, index, output.is_valid.cpu()),
            parts,
            info,
            applies=nowhere.index_copy(0, index, output.is_judged)[:, None],
        )

    def _score(
        self, rows: Sequence[int], images: Images | Clips, prompts: Sequence[Prompt]
    ) -> RewardOutput:
        """Score the samples of these rows alone."""
        chosen = [prompts[row] for row in rows]
        if isinstance(images, Tensor | Clips):
            return attempt(self.reward, images[rows], chosen, self.name)
        return attempt(self.reward, [images[row] for row in rows], chosen, self.name)

    def is_for(self, prompt: Prompt) -> bool:
        """Tell whether the reward applies to a prompt."""
        value = prompt.family if self.key == "family" else prompt.metadata.get(self.key)
        return value is not None and _text(value) in self.values


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

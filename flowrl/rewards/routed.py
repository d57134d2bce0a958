"""A reward for some of the prompts only, such as an OCR reward where there is something to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.rewards.attempt import attempt
from flowrl.rewards.protocol import Images, Reward
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Text


class Routed(nn.Module):
    """`reward` on the prompts whose `key` is one of `values`; it does not apply to the others and
    never sees them.

    `key` is `family`, the prompt's task family, or a key of its metadata. Where the reward does not
    apply, a sample is neither missing nor zero: a mixture sums the rewards that do, and advantages
    compare within a prompt anyway. Values are compared as text, so 3 is "3"; booleans are JSON's
    words true and false. A key that is absent or null has no value. Where the reward raises, or
    gives the wrong length, its own prompts are missing, and no others.
    """

    def __init__(self, *, reward: Reward, key: Text, values: Sequence[str | float | bool]) -> None:
        super().__init__()
        if isinstance(values, str) or not values:
            raise UserError(
                f"reward.values={values!r} must be a list of the values of {key!r} that the reward "
                "is for"
            )
        self.reward = reward
        self.key = key
        self.values = frozenset(map(_text, values))
        self.name = f"reward for {key} in {sorted(self.values)}"

    def forward(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        rows = [i for i, prompt in enumerate(prompts) if self._is_for(prompt)]
        none = torch.full((len(prompts),), torch.nan)
        applies = torch.zeros(len(prompts), dtype=torch.bool)
        if not rows:
            return RewardOutput(none, ~applies, applies=applies[:, None])
        some = images[rows] if isinstance(images, Tensor) else [images[row] for row in rows]
        output = attempt(self.reward, some, [prompts[row] for row in rows], self.name)
        inside = (
            torch.ones(len(rows), dtype=torch.bool)
            if output.applies is None
            else output.applies.cpu().any(1)
        )
        index = torch.tensor(rows)

        def spread(values: Tensor) -> Tensor:
            return none.index_copy(0, index, values.float().cpu())

        info = dict(zip(rows, output.info, strict=False))
        return RewardOutput(
            spread(output.values),
            (~applies).index_copy(0, index, output.is_valid.cpu()),
            {name: spread(part) for name, part in output.parts.items()},
            [info.get(row, {}) for row in range(len(prompts))] if info else (),
            applies=applies.index_copy(0, index, inside)[:, None],
        )

    def _is_for(self, prompt: Prompt) -> bool:
        value = prompt.family if self.key == "family" else prompt.metadata.get(self.key)
        return value is not None and _text(value) in self.values


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

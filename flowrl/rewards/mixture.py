"""A weighted mixture of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.rewards.protocol import Reward
from flowrl.types import Prompt, RewardOutput


class Mixture:
    """The weighted sum of named rewards, with each of them as a term for advantages that treat them apart (`gdpo`).

    Parts: the value of each reward under its name, and its own parts under `<name>_<part>`. A sample that one of them
    could not score is missing.
    """

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if not rewards or rewards.keys() != weights.keys():
            raise ValueError(
                f"reward.weights ({', '.join(weights)}) must name the rewards of reward.rewards ({', '.join(rewards)})"
            )
        self.rewards = dict(rewards)
        self.weights = tuple(float(weights[name]) for name in self.rewards)

    def __call__(self, images: Float[Tensor, "B 3 S S"], prompts: Sequence[Prompt]) -> RewardOutput:
        outputs = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        terms = torch.stack([output.values.float() for output in outputs.values()], 1)
        is_valid = torch.stack([output.is_valid for output in outputs.values()]).all(0)
        parts = {name: output.values for name, output in outputs.items()}
        for name, output in outputs.items():
            parts |= {f"{name}_{part}": values for part, values in output.parts.items()}
        return RewardOutput(terms @ terms.new_tensor(self.weights), is_valid, parts, (), terms, self.weights)

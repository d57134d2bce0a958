"""A weighted mixture of rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.rewards.protocol import Reward
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)


class Mixture:
    """The weighted sum of named rewards, with each of them as a term for advantages that treat them apart (`gdpo`).

    Parts: the value of each reward under its name, and its own parts under `<name>_<part>`. A sample that one of them
    could not score is missing. A reward of weight 0 only monitors: it is no term, and its failures are logged and
    leave its parts out.
    """

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if not rewards or rewards.keys() != weights.keys():
            raise ValueError(
                f"reward.weights ({', '.join(weights)}) must name the rewards of reward.rewards ({', '.join(rewards)})"
            )
        self.terms = {name: reward for name, reward in rewards.items() if weights[name] != 0}
        self.monitors = {name: reward for name, reward in rewards.items() if weights[name] == 0}
        if not self.terms:
            raise ValueError("reward.weights: at least one must differ from 0")
        self.weights = tuple(float(weights[name]) for name in self.terms)

    def __call__(self, images: Float[Tensor, "B 3 S S"], prompts: Sequence[Prompt]) -> RewardOutput:
        outputs = {name: reward(images, prompts) for name, reward in self.terms.items()}
        terms = torch.stack([output.values.float() for output in outputs.values()], 1)
        is_valid = torch.stack([output.is_valid for output in outputs.values()]).all(0)
        for name, reward in self.monitors.items():
            try:
                outputs[name] = reward(images, prompts)
            except Exception:  # whatever fails in a reward that only monitors must not stop a run
                log.exception("monitoring reward %s failed on %d images", name, len(prompts))
        parts = {name: torch.where(output.is_valid, output.values, torch.nan) for name, output in outputs.items()}
        for name, output in outputs.items():
            parts |= {f"{name}_{part}": values for part, values in output.parts.items()}
        return RewardOutput(terms @ terms.new_tensor(self.weights), is_valid, parts, (), terms, self.weights)

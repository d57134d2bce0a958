"""Rewards are mixed into a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowrl.advantages import weighted_sum
from flowrl.errors import UserError
from flowrl.rewards.attempt import attempt
from flowrl.rewards.clips import Clips
from flowrl.rewards.differentiable import DifferentiableReward, no_gradient
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import (
    Images,
    Reward,
    asks_for_whole_clips,
    asks_for_whole_groups,
    only_computes,
)
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Finite


class Mixture(nn.Module):
    """The weighted sum of named rewards, which keeps each of them as a term for advantages that
    treat them apart.

    Parts: the value of each reward under its name, and its own parts under `<name>_<part>`. A
    sample that one of them could not score is missing. A reward that does not apply to a prompt is
    no part of that prompt's sum. A reward of weight 0 only monitors: it is no term, its failures
    are logged, and where it scored nothing its parts are left out. Where one of them asks for whole
    groups, all of them are given those. Of clips, each sees what it asks for.
    """

    hands_on = True

    def __init__(self, *, rewards: Mapping[str, Reward], weights: Mapping[str, Finite]) -> None:
        super().__init__()
        if not rewards or rewards.keys() != weights.keys():
            raise UserError(
                f"reward.weights ({', '.join(weights)}) must name the rewards of reward.rewards "
                f"({', '.join(rewards)})"
            )
        self.trained: dict[str, Reward] = {}
        self.monitors: dict[str, Reward] = {}
        for name, reward in rewards.items():
            role = self.monitors if weights[name] == 0 else self.trained
            role[name] = reward
        if not self.trained:
            raise UserError("reward.weights: at least one must differ from 0")
        self.weights = tuple(float(weights[name]) for name in self.trained)
        self.whole_groups = any(map(asks_for_whole_groups, rewards.values()))
        self.whole_clips = any(map(asks_for_whole_clips, rewards.values()))
        self.only_computes = all(map(only_computes, rewards.values()))
        # Registered, so that scorers with weights are moved and frozen with the mixture.
        self.networks = nn.ModuleList(
            reward for reward in rewards.values() if isinstance(reward, nn.Module)
        )

    def forward(self, images: Images | Clips, prompts: Sequence[Prompt]) -> RewardOutput:
        outputs = {
            name: attempt(reward, images, prompts, f"reward {name}")
            for name, reward in self.trained.items()
        }
        # One column a reward: [B, R].
        terms = torch.stack([output.values.float().cpu() for output in outputs.values()], 1)
        applies = torch.stack([output.is_judged for output in outputs.values()], 1)
        is_scored = torch.stack([output.is_valid.cpu() for output in outputs.values()], 1)
        # In `weighted_sum` NaN stands for a reward that does not apply, so a term that is no number
        # must be marked before.
        has_score = is_scored & terms.isfinite()
        judged_terms = terms.masked_fill(~applies, torch.nan)
        return RewardOutput(
            values=weighted_sum(judged_terms, terms.new_tensor(self.weights)),
            is_valid=(has_score | ~applies).all(1),
            parts=_parts(outputs | self._monitor(images, prompts)),
            info=_reasons(outputs, len(prompts)),
            terms=terms,
            weights=self.weights,
            applies=applies,
        )

    def score_with_graph(
        self, images: Float[Tensor, "B 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        """Return the weighted sum of the rewards whose weight is not 0, each of which must have a
        gradient. Raises UserError for one that has none.
        """
        total = torch.zeros(len(prompts), device=images.device)
        for (name, reward), weight in zip(self.trained.items(), self.weights, strict=True):
            if not isinstance(reward, DifferentiableReward):
                raise UserError(no_gradient(f"{type(reward).__name__} ({name})"))
            total = total + weight * reward.score_with_graph(images, prompts)
        return total

    def _monitor(
        self, images: Images | Clips, prompts: Sequence[Prompt]
    ) -> dict[str, RewardOutput]:
        """Ask the rewards of weight 0, and return the outputs of those that scored anything."""
        outputs = {}
        for name, reward in self.monitors.items():
            output = attempt(reward, images, prompts, f"monitoring reward {name}")
            if output.is_valid.any():
                outputs[name] = output
        return outputs


def _parts(outputs: Mapping[str, RewardOutput]) -> dict[str, Float[Tensor, "B"]]:
    """Name the values and the parts of all rewards, NaN where a reward has no value."""
    parts = {}
    for name, output in outputs.items():
        has_value = output.has_value
        parts[name] = torch.where(has_value, output.values.float().cpu(), torch.nan)
        for part, values in output.parts.items():
            parts[f"{name}_{part}"] = torch.where(has_value, values.float().cpu(), torch.nan)
    return parts


def _reasons(outputs: Mapping[str, RewardOutput], count: int) -> list[dict[str, str]]:
    """Say for each sample why the first of its rewards that failed did so, where that one tells."""
    info: list[dict[str, str]] = [{} for _ in range(count)]
    for name, output in outputs.items():
        # The info of a reward may be empty, so the two need not have one length.
        for entry, reward_entry in zip(info, output.info, strict=False):
            if REASON in reward_entry:
                entry.setdefault(REASON, f"{name}: {reward_entry[REASON]}")
    return info

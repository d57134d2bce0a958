"""Group-relative advantages: rewards, their weights and integer group ids in, advantages out.

A sample has R rewards; most runs have one, of weight 1.
Statistics are population statistics over the whole batch handed in. Samples whose reward is missing are left out of
them and get 0; a group with fewer than two valid samples, or whose rewards are all equal, gets exactly 0 and is
counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing (Flow-GRPO, arXiv 2505.05470, and its reference code)."""
SCORE_FLOOR = 1e-6
"""The least standard deviation that GDPO divides by (Flow-Factory)."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of B samples, which of them have one at all, and what share of the groups taught nothing.

    A sample is used where its reward is valid and its group has another valid one; in a constant group that gives 0.
    """

    values: Float[Tensor, "B"]
    is_used: Bool[Tensor, "B"]
    constant_groups: float
    dropped_groups: float

    def metrics(self) -> dict[str, float]:
        """Named as in the glossary."""
        return {
            "advantage/largest": float(self.values.abs().max()),
            "advantage/constant_groups": self.constant_groups,
            "advantage/dropped_groups": self.dropped_groups,
        }


def group(
    rewards: Float[Tensor, "B R"], weights: Float[Tensor, "R"], groups: Int[Tensor, "B"], is_valid: Bool[Tensor, "B"]
) -> Advantages:
    """(r - mean_g) / (std_g + 1e-4), with mean and std of each group; r is the weighted sum of the rewards."""
    centred, std, counts, index = _centre(rewards @ weights, groups, is_valid)
    return _finish(centred / (std[index] + STD_FLOOR), std, counts, index, is_valid)


def global_std(
    rewards: Float[Tensor, "B R"], weights: Float[Tensor, "R"], groups: Int[Tensor, "B"], is_valid: Bool[Tensor, "B"]
) -> Advantages:
    """(r - mean_g) / (std + 1e-4), with the mean of each group and one std over the batch (flow_grpo's default)."""
    total = rewards @ weights
    centred, std, counts, index = _centre(total, groups, is_valid)
    overall = total[is_valid].std(correction=0) if is_valid.any() else total.new_zeros(())
    return _finish(centred / (overall + STD_FLOOR), std, counts, index, is_valid)


def gdpo(
    rewards: Float[Tensor, "B R"], weights: Float[Tensor, "R"], groups: Int[Tensor, "B"], is_valid: Bool[Tensor, "B"]
) -> Advantages:
    """Each reward's z-score within the group, their weighted sum, normalised over the batch (Flow-Factory's `gdpo`).

    So a reward's scale does not matter, only its weight. A group is constant where all of its rewards are.
    """
    columns = [_centre(column, groups, is_valid) for column in rewards.unbind(1)]
    _, _, counts, index = columns[0]
    scores = [centred / std[index].clamp(min=SCORE_FLOOR) for centred, std, _, _ in columns]
    total = torch.stack(scores, 1) @ weights
    spread = torch.stack([std for _, std, _, _ in columns]).amax(0)
    if is_valid.any():
        total = (total - total[is_valid].mean()) / total[is_valid].std(correction=0).clamp(min=SCORE_FLOOR)
    return _finish(total, spread, counts, index, is_valid)


def _centre(rewards: Tensor, groups: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards minus their group's mean, std and number of valid samples per group, and each sample's group index."""
    _, index = groups.unique(return_inverse=True)
    rewards = torch.where(is_valid, rewards, 0.0)
    num_groups = int(index.max()) + 1
    counts = rewards.new_zeros(num_groups).index_add_(0, index, is_valid.to(rewards))
    mean = rewards.new_zeros(num_groups).index_add_(0, index, rewards) / counts.clamp(min=1)
    centred = torch.where(is_valid, rewards - mean[index], 0.0)
    std = (rewards.new_zeros(num_groups).index_add_(0, index, centred.square()) / counts.clamp(min=1)).sqrt()
    low = torch.full_like(mean, torch.inf).scatter_reduce(0, index[is_valid], rewards[is_valid], "amin")
    high = torch.full_like(mean, -torch.inf).scatter_reduce(0, index[is_valid], rewards[is_valid], "amax")
    # The mean of equal floats can differ from them in the last bit; equality of extremes cannot.
    varies = low < high
    return torch.where(varies[index], centred, 0.0), torch.where(varies, std, 0.0), counts, index


def _finish(values: Tensor, std: Tensor, counts: Tensor, index: Tensor, is_valid: Tensor) -> Advantages:
    is_dropped = counts < 2
    is_constant = (std == 0) & ~is_dropped
    teaches = is_valid & ~(is_dropped | is_constant)[index]
    is_used = is_valid & ~is_dropped[index]
    return Advantages(
        torch.where(teaches, values, 0.0), is_used, float(is_constant.float().mean()), float(is_dropped.float().mean())
    )

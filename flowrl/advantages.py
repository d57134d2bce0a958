"""Group-relative advantages: rewards and integer group ids in, advantages out.

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


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of B samples, and what share of the groups taught nothing."""

    values: Float[Tensor, "B"]
    constant_groups: float
    dropped_groups: float


def group(
    rewards: Float[Tensor, "B"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """(r - mean_g) / (std_g + 1e-4), with mean and std of each group."""
    centred, std, counts, index = _centre(rewards, groups, is_valid)
    return _finish(centred / (std[index] + STD_FLOOR), std, counts, index, is_valid)


def global_std(
    rewards: Float[Tensor, "B"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """(r - mean_g) / (std + 1e-4), with the mean of each group and one std over the batch (flow_grpo's default)."""
    centred, std, counts, index = _centre(rewards, groups, is_valid)
    overall = rewards[is_valid].std(correction=0) if is_valid.any() else rewards.new_zeros(())
    return _finish(centred / (overall + STD_FLOOR), std, counts, index, is_valid)


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
    return centred, torch.where(low < high, std, 0.0), counts, index


def _finish(values: Tensor, std: Tensor, counts: Tensor, index: Tensor, is_valid: Tensor) -> Advantages:
    is_dropped = counts < 2
    is_constant = (std == 0) & ~is_dropped
    teaches = is_valid & ~(is_dropped | is_constant)[index]
    return Advantages(
        torch.where(teaches, values, 0.0), float(is_constant.float().mean()), float(is_dropped.float().mean())
    )

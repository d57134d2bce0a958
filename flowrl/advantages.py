"""Group-relative advantages: rewards, their weights and integer group ids in, advantages out.

A sample has R rewards; most runs have one, of weight 1. Statistics are population statistics over
the whole batch handed in. Samples whose reward is missing are left out of them and get 0; a group
with fewer than two valid samples, or whose rewards are all equal, gets exactly 0 and is counted.
The former is dropped: its lone sample is in no statistic of the batch. A reward that does not apply
to a sample's prompt is NaN there: it adds nothing and is in none of its own statistics. Whether it
applies is the same throughout a group, so nobody gains by it. A sample to which no reward applies
is left out, as a missing one is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_OFFSET = 1e-4
"""Added to a standard deviation before dividing (Flow-GRPO, arXiv 2505.05470, and its reference
code).
"""
SCORE_FLOOR = 1e-6
"""The least standard deviation that GDPO divides by (Flow-Factory)."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of B samples, which of them have one at all, and what share of the groups taught
    nothing.

    `values` holds one number a sample, or one a sample and term, [B, T]: a stochastic step, or
    with a forward-process loss a sigma of the grid. A sample is used
    where its reward is valid and its group has another valid one; in a constant group that gives 0.
    """

    values: Float[Tensor, "B *T"]
    is_used: Bool[Tensor, "B"]
    constant_groups: float
    dropped_groups: float

    def metrics(self) -> dict[str, float]:
        """Return metrics named as in the glossary."""
        return {
            "advantage/largest": float(self.values.abs().max()),
            "advantage/constant_groups": self.constant_groups,
            "advantage/dropped_groups": self.dropped_groups,
        }


def weighted_sum(rewards: Float[Tensor, "B R"], weights: Float[Tensor, "R"]) -> Float[Tensor, "B"]:
    """Return the sum over the rewards that apply to a sample, with nothing in place of the others;
    NaN where none applies.
    """
    applies = ~rewards.isnan()
    return torch.where(applies.any(1), torch.where(applies, rewards, 0.0) @ weights, torch.nan)


def group(
    rewards: Float[Tensor, "B R"],
    weights: Float[Tensor, "R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """Compute (r - mean_g) / (std_g + 1e-4), with mean and std of each group; r is the weighted sum
    of the rewards.
    """
    total = weighted_sum(rewards, weights)
    has_value = is_valid & ~total.isnan()
    centred, std, counts, index = _centre(total, groups, has_value)
    return _finish(centred / (std[index] + STD_OFFSET), std, counts, index, has_value)


def global_std(
    rewards: Float[Tensor, "B R"],
    weights: Float[Tensor, "R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """Compute (r - mean_g) / (std + 1e-4), with the mean of each group and one std over the batch
    (flow_grpo's default).

    Prompts that fewer rewards judge have other sums, which widens that std: with routed rewards
    prefer `zscore`.
    """
    total = weighted_sum(rewards, weights)
    has_value = _in_company(groups, is_valid & ~total.isnan())
    centred, std, counts, index = _centre(total, groups, has_value)
    values = centred / (_spread(total, has_value) + STD_OFFSET)
    return _finish(values, std, counts, index, has_value)


def zscore(
    rewards: Float[Tensor, "B R"],
    weights: Float[Tensor, "R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """Compute the weighted sum of (r - mean_g) / (std_r + 1e-4), with each reward's own std over
    the samples it applies to.

    So a reward's scale does not matter, and prompts on which a reward varies more count more; GDPO
    levels them. With one reward this is `global_std`. A group is constant where all of its rewards
    are.
    """
    has_value = _in_company(groups, is_valid & ~rewards.isnan().all(1))
    total = torch.zeros_like(rewards[:, 0])
    widest = None
    for column, weight in zip(rewards.unbind(1), weights, strict=True):
        has_term = has_value & ~column.isnan()
        centred, std, _, _ = _centre(column, groups, has_term)
        total = total + weight * centred / (_spread(column, has_term) + STD_OFFSET)
        widest = std if widest is None else torch.maximum(widest, std)
    assert widest is not None
    return _finish(total, widest, *_count(groups, has_value), has_value)


def gdpo(
    rewards: Float[Tensor, "B R"],
    weights: Float[Tensor, "R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """Compute each reward's z-score within the group and their weighted sum, normalised over the
    batch (Flow-Factory's `gdpo`).

    So a reward's scale does not matter, only its weight. A group is constant where all of its
    rewards are. A reward that does not apply adds nothing, so a prompt that fewer rewards judge
    moves less.
    """
    has_value = _in_company(groups, is_valid & ~rewards.isnan().all(1))
    counts, index = _count(groups, has_value)
    columns = [_centre(column, groups, has_value & ~column.isnan()) for column in rewards.unbind(1)]
    scores = [centred / std[index].clamp(min=SCORE_FLOOR) for centred, std, _, _ in columns]
    total = torch.stack(scores, 1) @ weights
    widest = torch.stack([std for _, std, _, _ in columns]).amax(0)
    if has_value.any():
        total = (total - total[has_value].mean()) / _spread(total, has_value).clamp(min=SCORE_FLOOR)
    return _finish(total, widest, counts, index, has_value)


def _spread(rewards: Tensor, is_valid: Tensor) -> Tensor:
    """Return the standard deviation over all valid samples, 0 where there is none."""
    return rewards[is_valid].std(correction=0) if is_valid.any() else rewards.new_zeros(())


def _count(groups: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of valid samples per group, and each sample's group index."""
    _, index = groups.unique(return_inverse=True)
    counts = is_valid.new_zeros(int(index.max()) + 1, dtype=torch.float32)
    return counts.index_add_(0, index, is_valid.float()), index


def _in_company(groups: Tensor, is_valid: Tensor) -> Tensor:
    """Tell which samples are valid in a group where another one is; a lone one must not set the
    spread of the batch.
    """
    counts, index = _count(groups, is_valid)
    return is_valid & (counts > 1)[index]


def _centre(
    rewards: Tensor, groups: Tensor, is_valid: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rewards minus their group's mean, std and number of valid samples per group, and each
    sample's group index.
    """
    counts, index = _count(groups, is_valid)
    rewards = torch.where(is_valid, rewards, 0.0)
    mean = rewards.new_zeros(len(counts)).index_add_(0, index, rewards) / counts.clamp(min=1)
    centred = torch.where(is_valid, rewards - mean[index], 0.0)
    squares = rewards.new_zeros(len(counts)).index_add_(0, index, centred.square())
    std = (squares / counts.clamp(min=1)).sqrt()
    low = torch.full_like(mean, torch.inf).scatter_reduce(
        0, index[is_valid], rewards[is_valid], "amin"
    )
    high = torch.full_like(mean, -torch.inf).scatter_reduce(
        0, index[is_valid], rewards[is_valid], "amax"
    )
    # The mean of equal floats can differ from them in the last bit; equality of extremes cannot.
    varies = low < high
    return torch.where(varies[index], centred, 0.0), torch.where(varies, std, 0.0), counts, index


def _finish(
    values: Tensor, std: Tensor, counts: Tensor, index: Tensor, is_valid: Tensor
) -> Advantages:
    is_dropped = counts < 2
    is_constant = (std == 0) & ~is_dropped
    teaches = is_valid & ~(is_dropped | is_constant)[index]
    is_used = is_valid & ~is_dropped[index]
    return Advantages(
        torch.where(teaches, values, 0.0),
        is_used,
        float(is_constant.float().mean()),
        float(is_dropped.float().mean()),
    )

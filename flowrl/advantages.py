"""Group-relative advantages: rewards, their weights and integer group ids in, advantages out.

A sample has R rewards; most runs have one, of weight 1. Statistics are population statistics over
the whole batch handed in. Samples whose reward is missing are left out of them and get 0; a group
with fewer than two valid samples, or whose rewards are all equal, gets exactly 0 and is counted.
The former is dropped: its lone sample is in no statistic of the batch. A reward that does not apply
to a sample's prompt is NaN there: it adds nothing and is in none of its own statistics. Whether it
applies is the same throughout a group, so nobody gains by it. A sample to which no reward applies
is left out, as a missing one is.

All of it is computed in float64, on the CPU, and returned in the rewards' dtype, float32 in
training: in float32 the order of samples would show at 5e-5 where rewards of 5 spread by .01.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.values.bounds import Positive

STD_OFFSET = 1e-4
"""Added to a standard deviation before dividing (Flow-GRPO, arXiv 2505.05470, and its reference
code).
"""
MIN_REWARD_STD = 1e-6
"""The least standard deviation that GDPO divides by (Flow-Factory)."""
ROUNDING = 8 * torch.finfo(torch.float32).eps
"""The share of a group's largest reward, in size, up to which GDPO takes differences for rounding.

The last bits of a scorer's float32 result vary with the batch. A group that differs by a few of
them is constant: Flow-Factory's floor alone makes advantages of .1 of one bit of rewards near 5,
and of 1 where all groups are such, since the sum is normalised over the batch.
"""


@dataclass(frozen=True, slots=True)
class Groups:
    """The advantage groups of B samples: each sample's group number, and valid samples a group."""

    index: Int[Tensor, "B"]
    counts: Float[Tensor, "P"]

    def total(self, values: Float[Tensor, "B"]) -> Float[Tensor, "P"]:
        """Return the sum of values over each group."""
        return values.new_zeros(len(self.counts)).index_add_(0, self.index, values)

    def mean(self, values: Float[Tensor, "B"]) -> Float[Tensor, "P"]:
        """Return each group's mean of values that are 0 where a sample is not valid; 0 for a group
        without valid ones.
        """
        return self.total(values) / self.counts.clamp(min=1)


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of B samples, which of them have one at all, and what share of the groups taught
    nothing.

    `values` holds one number a sample, or one a sample and term, [B, T]: a stochastic step, or
    with a forward-process loss a sigma of the grid. A sample is used where its reward is valid and
    its group has another valid one; in a constant group it is used with the value 0.
    """

    values: Float[Tensor, "B *T"]
    is_used: Bool[Tensor, "B"]
    constant_share: float
    dropped_share: float

    def metrics(self) -> dict[str, float]:
        """Return metrics named as in the glossary."""
        return {
            "advantage/largest": float(self.values.abs().max()),
            "advantage/constant_groups": self.constant_share,
            "advantage/dropped_groups": self.dropped_share,
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
    total = weighted_sum(rewards.double(), weights.double())
    # Lone samples may stay in here, since no statistic reaches beyond their group.
    has_value = is_valid & ~total.isnan()
    members = _group(groups, has_value)
    centred, std = _centre(total, groups, has_value)
    values = centred / (std[members.index] + STD_OFFSET)
    return _finish(values.to(rewards), std=std, members=members, has_value=has_value)


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
    total = weighted_sum(rewards.double(), weights.double())
    has_value = _in_company(groups, is_valid & ~total.isnan())
    centred, std = _centre(total, groups, has_value)
    values = centred / (_std(total, has_value) + STD_OFFSET)
    values = values.to(rewards)
    return _finish(values, std=std, members=_group(groups, has_value), has_value=has_value)


def from_mean(
    rewards: Float[Tensor, "B R"],
    weights: Float[Tensor, "R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
    *,
    scale: Positive,
) -> Advantages:
    """Compute scale (r - mean_g), with the mean of each group; r is the weighted sum of the
    rewards.

    No spread divides it, so it stays in units of the reward: for losses that weigh an advantage
    against a log-ratio, as PEPG and PAR do. Source: `exact` of rethinking-diffusion-rl (ICML 2026),
    whose recipes have a scale of 0.1, as the quotient of two numbers that also serve elsewhere.
    """
    total = weighted_sum(rewards.double(), weights.double())
    has_value = is_valid & ~total.isnan()
    centred, std = _centre(total, groups, has_value)
    values = (scale * centred).to(rewards)
    return _finish(values, std=std, members=_group(groups, has_value), has_value=has_value)


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
    total = torch.zeros_like(rewards[:, 0], dtype=torch.float64)
    stds = []
    for column, weight in zip(rewards.double().unbind(1), weights.double(), strict=True):
        has_term = has_value & ~column.isnan()
        centred, std = _centre(column, groups, has_term)
        total = total + weight * centred / (_std(column, has_term) + STD_OFFSET)
        stds.append(std)
    widest = torch.stack(stds).amax(0)
    values = total.to(rewards)
    return _finish(values, std=widest, members=_group(groups, has_value), has_value=has_value)


def gdpo(
    rewards: Float[Tensor, "B R"],
    weights: Float[Tensor, "R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Advantages:
    """Compute each reward's z-score within the group and their weighted sum, normalised over the
    batch (Flow-Factory's `gdpo`).

    So a reward's scale does not matter, only its weight. A group is constant where all of its
    rewards are, or differ by no more than `ROUNDING`, where Flow-Factory goes on. A reward that
    does not apply adds nothing, so a prompt that fewer rewards judge moves less.
    """
    has_value = _in_company(groups, is_valid & ~rewards.isnan().all(1))
    members = _group(groups, has_value)
    scores = []
    stds = []
    for column in rewards.double().unbind(1):
        has_term = has_value & ~column.isnan()
        centred, std = _centre(column, groups, has_term, rounding=ROUNDING)
        scores.append(centred / std[members.index].clamp(min=MIN_REWARD_STD))
        stds.append(std)
    total = torch.stack(scores, 1) @ weights.double()
    if has_value.any():
        total = (total - total[has_value].mean()) / _std(total, has_value).clamp(min=MIN_REWARD_STD)
    widest = torch.stack(stds).amax(0)
    return _finish(total.to(rewards), std=widest, members=members, has_value=has_value)


def _std(rewards: Tensor, has_value: Tensor) -> Tensor:
    """Return the standard deviation over all valid samples, 0 where there is none."""
    return rewards[has_value].std(correction=0) if has_value.any() else rewards.new_zeros(())


def _group(groups: Tensor, has_value: Tensor) -> Groups:
    """Number the groups from 0 on, whatever their ids, and count the valid samples of each."""
    _, index = groups.unique(return_inverse=True)
    counts = has_value.new_zeros(int(index.max()) + 1, dtype=torch.float32)
    return Groups(index, counts.index_add_(0, index, has_value.float()))


def _in_company(groups: Tensor, has_value: Tensor) -> Tensor:
    """Tell which samples are valid in a group where another one is; a lone one must not set the
    spread of the batch.
    """
    members = _group(groups, has_value)
    return has_value & (members.counts > 1)[members.index]


def _centre(
    rewards: Float[Tensor, "B"],
    groups: Int[Tensor, "B"],
    has_value: Bool[Tensor, "B"],
    *,
    rounding: float = 0.0,
) -> tuple[Float[Tensor, "B"], Float[Tensor, "P"]]:
    """Return rewards minus the mean of their group, and each group's population std.

    Both are exactly 0 where all valid rewards of a group are equal, or differ by at most `rounding`
    times the largest in size, and for samples that are not valid.
    """
    members = _group(groups, has_value)
    index = members.index
    rewards = torch.where(has_value, rewards, 0.0)
    mean = members.mean(rewards)
    centred = torch.where(has_value, rewards - mean[index], 0.0)
    std = members.mean(centred.square()).sqrt()
    low = torch.full_like(mean, torch.inf).scatter_reduce(
        0, index[has_value], rewards[has_value], "amin"
    )
    high = torch.full_like(mean, -torch.inf).scatter_reduce(
        0, index[has_value], rewards[has_value], "amax"
    )
    # The mean of equal floats can differ from them in the last bit; equality of extremes cannot.
    size = torch.maximum(low.abs(), high.abs())
    # Written with `~`, so that infinite rewards vary, and are refused for their advantages.
    varies = ~(high - low <= rounding * size)
    return torch.where(varies[index], centred, 0.0), torch.where(varies, std, 0.0)


def _finish(
    values: Float[Tensor, "B"],
    *,
    std: Float[Tensor, "P"],
    members: Groups,
    has_value: Bool[Tensor, "B"],
) -> Advantages:
    """Set to 0 what teaches nothing, and count the groups in which all samples are such.

    `std` is each group's, and with several rewards the largest of theirs.
    """
    is_dropped = members.counts < 2
    is_constant = (std == 0) & ~is_dropped
    teaches = has_value & ~(is_dropped | is_constant)[members.index]
    is_used = has_value & ~is_dropped[members.index]
    return Advantages(
        values=torch.where(teaches, values, 0.0),
        is_used=is_used,
        constant_share=float(is_constant.float().mean()),
        dropped_share=float(is_dropped.float().mean()),
    )

"""The advantages of an iteration's samples, from the scores of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowrl.advantages import Advantages, weighted_sum
from flowrl.errors import NotFinite, UserError
from flowrl.losses.protocol import Loss
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.training.credit import advantages_of_gains
from flowrl.training.metric_means import Record, record_rewards

if TYPE_CHECKING:
    from flowrl.training.policy import Policy


def assign_advantages(policy: Policy, batches: Sequence[MicroBatch], record: Record) -> None:
    """Wait for all scores and give every sample its advantage, from those of all processes. Where
    the loss needs no advantages, a sample is used if it has a reward.

    Raises TooManyMissingRewards as RewardModule.check does, unless the loss needs no rewards, and
    NotFinite for an advantage that is no number.
    """
    reward = policy.reward
    output = reward.collect([batch.score for batch in batches])
    assert output.terms is not None
    # From here on everything is that of all processes, so that all of them come to the same
    # advantages: [B, R] terms and the samples' global numbers.
    rows_here = torch.tensor([row for batch in batches for row in batch.rows])
    terms = gather_rows(policy, output.terms)
    is_valid = gather_rows(policy, output.is_valid)
    rows = gather_rows(policy, rows_here)
    if policy.algorithm.loss.needs_rewards:
        reward.check(is_valid, terms, output.info)
        reward.check_applies(terms)
    weights = torch.tensor(output.weights)
    values = weighted_sum(terms, weights)
    groups = torch.tensor([policy.plan.member(row)[0] for row in rows.tolist()])
    advantages = policy.algorithm.advantage(terms, weights, groups, is_valid)
    if policy.algorithm.credit == "step":
        stages = [*_earlier_stages(policy, batches), (terms, is_valid)]
        advantages = advantages_of_gains(policy, stages, weights, groups)
    advantages = _suited_to(policy.algorithm.loss, advantages, is_valid & ~values.isnan())
    _require_finite(advantages)
    # Processes come one after the other, and samples of an update do not: back to global order.
    num_samples = policy.plan.num_samples
    by_row = advantages.values.new_zeros(num_samples, *advantages.values.shape[1:])
    by_row = by_row.index_copy(0, rows, advantages.values)
    is_used = torch.zeros(num_samples, dtype=torch.bool).index_copy(0, rows, advantages.is_used)
    _check_width(policy, batches, by_row)
    for batch in batches:
        batch.advantage = by_row[list(batch.rows)].to(policy.device)
        batch.is_used = is_used[list(batch.rows)].to(policy.device)
    policy.learning.take(bool((is_valid & values.isfinite()).any()), advantages)
    record_rewards(record, output, values, is_valid)
    policy.scouting.compare(rows, values, is_valid, record)
    for name, value in advantages.metrics().items():
        record.add(name, value)


def _suited_to(loss: Loss, advantages: Advantages, has_reward: Bool[Tensor, "B"]) -> Advantages:
    """Return the advantages, with all samples used that have a reward where the loss needs nothing
    else, whatever became of the others of their prompts.
    """
    return advantages if loss.needs_advantages else replace(advantages, is_used=has_reward)


def _require_finite(advantages: Advantages) -> None:
    """Raise NotFinite for an advantage that is no number."""
    if not advantages.values.isfinite().all():
        raise NotFinite("an advantage is NaN or infinite: look at the rewards' weights")


def _earlier_stages(
    policy: Policy, batches: Sequence[MicroBatch]
) -> list[tuple[Float[Tensor, "B R"], Bool[Tensor, "B"]]]:
    """Wait for the scores of the samples' completions, and return the terms and validity of each
    stage before the last, of all processes.

    Raises TooManyMissingRewards as RewardModule.check does.
    """
    stages = []
    for scores in zip(*(batch.stages for batch in batches), strict=True):
        output = policy.reward.collect(scores)
        assert output.terms is not None
        terms = gather_rows(policy, output.terms)
        is_valid = gather_rows(policy, output.is_valid)
        policy.reward.check(is_valid, terms, output.info)
        stages.append((terms, is_valid))
    return stages


def _check_width(policy: Policy, batches: Sequence[MicroBatch], advantages: Tensor) -> None:
    """Raise UserError unless advantages are one a sample, or one a sample and term."""
    if advantages.ndim == 1:
        return
    num_terms = {policy.objective.num_terms(batch) for batch in batches}
    if num_terms != {advantages.shape[1]}:
        raise UserError(
            f"advantage gives {advantages.shape[1]} numbers a sample, but {sorted(num_terms)} "
            "terms are trained; give one number a sample, or one for each stochastic step or, with "
            "a forward-process loss, for each sigma of the grid"
        )


def gather_rows(policy: Policy, values: Tensor) -> Tensor:
    """Return the values of all processes, in rank order, on the CPU."""
    if policy.plan.num_processes == 1:
        return values
    gathered = policy.all_gather(values.to(policy.device))
    assert isinstance(gathered, Tensor)
    return gathered.flatten(0, 1).cpu()

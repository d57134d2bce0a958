"""The steps' own rewards: what each stochastic step changed in the score of its sample.

The policy scores the images that samples would have become without their later noise, and an
advantage of a step compares what it gained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.advantages import ROUNDING, Advantages
from flowrl.algorithm import Algorithm
from flowrl.objectives.micro_batch import ConditionedRows
from flowrl.rollout import rollout
from flowrl.samplers.ode import ODE
from flowrl.types import Prompt, RewardOutput, Trajectory

if TYPE_CHECKING:
    from flowrl.training.policy import Policy


def score_completions(
    policy: Policy,
    prompts: Sequence[Prompt],
    conditioned: ConditionedRows,
    trajectory: Trajectory,
) -> list[Future[RewardOutput]]:
    """Draw the completions of samples, and start scoring each stage as it is there."""
    return [
        policy.reward.submit(images, prompts)
        for images in completions(policy, conditioned, trajectory)
    ]


@torch.no_grad()
def completions(
    policy: Policy, conditioned: ConditionedRows, trajectory: Trajectory
) -> Iterator[Float[Tensor, "B *F 3 H W"]]:
    """Complete each sample by the ODE from before its first stochastic step, and from after each
    but the last, and decode it, in the order of the steps. Nothing where a sample has one advantage
    for all its steps.

    After its last stochastic step a sample is its own completion. Source: DenseGRPO (Deng et al.
    2026, arXiv 2601.20218), which completes every step from its own state; where ODE steps lie
    between two stochastic ones, both completions are the same image, drawn once here.
    """
    method = policy.algorithm
    if method.credit == "trajectory":
        return
    field = conditioned.field(policy.velocity)
    for stage, first_step in enumerate(first_steps(trajectory.steps)):
        state = trajectory.x[:, 0] if stage == 0 else trajectory.x_next[:, stage - 1]
        completed = rollout(
            field,
            state.contiguous(),
            method.intervals[first_step:],
            sampler=ODE(),
            stochastic=(),
            noise=_no_noise,
            shares_start=trajectory.shares_start and stage == 0,
        )
        yield policy.model.decode(completed.x0)


def first_steps(stochastic: Sequence[int]) -> list[int]:
    """Return the grid's step at which each completion begins: the first stochastic one, and those
    that follow each but the last.
    """
    return [stochastic[0], *(step + 1 for step in stochastic[:-1])]


def completed_steps(method: Algorithm, stochastic: Sequence[int]) -> list[int]:
    """Count the steps of each completion of a sample with these stochastic steps; none where a
    sample has one advantage for all its steps.
    """
    if method.credit == "trajectory":
        return []
    return [method.num_steps - first for first in first_steps(stochastic)]


def _no_noise(step: int) -> Tensor:
    raise AssertionError(f"an ODE step asked for noise: {step}")


def gains_of(
    before: Float[Tensor, "B R"],
    after: Float[Tensor, "B R"],
    groups: Int[Tensor, "B"],
    is_valid: Bool[Tensor, "B"],
) -> Float[Tensor, "B R"]:
    """Return after - before, where gains of a group that differ by rounding alone are made equal.

    Such are those whose extremes are no further apart than `ROUNDING` times the largest score, in
    size, of the group: the last bits of a score are those of a number of its size, and a gain may
    be much smaller, so that an advantage that divides by the gains' spread could not tell.
    """
    gains = after - before
    _, index = groups.unique(return_inverse=True)
    # Left alone where it is no number, for which no reward applies or the run stops.
    counts = is_valid[:, None] & gains.isfinite()
    largest = torch.where(counts, torch.maximum(before.abs(), after.abs()), 0.0)
    places = index[:, None].expand_as(gains)
    shape = (int(index.max()) + 1, gains.shape[1])
    size = gains.new_zeros(shape).scatter_reduce(0, places, largest, "amax")
    low = gains.new_full(shape, torch.inf)
    low = low.scatter_reduce(0, places, torch.where(counts, gains, torch.inf), "amin")
    high = gains.new_full(shape, -torch.inf)
    high = high.scatter_reduce(0, places, torch.where(counts, gains, -torch.inf), "amax")
    is_rounding = (high - low <= ROUNDING * size)[index] & counts
    return torch.where(is_rounding, low[index], gains)


def advantages_of_gains(
    policy: Policy,
    stages: Sequence[tuple[Float[Tensor, "B R"], Tensor]],
    weights: Float[Tensor, "R"],
    groups: Tensor,
) -> Advantages:
    """Compute advantages of T steps from the terms and validity of T + 1 stages: those of the gains
    from each stage to the next, each step's compared within its groups as one of rewards.

    A gain is missing where one of its two scores is.
    """
    of_steps = []
    for (before, was_valid), (after, is_valid) in pairwise(stages):
        has_both = was_valid & is_valid
        gains = gains_of(before, after, groups, has_both)
        of_steps.append(policy.algorithm.advantage(gains, weights, groups, has_both))
    return Advantages(
        values=torch.stack([step.values for step in of_steps], 1),
        is_used=torch.stack([step.is_used for step in of_steps], 1).any(1),
        constant_share=sum(step.constant_share for step in of_steps) / len(of_steps),
        dropped_share=sum(step.dropped_share for step in of_steps) / len(of_steps),
    )

"""The rollouts of an update, in micro-batches whose samples share their stochastic steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from flowrl.errors import UserError
from flowrl.noise import INITIAL, gaussian_noise, on_device
from flowrl.objectives.micro_batch import ConditionedRows, MicroBatch
from flowrl.objectives.protocol import Member
from flowrl.parallel.sharding import is_divided
from flowrl.rollout import rollout
from flowrl.schedule import Interval
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.prompt_data import PromptBatch
from flowrl.types import Trajectory

if TYPE_CHECKING:
    from flowrl.training.policy import Policy

Piece = tuple[range, tuple[int, ...]]
"""Rows of a micro-batch that have the same stochastic steps, and these steps."""


def sample_update(
    policy: Policy, batch: PromptBatch, number: int, micro_batches: Sequence[range]
) -> list[MicroBatch]:
    """Roll out the micro-batches of update `number`, split where prompts differ in their steps.

    Raises UserError where prompts have different numbers of steps, or where sharded weights, which
    all processes must gather equally often, meet processes with different numbers of pieces.
    """
    pieces = split_by_steps(policy, batch.iteration, micro_batches, policy.plan)
    if len({len(stochastic) for _, stochastic in pieces}) > 1:
        raise UserError("steps: each prompt must have as many stochastic steps as any other")
    if is_divided(policy.transformer):
        _require_equal_piece_counts(policy, batch.iteration, number)
    return [policy.sample(batch, rows, stochastic) for rows, stochastic in pieces]


@torch.no_grad()
def draw(
    policy: Policy, batch: PromptBatch, rows: range, stochastic: tuple[int, ...]
) -> tuple[ConditionedRows, Trajectory]:
    """Roll out the samples numbered `rows`, all with these stochastic steps; return the trajectory
    and what it is conditioned on.
    """
    method = policy.algorithm
    members = [policy.scouting.member(row) for row in rows]
    kept = policy.objective.kept_steps(stochastic, batch.iteration)
    return draw_members(policy, batch, members, stochastic, kept, method.intervals)


def draw_members(
    policy: Policy,
    batch: PromptBatch,
    members: Sequence[Member],
    stochastic: tuple[int, ...],
    kept: tuple[int, ...],
    grid: Sequence[Interval],
) -> tuple[ConditionedRows, Trajectory]:
    """Roll out samples over a grid, all with these stochastic steps, of which the states of the
    `kept` ones are kept.
    """
    method = policy.algorithm
    prompts = [batch.prompts[prompt] for prompt, _ in members]
    shape = policy.model.latent_shape
    noise = partial(gaussian_noise, shape, seed=policy.seed, iteration=batch.iteration)
    # Samples of one prompt may begin from the same noise, that of its first one.
    starts = members
    if method.shared_initial_noise:
        starts = [(prompt, 0) for prompt, _ in members]
    conditioned = ConditionedRows(*policy.embed.shared(prompts), starts)
    trajectory = rollout(
        conditioned.field(policy.velocity),
        on_device(noise(samples=starts, step=INITIAL), policy.device),
        grid,
        sampler=method.sampler,
        stochastic=stochastic,
        trained=kept,
        noise=lambda k: on_device(noise(samples=members, step=k), policy.device),
        shares_start=method.shared_initial_noise,
    )
    return conditioned, trajectory


def split_by_steps(
    policy: Policy, iteration: int, micro_batches: Sequence[range], plan: BatchPlan
) -> list[Piece]:
    """Split micro-batches of a plan into pieces whose samples have the same stochastic steps."""
    pieces = []
    for rows in micro_batches:
        prompts = [plan.member(row)[0] for row in rows]
        steps_of = {
            prompt: policy.objective.stochastic_steps(iteration, prompt) for prompt in set(prompts)
        }
        steps = [steps_of[prompt] for prompt in prompts]
        start = 0
        for place in range(len(rows)):
            is_last = place + 1 == len(rows)
            if is_last or steps[place + 1] != steps[place]:
                pieces.append((rows[start : place + 1], steps[place]))
                start = place + 1
    return pieces


def _require_equal_piece_counts(policy: Policy, iteration: int, number: int) -> None:
    """Raise UserError unless all processes make as many pieces of an update.

    Steps are a function of iteration and prompt, so every process can count those of the others.
    """
    plan = policy.plan
    require_equal_counts(
        len(split_by_steps(policy, iteration, plan.updates(rank)[number], plan))
        for rank in range(policy.plan.num_processes)
    )


def require_equal_counts(counts: Iterable[int]) -> None:
    """Raise UserError unless all processes make as many passes through weights that are divided."""
    if len(set(counts)) > 1:
        raise UserError(
            "trainer=fsdp: processes would make different numbers of passes, since prompts differ "
            "in their stochastic steps; take trainer=ddp, or steps that are alike"
        )

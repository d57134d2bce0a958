"""The rollouts of an update, in micro-batches whose samples share their stochastic steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from flowrl.errors import UserError
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.parallel.sharding import is_divided
from flowrl.training.prompt_data import PromptBatch

if TYPE_CHECKING:
    from flowrl.training.policy import Policy

Piece = tuple[range, tuple[int, ...]]
"""Rows of a micro-batch that share their stochastic steps, and these."""


def sample_update(
    policy: Policy, batch: PromptBatch, number: int, micro_batches: Sequence[range]
) -> list[MicroBatch]:
    """Roll out the micro-batches of update `number`, divided where prompts differ in their steps.

    Raises UserError where prompts have different numbers of steps, or where divided weights, which
    all processes must gather alike, meet processes with different numbers of pieces.
    """
    pieces = divide(policy, batch.iteration, micro_batches)
    if len({len(stochastic) for _, stochastic in pieces}) > 1:
        raise UserError("steps: each prompt must have as many stochastic steps as any other")
    if is_divided(policy.transformer):
        _require_equal_numbers(policy, batch.iteration, number)
    return [policy.sample(batch, rows, stochastic) for rows, stochastic in pieces]


def divide(policy: Policy, iteration: int, micro_batches: Sequence[range]) -> list[Piece]:
    """Divide micro-batches into pieces whose samples share their stochastic steps."""
    group_size = policy.plan.group_size
    pieces = []
    for rows in micro_batches:
        steps = [policy.objective.stochastic_steps(iteration, row // group_size) for row in rows]
        for stochastic, places in groupby(range(len(rows)), key=steps.__getitem__):
            numbers = list(places)
            pieces.append((rows[numbers[0] : numbers[-1] + 1], stochastic))
    return pieces


def _require_equal_numbers(policy: Policy, iteration: int, number: int) -> None:
    """Raise UserError unless all processes make as many pieces of an update.

    Steps are a function of iteration and prompt, so every process can count those of the others.
    """
    counts = {
        len(divide(policy, iteration, policy.plan.updates(rank)[number]))
        for rank in range(policy.plan.num_processes)
    }
    if len(counts) > 1:
        raise UserError(
            "trainer=fsdp: processes would make different numbers of passes, since prompts differ "
            "in their stochastic steps; take trainer=ddp, or steps that are alike"
        )

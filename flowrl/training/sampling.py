"""The rollouts of an update, in micro-batches whose samples share their stochastic steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from flowrl.objectives.micro_batch import MicroBatch
from flowrl.training.prompt_data import PromptBatch

if TYPE_CHECKING:
    from flowrl.training.policy import Policy


def sample_update(
    policy: Policy, batch: PromptBatch, micro_batches: Sequence[range]
) -> list[MicroBatch]:
    """Roll out an update's micro-batches, divided where prompts differ in stochastic steps."""
    group_size = policy.plan.group_size
    sampled = []
    for rows in micro_batches:
        steps = [
            policy.objective.stochastic_steps(batch.iteration, row // group_size) for row in rows
        ]
        for stochastic, places in groupby(range(len(rows)), key=steps.__getitem__):
            numbers = list(places)
            equal_rows = rows[numbers[0] : numbers[-1] + 1]
            sampled.append(policy.sample(batch, equal_rows, stochastic))
    return sampled

"""A device that runs out of memory: the phase in which it did, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowrl.errors import first_line
from flowrl.runs.command_line import tool_command
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.metric_means import Clock

REWARDED = "perf/reward_seconds"
"""The lap after which weights move."""


class OutOfMemory(RuntimeError):
    """A phase of a run needs more memory than the device has.

    `is_between_updates` tells that no weight has changed since the last iteration ended.
    """

    def __init__(self, text: str, *, is_between_updates: bool = False) -> None:
        super().__init__(text)
        self.is_between_updates = is_between_updates


@contextmanager
def memory_for(phase: str, remedy: str) -> Iterator[None]:
    """Raise OutOfMemory with the `phase`, which moves no weight, and the `remedy` where the device
    runs out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _told(error, phase, remedy, True) from error


@contextmanager
def memory_of_iteration(clock: Clock, plan: BatchPlan) -> Iterator[None]:
    """Raise OutOfMemory where an iteration runs out of memory, with the phase by its clock."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        is_updating = REWARDED in clock.laps
        phase = "update" if is_updating else "rollout"
        raise _told(error, phase, smaller_micro_batch(plan), not is_updating) from error


def _told(
    error: torch.OutOfMemoryError, phase: str, remedy: str, is_between_updates: bool
) -> OutOfMemory:
    planner = tool_command("plan", "plan_memory.py")
    return OutOfMemory(
        f"out of memory in the {phase}: {remedy}; {planner} says what fits. PyTorch says: "
        f"{first_line(error)}",
        is_between_updates=is_between_updates,
    )


def smaller_micro_batch(plan: BatchPlan) -> str:
    """Say how fewer samples go through the network at once; the plan's numbers stay the same."""
    if plan.micro_batch == 1:
        return (
            "micro-batches are of one sample, so set backend.gradient_checkpointing=true, or "
            "choose a smaller resolution or model"
        )
    if plan.has_whole_groups and plan.micro_batch < 2 * plan.group_size:
        return (
            "micro-batches are of one group, which the loss compares, so set a smaller "
            "batch.group_size or backend.gradient_checkpointing=true"
        )
    return f"set batch.max_micro_batch={plan.micro_batch // 2}, which changes no result"


SMALLER_SCORER = (
    "give the scorer smaller batches (reward.batch_size, where it has one) or a device of its own "
    "(`flowrl serve`)"
)
SMALLER_EVALUATION = "set evaluation.batch_size to half, which changes no result"

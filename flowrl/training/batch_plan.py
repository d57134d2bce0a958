"""All batch arithmetic: from global counts, which fix the semantics, to micro-batches, which never
do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from flowrl.errors import UserError
from flowrl.values.bounds import Count, Processes, Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How the samples of one iteration are split over updates, processes and micro-batches.

    Global and scientific: `prompts_per_iteration`, `group_size`, `updates_per_iteration`,
    `inner_epochs`. Local and without effect on the result beyond rounding: `num_processes`,
    `max_micro_batch`. Samples are numbered prompt by prompt; update u takes the u-th contiguous
    part of them, process r the r-th part of that, and micro-batches are contiguous. Rollout and
    updates share their micro-batches, so that a replay has the rollout's batch shape.
    """

    prompts_per_iteration: Samples
    group_size: Samples
    updates_per_iteration: Samples
    inner_epochs: Samples
    max_micro_batch: Count
    num_processes: Processes

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"batch.{field.name}={value} must be a whole number of at least 1")
        if self.group_size < 2:
            raise UserError(
                f"batch.group_size={self.group_size} must be at least 2: advantages compare the "
                "samples of one prompt"
            )
        if self.num_samples % (self.updates_per_iteration * self.num_processes):
            parts = self.updates_per_iteration * self.num_processes
            raise UserError(
                f"batch.prompts_per_iteration={self.prompts_per_iteration} x "
                f"batch.group_size={self.group_size} = "
                f"{self.num_samples} samples do not split into batch.updates_per_iteration="
                f"{self.updates_per_iteration} x {self.num_processes} processes; make them a "
                f"multiple of {parts}"
            )

    @property
    def num_samples(self) -> int:
        """Samples of one iteration over all processes."""
        return self.prompts_per_iteration * self.group_size

    @property
    def samples_per_update(self) -> int:
        """Samples of one optimizer step over all processes."""
        return self.num_samples // self.updates_per_iteration

    @property
    def micro_batch(self) -> int:
        """The largest equal split of a process's share of an update that stays within
        `max_micro_batch`.
        """
        share = self.samples_per_update // self.num_processes
        return max(
            size for size in range(1, min(share, self.max_micro_batch) + 1) if share % size == 0
        )

    def updates(self, rank: int) -> list[list[range]]:
        """For each optimizer step, the micro-batches of process `rank` as ranges of global sample
        numbers.
        """
        share = self.samples_per_update // self.num_processes
        starts = [
            u * self.samples_per_update + rank * share for u in range(self.updates_per_iteration)
        ]
        return [
            [range(i, i + self.micro_batch) for i in range(start, start + share, self.micro_batch)]
            for start in starts
        ]

    def describe(self, num_trained_steps: int) -> str:
        """The plan in words, printed before training."""
        micro_batches = self.num_samples // self.num_processes // self.micro_batch
        rows = [
            (
                "samples per iteration",
                f"{self.prompts_per_iteration} prompts x {self.group_size} = {self.num_samples}",
            ),
            (
                "processes x micro-batches",
                f"{self.num_processes} x {micro_batches} of {self.micro_batch} samples",
            ),
            (
                "optimizer steps per iteration",
                f"{self.inner_epochs} inner epochs x {self.updates_per_iteration} updates of "
                f"{self.samples_per_update} "
                f"samples x {num_trained_steps} trained steps",
            ),
        ]
        return "\n".join(f"  {name:<30} {value}" for name, value in rows)

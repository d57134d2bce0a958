"""All batch arithmetic, from global counts, which fix the semantics, to micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flowrl.errors import UserError
from flowrl.losses.protocol import Loss
from flowrl.values.bounds import Count, Processes, Samples
from flowrl.values.check import check_fields
from flowrl.values.plural import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The samples of one iteration are split over updates, processes and micro-batches.

    Global and scientific: `prompts_per_iteration`, `group_size`, `updates_per_iteration`,
    `inner_epochs`. Local and without effect on the result beyond rounding: `num_processes`,
    `max_micro_batch`. Samples are numbered prompt by prompt; update u takes the u-th contiguous
    part of them, process r the r-th part of that, and micro-batches are contiguous. Rollout and
    updates share their micro-batches, so that a replay has the rollout's batch shape. With
    `has_whole_groups` no group is split over them.
    """

    prompts_per_iteration: Samples
    group_size: Samples
    updates_per_iteration: Samples
    inner_epochs: Samples
    max_micro_batch: Count
    num_processes: Processes
    has_whole_groups: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "batch")
        if self.num_samples % (self.updates_per_iteration * self.num_processes):
            parts = self.updates_per_iteration * self.num_processes
            raise UserError(
                f"batch.prompts_per_iteration={self.prompts_per_iteration} x "
                f"batch.group_size={self.group_size} = "
                f"{self.num_samples} samples do not split into batch.updates_per_iteration="
                f"{self.updates_per_iteration} x {self.num_processes} processes; make them a "
                f"multiple of {parts}"
            )

    def require_processes(self, world_size: int) -> None:
        """Raise UserError unless so many processes are those that the plan splits samples over."""
        if world_size != self.num_processes:
            raise UserError(
                f"trainer.devices and trainer.num_nodes make {world_size} processes, but "
                f"batch.num_processes={self.num_processes}; make them equal"
            )

    def suited_to(self, loss: Loss) -> BatchPlan:
        """Return the plan for a loss: of whole groups, if it compares the samples of a prompt.

        Raises UserError where groups would be split, or are too small for the loss.
        """
        loss.num_selected(self.group_size)
        return self.of_whole_groups() if loss.compares else self

    def of_whole_groups(self) -> BatchPlan:
        """Return the plan with micro-batches of whole groups, for a loss that compares the samples
        of a prompt. Raises UserError where there can be none.
        """
        self.require_whole_groups("the loss compares the samples")
        if self.max_micro_batch < self.group_size:
            raise UserError(
                f"batch.max_micro_batch={self.max_micro_batch}: the loss compares the samples of a "
                f"prompt, so micro-batches hold all batch.group_size={self.group_size} of them; "
                "raise the first or lower the second"
            )
        return replace(self, has_whole_groups=True)

    def require_groups(self) -> None:
        """Raise UserError unless prompts have several samples each, which advantages compare."""
        if self.group_size < 2:
            raise UserError(
                f"batch.group_size={self.group_size} must be at least 2: advantages compare the "
                "samples of one prompt"
            )

    def require_whole_groups(self, reason: str = "the reward compares the images") -> None:
        """Raise UserError, with the reason, unless processes hold whole groups in each update."""
        num_shares = self.updates_per_iteration * self.num_processes
        if self.prompts_per_iteration % num_shares:
            raise UserError(
                f"batch.prompts_per_iteration={self.prompts_per_iteration}: {reason} of a prompt, "
                "so these must not be split over "
                f"batch.updates_per_iteration={self.updates_per_iteration} x {self.num_processes} "
                f"processes; make it a multiple of {num_shares}"
            )

    def member(self, row: int) -> tuple[int, int]:
        """Return the prompt of a global sample number, and the sample's place in its group."""
        return divmod(row, self.group_size)

    @property
    def num_samples(self) -> int:
        """The number of samples of one iteration, over all processes."""
        return self.prompts_per_iteration * self.group_size

    @property
    def samples_per_update(self) -> int:
        """The number of samples of one optimizer step, over all processes."""
        return self.num_samples // self.updates_per_iteration

    @property
    def samples_per_process(self) -> int:
        """The number of samples of one optimizer step that a process has."""
        return self.samples_per_update // self.num_processes

    @property
    def micro_batch(self) -> int:
        """The size of micro-batches: the largest divisor of a process's share of an update, by
        whole groups if so, that stays within `max_micro_batch`.
        """
        return max(self.micro_batches_up_to(min(self.samples_per_process, self.max_micro_batch)))

    def micro_batches_up_to(self, size: int) -> list[int]:
        """List the sizes of micro-batches, of at most `size` samples, that a process's share of an
        update may be divided into.
        """
        share = self.samples_per_process
        step = self.group_size if self.has_whole_groups else 1
        return [rows for rows in range(step, size + 1, step) if share % rows == 0]

    def updates(self, rank: int) -> list[list[range]]:
        """Return the micro-batches of process `rank`, for each optimizer step, as ranges of global
        sample numbers.
        """
        share = self.samples_per_process
        size = self.micro_batch
        updates = []
        for update in range(self.updates_per_iteration):
            start = update * self.samples_per_update + rank * share
            starts = range(start, start + share, size)
            updates.append([range(first, first + size) for first in starts])
        return updates

    def describe(self, num_trained: int) -> str:
        """Return the plan in words, as it is printed before training.

        `num_trained` counts the steps or sigmas that each sample trains on.
        """
        micro_batches = self.num_samples // self.num_processes // self.micro_batch
        rows = [
            (
                "samples an iteration",
                f"{self.prompts_per_iteration} prompts x {self.group_size} = {self.num_samples}",
            ),
            (
                "processes x micro-batches",
                f"{self.num_processes} x {micro_batches} of {self.micro_batch} samples",
            ),
            (
                "optimizer steps",
                f"{counted(self.inner_epochs, 'inner epoch')} x "
                f"{counted(self.updates_per_iteration, 'update')} of {self.samples_per_update} "
                f"x {counted(num_trained, 'trained term')}",
            ),
        ]
        if remedy := self._remedy():
            rows.append(("slow", remedy))
        return "\n".join(f"  {name:<25} {value}" for name, value in rows)

    def _remedy(self) -> str:
        """Say what to do where no other divisor than 1 stays within `max_micro_batch`; nothing
        where one does, or none is wanted.
        """
        share = self.samples_per_process
        if self.micro_batch > 1 or min(share, self.max_micro_batch) < 2:
            return ""
        smallest = next(size for size in range(2, share + 1) if share % size == 0)
        return (
            f"micro-batches of 1: {share} samples of an update have no divisor from 2 to "
            f"batch.max_micro_batch={self.max_micro_batch}; raise that to {smallest}, or choose "
            "batch.prompts_per_iteration and batch.group_size so that they have one"
        )

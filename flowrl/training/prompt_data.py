"""Training prompts as a LightningDataModule: one batch is the prompts of one iteration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from flowrl.types import Prompt
from flowrl.values.bounds import Count, Samples, Seed
from flowrl.values.check import checked


class PromptBatch(NamedTuple):
    """The prompts of one iteration, over all processes; groups are made by the batch plan.

    `progress` is the share of the run's iterations that came before, in [0, 1).
    """

    iteration: int
    progress: float
    prompts: tuple[Prompt, ...]


class Iterations(Dataset[PromptBatch]):
    """The prompts of iteration i are a function of seed and i.

    Every pass over the set goes through it in an order of its own.
    """

    def __init__(
        self, prompts: Sequence[Prompt], prompts_per_iteration: int, num_iterations: int, seed: int
    ) -> None:
        self.prompts = prompts
        self.prompts_per_iteration = prompts_per_iteration
        self.num_iterations = num_iterations
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.num_iterations

    def __getitem__(self, iteration: int) -> PromptBatch:
        first = iteration * self.prompts_per_iteration
        prompts = tuple(self._pick(first + i) for i in range(self.prompts_per_iteration))
        return PromptBatch(iteration, iteration / self.num_iterations, prompts)

    def _pick(self, position: int) -> Prompt:
        """Return the prompt at a place of the endless sequence of shuffled passes."""
        epoch, place = divmod(position, len(self.prompts))
        if epoch not in self._orders:
            order = list(range(len(self.prompts)))
            random.Random(f"prompts {self.seed} {epoch}").shuffle(order)
            # Only the newest pass is kept: iterations go forward.
            self._orders = {epoch: order}
        return self.prompts[self._orders[epoch][place]]


class PromptData(LightningDataModule):
    """The iterations of a run over a prompt set; a resumed run sets `start_iteration`."""

    @checked("")
    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        prompts_per_iteration: Samples,
        num_iterations: Count,
        seed: Seed,
    ) -> None:
        super().__init__()
        self.iterations = Iterations(prompts, prompts_per_iteration, num_iterations, seed)
        self.prompts = list(prompts)
        self.start_iteration = 0

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        """Return the remaining iterations, in order."""
        # Without automatic batches: an item of the set is the batch of a whole iteration.
        remaining = range(self.start_iteration, len(self.iterations))
        return DataLoader(self.iterations, batch_size=None, sampler=remaining)

    def transfer_batch_to_device(
        self, batch: PromptBatch, device: torch.device, dataloader_idx: int
    ) -> PromptBatch:
        """Return the batch as it is: prompts are text, and there is nothing to move."""
        return batch

"""A micro-batch, its conditioning once a prompt, and the velocity field that evaluates equal rows
once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowrl.noise import on_device
from flowrl.rollout import Velocity
from flowrl.types import Conditioning, Prompt, RewardOutput, Trajectory

ConditionedVelocity = Callable[[Float[Tensor, "B *X"], float, Conditioning], Float[Tensor, "B *X"]]
"""(x, sigma, conditioning) -> velocity."""


class ConditionedRows:
    """Rows with their conditioning and a `start` each; rows of equal start are equal while nothing
    random happened.

    `embedded` holds one row a prompt, and `numbers` says which of them each row takes: T5's tokens
    are megabytes, so a group's are kept once, and copied for its members while a field needs them.
    Samples of one prompt that share their initial noise need one evaluation of the network, not one
    each, up to and including the first stochastic step, in rollout and updates alike.
    """

    def __init__(
        self, embedded: Conditioning, numbers: Int[Tensor, "B"], starts: Sequence[Hashable]
    ) -> None:
        # Of each start the row that comes first stands for all, and each row knows which of these
        # stands for it.
        first: dict[Hashable, int] = {}
        for row, start in enumerate(starts):
            first.setdefault(start, row)
        place = {start: number for number, start in enumerate(first)}
        device = embedded.device
        self.embedded = embedded
        self._starts = starts
        self._chosen: dict[tuple[int, ...], ConditionedRows] = {}
        self._prompt_of_row = numbers
        self._firsts = torch.tensor(list(first.values()), device=device)
        self._prompt_of_first = numbers[self._firsts]
        self._first_of_row = torch.tensor([place[start] for start in starts], device=device)
        self._is_whole = len(first) == len(starts)

    def conditioning(self, places: Int[Tensor, "N"] | None = None) -> Conditioning:
        """Return one row a sample, or one for each of those at `places`; every call copies those of
        the prompts.
        """
        numbers = self._prompt_of_row if places is None else self._prompt_of_row[places]
        return self.embedded[numbers]

    def of_rows(self, places: Sequence[int]) -> ConditionedRows:
        """Return the rows at `places` with their conditioning and starts, made once."""
        key = tuple(places)
        if key not in self._chosen:
            rows = on_device(torch.tensor(key), self.embedded.device)
            starts = [self._starts[place] for place in places]
            numbers = self._prompt_of_row.index_select(0, rows)
            self._chosen[key] = ConditionedRows(self.embedded, numbers, starts)
        return self._chosen[key]

    def num_evaluated(self, is_shared: bool) -> int:
        """Return how many rows a field passes to the network."""
        return len(self._firsts if is_shared else self._first_of_row)

    def field(self, velocity: ConditionedVelocity) -> Velocity:
        """Return `velocity` bound to this conditioning."""
        # Copied once a field, and not at all where each call is of shared rows.
        of_all_rows = cache(self.conditioning)

        def bound(x: Tensor, sigma: float, is_shared: bool) -> Tensor:
            # Rows that all differ need no detour, which would only copy them twice.
            if not is_shared or self._is_whole:
                return velocity(x, sigma, of_all_rows())
            of_firsts = velocity(x[self._firsts], sigma, self.embedded[self._prompt_of_first])
            # index_select, not indexing: its backward adds in a fixed order on the CPU, so that
            # seeds and resumes stay bitwise there.
            return of_firsts.index_select(0, self._first_of_row)

        return bound


@dataclass(slots=True)
class MicroBatch:
    """The samples that one forward pass handles, in rollout and updates alike.

    `score` may still be under way, as may those of `stages`, the samples' ODE completions before
    their first trained step and after each but the last, where steps have rewards of their own.
    `advantage` is one number a sample, or one a sample and term.
    """

    rows: range
    iteration: int
    prompts: list[Prompt]
    conditioned: ConditionedRows
    trajectory: Trajectory
    score: Future[RewardOutput]
    advantage: Float[Tensor, "B *T"]
    is_used: Bool[Tensor, "B"]
    stages: Sequence[Future[RewardOutput]] = ()

    def advantage_at(self, index: int) -> Float[Tensor, "B"]:
        """Return the samples' advantages at the `index`-th step or sigma that they train on."""
        return self.advantage if self.advantage.ndim == 1 else self.advantage[:, index]

"""A micro-batch, its conditioning, and the velocity field that evaluates equal rows once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.rollout import Velocity
from flowrl.types import Conditioning, Prompt, RewardOutput, Trajectory

Conditioned = Callable[[Float[Tensor, "B C H W"], float, Conditioning], Float[Tensor, "B C H W"]]
"""(x, sigma, conditioning) -> velocity."""


class Group:
    """Rows with their conditioning and a `start` each; rows of equal start are equal while nothing random happened.

    Samples of one prompt that share their initial noise need one evaluation of the network, not one each, up to and
    including the first stochastic step, in rollout and updates alike.
    """

    def __init__(self, conditioning: Conditioning, starts: Sequence[Hashable]) -> None:
        first: dict[Hashable, int] = {}
        for row, start in enumerate(starts):
            first.setdefault(start, row)
        numbers = {start: number for number, start in enumerate(first)}
        device = conditioning.pooled.device
        self.conditioning = conditioning
        self._firsts = torch.tensor(list(first.values()), device=device)
        self._number = torch.tensor([numbers[start] for start in starts], device=device)
        self._is_whole = len(first) == len(starts)

    def field(self, velocity: Conditioned) -> Velocity:
        """`velocity` bound to this conditioning."""

        def bound(x: Tensor, sigma: float, is_shared: bool) -> Tensor:
            if not is_shared or self._is_whole:
                return velocity(x, sigma, self.conditioning)
            # index_select, not indexing: its backward adds in a fixed order on the CPU, so that seeds and resumes stay
            # bitwise there.
            return velocity(x[self._firsts], sigma, self.conditioning[self._firsts]).index_select(0, self._number)

        return bound


@dataclass(slots=True)
class MicroBatch:
    """The samples that one forward pass handles, in rollout and updates alike; `score` may still be under way."""

    rows: range
    iteration: int
    prompts: list[Prompt]
    group: Group
    trajectory: Trajectory
    score: Future[RewardOutput]
    advantage: Tensor
    is_used: Tensor

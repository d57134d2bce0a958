"""The interface of a sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
from flowrl.schedule import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The memory that a multi-step solver has of the step before: its noise level, and the estimate
    x - sigma v of the data.
    """

    sigma: float
    x0_hat: Float[Tensor, "B *X"]


@runtime_checkable
class Solver(Protocol):
    """A deterministic sampler, which may use the step before."""

    def advance(
        self,
        x: Float[Tensor, "B *X"],
        velocity: Float[Tensor, "B *X"],
        interval: Interval,
        history: History | None,
    ) -> tuple[Float[Tensor, "B *X"], History | None]:
        """Return the next state, and what to remember.

        `history` is what the call of the step before has returned, None at the first.
        """
        ...


@runtime_checkable
class Sampler(Protocol):
    """A frozen rule for one step; `x` and `velocity` are float32 and `velocity = noise - data`."""

    def std(self, interval: Interval) -> float:
        """Return the standard deviation of the whole step's Gaussian."""
        ...

    def gain(self, interval: Interval) -> float:
        """Return d mean / d velocity: how far the mean moves when the velocity does."""
        ...

    def step(
        self, x: Float[Tensor, "B *X"], velocity: Float[Tensor, "B *X"], interval: Interval
    ) -> GaussianStep:
        """Return the distribution of `x_next`: the mean, of x's shape, and one std for all entries.

        The step draws nothing; `GaussianStep` samples, and evaluates log-probabilities.
        """
        ...

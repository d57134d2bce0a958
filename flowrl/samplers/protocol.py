"""The interface of a sampler."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
from flowrl.schedule import Interval


@runtime_checkable
class Sampler(Protocol):
    """A frozen rule for one step; `x` and `velocity` are float32 and `velocity = noise - data`."""

    def std(self, interval: Interval) -> float:
        """Standard deviation of the whole step's Gaussian."""
        ...

    def gain(self, interval: Interval) -> float:
        """d mean / d velocity: how far the mean moves when the velocity does."""
        ...

    def step(self, x: Float[Tensor, "B C H W"], velocity: Float[Tensor, "B C H W"], interval: Interval) -> GaussianStep:
        """The distribution of `x_next`."""
        ...

"""Sigma grids: the noise levels a sampler visits, from 1 to 0.

Published results depend on the grid, so it is a configuration choice. Each grid is a frozen dataclass with
`sigmas(num_steps)`; `Interval` is one step of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Interval:
    """One step of a grid. `sigma_max` is the grid's second value, which stands in for sigma where 1 - sigma is 0."""

    sigma: float
    sigma_next: float
    sigma_max: float

    @property
    def dt(self) -> float:
        """sigma_next - sigma, negative."""
        return self.sigma_next - self.sigma


@runtime_checkable
class Schedule(Protocol):
    """A sigma grid of any number of steps."""

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """`num_steps + 1` values, strictly falling from 1 to 0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShift:
    """s(u) = shift u / (1 + (shift - 1) u) on u = 1, (K-1)/K, ..., 1/K, then 0.

    The grid of Flow-Factory and UniRL; SD3.5 uses shift 3. Differs from flow_grpo's, which applies diffusers' default
    timesteps and so shifts the small end twice.
    """

    shift: float

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"schedule.shift={self.shift} must be positive")

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """See `Schedule`."""
        grid = [(num_steps - k) / num_steps for k in range(num_steps)]
        return (*(self.shift * u / (1 + (self.shift - 1) * u) for u in grid), 0.0)


def intervals(schedule: Schedule, num_steps: int) -> tuple[Interval, ...]:
    """The K steps of a grid, in sampling order."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    sigmas = schedule.sigmas(num_steps)
    return tuple(Interval(sigma, nxt, sigmas[1]) for sigma, nxt in pairwise(sigmas))

"""Sigma grids: the noise levels a sampler visits, from 1 to 0.

Published results depend on the grid, so it is a configuration choice. Each grid is a frozen
dataclass with `sigmas(num_steps)`; `Interval` is one step of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

from flowrl.errors import UserError
from flowrl.values.bounds import Shift, Tokens


@dataclass(frozen=True, slots=True)
class Interval:
    """One step of a grid. `sigma_max` is the grid's second value, which stands in for sigma where 1
    - sigma is 0.
    """

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

    The grid of Flow-Factory and UniRL; SD3.5 uses shift 3. Differs from flow_grpo's, which applies
    diffusers' default timesteps and so shifts the small end twice.
    """

    shift: Shift

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise UserError(f"schedule.shift={self.shift} must be positive")

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """See `Schedule`."""
        grid = [(num_steps - k) / num_steps for k in range(num_steps)]
        return (*(_shift(self.shift, u) for u in grid), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersDefault:
    """What diffusers' FlowMatchEulerDiscreteScheduler gives when it is asked for K timesteps and no
    sigmas.

    Its K values run evenly from 1 to its smallest sigma, which is s(1/1000) already, and are then
    shifted by s again: twice at the small end, so the second-to-last step nearly reaches 0.
    flow_grpo and DiffusionNFT sample SD3 so.
    """

    shift: Shift

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise UserError(f"schedule.shift={self.shift} must be positive")

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """See `Schedule`."""
        smallest = _shift(self.shift, 1 / 1000)
        grid = [1 + (smallest - 1) * k / max(num_steps - 1, 1) for k in range(num_steps)]
        return (*(_shift(self.shift, u) for u in grid), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShift:
    """s(u) = e^mu / (e^mu + 1/u - 1) on u = 1, (K-1)/K, ..., 1/K, then 0; mu grows with the number
    of image tokens.

    `rule` `linear`: mu from 0.5 at 256 tokens to 1.15 at 4,096 (FLUX.1). `empirical`: FLUX.2's fit,
    which depends on K too. `tokens` is the length of the image's token sequence: 1,024 at 512x512.
    """

    rule: Literal["linear", "empirical"]
    tokens: Tokens

    def __post_init__(self) -> None:
        if self.rule not in ("linear", "empirical"):
            raise UserError(f"schedule.rule={self.rule!r} must be linear or empirical")
        if self.tokens < 1:
            raise UserError(f"schedule.tokens={self.tokens} must be at least 1")

    def mu(self, num_steps: int) -> float:
        """The logarithm of the shift."""
        if self.rule == "linear":
            return 0.5 + (1.15 - 0.5) * (self.tokens - 256) / (4096 - 256)
        many = 0.00016927 * self.tokens + 0.45666666  # the fit at 200 steps
        if self.tokens > 4300:
            return many
        few = 8.73809524e-05 * self.tokens + 1.89833333  # at 10 steps
        return many + (num_steps - 200) * (many - few) / 190

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """See `Schedule`."""
        grid = [(num_steps - k) / num_steps for k in range(num_steps)]
        return (*(_shift(math.exp(self.mu(num_steps)), u) for u in grid), 0.0)


def _shift(shift: float, u: float) -> float:
    # shift u / (1 + (shift - 1) u), in a form that is exactly 1 at u = 1 for every shift.
    return u / (u + (1 - u) / shift)


def intervals(schedule: Schedule, num_steps: int) -> tuple[Interval, ...]:
    """The K steps of a grid, in sampling order."""
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps} must be at least 1")
    sigmas = schedule.sigmas(num_steps)
    return tuple(Interval(sigma, nxt, sigmas[1]) for sigma, nxt in pairwise(sigmas))

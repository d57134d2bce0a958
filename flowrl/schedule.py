"""Sigma grids: the noise levels a sampler visits, from 1 to 0.

Published results depend on the grid, so it is a configuration choice. Each grid is a frozen
dataclass with `sigmas(num_steps)`; `Interval` is one step of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

from flowrl.errors import UserError
from flowrl.values.bounds import Shift, Tokens
from flowrl.values.check import check_fields


@dataclass(frozen=True, slots=True)
class Interval:
    """One step of a grid.

    `second_sigma` is the grid's second value, which stands in for sigma where 1 - sigma would be
    0; flow_grpo calls it sigma_max.
    """

    sigma: float
    sigma_next: float
    second_sigma: float

    @property
    def dt(self) -> float:
        """Return sigma_next - sigma, which is negative."""
        return self.sigma_next - self.sigma


@runtime_checkable
class Schedule(Protocol):
    """A sigma grid of any number of steps."""

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """Return `num_steps + 1` values, strictly falling from 1 to 0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShift:
    """s(u) = shift u / (1 + (shift - 1) u) on u = 1, (K-1)/K, ..., 1/K, then 0.

    The grid of Flow-Factory and UniRL; SD3.5 uses shift 3. Differs from flow_grpo's, which applies
    diffusers' default timesteps and so shifts the small end twice.
    """

    shift: Shift

    def __post_init__(self) -> None:
        check_fields(self, "schedule")

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return _shifted(self.shift, _even(num_steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersDefault:
    """The grid that diffusers' FlowMatchEulerDiscreteScheduler gives when it is asked for K
    timesteps and no sigmas.

    The scheduler's K values run evenly from 1 to its smallest sigma, which is s(1/1000) already,
    with the s of `LinearShift`, and are then shifted by s again: twice at the small end, so the
    second-to-last step nearly reaches 0. flow_grpo and DiffusionNFT sample SD3 so.
    """

    shift: Shift

    def __post_init__(self) -> None:
        check_fields(self, "schedule")

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        smallest = _shift(self.shift, 1 / 1000)
        grid = [1 + (smallest - 1) * k / max(num_steps - 1, 1) for k in range(num_steps)]
        return _shifted(self.shift, grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShift:
    """s(u) = e^mu / (e^mu + 1/u - 1) on u = 1, (K-1)/K, ..., 1/K, then 0: `LinearShift` with a
    shift of e^mu, where mu grows with the number of image tokens.

    `rule` `linear`: mu from 0.5 at 256 tokens to 1.15 at 4,096 (FLUX.1). `empirical`: FLUX.2's fit,
    which depends on K too. `tokens` is the length of the image's token sequence: 1,024 at 512x512.
    """

    rule: Literal["linear", "empirical"]
    tokens: Tokens

    def __post_init__(self) -> None:
        check_fields(self, "schedule")

    def mu(self, num_steps: int) -> float:
        """Return the logarithm of the shift."""
        if self.rule == "linear":
            return 0.5 + (1.15 - 0.5) * (self.tokens - 256) / (4096 - 256)
        # A line in K through two fits in the number of tokens, at 10 and at 200 steps, which are
        # 190 apart; above 4,300 tokens the latter alone. FLUX.2's pipeline in diffusers has it as
        # `compute_empirical_mu`.
        at_200_steps = 0.00016927 * self.tokens + 0.45666666
        if self.tokens > 4300:
            return at_200_steps
        at_10_steps = 8.73809524e-05 * self.tokens + 1.89833333
        return at_200_steps + (num_steps - 200) * (at_200_steps - at_10_steps) / 190

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return _shifted(math.exp(self.mu(num_steps)), _even(num_steps))


@dataclass(slots=True, kw_only=True)
class PipelineGrid:
    """The grid of the base model's own pipeline, whatever its rule: it is known once the model is
    loaded and `follow` was told of it.
    """

    _grid: Callable[[int], tuple[float, ...]] | None = field(
        default=None, init=False, compare=False
    )
    _known: dict[int, tuple[float, ...]] = field(default_factory=dict, init=False, compare=False)

    @property
    def is_open(self) -> bool:
        """True while the model is not known, and with it the grid."""
        return self._grid is None

    def follow(self, grid: Callable[[int], tuple[float, ...]]) -> None:
        """Take the grids of a model, which gives the sigmas of a number of steps."""
        self._grid = grid
        self._known = {}

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """Return the pipeline's sigmas. Raises UserError before there is a model that has any."""
        if self._grid is None:
            raise UserError(
                "schedule=pipeline is the grid of model=derived; choose schedule=linear_shift or "
                "another one for a model with an adapter of its own"
            )
        if num_steps not in self._known:
            self._known[num_steps] = self._grid(num_steps)
        return self._known[num_steps]


def _even(num_steps: int) -> list[float]:
    """Return u = 1, (K-1)/K, ..., 1/K."""
    return [(num_steps - k) / num_steps for k in range(num_steps)]


def _shifted(shift: float, grid: Sequence[float]) -> tuple[float, ...]:
    """Return s(u) of each value of a grid, and 0 at the end."""
    return (*(_shift(shift, u) for u in grid), 0.0)


def _shift(shift: float, u: float) -> float:
    # shift u / (1 + (shift - 1) u), in a form that is exactly 1 at u = 1 for every shift.
    return u / (u + (1 - u) / shift)


def intervals(schedule: Schedule, num_steps: int) -> tuple[Interval, ...]:
    """Return the K steps of a grid, in sampling order."""
    if num_steps < 1:
        raise UserError(f"num_steps={num_steps} must be at least 1")
    sigmas = schedule.sigmas(num_steps)
    return tuple(Interval(sigma, sigma_next, sigmas[1]) for sigma, sigma_next in pairwise(sigmas))

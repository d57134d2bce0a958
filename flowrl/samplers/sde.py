"""The reverse SDE of a rectified flow: Flow-SDE and Dance-SDE are its two published diffusion
coefficients.

    mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt,    std = g sqrt(-dt)

Papers: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and DanceGRPO (Xue et al. 2025, arXiv
2505.07818).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
from flowrl.schedule import Interval
from flowrl.values.bounds import NoiseLevel
from flowrl.values.check import check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSDE:
    """g = noise_level sqrt(sigma / (1 - sigma)), with the grid's second value for sigma in 1 -
    sigma at sigma = 1.

    At the first step of a grid that starts at 1, std equals noise_level. noise_level 0 is the Euler
    ODE.
    """

    noise_level: NoiseLevel

    def __post_init__(self) -> None:
        check_fields(self, "sampler")

    def diffusion(self, interval: Interval) -> float:
        """Return g, the diffusion coefficient (not a standard deviation of the step)."""
        # At sigma 1 the denominator is zero, so that flow_grpo takes the grid's second value there.
        below_one = interval.second_sigma if interval.sigma == 1 else interval.sigma
        return self.noise_level * math.sqrt(interval.sigma / (1 - below_one))

    def std(self, interval: Interval) -> float:
        return reverse_sde_std(interval, self.diffusion(interval))

    def gain(self, interval: Interval) -> float:
        return reverse_sde_gain(interval, self.diffusion(interval))

    def step(
        self, x: Float[Tensor, "B *X"], velocity: Float[Tensor, "B *X"], interval: Interval
    ) -> GaussianStep:
        return reverse_sde_step(x, velocity, interval, self.diffusion(interval))


@dataclass(frozen=True, slots=True, kw_only=True)
class DanceSDE:
    """g = noise_level, the same at every sigma (0.3 in DanceGRPO, 0.7 in MixGRPO)."""

    noise_level: NoiseLevel

    def __post_init__(self) -> None:
        check_fields(self, "sampler")

    def std(self, interval: Interval) -> float:
        return reverse_sde_std(interval, self.noise_level)

    def gain(self, interval: Interval) -> float:
        return reverse_sde_gain(interval, self.noise_level)

    def step(
        self, x: Float[Tensor, "B *X"], velocity: Float[Tensor, "B *X"], interval: Interval
    ) -> GaussianStep:
        return reverse_sde_step(x, velocity, interval, self.noise_level)


def reverse_sde_step(
    x: Float[Tensor, "B *X"],
    velocity: Float[Tensor, "B *X"],
    interval: Interval,
    diffusion: float,
) -> GaussianStep:
    """Compute one Euler-Maruyama step of the reverse SDE with diffusion coefficient g, by the
    formula at the head of this module.

    `diffusion` is g, per square root of time; the step's standard deviation is g sqrt(-dt).
    """
    # The reverse SDE's drift is v - g^2 / 2 times the score, which is -(x + (1 - sigma) v) / sigma:
    # v plus g^2 / (2 sigma) times (x + (1 - sigma) v).
    pull = _pull(interval, diffusion)
    mean = x * (1 + pull * interval.dt) + velocity * reverse_sde_gain(interval, diffusion)
    return GaussianStep(mean, reverse_sde_std(interval, diffusion))


def reverse_sde_gain(interval: Interval, diffusion: float) -> float:
    """Return d mean / d velocity of `reverse_sde_step`: (1 + g^2 (1 - sigma) / (2 sigma)) dt."""
    return (1 + _pull(interval, diffusion) * (1 - interval.sigma)) * interval.dt


def reverse_sde_std(interval: Interval, diffusion: float) -> float:
    """Return the standard deviation of `reverse_sde_step`: g sqrt(-dt)."""
    return diffusion * math.sqrt(-interval.dt)


def _pull(interval: Interval, diffusion: float) -> float:
    """Return g^2 / (2 sigma), the share of the score's correction in the drift."""
    return diffusion**2 / (2 * interval.sigma)

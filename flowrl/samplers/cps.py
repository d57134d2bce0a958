"""Coefficient-preserving sampling (Flow-CPS, Wang and Yu 2025, arXiv 2509.05952).

    x0_hat = x - sigma v,    eps_hat = x + (1 - sigma) v
    std = sigma_next sin(noise_level pi / 2)
    mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) eps_hat

The total noise after the step is exactly sigma_next, which Flow-SDE overshoots at the small end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
from flowrl.schedule import Interval
from flowrl.values.bounds import Share
from flowrl.values.check import check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class CPS:
    """Flow-CPS; `noise_level` 0 is the Euler ODE, 1 replaces all remaining noise by fresh noise.

    `x` is (1 - sigma) data + sigma noise and `velocity` is noise - data; both are float32. The
    methods are those of `flowrl.samplers.protocol.Sampler`.
    """

    noise_level: Share

    def __post_init__(self) -> None:
        check_fields(self, "sampler")

    def std(self, interval: Interval) -> float:
        return interval.sigma_next * math.sin(self.noise_level * math.pi / 2)

    def gain(self, interval: Interval) -> float:
        # In the mean, x0_hat has the velocity by -sigma, and eps_hat by 1 - sigma.
        old_noise = self._old_noise(interval)
        return old_noise * (1 - interval.sigma) - (1 - interval.sigma_next) * interval.sigma

    def step(
        self, x: Float[Tensor, "B *X"], velocity: Float[Tensor, "B *X"], interval: Interval
    ) -> GaussianStep:
        # Collected coefficients of (1 - sigma_next) x0_hat + old_noise eps_hat: two passes over
        # memory instead of six. They are Python floats, so that their sums are of double precision.
        weight = 1 - interval.sigma_next + self._old_noise(interval)
        return GaussianStep(x * weight + velocity * self.gain(interval), self.std(interval))

    def _old_noise(self, interval: Interval) -> float:
        """Return the coefficient of eps_hat, the noise that stays."""
        # Rounding may make the difference negative where all noise is fresh.
        return math.sqrt(max(interval.sigma_next**2 - self.std(interval) ** 2, 0.0))

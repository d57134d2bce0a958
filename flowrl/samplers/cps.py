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

from flowrl.errors import UserError
from flowrl.gaussian import GaussianStep
from flowrl.schedule import Interval
from flowrl.values.bounds import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class CPS:
    """noise_level in [0, 1]: 0 is the Euler ODE, 1 replaces all remaining noise by fresh noise."""

    noise_level: Share

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level <= 1:
            raise UserError(f"sampler.noise_level={self.noise_level} must be in [0, 1] for CPS")

    def std(self, interval: Interval) -> float:
        return interval.sigma_next * math.sin(self.noise_level * math.pi / 2)

    def gain(self, interval: Interval) -> float:
        kept = math.sqrt(max(interval.sigma_next**2 - self.std(interval) ** 2, 0.0))
        return kept * (1 - interval.sigma) - (1 - interval.sigma_next) * interval.sigma

    def step(
        self, x: Float[Tensor, "B C H W"], velocity: Float[Tensor, "B C H W"], interval: Interval
    ) -> GaussianStep:
        std = self.std(interval)
        kept = math.sqrt(max(interval.sigma_next**2 - std**2, 0.0))
        # Collected coefficients of (1 - sigma_next) x0_hat + kept eps_hat: two passes over memory
        # instead of six.
        return GaussianStep(
            x * (1 - interval.sigma_next + kept) + velocity * self.gain(interval), std
        )

"""The deterministic sampler: one Euler step of the probability-flow ODE, dx = v d sigma."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
from flowrl.samplers.protocol import History
from flowrl.schedule import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ODE:
    """The Euler step: mean = x + v dt, std = 0.

    dt = sigma_next - sigma is negative, so that the step leads from noise towards data. `advance`
    needs no history, and returns none.
    """

    def std(self, interval: Interval) -> float:
        return 0.0

    def gain(self, interval: Interval) -> float:
        return interval.dt

    def step(
        self, x: Float[Tensor, "B *X"], velocity: Float[Tensor, "B *X"], interval: Interval
    ) -> GaussianStep:
        return GaussianStep(x + velocity * interval.dt, 0.0)

    def advance(
        self,
        x: Float[Tensor, "B *X"],
        velocity: Float[Tensor, "B *X"],
        interval: Interval,
        history: History | None,
    ) -> tuple[Float[Tensor, "B *X"], History | None]:
        return self.step(x, velocity, interval).mean, None

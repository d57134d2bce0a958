"""DPM-Solver++(2M) for rectified flows (Lu et al. 2022, arXiv 2211.01095): a second-order
deterministic sampler.

With alpha = 1 - sigma, lambda = log(alpha / sigma), h = lambda_next - lambda and h_previous that of
the step before:

    x_next = sigma_next / sigma x + (alpha_next - sigma_next / sigma alpha) d,
    d = x0_hat + h / (2 h_previous) (x0_hat - x0_hat_previous)

The first two steps of a grid that starts at sigma 1, where lambda is minus infinity, and the last
one, where it becomes infinite, take d = x0_hat, which is the Euler step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from flowrl.samplers.ode import ODE
from flowrl.samplers.protocol import History
from flowrl.schedule import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class DPM2(ODE):
    """DPM-Solver++(2M), second order over several steps; a single `step` knows no history and is
    Euler's.

    `advance` takes the history that the step before has returned, and None at a grid's first step.
    """

    def advance(
        self,
        x: Float[Tensor, "B *X"],
        velocity: Float[Tensor, "B *X"],
        interval: Interval,
        history: History | None,
    ) -> tuple[Float[Tensor, "B *X"], History | None]:
        sigma = interval.sigma
        sigma_next = interval.sigma_next
        # With x = (1 - sigma) data + sigma noise and v = noise - data, this is the data.
        x0_hat = x - sigma * velocity
        estimate = x0_hat
        # lambda is infinite at sigma 1 and at sigma 0, so that neither has a difference to it.
        if history is not None and history.sigma < 1 and sigma_next > 0:
            # d is x0_hat extrapolated to the middle of the step, by the slope of the step before.
            h_previous = _log_ratio(sigma) - _log_ratio(history.sigma)
            h = _log_ratio(sigma_next) - _log_ratio(sigma)
            estimate = x0_hat + h / (2 * h_previous) * (x0_hat - history.x0_hat)
        ratio = sigma_next / sigma
        data_weight = 1 - sigma_next - ratio * (1 - sigma)
        x_next = ratio * x + data_weight * estimate
        return x_next, History(sigma=sigma, x0_hat=x0_hat)


def _log_ratio(sigma: float) -> float:
    """Return lambda, the logarithm of signal over noise."""
    return math.log((1 - sigma) / sigma)

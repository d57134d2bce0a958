"""The start-up gate: a replay of a fresh rollout under unchanged weights must reproduce it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.types import Trajectory


class GateFailed(RuntimeError):
    """Replaying a fresh rollout with unchanged weights did not reproduce its steps."""


def check_replay(
    trajectory: Trajectory,
    replay: Callable[[int], GaussianStep],
    likelihood: Likelihood,
    tolerance: float,
) -> None:
    """Raise GateFailed where a step's log-ratio or divergence is not 0 within `tolerance`.

    `replay` gives the Gaussian of the trajectory's i-th step, evaluated as an update
    would.
    """
    # As in an update, where autograd may pick other kernels.
    with torch.enable_grad():
        for index, number in enumerate(trajectory.steps):
            step = replay(index)
            old_mean = trajectory.old_mean[:, index]
            log_ratio = likelihood.log_ratio(step, old_mean, trajectory.x_next[:, index])
            drift = log_ratio.abs().max().item()
            divergence = likelihood.kl(step, old_mean).max().item()
            # Written with `not`, so that NaN does not pass.
            if not (drift <= tolerance and divergence <= tolerance):
                raise GateFailed(
                    f"step {number}: replaying the rollout moved its log-probability by "
                    f"{drift:.2e} and its mean by a divergence of {divergence:.2e}, above "
                    f"gate_tolerance={tolerance:g}: rollout and update disagree in precision, "
                    "batch shape or mode"
                )

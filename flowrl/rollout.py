"""Rollouts: `rollout` draws trajectories under given weights, `replay` re-evaluates one of their
steps under others.

Neither knows about models, prompts or rewards: a velocity field is a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.samplers.ode import ODE
from flowrl.samplers.protocol import History, Sampler, Solver
from flowrl.schedule import Interval
from flowrl.types import Trajectory

Velocity = Callable[[Float[Tensor, "B *X"], float, bool], Float[Tensor, "B *X"]]
"""(x, sigma, is_shared) -> velocity in float32; `is_shared` promises that rows of one group are
equal, so that a field may evaluate one of them for all.
"""


@torch.no_grad()
def rollout(
    velocity: Velocity,
    x: Float[Tensor, "B *X"],
    intervals: Sequence[Interval],
    *,
    sampler: Sampler,
    stochastic: Sequence[int],
    noise: Callable[[int], Float[Tensor, "B *X"]],
    likelihood: Likelihood,
    shares_start: bool,
) -> Trajectory:
    """Sample from noise `x` to data; `stochastic` steps use `sampler` and `noise(k)`, the others
    the Euler ODE, or `sampler` itself where it is deterministic.

    Only the states of stochastic steps are kept. With no stochastic step the trajectory holds `x0`
    alone. With `shares_start` the rows of a group begin equal, and stay so until the first noise is
    drawn.
    """
    solver = sampler if isinstance(sampler, Solver) else ODE()
    history: History | None = None
    trained_steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for k, interval in enumerate(intervals):
        is_shared = shares_start and not trained_steps
        v = velocity(x, interval.sigma, is_shared)
        if k not in stochastic:
            x, history = solver.advance(x, v, interval, history)
            continue
        step = sampler.step(x, v, interval)
        x_next = step.sample(noise(k).to(x))
        trained_steps.append((x, x_next, step.mean, likelihood.log_prob(step, x_next)))
        x = x_next
        # A multi-step solver may not look back over fresh noise.
        history = None
    if not trained_steps:
        none = x.new_zeros(len(x), 0, *x.shape[1:])
        return Trajectory(
            steps=(),
            shares_start=shares_start,
            x=none,
            x_next=none,
            old_mean=none,
            old_log_prob=x.new_zeros(len(x), 0),
            x0=x,
        )
    states, nexts, means, log_probs = (
        torch.stack(values, dim=1) for values in zip(*trained_steps, strict=True)
    )
    return Trajectory(
        steps=tuple(sorted(stochastic)),
        shares_start=shares_start,
        x=states,
        x_next=nexts,
        old_mean=means,
        old_log_prob=log_probs,
        x0=x,
    )


def replay(
    velocity: Velocity,
    trajectory: Trajectory,
    index: int,
    intervals: Sequence[Interval],
    sampler: Sampler,
) -> GaussianStep:
    """Return the Gaussian of the trajectory's `index`-th stochastic step under the weights behind
    `velocity`.

    With the rollout's own weights and batch shape, its mean equals `trajectory.old_mean[:, index]`
    bitwise.
    """
    interval = intervals[trajectory.steps[index]]
    x = trajectory.x[:, index].contiguous()
    is_shared = trajectory.shares_start and index == 0
    return sampler.step(x, velocity(x, interval.sigma, is_shared), interval)

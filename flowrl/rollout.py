"""Rollouts: `rollout` draws trajectories under given weights, `replay` re-evaluates one of their
steps under others.

Neither knows about models, prompts or rewards: a velocity field is a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.gaussian import GaussianStep
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
    trained: Sequence[int] | None = None,
    noise: Callable[[int], Float[Tensor, "B *X"]],
    shares_start: bool,
) -> Trajectory:
    """Sample from noise `x` to data; `stochastic` steps use `sampler` and `noise(k)`, the others
    the Euler ODE, or `sampler` itself where it is deterministic.

    Only the states of `trained` steps are kept; None keeps those of the stochastic ones. The mean
    of a deterministic step is the next state. With no step kept the trajectory holds `x0` alone.
    With `shares_start` the rows of a group begin equal, and stay so until the first noise is drawn.
    """
    kept_steps = tuple(sorted(stochastic if trained is None else trained))
    solver = sampler if isinstance(sampler, Solver) else ODE()
    history: History | None = None
    trained_steps: list[tuple[Tensor, Tensor, Tensor]] = []
    first_noise = min(stochastic, default=len(intervals))
    for k, interval in enumerate(intervals):
        is_shared = shares_start and k <= first_noise
        v = velocity(x, interval.sigma, is_shared)
        if k in stochastic:
            step = sampler.step(x, v, interval)
            x_next, mean = step.sample(noise(k).to(x)), step.mean
            # A multi-step solver may not look back over fresh noise.
            history = None
        else:
            x_next, history = solver.advance(x, v, interval, history)
            mean = x_next
        if k in kept_steps:
            trained_steps.append((x, x_next, mean))
        x = x_next
    if not trained_steps:
        none = x.new_zeros(len(x), 0, *x.shape[1:])
        return Trajectory(
            steps=(),
            shares_start=shares_start,
            x=none,
            x_next=none,
            old_mean=none,
            x0=x,
        )
    # Steps come first in memory, so that one of them is moved to the device in one piece.
    states, nexts, means = (
        torch.stack(values).transpose(0, 1) for values in zip(*trained_steps, strict=True)
    )
    return Trajectory(
        steps=kept_steps,
        shares_start=shares_start and kept_steps[0] == first_noise,
        x=states,
        x_next=nexts,
        old_mean=means,
        x0=x,
    )


def replay(
    velocity: Velocity,
    trajectory: Trajectory,
    index: int,
    intervals: Sequence[Interval],
    sampler: Sampler,
) -> GaussianStep:
    """Return the Gaussian of the trajectory's `index`-th step under the weights behind `velocity`.

    With the rollout's own weights and batch shape, its mean equals `trajectory.old_mean[:, index]`
    bitwise.
    """
    interval = intervals[trajectory.steps[index]]
    x = trajectory.at("x", index).contiguous()
    is_shared = trajectory.shares_start and index == 0
    return sampler.step(x, velocity(x, interval.sigma, is_shared), interval)

"""The differences between a derived model and its stock pipeline, each as a share of the largest
number of its kind; what may be is said by `flowrl.training.parity`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flowrl.models.derived.adapter import Derived
from flowrl.models.derived.stock import Sampling
from flowrl.rollout import rollout
from flowrl.samplers.ode import ODE
from flowrl.schedule import Interval
from flowrl.types import Conditioning


def share(value: Tensor, other: Tensor) -> float:
    """Return the largest difference as a share of the other's largest number."""
    difference = (value - other.float()).abs().max()
    return float(difference / other.float().abs().max())


@torch.no_grad()
def velocity_errors(
    model: Derived, row: Conditioning, scale: float, stock: Sampling, sigmas: Sequence[float]
) -> list[float]:
    """Compare the velocity with the stock prediction at each of its states, in their own dtype, to
    which pipelines round the timestep.
    """
    errors = []
    for step, sigma in zip(stock.steps, sigmas, strict=False):
        velocity = model.velocity(step.before, sigma, row, scale)
        errors.append(share(velocity, -step.output if model.is_mirrored else step.output))
    return errors


def memory_error(
    model: Derived, row: Conditioning, scale: float, stock: Sampling, seed: int
) -> float:
    """Compare the stock prediction at the last step's state with the one at the same state of a
    sampling that began from other noise: they differ where a guidance remembers earlier steps.
    """
    meeting = stock.steps[-1].before
    other = model.sample_stock(row, scale, len(stock.steps), seed + 1, last=meeting)
    return share(other.steps[-1].output.float(), stock.steps[-1].output)


@torch.no_grad()
def last_state(
    model: Derived, row: Conditioning, scale: float, stock: Sampling, sigmas: Sequence[float]
) -> Tensor:
    """Return the last state of the ODE from the stock sampling's noise, as evaluations sample."""
    trajectory = rollout(
        lambda x, sigma, is_shared: model.velocity(x, sigma, row, scale),
        stock.steps[0].before.float(),
        [Interval(sigma, sigma_next, sigmas[1]) for sigma, sigma_next in pairwise(sigmas)],
        sampler=ODE(),
        stochastic=(),
        noise=_no_noise,
        shares_start=False,
    )
    return trajectory.x0


def _no_noise(step_number: int) -> Tensor:
    raise AssertionError(f"step {step_number} of an ODE asked for noise")


@torch.no_grad()
def rows_error(
    model: Derived, conditioning: Conditioning, scale: float, x: Tensor, sigma: float
) -> float:
    """Compare rows of two prompts, in one batch, with each alone."""
    numbers = torch.tensor([0, 1, 0], device=conditioning.device)
    states = torch.cat([x, 0.5 * x, -x])
    together = model.velocity(states, sigma, conditioning[numbers], scale)
    alone = [
        model.velocity(states[i : i + 1], sigma, conditioning[numbers[i : i + 1]], scale)
        for i in range(len(numbers))
    ]
    return share(together, torch.cat(alone))


@torch.no_grad()
def replay_error(model: Derived, row: Conditioning, scale: float, x: Tensor, sigma: float) -> float:
    """Evaluate a state, another one, and the first again: a guidance with memory differs."""
    before = model.velocity(x, sigma, row, scale)
    model.velocity(-x, sigma, row, scale)
    after = model.velocity(x, sigma, row, scale)
    return share(after, before)

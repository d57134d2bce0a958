"""Two pixels by hand, for the losses that follow a lower bound."""

from __future__ import annotations

import torch

from flowrl.types import ForwardInputs

OPTIONS = {
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}
RHO = -1 / 12


def two_pixels(advantage, shape=(1, 1, 2), velocity=(0.6, 0.2), old_velocity=(0.8, 0.4)):
    """One sample with x0 = 0 and x = 1/2 at sigma 1/2; a velocity v errs by (1 - v) / 2.

    Errors (.2, .4) now: elbo = -.1 / .3 = -1/3; (.1, .3) before: -.05 / .2 = -1/4; rho = -1/12.
    """

    def numbers(values):
        return torch.tensor(values, dtype=torch.float64).view(1, *shape)

    return ForwardInputs(
        x0=numbers([0.0, 0.0]),
        x=numbers([0.5, 0.5]),
        sigma=torch.tensor([0.5], dtype=torch.float64),
        velocity=numbers(velocity).requires_grad_(),
        old_velocity=numbers(old_velocity),
        advantage=torch.tensor([advantage], dtype=torch.float64),
        is_used=torch.tensor([True]),
    )

import math

import pytest
import torch

from flowrl.losses.epg import EPG
from flowrl.types import ForwardInputs

OPTIONS = {
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}
RHO = -1 / 12


def two(advantage, shape=(1, 1, 2)):
    """Two pixels with x0 = 0 and x = 1/2 at sigma 1/2; a velocity v errs by (1 - v) / 2.

    Errors (.2, .4) now: elbo = -.1 / .3 = -1/3; (.1, .3) before: -.05 / .2 = -1/4; rho = -1/12.
    """

    def numbers(values):
        return torch.tensor(values, dtype=torch.float64).view(1, *shape)

    return ForwardInputs(
        x0=numbers([0.0, 0.0]),
        x=numbers([0.5, 0.5]),
        sigma=torch.tensor([0.5], dtype=torch.float64),
        velocity=numbers([0.6, 0.2]).requires_grad_(),
        old_velocity=numbers([0.8, 0.4]),
        advantage=torch.tensor([advantage], dtype=torch.float64),
        is_used=torch.tensor([True]),
    )


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
def test_by_hand(shape):
    """Mutation: A - rho for A, leave the ratio out, or swap its sign."""
    loss = EPG(**OPTIONS)(two(2.0, shape)).loss
    assert loss.item() == pytest.approx(math.exp(RHO) * 2.0 / 3, rel=1e-12)


def test_neither_weight_nor_ratio_has_a_gradient():
    """d elbo / d v = 2 error sigma / (2 w) for each of two pixels, times -exp(rho) A, here -A.

    Mutation: let the gradient through the ratio.
    """
    inputs = two(-2.0)
    EPG(**OPTIONS)(inputs).loss.backward()
    expected = [math.exp(RHO) * 2.0 * error * 0.5 / 0.3 for error in (0.2, 0.4)]
    assert inputs.velocity.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_without_an_advantage_nothing_pulls_back():
    """Mutation: PEPG's factor A - rho."""
    inputs = two(0.0)
    EPG(**OPTIONS)(inputs).loss.backward()
    assert not inputs.velocity.grad.any()

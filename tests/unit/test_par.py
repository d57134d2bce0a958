import math

import pytest
import torch

from flowrl.losses.par import PAR
from flowrl.losses.pepg import PEPG
from flowrl.types import ForwardInputs

OPTIONS = {
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}


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
    """rho = -1/12. Mutation: leave out the half or the ratio, or A + rho."""
    rho = -1 / 12
    expected = math.exp(rho) * (2.0 - rho) ** 2 / 2
    assert PAR(**OPTIONS)(two(2.0, shape)).loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_perfect_fit_costs_nothing():
    """Mutation: fit elbo in place of its change."""
    inputs = two(-1 / 12)
    loss = PAR(**OPTIONS)(inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert inputs.velocity.grad.abs().max() < 1e-15


def test_its_gradient_is_pepgs():
    """On 6 samples of 12 dimensions, with missing ones and advantages beyond the bound.

    Mutation: let the gradient through the ratio, or stop it in the square.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    velocity = normal(6, 3, 4).requires_grad_()
    inputs = ForwardInputs(
        x0=normal(6, 3, 4),
        x=normal(6, 3, 4),
        sigma=torch.linspace(0.2, 1, 6, dtype=torch.float64),
        velocity=velocity,
        old_velocity=normal(6, 3, 4),
        advantage=torch.tensor([1.5, -0.5, 7.0, -9.0, 0.0, 2.0], dtype=torch.float64),
        is_used=torch.tensor([True, True, True, True, True, False]),
    )
    losses = [loss(**OPTIONS)(inputs).loss for loss in (PAR, PEPG)]
    found, expected = (torch.autograd.grad(loss, velocity)[0] for loss in losses)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert found[:5].flatten(1).any(1).all() and not found[5].any()

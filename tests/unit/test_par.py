import math

import pytest
import torch
from two_pixels import OPTIONS, RHO, two_pixels

from flowrl.losses.par import PAR
from flowrl.losses.pepg import PEPG
from flowrl.types import ForwardInputs


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
def test_by_hand(shape):
    """Mutation: leave out the half or the ratio, or A + rho."""
    expected = math.exp(RHO) * (2.0 - RHO) ** 2 / 2
    assert PAR(**OPTIONS)(two_pixels(2.0, shape)).loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_perfect_fit_costs_nothing():
    """Mutation: fit elbo in place of its change."""
    inputs = two_pixels(RHO)
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

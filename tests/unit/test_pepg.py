import math

import pytest
from two_pixels import OPTIONS, RHO, two_pixels

from flowrl.losses.pepg import PEPG


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
def test_by_hand(shape):
    """Mutation: divide by the squared error, leave rho out of a factor, or swap its sign."""
    inputs = two_pixels(2.0, shape)
    expected = math.exp(RHO) * (2.0 - RHO) / 3
    assert PEPG(**OPTIONS)(inputs).loss.item() == pytest.approx(expected, rel=1e-12)


def test_neither_weight_nor_ratio_has_a_gradient():
    """d elbo / d v = 2 error sigma / (2 w) for each of two pixels, times -exp(rho) (A - rho).

    Mutation: let the gradient through the weight or through rho.
    """
    inputs = two_pixels(2.0)
    PEPG(**OPTIONS)(inputs).loss.backward()
    factor = -math.exp(RHO) * (2.0 - RHO)
    expected = [factor * error * 0.5 / 0.3 for error in (0.2, 0.4)]
    assert inputs.velocity.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_without_an_advantage_it_goes_back_to_the_old_policy():
    """A = 0 and a better fit than before, rho > 0: the factor is -rho, so the fit gets worse.

    Mutation: weight by A alone, or by A + rho.
    """
    inputs = two_pixels(0.0, velocity=[0.8, 0.4], old_velocity=[0.6, 0.2])
    PEPG(**OPTIONS)(inputs).loss.backward()
    # Gradient descent lowers v, away from the target 1.
    assert (inputs.velocity.grad > 0).all()

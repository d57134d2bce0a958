import math

import pytest
from two_pixels import OPTIONS, RHO, two_pixels

from flowrl.losses.epg import EPG


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
def test_by_hand(shape):
    """Mutation: A - rho for A, leave the ratio out, or swap its sign."""
    loss = EPG(**OPTIONS)(two_pixels(2.0, shape)).loss
    assert loss.item() == pytest.approx(math.exp(RHO) * 2.0 / 3, rel=1e-12)


def test_neither_weight_nor_ratio_has_a_gradient():
    """d elbo / d v = 2 error sigma / (2 w) for each of two pixels, times -exp(rho) A, here -A.

    Mutation: let the gradient through the ratio.
    """
    inputs = two_pixels(-2.0)
    EPG(**OPTIONS)(inputs).loss.backward()
    expected = [math.exp(RHO) * 2.0 * error * 0.5 / 0.3 for error in (0.2, 0.4)]
    assert inputs.velocity.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_without_an_advantage_nothing_pulls_back():
    """Mutation: PEPG's factor A - rho."""
    inputs = two_pixels(0.0)
    EPG(**OPTIONS)(inputs).loss.backward()
    assert not inputs.velocity.grad.any()

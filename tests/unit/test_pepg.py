import math

import pytest
import torch

from flowrl.losses.pepg import PEPG
from flowrl.types import ForwardInputs

OPTIONS = {
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}


def two(velocity, old_velocity, advantage, shape=(1, 1, 2)):
    """Two pixels with x0 = 0 and x = 1/2 at sigma 1/2; a velocity v errs by (1 - v) / 2."""

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


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
def test_by_hand(shape):
    """Errors (.2, .4) now: elbo = -.1 / .3 = -1/3; (.1, .3) before: -.05 / .2 = -1/4; rho = -1/12.

    Mutation: divide by the squared error, leave rho out of a factor, or swap its sign.
    """
    inputs = two([0.6, 0.2], [0.8, 0.4], 2.0, shape)
    rho = -1 / 12
    expected = math.exp(rho) * (2.0 - rho) / 3
    assert PEPG(**OPTIONS)(inputs).loss.item() == pytest.approx(expected, rel=1e-12)


def test_neither_weight_nor_ratio_has_a_gradient():
    """d elbo / d v = 2 error sigma / (2 w) for each of two pixels, times -exp(rho) (A - rho).

    Mutation: let the gradient through the weight or through rho.
    """
    inputs = two([0.6, 0.2], [0.8, 0.4], 2.0)
    PEPG(**OPTIONS)(inputs).loss.backward()
    rho = -1 / 12
    factor = -math.exp(rho) * (2.0 - rho)
    expected = [factor * error * 0.5 / 0.3 for error in (0.2, 0.4)]
    assert inputs.velocity.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_without_an_advantage_it_goes_back_to_the_old_policy():
    """A = 0 and a better fit than before, rho > 0: the factor is -rho, so the fit gets worse.

    Mutation: weight by A alone, or by A + rho.
    """
    inputs = two([0.8, 0.4], [0.6, 0.2], 0.0)
    PEPG(**OPTIONS)(inputs).loss.backward()
    # Gradient descent lowers v, away from the target 1.
    assert (inputs.velocity.grad > 0).all()

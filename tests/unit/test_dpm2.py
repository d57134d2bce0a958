import math

import pytest
import torch

from flowrl.gaussian import Likelihood
from flowrl.rollout import rollout
from flowrl.samplers.dpm2 import DPM2
from flowrl.samplers.ode import ODE
from flowrl.samplers.protocol import History
from flowrl.schedule import Interval, LinearShift, intervals

SPREAD = 0.5
MEAN = Likelihood(reduction="mean", form="gaussian")


def exact_velocity(x, sigma, is_shared):
    """The field of data from N(0, SPREAD^2): E[eps - x0 | x]."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return x * (sigma - (1 - sigma) * SPREAD**2) / variance


def error(solver, num_steps):
    """Distance of the sample from the exact map of the flow, SPREAD times the initial noise."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    grid = intervals(LinearShift(shift=1.0), num_steps)
    options = {"stochastic": (), "noise": lambda k: x, "likelihood": MEAN, "shares_start": False}
    return abs(rollout(exact_velocity, x, grid, sampler=solver, **options).x0.item() - SPREAD)


def test_second_order_where_euler_is_first():
    """Twice the steps: Euler's error halves, this one's falls at least three times, and is smaller throughout.

    Mutation: a factor of the correction, or its sign.
    """
    for num_steps in (8, 16, 32):
        assert error(DPM2(), num_steps) < 0.5 * error(ODE(), num_steps)
    assert error(ODE(), 16) / error(ODE(), 32) == pytest.approx(2, rel=0.15)
    assert error(DPM2(), 16) / error(DPM2(), 32) > 3


def test_by_hand():
    """sigma 2/3 to 1/2 after 4/5, x0_hat 1 after 0: log 4, log 2 and 0 apart, so d = 1 + 1 / 2.

    Mutation: take the ratio of steps upside down, or the previous estimate twice.
    """
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    history = History(4 / 5, torch.zeros_like(x))
    got, kept = DPM2().advance(x, torch.full_like(x, 3.0), Interval(2 / 3, 0.5, 0.9), history)
    assert math.log((1 - 2 / 3) / (2 / 3)) - math.log(0.2 / 0.8) == pytest.approx(math.log(2))
    assert got.item() == pytest.approx(0.75 * 3 + (0.5 - 0.25) * 1.5)
    assert kept.sigma == 2 / 3 and kept.x0_hat.item() == pytest.approx(1)


@pytest.mark.parametrize("interval", [Interval(1.0, 0.8, 0.8), Interval(0.4, 0.0, 0.8)])
def test_ends_of_the_grid_are_euler(normal, interval):
    """Mutation: drop the condition on the last sigma, which then is infinite."""
    x, velocity = normal(2, 1, 3, 3), normal(2, 1, 3, 3)
    history = None if interval.sigma == 1 else History(0.8, normal(2, 1, 3, 3))
    got, _ = DPM2().advance(x, velocity, interval, history)
    torch.testing.assert_close(got, x + velocity * interval.dt, rtol=1e-12, atol=1e-12)

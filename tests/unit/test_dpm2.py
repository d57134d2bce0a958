import math
from itertools import pairwise

import pytest
import torch

from flowrl.samplers.dpm2 import DPM2
from flowrl.samplers.ode import ODE
from flowrl.samplers.protocol import History
from flowrl.schedule import Interval, LinearShift

SPREAD = 0.5


def variance(sigma):
    """Of x at sigma, for data from N(0, SPREAD^2)."""
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


def exact_velocity(x, sigma):
    """E[eps - x0 | x]."""
    return x * (sigma - (1 - sigma) * SPREAD**2) / variance(sigma)


def deviation(solver, sigmas):
    """Relative distance from the exact map, along which x keeps its number of standard
    deviations.
    """
    x, history = torch.full((1, 1, 1, 1), math.sqrt(variance(sigmas[0])), dtype=torch.float64), None
    for sigma, sigma_next in pairwise(sigmas):
        velocity = exact_velocity(x, sigma)
        x, history = solver.advance(x, velocity, Interval(sigma, sigma_next, sigmas[1]), history)
    return abs(x.item() / math.sqrt(variance(sigmas[-1])) - 1)


def test_second_order_where_euler_is_first():
    """From sigma 0.9 to 0.1: twice the steps halve Euler's error and quarter this one's.

    Mutation: a factor of the correction, or its sign.
    """
    errors = {
        kind: [deviation(kind(), [0.9 - 0.8 * k / n for k in range(n + 1)]) for n in (32, 64)]
        for kind in (ODE, DPM2)
    }
    assert errors[ODE][0] / errors[ODE][1] == pytest.approx(2, rel=0.1)
    assert errors[DPM2][0] / errors[DPM2][1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("num_steps", [6, 12, 24])
def test_more_exact_than_euler_on_a_whole_grid(num_steps):
    """Mutation: forget the history, which is Euler's method."""
    grid = LinearShift(shift=2.0).sigmas(num_steps)
    assert deviation(DPM2(), grid) < 0.85 * deviation(ODE(), grid)


def test_by_hand():
    """sigma 2/3 to 1/2 after 4/5, x0_hat 1 after 0: log 4, log 2 and 0 apart, so d = 1 + 1 / 2.

    Mutation: take the ratio of steps upside down, or the previous estimate twice.
    """
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    history = History(sigma=4 / 5, x0_hat=torch.zeros_like(x))
    got, kept = DPM2().advance(x, torch.full_like(x, 3.0), Interval(2 / 3, 0.5, 0.9), history)
    assert math.log((1 - 2 / 3) / (2 / 3)) - math.log(0.2 / 0.8) == pytest.approx(math.log(2))
    assert got.item() == pytest.approx(0.75 * 3 + (0.5 - 0.25) * 1.5)
    assert kept.sigma == 2 / 3 and kept.x0_hat.item() == pytest.approx(1)


@pytest.mark.parametrize("interval", [Interval(1.0, 0.8, 0.8), Interval(0.4, 0.0, 0.8)])
def test_ends_of_the_grid_are_euler(normal, interval):
    """Mutation: drop the condition on the last sigma, which then is infinite."""
    x, velocity = normal(2, 1, 3, 3), normal(2, 1, 3, 3)
    history = None if interval.sigma == 1 else History(sigma=0.8, x0_hat=normal(2, 1, 3, 3))
    got, _ = DPM2().advance(x, velocity, interval, history)
    torch.testing.assert_close(got, x + velocity * interval.dt, rtol=1e-12, atol=1e-12)

import math

import pytest
import torch

from flowrl.gaussian import Likelihood
from flowrl.samplers.sde import DanceSDE, FlowSDE
from flowrl.schedule import Interval

PUBLISHED_STD = (0.7000, 0.7384, 0.5317, 0.4415, 0.3877, 0.3500, 0.3195, 0.2905, 0.2562, 0.2021)
PUBLISHED_DIFFUSION = (
    3.7040,
    3.6373,
    2.4249,
    1.8520,
    1.4849,
    1.2124,
    0.9899,
    0.7937,
    0.6062,
    0.4041,
)
KL = Likelihood(reduction="mean", form="gaussian").kl


def test_published_std_and_diffusion(grid):
    """peers.md 2.0, noise level 0.7. Mutation: std without sqrt(-dt); clamp sigma at .99;
    sigma_next for sigma.
    """
    sampler = FlowSDE(noise_level=0.7)
    assert [sampler.std(step) for step in grid] == pytest.approx(PUBLISHED_STD, abs=5e-5)
    assert [sampler.diffusion(step) for step in grid] == pytest.approx(
        PUBLISHED_DIFFUSION, abs=1e-4
    )


def test_first_std_is_the_noise_level(grid):
    """Exact for every grid that starts at 1. Mutation: use any other stand-in for sigma = 1."""
    assert FlowSDE(noise_level=0.7).std(grid[0]) == pytest.approx(0.7, abs=1e-14)


def test_dance_std(grid):
    """0.3 sqrt(1 - 27/28) = 0.056695. Mutation: multiply by dt instead of its root."""
    assert DanceSDE(noise_level=0.3).std(grid[0]) == pytest.approx(0.3 / math.sqrt(28), rel=1e-12)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_flow_sde_kl_by_hand(grid, normal, k):
    """g^2 = eta^2 s / (1 - s) gives KL = (1 + eta^2/2)^2 (-dt) (1 - s) dv^2 / (2 eta^2 s) for a
    velocity moved by dv.

    Mutation: std without sqrt(-dt) in the KL (a published mistake), or another sampler's std.
    """
    sampler, step, x, velocity = (
        FlowSDE(noise_level=0.7),
        grid[k],
        normal(2, 1, 3, 3),
        normal(2, 1, 3, 3),
    )
    kl = KL(sampler.step(x, velocity + 0.1, step), sampler.step(x, velocity, step).mean)
    expected = (1 + 0.49 / 2) ** 2 * -step.dt * (1 - step.sigma) * 0.01 / (2 * 0.49 * step.sigma)
    assert kl.tolist() == pytest.approx([expected] * 2, rel=1e-10)


def test_mean_by_hand():
    """x 2, v 1, sigma 1/2 to 1/4, g 1: 2 (1 - 1/4) - 1/4 (1 + 1/2) = 1.125. Mutation: flip a drift
    sign.
    """
    x = torch.full((1, 1, 1, 1), 2.0)
    step = DanceSDE(noise_level=1.0).step(x, x / 2, Interval(0.5, 0.25, 0.9))
    assert (step.mean.item(), step.std) == (1.125, 0.5)

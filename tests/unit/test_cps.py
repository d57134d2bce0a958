import math

import pytest
import torch

from flowrl.gaussian import Likelihood
from flowrl.samplers.cps import CPS
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import Interval

PUBLISHED_STD = (0.8592, 0.8225, 0.7796, 0.7290, 0.6683, 0.5940, 0.5012, 0.3819, 0.2228, 0)
KL = Likelihood(reduction="mean", form="gaussian").kl


def test_published_std(grid):
    """peers.md 2.0, noise level 0.7. Mutation: sigma for sigma_next, cos for sin, a factor
    sqrt(-dt).
    """
    assert [CPS(noise_level=0.7).std(step) for step in grid] == pytest.approx(
        PUBLISHED_STD, abs=5e-5
    )


def test_kl_by_hand(grid, normal):
    """sigma 3/4 to 2/3, noise level 0.8, dv 0.1: the mean moves by -0.0198497, std is 0.634038, KL
    4.9006e-4.

    Mutation: the KL with Flow-SDE's std, or with std sqrt(-dt) (both published mistakes).
    """
    sampler, step, x, velocity = (
        CPS(noise_level=0.8),
        grid[5],
        normal(2, 1, 3, 3),
        normal(2, 1, 3, 3),
    )
    moved = sampler.step(x, velocity + 0.1, step)
    kl = KL(moved, sampler.step(x, velocity, step).mean)
    assert kl.tolist() == pytest.approx([4.9006e-4] * 2, rel=1e-4)
    for mistake in (FlowSDE(noise_level=0.8).std(step), moved.std * math.sqrt(-step.dt)):
        assert kl[0].item() * (moved.std / mistake) ** 2 > 1.5 * 4.9006e-4, "the mistake would pass"


def test_mean_by_hand(normal):
    """noise 1/3, sigma 1/2 to 1/4: std 1/8, kept sqrt(3)/8, mean 3/4 x0_hat + kept eps_hat.

    Mutation: swap x0_hat and eps_hat, or sigma and sigma_next.
    """
    x, velocity = normal(1, 1, 2, 2), normal(1, 1, 2, 2)
    step = CPS(noise_level=1 / 3).step(x, velocity, Interval(0.5, 0.25, 0.9))
    expected = 0.75 * (x - 0.5 * velocity) + math.sqrt(3) / 8 * (x + 0.5 * velocity)
    torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(0.125, rel=1e-12)


def test_full_noise_keeps_only_the_data_estimate(grid, normal):
    """Mutation: clamp the kept noise away from 0."""
    x, velocity = normal(1, 1, 2, 2), normal(1, 1, 2, 2)
    step = CPS(noise_level=1.0).step(x, velocity, grid[3])
    expected = (1 - grid[3].sigma_next) * (x - grid[3].sigma * velocity)
    torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)


def test_noise_level_is_a_share():
    """Mutation: accept 1.1, whose sine folds back."""
    with pytest.raises(ValueError, match=r"sampler.noise_level=1\.1"):
        CPS(noise_level=1.1)

import math
from dataclasses import replace

import pytest
import torch

from flowrl.losses.awm import AWM
from flowrl.types import ForwardInputs

OPTIONS = {
    "weighting": "uniform",
    "huber_power": 0.5,
    "clip_low": 0.1,
    "clip_high": 0.1,
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}


def one(velocity, old_velocity, advantage, sigma=0.5):
    """One pixel with x0 = 0 and eps = 1, so that x = sigma and the target eps - x0 is 1."""

    def number(value):
        return torch.full((1, 1, 1, 1), value, dtype=torch.float64)

    return ForwardInputs(
        x0=number(0.0),
        x=number(sigma),
        sigma=torch.tensor([sigma], dtype=torch.float64),
        velocity=number(velocity).requires_grad_(),
        old_velocity=number(old_velocity),
        advantage=torch.tensor([advantage], dtype=torch.float64),
        is_used=torch.tensor([True]),
    )


def loss(inputs, **options):
    return AWM(**OPTIONS | options)(inputs)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2), (1, 2, 1, 1)])
def test_two_dimensions_by_hand_whatever_their_axes(shape):
    """Targets of 1: errors (.3, .1) now, (.4, .2) before, mean squares .05 and .1; two samples, the
    second at sigma 1/4, alike. Mutation: a sigma of another sample, or another mean.
    """
    ones = torch.ones(2, *shape, dtype=torch.float64)
    sigma = torch.tensor([0.5, 0.25], dtype=torch.float64)
    velocity, old_velocity = (
        torch.tensor(values, dtype=torch.float64).view(1, *shape) * ones
        for values in ([0.7, 0.9], [0.6, 0.8])
    )
    x = (ones.flatten(1) * sigma[:, None]).view_as(ones)
    used = torch.tensor([True, True])
    inputs = ForwardInputs(0 * ones, x, sigma, velocity, old_velocity, 0 * sigma + 1, used)
    output = loss(inputs, clip_high=1.0)
    assert output.loss.item() == pytest.approx(-math.exp(0.1 - 0.05), rel=1e-6)


@pytest.mark.parametrize(
    ("weighting", "log_ratio"),
    [
        ("uniform", 0.16 - 0.09),
        ("sigma", 0.5 * (0.16 - 0.09)),
        ("sigma_squared", 0.25 * (0.16 - 0.09)),
        ("generalised_huber", 0.5 * (0.4 - 0.3) / 0.5),
    ],
)
def test_by_hand(weighting, log_ratio):
    """Errors .3^2 now and .4^2 before; -A exp(log-ratio) inside of the range.

    Mutation: swap the two errors, another power of sigma, or a target of x0 - eps.
    """
    output = loss(one(0.7, 0.6, 1.0), weighting=weighting, clip_high=1.0)
    assert output.loss.item() == pytest.approx(-math.exp(log_ratio), rel=1e-6)


def test_the_target_is_noise_minus_sample():
    """At x0 = 2 and eps = -1 with sigma 1/4, x = 1.25 and the target -3. Mutation: divide by
    1 - sigma.
    """
    inputs = one(-2.5, -2.0, 1.0, sigma=0.25)
    inputs = replace(inputs, x0=torch.full_like(inputs.x0, 2.0), x=torch.full_like(inputs.x, 1.25))
    assert AWM(**OPTIONS).log_prob(inputs, inputs.velocity).item() == pytest.approx(-0.25)


def test_the_ratio_is_clipped_on_the_side_of_the_advantage():
    """Log-ratio .07: 1.0725 is inside of 1.1 and beyond 1.05. Mutation: clip both sides, or
    none.
    """
    assert loss(one(0.7, 0.6, 1.0), clip_high=0.05).loss.item() == pytest.approx(-1.05)
    assert loss(one(0.7, 0.6, -1.0), clip_high=0.05).loss.item() == pytest.approx(math.exp(0.07))
    assert loss(one(0.7, 0.6, 9.0)).loss.item() == pytest.approx(-5 * math.exp(0.07))


def test_the_first_gradient_is_the_weighted_matching_gradient():
    """At equal velocities d loss / d v = A 2 (v - target). Mutation: lose the advantage's sign."""
    inputs = one(0.6, 0.6, -2.0)
    loss(inputs).loss.backward()
    assert inputs.velocity.grad.item() == pytest.approx(-2.0 * 2 * (0.6 - 1.0))


def test_the_lower_bound_is_its_own_and_the_mean_counts_all_samples():
    """Log-ratio -.07 is beyond 1 - .05 for a negative advantage; of two samples one is not used.

    Mutation: take the upper bound for both, or a mean over used samples alone.
    """
    inputs = one(0.6, 0.7, -1.0)
    assert loss(inputs, clip_low=0.05).loss.item() == pytest.approx(0.95)
    pair = ForwardInputs(
        *(torch.cat([value, value]) for value in (inputs.x0, inputs.x)),
        torch.cat([inputs.sigma, inputs.sigma]),
        *(torch.cat([value, value]) for value in (inputs.velocity, inputs.old_velocity)),
        torch.cat([inputs.advantage, inputs.advantage]),
        torch.tensor([True, False]),
    )
    assert loss(pair, clip_low=0.05).loss.item() == pytest.approx(0.95 / 2)


def test_the_huber_root_has_a_gradient_at_a_perfect_velocity():
    """Mutation: take the root of the error alone, whose slope at 0 is infinite."""
    inputs = one(1.0, 0.6, 1.0)
    loss(inputs, weighting="generalised_huber").loss.backward()
    assert inputs.velocity.grad.isfinite().all()

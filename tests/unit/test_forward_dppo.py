import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowrl.losses.forward_dppo import ForwardDPPO
from flowrl.types import ForwardInputs

OPTIONS = {
    "delta": math.inf,
    "weighting": "sigma",
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.5,
}
GAINED = 0.5 * (0.4**2 - 0.3**2)
LOST = 0.5 * (0.4**2 - 0.5**2)
"""rho at sigma 1/2 where the old velocity .6 has become .7 or .5: the target u is 1."""


def pixels(velocity, advantage, *, old_velocity=0.6, sigma=0.5, is_used=True):
    """Samples of one pixel with x0 = 0 and eps = 1, so that x = sigma and u = eps - x0 = 1."""
    velocity = torch.tensor(velocity, dtype=torch.float64)
    ones = torch.ones_like(velocity)

    def latents(values):
        return values.view(-1, 1, 1, 1)

    return ForwardInputs(
        x0=latents(0 * ones),
        x=latents(sigma * ones),
        sigma=sigma * ones,
        velocity=latents(velocity).requires_grad_(),
        old_velocity=latents(old_velocity * ones),
        advantage=torch.tensor(advantage, dtype=torch.float64),
        is_used=torch.tensor([is_used]).expand(len(ones)),
    )


def loss(**options):
    return ForwardDPPO(**OPTIONS | options)


def test_four_mask_cases_by_hand():
    """D = .5 x .1^2. Far: dropped where the update moves further, kept where it corrects; near: all
    are kept. d rho / d v = 2 w (u - v).

    Mutation: swap a side's comparison, drop corrective updates, or leave dropped ones out of the
    mean.
    """
    velocities, advantages = [0.7, 0.5, 0.5, 0.7], [1.0, 1.0, -1.0, -1.0]
    far, near = (pixels(velocities, advantages) for _ in range(2))
    output = loss(delta=0.0049)(far)
    expected = [0, -math.exp(LOST), 0, math.exp(GAINED)]
    assert output.loss.item() == pytest.approx(sum(expected) / 4, rel=1e-12)
    output.loss.backward()
    slopes = [0, -math.exp(LOST) * 0.5, 0, math.exp(GAINED) * 0.3]
    assert (4 * far.velocity.grad).flatten().tolist() == pytest.approx(slopes, rel=1e-12)
    assert {name: value.item() for name, value in output.metrics.items()} == {
        "trust/masked_fraction": 0.5,
        "trust/masked_positive": 0.25,
        "trust/masked_negative": 0.25,
        "trust/delta": pytest.approx(0.0049),
        "trust/divergence_old": pytest.approx(0.005),
    }
    kept = loss(delta=0.0051)(near)
    ratios = [-math.exp(GAINED), -math.exp(LOST), math.exp(LOST), math.exp(GAINED)]
    assert kept.loss.item() == pytest.approx(sum(ratios) / 4, rel=1e-12)


def test_delta_itself_is_far():
    """D = .5 x .5^2 exactly. Mutation: D > delta."""
    assert loss(delta=0.125)(pixels([0.75], [1.0], old_velocity=0.25)).loss.item() == 0


def test_the_ratio_has_no_say_in_how_far():
    """From .6 to just below 1.4, on the other side of the target: a ratio of 1 to 1e-6, and far.
    From -9 to -8.99: a ratio of 1.1, and near.

    Mutation: compare the ratio, or its logarithm, with the threshold.
    """
    assert loss(delta=0.01)(pixels([1.4 - 1e-6], [1.0])).loss.item() == 0
    near = loss(delta=0.01)(pixels([-8.99], [1.0], old_velocity=-9.0))
    assert near.loss.item() == pytest.approx(-math.exp(0.5 * (10**2 - 9.99**2)), rel=1e-9)


@pytest.mark.parametrize(
    ("weighting", "power"), [("uniform", 0), ("sigma", 1), ("sigma_squared", 2)]
)
@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2), (1, 2, 1, 1)])
def test_it_is_the_ratio_and_the_kl_of_gaussians(weighting, power, shape):
    """Of N(x - sigma v, s^2) in each dimension of x0, with s^2 = sigma^2 / (2 w), for three samples
    at sigmas of their own.

    Mutation: a target of x0 - eps, another weight, the weight of another sample, or a sum.
    """
    generator = torch.Generator().manual_seed(0)
    x0, x, velocity, old_velocity = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    sigma = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    ones = torch.ones_like(sigma)
    inputs = ForwardInputs(x0, x, sigma, velocity, old_velocity, ones, ones > 0)
    rows = sigma.view(-1, *[1] * len(shape))
    spread = (rows**2 / (2 * rows**power)).sqrt()
    now, before = (Normal(x - rows * v, spread) for v in (velocity, old_velocity))
    log_ratio = (now.log_prob(x0) - before.log_prob(x0)).flatten(1).mean(1)
    found = loss(weighting=weighting)
    torch.testing.assert_close(found.log_ratio(inputs), log_ratio, rtol=1e-9, atol=1e-12)
    kl = kl_divergence(before, now).flatten(1).mean(1)
    torch.testing.assert_close(found.divergence(inputs), kl, rtol=1e-12, atol=0)
    assert found(inputs).loss.item() == pytest.approx(-log_ratio.exp().mean().item(), rel=1e-9)


def test_the_log_ratio_is_noise_less_the_divergence():
    """Targets on either side of the old velocity, as likely: .6 +- .3, from x = u / 2. Their mean
    log-ratio is -D.

    Mutation: a log-ratio that lacks the divergence, or counts it twice.
    """
    inputs = pixels([0.7, 0.7], [1.0, 1.0])
    targets = torch.tensor([0.9, 0.3], dtype=torch.float64).view(-1, 1, 1, 1)
    inputs = ForwardInputs(
        inputs.x0,
        targets / 2,
        inputs.sigma,
        inputs.velocity,
        inputs.old_velocity,
        inputs.advantage,
        inputs.is_used,
    )
    noisy = loss().log_ratio(inputs)
    assert noisy.mean().item() == pytest.approx(-0.005)
    assert (noisy[0] - noisy[1]).item() == pytest.approx(2 * 0.5 * 2 * 0.3 * 0.1)


def test_equal_velocities_have_a_ratio_of_1_and_the_matching_gradient():
    """-A 2 w (u - v), advantages clipped, at a threshold of 0 too. Mutation: mask what has not
    moved, an advantage's sign, or no clip.
    """
    inputs = pixels([0.6] * 3, [2.0, -1.0, 9.0])
    output = loss(delta=0.0)(inputs)
    output.loss.backward()
    expected = [-2.0 * 0.4, 1.0 * 0.4, -5.0 * 0.4]
    assert (3 * inputs.velocity.grad).flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert not loss().log_ratio(inputs).any()


def test_an_overflowing_dropped_ratio_does_no_harm():
    """Mutation: multiply by the mask (NaN loss), or mask after the exponential alone (NaN
    gradient).
    """
    inputs = pixels([0.6, 1.0], [1.0, 1.0], old_velocity=-99.0)
    output = loss(delta=1.0)(inputs)
    output.loss.backward()
    assert output.loss.item() == 0 and not inputs.velocity.grad.any()


def test_the_divergence_counts_samples_that_are_not_used():
    """Mutation: measure it where unused samples are zeros."""
    metrics = loss()(pixels([0.7], [1.0], is_used=False)).metrics
    assert metrics["trust/divergence_old"].item() == pytest.approx(0.005)
    assert metrics["trust/masked_fraction"].item() == 0

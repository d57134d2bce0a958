import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowrl.gaussian import GaussianStep, Likelihood, broadcast, mean_square, tv

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


def reduce(values, reduction):
    return getattr(values.flatten(1), reduction)(1)


@REDUCTIONS
def test_log_prob_is_that_of_torch(normal, reduction):
    """Mutation: drop log std, or the factor 2 under the square, or swap the reductions."""
    mean, x_next = normal(3, 2, 4, 4), normal(3, 2, 4, 4)
    log_prob = Likelihood(reduction=reduction, form="gaussian").log_prob(
        GaussianStep(mean, 0.3), x_next
    )
    torch.testing.assert_close(
        log_prob, reduce(Normal(mean, 0.3).log_prob(x_next), reduction), rtol=1e-12, atol=1e-12
    )


@REDUCTIONS
def test_kl_is_that_of_torch(normal, reduction):
    """Mutation: drop the factor 2 in kl, or divide by std instead of std^2."""
    mean, other = normal(3, 2, 4, 4), normal(3, 2, 4, 4)
    kl = Likelihood(reduction=reduction, form="gaussian").kl(GaussianStep(mean, 0.3), other)
    expected = reduce(kl_divergence(Normal(other, 0.3), Normal(mean, 0.3)), reduction)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)


@REDUCTIONS
def test_unnormalised_form_by_hand(reduction):
    """-(0.5^2), -(2^2), whatever std. Mutation: divide by 2 std^2."""
    step = GaussianStep(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), 0.3)
    x_next = torch.tensor([0.5, 3.0]).view(1, 1, 1, 2)
    log_prob = Likelihood(reduction=reduction, form="unnormalised").log_prob(step, x_next)
    assert log_prob.item() == pytest.approx({"mean": -2.125, "sum": -4.25}[reduction], rel=1e-6)


@pytest.mark.parametrize("shift", [0.01, 0.3, 2.0])
def test_tv_against_integration(shift):
    """Half the integral of |p - q| in one dimension. Mutation: drop the 2 (or sqrt 2) under the
    distance.
    """
    std, x = 0.4, torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    p, q = (
        Normal(torch.tensor(m, dtype=torch.float64), std).log_prob(x).exp() for m in (0.0, shift)
    )
    expected = 0.5 * torch.trapezoid((p - q).abs(), x)
    step = GaussianStep(torch.zeros(1, 1, 1, 1, dtype=torch.float64), std)
    torch.testing.assert_close(
        tv(step, torch.full_like(step.mean, shift))[0], expected, rtol=1e-6, atol=0
    )


def test_tv_depends_on_the_euclidean_distance():
    """(3, 4) is as far as 5 along one axis. Mutation: average the squares over dimensions."""
    step = GaussianStep(torch.zeros(1, 1, 1, 2), 4.0)
    far, axis = (tv(step, torch.tensor(d).view(1, 1, 1, 2)) for d in ([3.0, 4.0], [5.0, 0.0]))
    assert far.item() == pytest.approx(axis.item(), rel=1e-6)
    assert far.item() == pytest.approx(0.46803, abs=1e-5)  # 2 Phi(5/8) - 1


RANKS = pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (3, 1, 2, 1)])
"""Latents of six dimensions: flat, 3-D with the batch, 4-D and 5-D."""


@RANKS
def test_six_dimensions_by_hand_whatever_their_axes(shape):
    """Differences 1 to 6 at std 1/2: squares sum to 91, over 2 std^2 to 182; log std + log(2 pi) /
    2 is .22579 in each. The second sample does not differ at all.

    Mutation: reduce over three axes whatever the rank.
    """
    offset = torch.stack([torch.arange(1.0, 7.0), torch.zeros(6)]).double().view(2, *shape)
    step = GaussianStep(torch.zeros_like(offset), 0.5)
    constant = math.log(0.5) + math.log(2 * math.pi) / 2
    assert constant == pytest.approx(0.22579, abs=1e-5)
    for reduction, share in (("mean", 1 / 6), ("sum", 1)):
        gaussian = Likelihood(reduction=reduction, form="gaussian")
        plain = Likelihood(reduction=reduction, form="unnormalised")
        expected = [-182 * share - 6 * share * constant, -6 * share * constant]
        assert gaussian.log_prob(step, offset).tolist() == pytest.approx(expected, rel=1e-12)
        assert plain.log_prob(step, offset).tolist() == pytest.approx([-91 * share, 0], rel=1e-12)
        assert gaussian.kl(step, offset).tolist() == pytest.approx([182 * share, 0], rel=1e-12)
    assert mean_square(offset).tolist() == pytest.approx([91 / 6, 0], rel=1e-12)
    far = math.erf(0.1 * math.sqrt(91) / (2 * math.sqrt(2) * 0.5))  # a tenth of the way
    assert tv(step, offset / 10).tolist() == pytest.approx([far, 0], rel=1e-12)
    assert torch.equal(step.sample(offset), offset / 2)


@RANKS
def test_one_number_a_sample_meets_latents_of_any_rank(shape):
    """Mutation: a number for each row of the last axis but three."""
    latents = torch.ones(2, *shape)
    product = broadcast(torch.tensor([2.0, 3.0]), latents) * latents
    assert product.shape == latents.shape
    assert product.flatten(1).tolist() == [[2.0] * 6, [3.0] * 6]


def test_log_prob_gradient_reaches_the_mean_only(normal):
    """(x_next - mean) / (D std^2) to the mean, nothing to x_next. Mutation: do not detach
    x_next.
    """
    mean, x_next = normal(2, 1, 2, 2).requires_grad_(), normal(2, 1, 2, 2).requires_grad_()
    Likelihood(reduction="mean", form="gaussian").log_prob(
        GaussianStep(mean, 0.5), x_next
    ).sum().backward()
    torch.testing.assert_close(
        mean.grad, ((x_next - mean) / (4 * 0.25)).detach(), rtol=1e-12, atol=0
    )
    assert x_next.grad is None


def test_sample_scales_noise_by_std(normal):
    """Mutation: scale by std^2, or ignore the mean."""
    mean, noise = normal(2, 1, 2, 2), normal(2, 1, 2, 2)
    assert torch.equal(GaussianStep(mean, 0.5).sample(noise), mean + noise / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda step, x: Likelihood(reduction="mean", form="gaussian").log_prob(step, x),
        lambda step, x: Likelihood(reduction="mean", form="unnormalised").kl(step, x),
        tv,
    ],
)
def test_a_step_without_noise_has_no_density(call):
    """Mutation: return inf or NaN instead of refusing."""
    with pytest.raises(ValueError, match=r"std=0\.0"):
        call(GaussianStep(torch.zeros(1, 1, 1, 1), 0.0), torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize(("key", "value"), [("reduction", "max"), ("form", "laplace")])
def test_unknown_choices_are_named(key, value):
    """Mutation: fall through to a default. (The type checker of the suite may be first to
    object.)
    """
    with pytest.raises(Exception, match=f"{key}.*{value}|{value}"):
        Likelihood(**{"reduction": "mean", "form": "gaussian", key: value})

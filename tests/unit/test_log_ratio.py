"""The log-ratio of two steps: by hand, and in float32 against float64 near ratio 1."""

import math

import pytest
import torch

from flowrl.gaussian import GaussianStep, Likelihood
from flowrl.losses.ratio import moves_down, moves_up

DIMENSIONS, STD = 65_536, 0.3
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])
FORMS = pytest.mark.parametrize("form", ["gaussian", "unnormalised"])


def of_column(*numbers):
    """One sample of latents along one axis, in float64."""
    return torch.tensor([numbers], dtype=torch.float64)


@FORMS
@REDUCTIONS
def test_two_dimensions_by_hand(form, reduction):
    """The state (3, 0) has squared distances 4 and 1 from the old mean (1, 1), 1 and 4 from the new
    one (2, 2): nothing is gained. From (1, 0) to (2, 0) they fall from 4 and 0 to 1 and 0, by 3 in
    all, which at std 1/2 is 6 nats.

    Mutation: a sum of distances for their difference, std for std^2, a missing 2, or one reduction
    for the other.
    """
    likelihood = Likelihood(reduction=reduction, form=form)
    x_next = of_column(3.0, 0.0)
    scale = {"gaussian": 2.0, "unnormalised": 1.0}[form] * {"mean": 0.5, "sum": 1.0}[reduction]
    both = likelihood.log_ratio(GaussianStep(of_column(2.0, 2.0), 0.5), of_column(1.0, 1.0), x_next)
    one = likelihood.log_ratio(GaussianStep(of_column(2.0, 0.0), 0.5), of_column(1.0, 0.0), x_next)
    assert both.tolist() == [0.0]
    assert one.tolist() == pytest.approx([3 * scale], rel=1e-12)


@FORMS
@REDUCTIONS
def test_it_is_the_difference_of_log_probabilities(normal, form, reduction):
    """In float64, with the gradient. Mutation: a gradient to the state, or none to the mean."""
    old_mean, x_next = normal(3, 2, 4, 4), normal(3, 2, 4, 4).requires_grad_()
    mean = (old_mean + 0.1 * normal(3, 2, 4, 4)).requires_grad_()
    likelihood, step = Likelihood(reduction=reduction, form=form), GaussianStep(mean, STD)
    old = likelihood.log_prob(GaussianStep(old_mean, STD), x_next)
    differences = likelihood.log_prob(step, x_next) - old
    log_ratio = likelihood.log_ratio(step, old_mean, x_next)
    torch.testing.assert_close(log_ratio, differences, rtol=1e-10, atol=1e-10)
    (wanted,) = torch.autograd.grad(differences.sum(), mean)
    log_ratio.sum().backward()
    torch.testing.assert_close(mean.grad, wanted, rtol=1e-12, atol=1e-14)
    assert x_next.grad is None


def drawn(kl, count=64):
    """Float32 steps of `DIMENSIONS` whose mean KL is `kl`: the new one's mean, the old one's, and
    the state, drawn by the old one.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (count, DIMENSIONS)
    old_mean, noise, moved = (torch.randn(shape, generator=generator) for _ in range(3))
    # |d|^2 / (2 std^2) per dimension, where d is normal: its variance is 2 std^2 KL.
    mean = old_mean + moved * (STD * math.sqrt(2 * kl))
    return mean, old_mean, old_mean + STD * noise


def exact(mean, old_mean, x_next):
    """The same log-ratios summed in float64, by the definition."""
    squares = [(x_next.double() - centre.double()).square().sum(1) for centre in (old_mean, mean)]
    return (squares[0] - squares[1]) / (2 * STD**2)


@REDUCTIONS
@pytest.mark.parametrize("kl", [1e-8, 1e-6])
def test_float32_keeps_the_ratio_near_one(kl, reduction):
    """Log-ratios have a standard deviation of sqrt(2 KL / D), 5.5e-7 at KL 1e-8. In float32 they
    are right to 1e-5 of it, with all signs; a difference of log-densities is some 1e4 times worse.

    Mutation: a difference of two reduced log-densities, or of two squares before the reduction.
    """
    mean, old_mean, x_next = drawn(kl)
    likelihood, step = Likelihood(reduction=reduction, form="gaussian"), GaussianStep(mean, STD)
    divisor = DIMENSIONS if reduction == "mean" else 1
    right = exact(mean, old_mean, x_next) / divisor
    size = right.square().mean().sqrt().item()
    assert size == pytest.approx(math.sqrt(2 * kl * DIMENSIONS) / divisor, rel=0.2)
    old = likelihood.log_prob(GaussianStep(old_mean, STD), x_next)
    log_ratio = likelihood.log_ratio(step, old_mean, x_next)
    found = {"difference": likelihood.log_prob(step, x_next) - old, "product": log_ratio}
    errors = {
        name: (value.double() - right).square().mean().sqrt().item()
        for name, value in found.items()
    }
    # Published code asks the ratio itself, which in float32 is exactly 1 within 6e-8.
    sides = {"difference": found["difference"].exp() > 1, "product": found["product"] > 0}
    flipped = {name: (side != (right > 0)).double().mean().item() for name, side in sides.items()}
    print(f"KL {kl:g}, {reduction}: errors {errors}, size {size:.1e}, wrong signs {flipped}")
    assert errors["product"] < 1e-5 * size
    assert errors["difference"] > 1e3 * errors["product"]
    assert flipped["product"] == 0
    if (kl, reduction) == (1e-8, "mean"):
        assert flipped["difference"] > 0


def test_equal_weights_have_ratio_one_exactly():
    """Mutation: any form whose terms do not all have the factor mean - old_mean."""
    mean, _, x_next = drawn(1e-6, count=4)
    for form in ("gaussian", "unnormalised"):
        likelihood = Likelihood(reduction="sum", form=form)
        assert likelihood.log_ratio(GaussianStep(mean, STD), mean, x_next).tolist() == [0.0] * 4


def test_a_ratio_within_rounding_of_one_has_a_side():
    """The exponential of 2e-8 is 1 in float32, yet the sample has become likelier. Mutation:
    compare the exponential with 1.
    """
    log_ratio, advantage = torch.tensor([2e-8, -2e-8, 0.0]), torch.ones(3)
    assert moves_up(advantage, log_ratio=log_ratio).tolist() == [True, False, False]
    assert moves_down(-advantage, log_ratio=log_ratio).tolist() == [False, True, False]


def test_a_step_without_noise_has_no_ratio():
    """Mutation: divide by zero."""
    likelihood = Likelihood(reduction="mean", form="gaussian")
    with pytest.raises(ValueError, match=r"std=0\.0"):
        likelihood.log_ratio(
            GaussianStep(torch.zeros(1, 2), 0.0), torch.ones(1, 2), torch.ones(1, 2)
        )

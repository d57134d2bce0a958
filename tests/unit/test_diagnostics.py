import math

import pytest
import torch

from flowrl.diagnostics import Diagnostics, bound, full_log_ratio
from flowrl.gaussian import GaussianStep, Likelihood

compare = Diagnostics(clip=0.1, delta=0.1)


def test_contradicted_decisions_by_hand(loss_inputs):
    """Clipped but near; far but not clipped; both; neither; far but corrective.

    Mutation: count corrective updates, swap the two shares, or ignore which way an update moves.
    """
    log_ratio = [
        math.log(1.2),
        math.log(1.05),
        math.log(0.8),
        math.log(1.05),
        math.log(1.2),
        math.log(1.2),
    ]
    inputs = loss_inputs(log_ratio, [1, 1, -1, 1, -1, 1], kl=[0.0, 0.2, 0.2, 0.0, 0.2, 0.0])
    metrics = {name: value.item() for name, value in compare(inputs, 2).items()}
    assert metrics["trust/clip_false_alarms"] == pytest.approx(2 / 6)
    assert metrics["trust/clip_misses"] == pytest.approx(1 / 6)
    assert metrics["bound/surrogate"] == pytest.approx((0.2 + 0.05 + 0.2 + 0.05 - 0.2 + 0.2) / 6)


def test_parts_of_the_log_ratio(loss_inputs):
    """log r = noise - KL. Mutation: subtract the KL once more."""
    metrics = compare(loss_inputs([0.2, -0.5], [1, 1], kl=[0.1, 0.2]), 2)
    assert metrics["trust/log_ratio_noise_squared"].item() == pytest.approx(0.09)
    assert metrics["trust/kl_old/2"].item() == pytest.approx(0.15)
    assert "trust/log_ratio_noise_squared" not in compare(
        loss_inputs([0.2], [1], form="unnormalised"), 2
    )


@pytest.mark.parametrize(("reduction", "log_ratio"), [("mean", 0.01), ("sum", 0.4)])
def test_both_sides_of_the_bound_are_of_the_full_gaussian(loss_inputs, reduction, log_ratio):
    """Mean-reduced over 40 dimensions, 0.01 is 0.4 in all: A (r - 1) is 2 (e^0.4 - 1), as summed;
    clipping sees e^0.01.

    Mutation: the surrogate of the mean-reduced ratio, whose penalty is that of a total variation
    over all dimensions.
    """
    metrics = compare(loss_inputs([log_ratio], [2], reduction=reduction, dimensions=40), 0)
    assert metrics["bound/surrogate"].item() == pytest.approx(2 * math.expm1(0.4))
    assert metrics["trust/ratio_std_squared"].item() == pytest.approx(math.expm1(log_ratio) ** 2)


@pytest.mark.parametrize("form", ["gaussian", "unnormalised"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_full_log_ratio_is_the_same_however_it_was_taken(loss_inputs, normal, form, reduction):
    """eps.d / std - |d|^2 / (2 std^2), summed. Mutation: leave out D, or 2 std^2 of the
    unnormalised form.
    """
    old_mean, eps, d, std = normal(3, 2, 4, 4), normal(3, 2, 4, 4), 0.1 * normal(3, 2, 4, 4), 0.5
    likelihood, x_next = Likelihood(reduction=reduction, form=form), old_mean + std * eps
    new, old = (
        likelihood.log_prob(GaussianStep(mean, std), x_next) for mean in (old_mean + d, old_mean)
    )
    inputs = loss_inputs(new - old, [1, 1, 1], form=form, reduction=reduction, dimensions=32)
    expected = (eps * d / std - d.square() / (2 * std**2)).sum((1, 2, 3))
    torch.testing.assert_close(full_log_ratio(inputs), expected, rtol=1e-9, atol=1e-9)


def test_a_ratio_beyond_float32_stays_finite(loss_inputs):
    """Mean-reduced 0.01 over 65,536 dimensions is e^655. Mutation: no limit, and one sample makes
    the surrogate inf.
    """
    single = loss_inputs([0.01, 0.0], [1, 1], dimensions=65536)
    surrogate = compare(single, 0)["bound/surrogate"].float()
    assert surrogate.isfinite() and surrogate > 1e20


def test_bound_by_hand():
    """Three stochastic steps: 2 * 3 * 3 * 2 * 1/4 = 9, surrogate three times its mean; a single
    step costs nothing.

    Mutation: n - 1 for n, or leave the surrogate a mean.
    """
    metrics = {"trust/tv_old_max": 0.5, "advantage/largest": 3.0, "bound/surrogate": 0.2}
    assert bound(metrics, 3) == pytest.approx({"bound/surrogate": 0.6, "bound/penalty": 9})
    assert bound(metrics, 1)["bound/penalty"] == 0
    assert bound({"advantage/largest": 3.0}, 3) == {}

import math

import pytest

from flowrl.diagnostics import Diagnostics, bound

compare = Diagnostics(clip=0.1, delta=0.1)


def test_contradicted_decisions_by_hand(loss_inputs):
    """Clipped but near; far but not clipped; both; neither; far but corrective.

    Mutation: count corrective updates, swap the two shares, or ignore which way an update moves.
    """
    log_ratio = [math.log(1.2), math.log(1.05), math.log(0.8), math.log(1.05), math.log(1.2), math.log(1.2)]
    inputs = loss_inputs(log_ratio, [1, 1, -1, 1, -1, 1], kl=[0.0, 0.2, 0.2, 0.0, 0.2, 0.0])
    metrics = {name: value.item() for name, value in compare(inputs, 2).items()}
    assert metrics["trust/clip_false_alarms"] == pytest.approx(2 / 6)
    assert metrics["trust/clip_misses"] == pytest.approx(1 / 6)
    assert metrics["bound/surrogate"] == pytest.approx((0.2 + 0.05 + 0.2 + 0.05 - 0.2 + 0.2) / 6)


def test_parts_of_the_log_ratio(loss_inputs):
    """log r = noise - KL. Mutation: subtract the KL once more."""
    metrics = compare(loss_inputs([0.2, -0.5], [1, 1], kl=[0.1, 0.2]), 2)
    assert metrics["trust/log_ratio_noise"].item() == pytest.approx(0.3)
    assert metrics["trust/kl_old/2"].item() == pytest.approx(0.15)
    assert metrics["trust/log_ratio_signal"].item() == pytest.approx(0.15)
    assert "trust/log_ratio_noise" not in compare(loss_inputs([0.2], [1], form="unnormalised"), 2)


def test_bound_by_hand():
    """Three stochastic steps: 2 * 3 * 3 * 2 * 1/4 = 9, surrogate three times its mean; a single step costs nothing.

    Mutation: n - 1 for n, or leave the surrogate a mean.
    """
    metrics = {"trust/tv_old_max": 0.5, "advantage/largest": 3.0, "bound/surrogate": 0.2}
    assert bound(metrics, 3) == pytest.approx({"bound/surrogate": 0.6, "bound/penalty": 9})
    assert bound(metrics, 1)["bound/penalty"] == 0
    assert bound({"advantage/largest": 3.0}, 3) == {}

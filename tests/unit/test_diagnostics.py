import math

import pytest

from flowrl.diagnostics import Diagnostics, bound_penalty

compare = Diagnostics(clip=0.1, delta=0.1)


def test_contradicted_decisions_by_hand(loss_inputs):
    """Clipped but near; far but not clipped; both; neither; far but corrective.

    Mutation: count corrective updates, swap the two shares, or ignore which way an update moves.
    """
    log_ratio = [math.log(1.2), math.log(1.05), math.log(0.8), math.log(1.05), math.log(1.2)]
    inputs = loss_inputs(log_ratio, [1, 1, -1, 1, -1], kl=[0.0, 0.2, 0.2, 0.0, 0.2])
    metrics = {name: value.item() for name, value in compare(inputs).items()}
    assert metrics["trust/clip_false_alarms"] == pytest.approx(0.2)
    assert metrics["trust/clip_misses"] == pytest.approx(0.2)
    assert metrics["bound/surrogate"] == pytest.approx((0.2 + 0.05 + 0.2 + 0.05 - 0.2) / 5)


def test_parts_of_the_log_ratio(loss_inputs):
    """log r = noise - KL. Mutation: subtract the KL once more."""
    metrics = compare(loss_inputs([0.2, -0.5], [1, 1], kl=[0.1, 0.2]))
    assert metrics["trust/log_ratio_noise"].item() == pytest.approx(0.3)
    assert metrics["trust/log_ratio_signal"].item() == pytest.approx(0.15)
    assert "trust/log_ratio_noise" not in compare(loss_inputs([0.2], [1], form="unnormalised"))


def test_bound_by_hand():
    """2 * 3 * (4 - 1) * (4 - 2) * 1/4 = 9; one or two steps cost nothing. Mutation: K for K - 1."""
    assert bound_penalty(0.5, 4, 3.0) == 9
    assert bound_penalty(0.5, 2, 3.0) == 0

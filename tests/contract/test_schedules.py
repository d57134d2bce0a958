"""What follows the course of a run on the embedded model: thresholds, learning rate."""

import math

import pytest
from runs import fit, make


def test_a_threshold_that_holds_a_budget_moves_in_the_loop_and_is_kept():
    """Mutation: never hand the mean KL on, leave the threshold out of the state, or take two
    updates.
    """
    auto = ("loss.delta=auto", "loss.kl_budget=1e-9", "batch.inner_epochs=2")
    policy, data, _ = make(*auto, "num_iterations=2")
    start = policy.algorithm.loss.threshold
    fit(policy, data)
    other, _, _ = make(*auto)
    other.load_state(policy.state())
    assert policy.algorithm.loss.threshold != start == 1e-9
    assert other.algorithm.loss.threshold == policy.algorithm.loss.threshold
    with pytest.raises(Exception, match=r"loss.delta=auto.*updates_per_iteration"):
        make(
            "loss.delta=auto",
            "loss.kl_budget=1e-9",
            "batch.updates_per_iteration=2",
            "batch.inner_epochs=1",
        )


def test_a_scheduled_threshold_follows_the_run():
    """Mutation: never begin an iteration with its progress."""
    policy, data, _ = make("loss.delta=1e-4", "loss.final_delta=1e-6", "num_iterations=2")
    thresholds = []
    policy.report = lambda values: thresholds.append(values["trust/delta"])
    fit(policy, data)
    assert thresholds == pytest.approx([1e-4, 1e-5])


def test_the_learning_rate_follows_the_schedule():
    """Cosine over four iterations. Mutation: multiply the factors up, or count updates instead of
    iterations.
    """
    policy, data, _ = make("num_iterations=4", "optimizer.lr=1e-3")
    rates = []
    policy.report = lambda values: rates.append(values["update/learning_rate"])
    fit(policy, data)
    assert rates == pytest.approx(
        [1e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)], rel=1e-6
    )

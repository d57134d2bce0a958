import math
from functools import partial

import pytest
import torch

from flowrl.losses.dppo import DPPO
from flowrl.losses.grpo import GRPO

FIXED = {
    "delta": 1e-6,
    "final_delta": None,
    "kl_budget": None,
    "divergence": "kl",
    "calibrated_for": "kl",
    "advantage_clip": 5.0,
}
AUTO = FIXED | {"delta": "auto", "kl_budget": 1e-5}


def kl_loss(inputs, *, delta=0.1, divergence="kl"):
    options = {"delta": delta, "divergence": divergence, "calibrated_for": divergence}
    return DPPO(**FIXED | options)(inputs)


UP, DOWN = math.log(1.2), math.log(0.8)


def test_four_mask_cases_by_hand(loss_inputs):
    """Far steps: dropped when the update moves further out, kept when it corrects; near steps are
    kept.

    Mutation: swap a side's comparison, drop corrective updates, or leave dropped terms out of the
    mean.
    """
    log_ratios, advantages = [UP, DOWN, DOWN, UP] * 2, [1, 1, -1, -1] * 2
    inputs = loss_inputs(log_ratios, advantages, kl=[0.2] * 4 + [0.09] * 4)
    output = kl_loss(inputs)
    output.loss.backward()
    expected = [0, -0.8, 0, 1.2, -1.2, -0.8, 0.8, 1.2]
    assert output.loss.item() == pytest.approx(sum(expected) / 8, rel=1e-12)
    assert (8 * inputs.log_ratio.grad).tolist() == pytest.approx(expected, rel=1e-12)
    assert {name: value.item() for name, value in output.metrics.items()} == {
        "trust/masked_fraction": 0.25,
        "trust/masked_positive": 0.125,
        "trust/masked_negative": 0.125,
        "trust/delta": pytest.approx(0.1),
    }


def test_delta_itself_is_far(loss_inputs):
    """D >= delta drops. Mutation: D > delta."""
    assert kl_loss(loss_inputs([UP], [1], kl=[0.1])).loss.item() == 0


def test_a_step_that_is_no_number_is_not_masked_away(loss_inputs):
    """Means that are NaN make KL and ratio NaN, and so the loss, which the gradient's check then
    stops.

    Mutation: count NaN as far, which drops the sample and trains on.
    """
    output = kl_loss(loss_inputs([UP, math.nan], [1, 1], kl=[0.0, math.nan]))
    assert output.loss.isnan() and output.metrics["trust/masked_fraction"] == 0


@pytest.mark.parametrize(("name", "place"), [("kl", 0), ("tv", 1), ("velocity", 2)])
def test_divergence_chooses_what_is_measured(loss_inputs, name, place):
    """Mutation: always look at kl."""
    inputs = loss_inputs([UP] * 3, [1] * 3, kl=[0.2, 0, 0], tv=[0, 0.2, 0], velocity=[0, 0, 0.2])
    kl_loss(inputs, divergence=name).loss.backward()
    assert [i for i, value in enumerate(inputs.log_ratio.grad.tolist()) if value == 0] == [place]


def test_an_overflowing_dropped_ratio_does_no_harm(loss_inputs):
    """Mutation: multiply by the mask (NaN loss), or mask after the exponential alone (NaN
    gradient).
    """
    inputs = loss_inputs([1000.0, 0.0], [1, 1], kl=[9.0, 0.0])
    output = kl_loss(inputs)
    output.loss.backward()
    assert output.loss.item() == -0.5
    assert inputs.log_ratio.grad.tolist() == [0, -0.5]


def test_gradient_at_the_rollout_weights(loss_inputs):
    """-A grad log_prob, averaged, advantages clipped. Mutation: flip the sign, drop the advantage
    clip.
    """
    inputs = loss_inputs([0.0] * 4, [2, -1, 7, -9])
    kl_loss(inputs, delta=1e-6).loss.backward()
    assert inputs.log_ratio.grad.tolist() == [-0.5, 0.25, -1.25, 1.25]


def test_without_a_bound_it_is_grpo_without_a_clip(loss_inputs, normal):
    """Mutation: clip the ratio in dppo, or weight one of the losses."""
    log_ratio, advantage = normal(6), [3, -8, 1, 0.5, -2, 6]
    bounds = {"clip_low": 1.0, "clip_high": math.inf}
    unbounded = GRPO(**bounds, advantage_clip=5.0, calibrated_for="gaussian")
    inputs = loss_inputs(log_ratio, advantage, kl=[1e9] * 6)
    losses = [loss(inputs).loss for loss in (partial(kl_loss, delta=math.inf), unbounded)]
    grads = [torch.autograd.grad(loss, inputs.log_ratio)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)


def observe(loss, mean_kl, num_updates=1000000):
    """Hand on an iteration's mean KL; with so many updates the first hardly counts."""
    loss.observe({"trust/kl_old": mean_kl * (num_updates - 1) / num_updates}, num_updates)


def test_a_fixed_threshold_stays(loss_inputs):
    """Mutation: let it follow the divergence, or call the function with another delta."""
    loss = DPPO(**FIXED | {"delta": 0.1})
    loss.begin(0.7)
    observe(loss, 1.0)
    inputs = loss_inputs([UP, UP], [1, 1], kl=[0.2, 0.05])
    output = loss(inputs)
    assert output.loss.item() == kl_loss(inputs).loss.item()
    assert output.metrics["trust/delta"].item() == pytest.approx(0.1)


def test_schedule_is_geometric():
    """1e-4 to 1e-6: 1e-5 half-way. Mutation: interpolate linearly."""
    loss = DPPO(**FIXED | {"delta": 1e-4, "final_delta": 1e-6})
    thresholds = []
    for progress in (0.0, 0.5, 1.0):
        loss.begin(progress)
        thresholds.append(loss.threshold)
    assert thresholds == pytest.approx([1e-4, 1e-5, 1e-6])


def test_controller_by_hand_and_within_its_limits():
    """Four times the budget halves the threshold. Mutation: raise it instead, or drop a limit."""
    loss = DPPO(**AUTO)
    assert loss.threshold == 1e-5
    observe(loss, 4e-5)
    assert loss.threshold == pytest.approx(5e-6)
    for mean_kl, limit in ((1.0, 1e-7), (1e-12, 1e-3)):
        for _ in range(10):
            observe(loss, mean_kl)
        assert loss.threshold == pytest.approx(limit)


def test_controller_settles_where_the_mean_is_the_budget():
    """On a process whose mean KL is half the threshold. Mutation: compare the threshold with the
    budget.
    """
    loss = DPPO(**AUTO)
    for _ in range(60):
        observe(loss, loss.threshold / 2)
    assert loss.threshold / 2 == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"divergence": "velocityy", "calibrated_for": "velocityy"}, "velocityy"),
        ({"delta": "auto"}, r"loss.delta=auto.*loss.kl_budget"),
        ({"delta": "some"}, "some"),
        ({"delta": -1.0}, r"loss.delta=-1"),
        ({"kl_budget": 1e-5}, "loss.kl_budget=1e-05"),
        ({"delta": 0.0, "final_delta": 1e-6}, "loss.final_delta=1e-06"),
        (
            {"delta": "auto", "kl_budget": 1e-5, "divergence": "tv", "calibrated_for": "tv"},
            "loss.divergence=kl",
        ),
    ],
)
def test_wrong_thresholds_are_named(change, names):
    """Mutation: drop a check."""
    with pytest.raises(Exception, match=names):
        DPPO(**FIXED | change)

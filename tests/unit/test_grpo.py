import math

import pytest
import torch

from flowrl.losses.grpo import GRPO


def grpo(inputs, **options):
    return GRPO(**{"calibrated_for": "gaussian"} | options)(inputs)


LOGS = [math.log(1.2), math.log(0.8), math.log(0.8), math.log(1.2)]


def test_four_cases_by_hand(loss_inputs):
    """-1.1 (clipped), -0.8, 0.9 (clipped), 1.2 at eps 0.1. Mutation: minimum for maximum, or a
    flipped sign.
    """
    for log_ratio, advantage, expected in zip(
        LOGS, [1, 1, -1, -1], [-1.1, -0.8, 0.9, 1.2], strict=True
    ):
        output = grpo(
            loss_inputs([log_ratio], [advantage]), clip_low=0.1, clip_high=0.1, advantage_clip=5.0
        )
        assert output.loss.item() == pytest.approx(expected, rel=1e-12)


def test_asymmetric_range(loss_inputs):
    """Mutation: swap clip_low and clip_high."""
    output = grpo(
        loss_inputs([1.0, -1.0], [1, -2]), clip_low=0.1, clip_high=0.3, advantage_clip=5.0
    )
    assert output.loss.item() == pytest.approx((-1.3 + 2 * 0.9) / 2, rel=1e-12)
    between = grpo(
        loss_inputs([math.log(1.2), math.log(0.8)], [1, -2]),
        clip_low=0.3,
        clip_high=0.1,
        advantage_clip=5.0,
    )
    assert between.loss.item() == pytest.approx((-1.1 + 2 * 0.8) / 2, rel=1e-12)
    between = grpo(
        loss_inputs([math.log(1.2), math.log(0.8)], [1, -2]),
        clip_low=0.1,
        clip_high=0.3,
        advantage_clip=5.0,
    )
    assert between.loss.item() == pytest.approx((-1.2 + 2 * 0.9) / 2, rel=1e-12)


def test_gradient_at_the_rollout_weights(loss_inputs):
    """-A grad log_prob, averaged; advantages beyond +-5 count as 5. Mutation: drop the advantage
    clip or the mean.
    """
    inputs = loss_inputs([0.0] * 4, [2, -1, 7, -9])
    grpo(inputs, clip_low=1e-4, clip_high=1e-4, advantage_clip=5.0).loss.backward()
    assert inputs.log_ratio.grad.tolist() == [-0.5, 0.25, -1.25, 1.25]


def test_clipped_terms_have_no_gradient_and_are_counted(loss_inputs):
    """Mutation: keep the gradient of clipped terms, or count a side by the ratio alone."""
    inputs = loss_inputs(LOGS, [1, 1, -1, -1])
    output = grpo(inputs, clip_low=0.1, clip_high=0.1, advantage_clip=5.0)
    output.loss.backward()
    assert inputs.log_ratio.grad.tolist() == pytest.approx([0, -0.2, 0, 0.3], rel=1e-12)
    assert {name: value.item() for name, value in output.metrics.items()} == {
        "trust/masked_fraction": 0.5,
        "trust/masked_positive": 0.25,
        "trust/masked_negative": 0.25,
    }


def test_an_overflowing_clipped_ratio_does_no_harm(loss_inputs):
    """Loss -A (1 + eps), gradient 0. Mutation: clip after the exponential alone, which gives 0
    times inf backwards.
    """
    inputs = loss_inputs([1000.0, 0.0], [1, 1])
    output = grpo(inputs, clip_low=0.1, clip_high=0.1, advantage_clip=5.0)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-1.05, rel=1e-12)
    torch.testing.assert_close(
        inputs.log_ratio.grad, torch.tensor([0, -0.5], dtype=torch.float64), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("calibrated_for", "form"), [("gaussian", "unnormalised"), ("unnormalised", "gaussian")]
)
def test_a_range_for_the_other_form_is_refused(calibrated_for, form):
    """Both keys are named. Mutation: drop the check, and Flow-GRPO's range silently bounds
    something else.
    """
    loss = GRPO(clip_low=0.1, clip_high=0.1, advantage_clip=5.0, calibrated_for=calibrated_for)
    named = f"loss.calibrated_for={calibrated_for}, but likelihood.form={form}"
    with pytest.raises(ValueError, match=named):
        loss.check(form=form, reduction="mean", sampler="cps")

"""DGPO by hand, and beside the published code's arithmetic."""

import dataclasses
import math

import pytest
import torch
from test_flow_dpo import a_pair, numbers

from flowrl.losses.dgpo import DGPO

OPTIONS = {
    "beta": 10.0,
    "anchor": "reference",
    "clip_low": 1.0,
    "clip_high": math.inf,
    "advantage_clip": 5.0,
    "fraction": 0.99,
    "decay_rate": 0.001,
    "decay_start": 0,
    "decay_limit": 0.3,
}


def a_group(**changes):
    """The pair of Flow-DPO's test with advantages 1 and -1, and an old policy that is the current
    one.
    """
    inputs = a_pair(advantage=numbers([1.0, -1.0]), **changes)
    return dataclasses.replace(inputs, old_velocity=inputs.velocity.detach().clone())


def test_by_hand():
    """The sum is 10 / 2 (.2 - .08) = .6; the loss sigmoid(.6) (.4 - .13) / 2. Mutation: a weight
    of 1 - sigmoid, no G, or a sum over all samples.
    """
    output = DGPO(**OPTIONS)(a_group())
    weight = 1 / (1 + math.exp(-0.6))
    assert output.loss.item() == pytest.approx(weight * 0.27 / 2, rel=1e-12)
    assert output.metrics["preference/margin"].item() == pytest.approx(-0.6, rel=1e-12)
    assert output.metrics["preference/accuracy"] == 0


def test_the_gradient_in_closed_form():
    """w A 2 (v - u) / D / B, with no gradient through w. Mutation: let it through."""
    inputs = a_group()
    DGPO(**OPTIONS)(inputs).loss.backward()
    weight = 1 / (1 + math.exp(-0.6))
    expected = numbers([[-0.4, -0.8], [-0.5, -0.1]]) * weight / 2
    torch.testing.assert_close(inputs.velocity.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("advantage", "old", "is_clipped"),
    [
        ([1.0, -1.0], [[0.5, 0.1], [0.5, 0.1]], [True, False]),
        ([-1.0, 1.0], [[0.5, 0.1], [0.5, 0.1]], [False, False]),
        ([1.0, -1.0], [[0.6, 0.2], [0.3, 0.1]], [False, True]),
        ([1.0, 1.0], [[0.6, 0.2], [0.3, 0.1]], [False, False]),
        ([0.0, 0.0], [[0.5, 0.1], [0.3, 0.1]], [False, False]),
    ],
)
def test_what_has_moved_far_enough_is_clipped(advantage, old, is_clipped):
    """The first sample fitted worse before, mean squares .53 and .4: r = exp(.13). The second
    fitted better, .05 and .13: r = exp(-.08). Both leave 1 +- .05.

    Mutation: swap the sides, or clip on the way back.
    """
    inputs = dataclasses.replace(a_group(), advantage=numbers(advantage), old_velocity=numbers(old))
    output = DGPO(**OPTIONS | {"clip_low": 0.05, "clip_high": 0.05})(inputs)
    free = DGPO(**OPTIONS)(inputs)
    assert output.loss.item() == free.loss.item()
    (gradient,) = torch.autograd.grad(output.loss, inputs.velocity)
    (whole,) = torch.autograd.grad(free.loss, inputs.velocity)
    for row, clipped in enumerate(is_clipped):
        assert torch.equal(gradient[row], 0 * whole[row] if clipped else whole[row])
    masked = output.metrics["trust/masked_fraction"].item()
    assert masked == pytest.approx(sum(is_clipped) / 2)


@pytest.mark.parametrize("anchor", ["reference", "old"])
def test_it_is_what_the_published_code_computes(anchor):
    """train_sd3_dgpo.py's lines on random tensors: three groups of four, clipped and all.

    Mutation: any of its factors.
    """
    generator = torch.Generator().manual_seed(2)
    shape = (12, 4, 3, 3)
    x0, ref_v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    model_v = ref_v + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    old_v = ref_v + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 4, 3, 3, generator=generator, dtype=torch.float64)
    noise = noise.repeat_interleave(4, 0)
    raw = 4 * torch.randn(12, generator=generator, dtype=torch.float64)
    local_group_indices = torch.arange(12) // 4
    target_v = noise - x0
    model_v.requires_grad_()
    # As published.
    advantages = torch.clamp(raw, -5.0, 5.0)
    dsm_loss = (target_v - model_v).square().reshape(12, -1).mean(dim=1)
    old_dsm_loss = (target_v - old_v).square().reshape(12, -1).mean(dim=1)
    ratio = torch.exp(-dsm_loss + old_dsm_loss)
    should_clip = torch.where(advantages > 0, ratio > 1.0 + 1e-2, ratio < 1.0 - 1e-2)
    dsm_loss = torch.where(should_clip, dsm_loss.detach(), dsm_loss)
    anchor_v = ref_v if anchor == "reference" else old_v
    ref_dsm_loss = (target_v - anchor_v).square().reshape(12, -1).mean(dim=1)
    terms = advantages * 10.0 * (dsm_loss.detach() - ref_dsm_loss) / 4
    sums = torch.zeros(3, dtype=torch.float64).scatter_add_(0, local_group_indices, terms)
    weights = torch.sigmoid(sums)[local_group_indices]
    expected = (weights.detach() * advantages * dsm_loss).mean()
    (wanted,) = torch.autograd.grad(expected, model_v)
    inputs = dataclasses.replace(
        a_group(),
        x0=x0,
        x=0.3 * x0 + 0.7 * noise,
        sigma=torch.full((12,), 0.7, dtype=torch.float64),
        velocity=model_v,
        old_velocity=old_v,
        ref_velocity=ref_v,
        advantage=raw,
        is_used=torch.ones(12, dtype=torch.bool),
        group=local_group_indices,
        group_size=4,
    )
    loss = DGPO(**OPTIONS | {"anchor": anchor, "clip_low": 1e-2, "clip_high": 1e-2})
    output = loss(inputs)
    (gradient,) = torch.autograd.grad(output.loss, model_v)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)
    assert 0 < should_clip.sum() < 12
    masked = output.metrics["trust/masked_fraction"].item()
    assert masked == pytest.approx(should_clip.double().mean().item())

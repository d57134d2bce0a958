"""Samples that are missing neither train nor spoil what a loss of conf/loss gives of the others."""

import dataclasses
import math

import pytest
import torch
from each_loss import distances, draw, inputs_of, method, output_of

from flowrl.losses.used import keep_used, velocity_distance

BROKEN = (math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("broken", BROKEN)
@distances
def test_a_missing_sample_gives_no_gradient_and_spoils_nothing(rewarded, distance, broken):
    """Whatever its numbers are; it counts in the mean. Mutation: mask after the arithmetic, which
    gives 0 times infinity, or take the mean over the others.
    """
    samples, lost = draw(distance, (1.5, 0.0, 2.0, -3.0)), 1
    spoil = spoiled_forward if rewarded.loss.kind == "forward" else spoiled_reverse
    inputs, leaves = spoil(rewarded, samples, lost, broken)
    output = rewarded.loss(inputs)
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
    for gradient in gradients:
        if gradient is not None:
            assert gradient.isfinite().all() and not gradient[lost].any()
    others, _ = output_of(rewarded, samples[torch.tensor([0, 2, 3])])
    torch.testing.assert_close(output.loss, 0.75 * others.loss, rtol=1e-12, atol=1e-14)
    mean = {name: value.isfinite() for name, value in output.metrics.items()}
    assert all(mean.values()), mean


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_used_is_zero_before_a_loss_computes(broken):
    """Every tensor of it, and nothing else, so that a loss of one's own needs no mask. Mutation:
    leave one of them as it is.
    """
    algorithm = method("flow_dpo")
    spoiled, _ = spoiled_forward(algorithm, draw(0.1), 1, broken)
    used = keep_used(spoiled)
    others = torch.tensor([0, 2, 3])
    for name in ("x0", "x", "velocity", "old_velocity", "ref_velocity", "advantage"):
        assert not getattr(used, name)[1].any(), name
        assert torch.equal(getattr(used, name)[others], getattr(spoiled, name)[others])


@pytest.mark.parametrize("broken", BROKEN)
def test_the_distance_from_the_old_policy_leaves_out_what_is_broken(broken):
    """A sample that is not used counts as 0 where its distance is no number, and as it is where it
    is one. Mutation: let it make the metric infinite, or leave out every sample that is not used.
    """
    algorithm = method("nft")
    samples = draw(0.1)
    is_used = torch.arange(len(samples.x0)) != 1
    inputs = inputs_of(algorithm, samples, is_used)
    each = (inputs.velocity - inputs.old_velocity).detach().square().mean((1, 2, 3))
    assert velocity_distance(inputs).item() == pytest.approx(each.mean().item())
    velocity = inputs.velocity.detach().clone()
    velocity[1] = broken
    found = velocity_distance(dataclasses.replace(inputs, velocity=velocity))
    assert found.item() == pytest.approx((each.sum() - each[1]).item() / len(each))


def spoiled_forward(algorithm, samples, lost, broken):
    """Inputs where all tensors of a sample that is not used are broken, and the leaf."""
    is_used = torch.arange(len(samples.x0)) != lost
    inputs = inputs_of(algorithm, samples, is_used)
    changes = {}
    names = ["x0", "x", "velocity", "old_velocity", "advantage"]
    if inputs.ref_velocity is not None:
        names.append("ref_velocity")
    for name in names:
        changes[name] = getattr(inputs, name).detach().clone()
        changes[name][lost] = broken
    velocity = changes["velocity"].requires_grad_()
    return dataclasses.replace(inputs, **changes), [velocity]


def spoiled_reverse(algorithm, samples, lost, broken):
    """Inputs where the step of a sample without an advantage is broken, and the leaves."""
    inputs = inputs_of(algorithm, samples)
    changes = {}
    for name in ("log_ratio", "kl", "tv", "velocity_change"):
        changes[name] = getattr(inputs, name).detach().clone()
        changes[name][lost] = broken
    leaves = [changes[name].requires_grad_() for name in ("log_ratio", "kl")]
    return dataclasses.replace(inputs, **changes), leaves

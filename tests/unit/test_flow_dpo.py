"""Flow-DPO by hand, beside the published code's arithmetic, and which samples are pairs."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from flowrl.errors import UserError
from flowrl.losses.flow_dpo import FlowDPO
from flowrl.losses.preference import pairs
from flowrl.types import ForwardInputs

OPTIONS = {
    "beta": 10.0,
    "anchor": "reference",
    "num_pairs": 1,
    "weighting": "constant",
    "fraction": 0.99,
    "decay_rate": 0.0,
    "decay_start": 0,
    "decay_limit": 0.0,
}


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def a_pair(**changes):
    """Two samples of two pixels at sigma 1/2, x0 = 0 (better) and x0 = 1, both with noise 1.

    u is 1 and 0. The better one's errors are (.4, .8) now and (.2, .6) before, mean squares .4 and
    .2: change .2. The worse one's are (.5, .1) and (.3, .1), .13 and .05: change .08.
    """
    values = {
        "x0": numbers([[0.0, 0.0], [1.0, 1.0]]),
        "x": numbers([[0.5, 0.5], [1.0, 1.0]]),
        "sigma": numbers([0.5, 0.5]),
        "velocity": numbers([[0.6, 0.2], [0.5, 0.1]]),
        "old_velocity": torch.full((2, 2), torch.nan, dtype=torch.float64),
        "advantage": numbers([0.3, 0.1]),
        "is_used": torch.tensor([True, True]),
        "ref_velocity": numbers([[0.8, 0.4], [0.3, 0.1]]),
        "group": torch.tensor([7, 7]),
        "group_size": 2,
    }
    inputs = ForwardInputs(**(values | changes))
    inputs.velocity.requires_grad_()
    return inputs


def test_by_hand():
    """m = -10 / 2 (.2 - .08) = -.6. Mutation: swap the samples, drop the anchor, the half or a
    sign, or sum over latent dimensions.
    """
    output = FlowDPO(**OPTIONS)(a_pair())
    assert output.loss.item() == pytest.approx(math.log(1 + math.exp(0.6)), rel=1e-12)
    assert output.metrics["preference/margin"].item() == pytest.approx(-0.6, rel=1e-12)
    assert output.metrics["preference/accuracy"] == 0


def test_the_gradient_in_closed_form():
    """sigmoid(-m) beta / 2 times 2 (v - u) / D for the better sample, and minus that for the other.

    Mutation: a weight without the sigmoid, or a gradient for one of both.
    """
    inputs = a_pair()
    FlowDPO(**OPTIONS)(inputs).loss.backward()
    weight = 5 / (1 + math.exp(-0.6))
    expected = numbers([[-0.4, -0.8], [-0.5, -0.1]]) * weight
    torch.testing.assert_close(inputs.velocity.grad, expected, rtol=1e-12, atol=0)


def test_the_old_policy_may_be_the_anchor():
    """With `anchor=old` the same number follows from the old velocity, and the reference is not
    asked for.

    Mutation: look at the reference whatever the anchor.
    """
    inputs = a_pair(old_velocity=a_pair().ref_velocity, ref_velocity=None)
    loss = FlowDPO(**OPTIONS | {"anchor": "old"})
    assert loss(inputs).loss.item() == pytest.approx(math.log(1 + math.exp(0.6)), rel=1e-12)
    assert loss.needs_old and not loss.needs_reference
    other = FlowDPO(**OPTIONS)
    assert other.needs_reference and not other.needs_old


def test_the_weight_of_the_paper():
    """(1 - 1/2)^2 = 1/4 of beta: m = -.15. Mutation: sigma^2 would be as much, (1 - sigma) not; at
    sigma .2 it is .64.
    """
    weighted = FlowDPO(**OPTIONS | {"weighting": "one_minus_sigma_squared"})
    margin = weighted(a_pair()).metrics["preference/margin"]
    assert margin.item() == pytest.approx(-0.15, rel=1e-12)
    # x - x0 = sigma u, with the same u.
    near = a_pair(sigma=numbers([0.2, 0.2]), x=numbers([[0.2, 0.2], [1.0, 1.0]]))
    margin = weighted(near).metrics["preference/margin"]
    assert margin.item() == pytest.approx(-0.6 * 0.64, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 4, 2, 2)])
def test_it_is_what_flow_grpo_computes(shape):
    """train_sd3_dpo.py's lines on random tensors, for four pairs in the order chosen, rejected.

    Mutation: any of its factors.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(8, *shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    model_input, model_pred, model_pred_ref = draws
    noise = torch.randn(4, *shape, generator=generator, dtype=torch.float64).repeat_interleave(2, 0)
    sigmas = torch.rand(4, generator=generator, dtype=torch.float64).repeat_interleave(2)
    wide = sigmas.view(-1, *[1] * len(shape))
    target = noise - model_input
    theta_mse = (model_pred - target).square().flatten(1).mean(1)
    ref_mse = (model_pred_ref - target).square().flatten(1).mean(1)
    w_diff, l_diff = (theta_mse - ref_mse)[0::2], (theta_mse - ref_mse)[1::2]
    inside_term = -0.5 * 100.0 * (w_diff - l_diff)
    expected = -functional.logsigmoid(inside_term)
    inputs = ForwardInputs(
        x0=model_input,
        x=(1 - wide) * model_input + wide * noise,
        sigma=sigmas,
        velocity=model_pred,
        old_velocity=torch.full_like(model_pred, torch.nan),
        advantage=numbers([1.0, -1.0] * 4),
        is_used=torch.ones(8, dtype=torch.bool),
        ref_velocity=model_pred_ref,
        group=torch.arange(8) // 2,
        group_size=2,
    )
    output = FlowDPO(**OPTIONS | {"beta": 100.0})(inputs)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-9, atol=0)
    accuracy = output.metrics["preference/accuracy"]
    assert accuracy.item() == pytest.approx((inside_term > 0).double().mean().item())


def found(advantage, group, is_used, num_pairs):
    """The pairs as (better, worse), in the order of the samples."""
    is_pair = pairs(
        numbers(advantage),
        group=torch.tensor(group),
        is_used=torch.tensor(is_used, dtype=torch.bool),
        num_pairs=num_pairs,
    )
    return [tuple(pair) for pair in is_pair.nonzero().tolist()]


def test_best_and_worst_are_pairs():
    """Two groups of four, interleaved. Mutation: across groups, the worst as the better, or a
    second-best with the worst.
    """
    advantage = [0.1, -5.0, 0.4, 7.0, -0.2, 6.0, 0.3, 1.0]
    group = [0, 1, 0, 1, 0, 1, 0, 1]
    assert found(advantage, group, [1] * 8, 1) == [(2, 4), (3, 1)]
    assert found(advantage, group, [1] * 8, 2) == [(2, 4), (3, 1), (5, 7), (6, 0)]
    # More than half of a group would pair samples twice.
    assert found(advantage, group, [1] * 8, 9) == found(advantage, group, [1] * 8, 2)


def test_ties_are_no_pairs():
    """A group of equal rewards teaches nothing; of equal best ones the first, of equal worst ones
    the last is taken. Mutation: >= for >, or leave ties to the sorting.
    """
    assert found([1.0, 1.0, 1.0], [0] * 3, [1] * 3, 1) == []
    assert found([2.0, 1.0, 2.0, 1.0], [0] * 4, [1] * 4, 1) == [(0, 3)]
    # The second best and the second worst are equal.
    assert found([2.0, 1.0, 1.0, 0.0], [0] * 4, [1] * 4, 2) == [(0, 3)]


def test_samples_that_are_not_used_are_in_no_pair():
    """The best and the worst are missing: the others make the pair. Mutation: rank all."""
    assert found([9.0, 1.0, 2.0, -9.0], [0] * 4, [0, 1, 1, 0], 1) == [(2, 1)]
    assert found([9.0, 1.0], [0] * 2, [0, 1], 1) == []


def test_what_is_selected_is_what_pairs_are_made_of():
    """A loss that sees the selected samples alone finds the same pairs. Mutation: select the better
    ones only.
    """
    loss = FlowDPO(**OPTIONS | {"num_pairs": 2})
    generator = torch.Generator().manual_seed(1)
    advantage = torch.randint(0, 3, (24,), generator=generator).double()
    advantage[:6] = 1.0
    group = torch.arange(24) // 6
    is_used = torch.rand(24, generator=generator) > 0.2
    options = {"group": group, "is_used": is_used}
    selected = loss.selected(advantage, **options)
    rows = selected.nonzero().flatten()
    everywhere = pairs(advantage, **options, num_pairs=2)
    among = pairs(advantage[rows], group=group[rows], is_used=is_used[rows], num_pairs=2)
    assert torch.equal(among, everywhere[rows][:, rows]) and everywhere.sum() == among.sum() > 3
    assert len(rows) == 2 * everywhere.sum() < 4 * loss.num_selected(6)


def test_a_sample_without_a_pair_counts_as_nothing():
    """The mean is over samples. Mutation: one over pairs, which depends on the micro-batch."""
    pair = a_pair()
    lonely = {}
    for field in dataclasses.fields(pair):
        value = getattr(pair, field.name)
        lonely[field.name] = value if field.name == "group_size" else torch.cat([value, value])
    lonely["velocity"] = lonely["velocity"].detach().requires_grad_()
    lonely["group"] = torch.tensor([7, 7, 8, 9])
    inputs = ForwardInputs(**lonely)
    loss = FlowDPO(**OPTIONS)
    output = loss(inputs)
    assert output.loss.item() == pytest.approx(loss(pair).loss.item() / 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(output.loss, inputs.velocity)
    assert gradient[:2].all() and not gradient[2:].any()


def test_a_group_must_hold_the_pairs():
    """Mutation: count pairs, not samples."""
    loss = FlowDPO(**OPTIONS | {"num_pairs": 3})
    assert loss.num_selected(6) == 6
    with pytest.raises(UserError, match=r"loss.num_pairs=3 needs 6 samples .* batch.group_size=5"):
        loss.num_selected(5)

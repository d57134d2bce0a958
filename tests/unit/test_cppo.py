import math
from dataclasses import replace

import pytest
import torch

from flowrl.errors import UserError
from flowrl.losses.cppo import CPPO

OPTIONS = {
    "delta": 0.1,
    "budget_share": 0.1,
    "last_weight": 0.8,
    "calibrated_for": "kl",
    "advantage_clip": 5.0,
}
UP, DOWN = math.log(1.2), math.log(0.8)


def dropped(inputs, earlier, num_steps=3, **options):
    """Which samples have no gradient, after these KLs of their earlier steps."""
    rows = len(inputs.log_ratio)
    values = torch.tensor(earlier, dtype=torch.float64).view(rows, -1)
    output = CPPO(**OPTIONS | options)(replace(inputs, earlier_kl=values, num_steps=num_steps))
    (gradient,) = torch.autograd.grad(output.loss, inputs.log_ratio)
    return (gradient == 0).tolist(), output


@pytest.mark.parametrize(
    ("earlier", "kl", "expected"),
    [
        # First step, weight 1: the limit is delta itself.
        ([[], []], [0.0999, 0.1001], [False, True]),
        # Second of three, weight .9, nothing spent: the limit is delta, and .9 * .111 is below it.
        ([[0.0], [0.0]], [0.111, 0.112], [False, True]),
        # Spent .1 of .1 (1 + .1 * 1): the limit is .01, and .9 * .0111 is below it.
        ([[0.1], [0.1]], [0.0111, 0.0112], [False, True]),
        # Last, weight .8: .1 (1 + .1 * 1.9) - (.05 + .9 * .05) = .024, and .8 * .0299 is below it.
        ([[0.05, 0.05], [0.05, 0.05]], [0.0299, 0.0301], [False, True]),
        # Spent far more than there was: nothing may move away, not even by nothing.
        ([[0.4, 0.0], [0.0, 0.4]], [0.0, 0.0], [True, True]),
    ],
)
def test_the_limit_by_hand(loss_inputs, earlier, kl, expected):
    """Mutation: weigh by another place, leave the weights out of what is spent, or the share out of
    what may be.
    """
    is_dropped, _ = dropped(loss_inputs([UP, UP], [1, 1], kl=kl), earlier)
    assert is_dropped == expected


def test_corrective_updates_keep_their_gradient(loss_inputs):
    """Mutation: drop whatever is far."""
    inputs = loss_inputs([UP, DOWN, DOWN, UP], [1, 1, -1, -1], kl=[9.0] * 4)
    is_dropped, output = dropped(inputs, [[9.0]] * 4)
    assert is_dropped == [True, False, True, False]
    assert output.loss.item() == pytest.approx((-0.8 + 1.2) / 4, rel=1e-12)


def test_the_published_rule_with_a_fixed_budget(loss_inputs, normal):
    """A plain copy of the rule over whole sequences, as the paper's equations have it, at each
    step of random trajectories. Mutation: any of the above.
    """
    num_steps, num_samples = 7, 50
    generator = torch.Generator().manual_seed(0)
    shape = (num_samples, num_steps)
    kls = 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
    seen = 0
    for step in range(num_steps):
        expected = []
        for kl in kls.tolist():
            spent, weights = 0.0, 0.0
            for place in range(step + 1):
                weight = 1 - 0.2 * place / (num_steps - 1)
                limit = min(0.1, 0.1 + 0.01 * weights - spent)
                is_far = weight * kl[place] > limit
                spent, weights = spent + weight * kl[place], weights + weight
            expected.append(is_far)
        inputs = loss_inputs([UP] * num_samples, [1] * num_samples, kl=kls[:, step].tolist())
        is_dropped, output = dropped(inputs, kls[:, :step].tolist(), num_steps=num_steps)
        assert is_dropped == expected
        assert output.metrics["trust/masked_fraction"] == pytest.approx(sum(expected) / num_samples)
        seen += sum(expected) not in (0, num_samples)
    assert seen == num_steps


def test_the_share_of_terms_with_less_than_delta_left(loss_inputs):
    """Mutation: count those whose limit is delta."""
    inputs = loss_inputs([UP] * 3, [1] * 3, kl=[0.0] * 3)
    _, output = dropped(inputs, [[0.0], [0.01], [0.0101]])
    assert output.metrics["budget/limited"] == pytest.approx(1 / 3)
    assert output.metrics["trust/delta"] == pytest.approx(0.1)
    _, first = dropped(inputs, [[], [], []])
    assert first.metrics["budget/limited"] == 0


def test_one_step_or_an_infinite_delta(loss_inputs):
    """A lone step has the weight 1. Mutation: divide by no steps."""
    inputs = loss_inputs([UP, UP], [1, 1], kl=[0.09, 0.11])
    assert dropped(inputs, [[], []], num_steps=1)[0] == [False, True]
    assert dropped(inputs, [[9.0], [9.0]], delta=math.inf)[0] == [False, False]


def test_a_floor_is_no_part_of_what_is_spent(loss_inputs):
    """Mutation: compare the whole KL, or let a KL below its floor give something back."""
    inputs = replace(loss_inputs([UP, UP], [1, 1], kl=[0.109, 0.111]), kl_floor=0.01)
    assert dropped(inputs, [[], []])[0] == [False, True]
    below = replace(loss_inputs([UP], [1], kl=[0.0]), kl_floor=0.01)
    assert dropped(below, [[0.1101]])[0] == [True]


def test_what_it_does_not_suit_is_refused():
    """Mutation: take a threshold for means with sums, or a ratio that is none."""
    loss = CPPO(**OPTIONS)
    with pytest.raises(UserError, match=r"loss\.calibrated_for=kl, but .*sum_kl"):
        loss.check(form="gaussian", reduction="sum", sampler="cps")
    with pytest.raises(UserError, match=r"likelihood\.form"):
        loss.check(form="unnormalised", reduction="mean", sampler="cps")
    assert loss.kl_threshold == 0.1

"""FDFO by hand: the loss on ratios, and the pull between two samples."""

import math
from dataclasses import replace

import pytest
import torch

from flowrl.errors import UserError
from flowrl.losses.fdfo import FDFO
from flowrl.objectives.pair import paired, partners_of
from flowrl.types import LossInputs


def leaf(*numbers):
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def test_the_loss_by_hand(loss_inputs):
    """-A r + |A| (r - 1)^2 / (2 clip), and its gradient in log r: r (-A + |A| (r - 1) / clip).

    Mutation: leave out the absolute value, the square, or the 2; count both sides as beyond it.
    """
    log_ratio = leaf(math.log(1.5), math.log(1.5), 0.0, math.log(0.9))
    inputs = loss_inputs([0.0] * 4, [2.0, -2.0, 1.0, 1.0])
    output = FDFO(clip=0.25, advantage_clip=5.0)(replace(inputs, pair_log_ratio=log_ratio))
    expected = [-3 + 2 * 0.25 / 0.5, 3 + 2 * 0.25 / 0.5, -1, -0.9 + 0.01 / 0.5]
    assert output.loss.item() == pytest.approx(sum(expected) / 4)
    (gradient,) = torch.autograd.grad(output.loss, log_ratio)
    by_hand = [1.5 * (-2 + 2 * 2), 1.5 * (2 + 2 * 2), -1, 0.9 * (-1 - 0.4)]
    assert (4 * gradient).tolist() == pytest.approx(by_hand)
    # Of the two at 1.5 the one with A > 0 is beyond its side of the clip, and so is none at .9.
    shares = {name: value.item() for name, value in output.metrics.items()}
    assert shares == {
        "trust/masked_fraction": 0.25,
        "trust/masked_positive": 0.25,
        "trust/masked_negative": 0.0,
    }


def test_a_ratio_at_the_clip_has_no_gradient(loss_inputs):
    """SPO's optimum is r = 1 + clip for A > 0 and 1 - clip for A < 0: it comes back from beyond.

    Mutation: another factor before the square.
    """
    log_ratio = leaf(math.log(1.25), math.log(0.75))
    inputs = loss_inputs([0.0] * 2, [3.0, -0.5])
    output = FDFO(clip=0.25, advantage_clip=5.0)(replace(inputs, pair_log_ratio=log_ratio))
    (gradient,) = torch.autograd.grad(output.loss, log_ratio)
    assert gradient.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_a_ratio_that_overflows_without_an_advantage_is_ignored(loss_inputs):
    """Mutation: the ratio of a sample without an advantage."""
    log_ratio = leaf(1000.0, 0.0)
    inputs = loss_inputs([0.0] * 2, [0.0, 1.0])
    output = FDFO(clip=0.25, advantage_clip=5.0)(replace(inputs, pair_log_ratio=log_ratio))
    (gradient,) = torch.autograd.grad(output.loss, log_ratio)
    assert gradient.tolist() == [0, -0.5]


def a_pair(advantage, is_used=(True, True), moved=(0.0, 0.0), x0=((1.0, 3.0), (0.0, -1.0))):
    """Inputs of two samples of two latents, whose velocity has moved by `moved` times (1, 2)."""
    moves = torch.tensor(moved).requires_grad_()
    inputs = LossInputs(
        *[torch.tensor(advantage)] * 5,
        std=1.0,
        dt=-0.2,
        form="gaussian",
        reduction="mean",
        dimensions=2,
    )
    found = paired(
        inputs,
        moved=moves[:, None] * torch.tensor([1.0, 2.0]),
        x0=torch.tensor(x0),
        is_used=torch.tensor(is_used),
        members=[(7, 0), (7, 1)],
    )
    return found, moves


def test_the_pull_by_hand():
    """d = ((1, 3) - (0, -1)) / 2 = (.5, 2), whose mean square is 2.125: over that (.2353, .9412).
    The first sample's velocity moved by .1 (1, 2), so log r = -.025 - 2 (.02353 + .18824) / 2 =
    -.2368; the second's by -.1 (1, 2), towards itself as well: d is (-.2353, -.9412), log r -.2368.
    Away from the partner is a falling velocity, at which log r rises.

    Mutation: the sign of d, its norm for its mean square, or the whole difference for half of it.
    """
    inputs, moves = a_pair([1.0, -1.0], moved=(0.1, -0.1))
    assert inputs.pair_log_ratio.tolist() == pytest.approx([-0.236765, -0.236765], abs=2e-6)
    (gradient,) = torch.autograd.grad(inputs.pair_log_ratio.sum(), moves)
    # d log r / d move = -mean (2 move (1, 4)) - 2 mean (d (1, 2)).
    assert gradient.tolist() == pytest.approx([-0.5 - 2.117647, 0.5 + 2.117647], abs=1e-5)


def test_equal_velocities_have_a_ratio_of_exactly_1():
    """Mutation: subtract two squares."""
    inputs, _ = a_pair([1.0, -1.0])
    assert inputs.pair_log_ratio.tolist() == [0.0, 0.0]


def test_equal_samples_pull_nowhere():
    """Mutation: divide by the mean square alone."""
    inputs, _ = a_pair([1.0, -1.0], moved=(0.1, 0.1), x0=((1.0, 1.0), (1.0, 1.0)))
    assert inputs.pair_log_ratio.tolist() == pytest.approx([-0.025, -0.025])


def test_advantages_are_half_the_pairs_differences():
    """.5 and -.3 are .4 and -.4 to each other; none where one has no reward.

    Mutation: the whole difference, or what a sample has without its partner.
    """
    assert a_pair([0.5, -0.3])[0].advantage.tolist() == pytest.approx([0.4, -0.4])
    assert a_pair([0.5, 0.0], is_used=(True, False))[0].advantage.tolist() == [0.0, 0.0]


def test_partners_are_neighbours_by_number_wherever_they_stand():
    """Mutation: by place."""
    assert partners_of([(3, 2), (4, 1), (3, 3), (4, 0)]) == [2, 3, 0, 1]


def test_an_odd_group_is_refused():
    """Mutation: leave one sample alone."""
    assert FDFO(clip=0.1, advantage_clip=5.0).num_selected(6) == 6
    with pytest.raises(UserError, match=r"batch.group_size=5: .* make it even"):
        FDFO(clip=0.1, advantage_clip=5.0).num_selected(5)

from itertools import pairwise

import pytest

from flowrl.schedule import LinearShift, intervals

SD35 = (1, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0)


def test_published_sd35_grid():
    """peers.md 2.0, linspace grid. Mutation: shift the small end twice, as diffusers' default does."""
    assert LinearShift(shift=3.0).sigmas(10) == pytest.approx(SD35, abs=5e-6)


def test_shift_by_hand():
    """s(3/4) at shift 2 is (2 * 3/4) / (1 + 3/4) = 6/7. Mutation: divide by shift + (1 - shift) u."""
    assert LinearShift(shift=2.0).sigmas(4) == pytest.approx((1, 6 / 7, 2 / 3, 2 / 5, 0), abs=1e-15)


def test_shift_1_is_uniform():
    """Mutation: start the grid at (K - 1) / K."""
    assert LinearShift(shift=1.0).sigmas(4) == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_intervals_chain_and_share_sigma_max(grid):
    """Mutation: give every interval its own sigma_next as sigma_max, or dt a positive sign."""
    assert [step.sigma_next for step in grid[:-1]] == [step.sigma for step in grid[1:]]
    assert {step.sigma_max for step in grid} == {grid[1].sigma}
    assert [step.dt for step in grid] == pytest.approx([b - a for a, b in pairwise(SD35)], abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_must_be_positive(shift):
    """Mutation: drop the check."""
    with pytest.raises(ValueError, match=f"schedule.shift={shift}"):
        LinearShift(shift=shift)


def test_a_grid_has_a_step():
    """Mutation: allow num_steps 0."""
    with pytest.raises(ValueError, match="num_steps=0"):
        intervals(LinearShift(shift=1.0), 0)

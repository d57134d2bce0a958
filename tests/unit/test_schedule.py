from itertools import pairwise

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import given
from hypothesis import strategies as st

from flowrl.schedule import DiffusersDefault, DynamicShift, LinearShift, intervals

SD35 = (1, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0)


def test_published_sd35_grid():
    """peers.md 2.0, linspace grid. Mutation: shift the small end twice, as diffusers' default
    does.
    """
    assert LinearShift(shift=3.0).sigmas(10) == pytest.approx(SD35, abs=5e-6)


def test_shift_by_hand():
    """s(3/4) at shift 2 is (2 * 3/4) / (1 + 3/4) = 6/7. Mutation: divide by shift + (1 - shift)
    u.
    """
    assert LinearShift(shift=2.0).sigmas(4) == pytest.approx((1, 6 / 7, 2 / 3, 2 / 5, 0), abs=1e-15)


def test_shift_1_is_uniform():
    """Mutation: start the grid at (K - 1) / K."""
    assert LinearShift(shift=1.0).sigmas(4) == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_intervals_chain_and_share_sigma_max(grid):
    """Mutation: give every interval its own sigma_next as second_sigma, or dt a positive sign."""
    assert [step.sigma_next for step in grid[:-1]] == [step.sigma for step in grid[1:]]
    assert {step.second_sigma for step in grid} == {grid[1].sigma}
    assert [step.dt for step in grid] == pytest.approx([b - a for a, b in pairwise(SD35)], abs=1e-5)


@given(shift=st.floats(0.1, 20.0), num_steps=st.integers(1, 30))
def test_every_grid_starts_at_exactly_1(shift, num_steps):
    """Flow-SDE divides by 1 - sigma elsewhere. Mutation: compute s(1) as shift / (1 + (shift -
    1)).
    """
    for schedule in (LinearShift(shift=shift), DiffusersDefault(shift=shift)):
        assert schedule.sigmas(num_steps)[0] == 1


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_must_be_positive(shift):
    """Mutation: drop the check."""
    with pytest.raises(ValueError, match=f"schedule.shift={shift}"):
        LinearShift(shift=shift)


def test_a_grid_has_a_step():
    """Mutation: allow num_steps 0."""
    with pytest.raises(ValueError, match="num_steps=0"):
        intervals(LinearShift(shift=1.0), 0)


TWICE_SHIFTED = (
    1,
    0.96013,
    0.91335,
    0.85769,
    0.79037,
    0.70728,
    0.60215,
    0.46488,
    0.27805,
    0.00893,
    0,
)
KLEIN = (
    1,
    0.98927,
    0.97704,
    0.96298,
    0.94662,
    0.92737,
    0.90438,
    0.87645,
    0.84178,
    0.79761,
    0.73942,
    0.65925,
    0.54177,
)
FLUX1 = (1, 0.90374, 0.7897, 0.65249, 0.48422, 0.273, 0)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_default_grid_is_what_diffusers_gives(shift, num_steps):
    """Mutation: shift once, or run the grid to 1/K instead of the scheduler's smallest sigma."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    grid = DiffusersDefault(shift=shift).sigmas(num_steps)
    assert grid == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_published_grids():
    """peers.md 2.0: SD3.5 as flow_grpo samples it, FLUX.1 and FLUX.2-klein at 512x512. Mutation:
    swap the two rules.
    """
    assert DiffusersDefault(shift=3.0).sigmas(10) == pytest.approx(TWICE_SHIFTED, abs=6e-6)
    assert DynamicShift(rule="linear", tokens=1024).sigmas(6) == pytest.approx(FLUX1, abs=6e-6)
    assert DynamicShift(rule="empirical", tokens=1024).sigmas(14) == pytest.approx(
        (*KLEIN, 0.35304, 0), abs=6e-6
    )


def test_dynamic_shift_agrees_with_diffusers():
    """Mu by diffusers' own functions, below and above 4,300 tokens. Mutation: drop the second
    fit.
    """
    for tokens in (256, 1024, 4096, 6000):
        assert DynamicShift(rule="linear", tokens=tokens).mu(8) == pytest.approx(
            calculate_shift(tokens, 256, 4096)
        )
        for num_steps in (4, 14, 50):
            expected = compute_empirical_mu(tokens, num_steps)
            assert DynamicShift(rule="empirical", tokens=tokens).mu(num_steps) == pytest.approx(
                expected
            )


@pytest.mark.parametrize(
    ("change", "message"), [({"rule": "cubic"}, "cubic"), ({"tokens": 0}, "schedule.tokens=0")]
)
def test_wrong_dynamic_shifts_are_named(change, message):
    """Mutation: drop a check."""
    with pytest.raises(Exception, match=message):
        DynamicShift(**{"rule": "linear", "tokens": 16} | change)

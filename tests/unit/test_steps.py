import random
from collections import Counter

import pytest

from flowrl.samplers.steps import AllButLast, Subset, Window


def draws(steps, count, seed=0):
    return [steps.draw(10, iteration, seed, 0) for iteration in range(count)]


def test_all_but_last():
    """Mutation: include the last step."""
    assert AllButLast().draw(4, 7, 0, 0) == AllButLast().candidates(4) == (0, 1, 2)


def test_random_window_covers_every_start():
    """Mutation: randrange in place of randint, which never draws the last start."""
    seen = Counter(draws(Window(size=3, low=1, high=7, advance_every=None), 2000))
    assert set(seen) == {(start, start + 1, start + 2) for start in (1, 2, 3, 4)}
    assert all(abs(count - 500) < 5 * 20 for count in seen.values())  # 5 standard deviations


def test_progressive_window_by_hand():
    """Two iterations a place, moving by the window's size, wrapping. Mutation: move by 1."""
    assert draws(Window(size=2, low=1, high=6, advance_every=2), 6) == [
        (1, 2),
        (1, 2),
        (3, 4),
        (3, 4),
        (1, 2),
        (1, 2),
    ]


def test_subset_draws_without_replacement_and_evenly():
    """Flow-DPPO's 3 of [0..5]. Mutation: draw with replacement, leave unsorted, or leave out an
    end.
    """
    drawn = draws(Subset(count=3, low=0, high=6), 2000)
    assert all(len(set(pick)) == 3 and list(pick) == sorted(pick) for pick in drawn)
    share = Counter(step for pick in drawn for step in pick)
    assert set(share) == set(range(6))
    assert all(abs(count - 1000) < 5 * 22.4 for count in share.values())


@pytest.mark.parametrize(
    "steps", [Subset(count=3, low=0, high=8), Window(size=2, low=0, high=9, advance_every=None)]
)
def test_draw_is_a_function_of_seed_and_iteration(steps):
    """Mutation: draw from the global generator, or ignore the seed or the iteration."""
    random.seed(1)
    first = draws(steps, 20)
    random.seed(2)
    assert draws(steps, 20) == first
    assert draws(steps, 20, seed=1) != first
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    "steps", [Subset(count=2, low=1, high=4), Window(size=2, low=1, high=4, advance_every=None)]
)
def test_candidates_are_what_is_drawn(steps):
    """Mutation: candidates up to num_steps."""
    assert (
        {step for pick in draws(steps, 200) for step in pick}
        == set(steps.candidates(10))
        == {1, 2, 3}
    )


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Window(size=0, low=0, high=4, advance_every=None), "steps.size=0"),
        (lambda: Window(size=3, low=2, high=4, advance_every=None), "steps.size=3"),
        (lambda: Window(size=1, low=0, high=4, advance_every=0), "steps.advance_every=0"),
        (lambda: Window(size=1, low=0, high=4, advance_every=-2), "steps.advance_every=-2"),
        (lambda: Subset(count=5, low=0, high=4), "steps.count=5"),
        (lambda: Subset(count=1, low=-1, high=4), "steps.low=-1"),
    ],
)
def test_impossible_ranges_are_named(build, name):
    """Mutation: drop one bound of the check."""
    with pytest.raises(ValueError, match=name):
        build()

import itertools
import random
from collections import Counter

import pytest

from flowrl.errors import UserError
from flowrl.samplers.steps import AllButLast, Branch, Subset
from flowrl.samplers.steps import Window as AnyWindow
from flowrl.samplers.trained import AllStochastic, RandomShare


def window(**options):
    """A window with the options of conf/steps/window.yaml where a test gives no other."""
    return AnyWindow(**{"stride": None, "rolls_back": True, "shrinks": False} | options)


def draws(steps, count, seed=0):
    return [steps.draw(10, iteration, seed, 0) for iteration in range(count)]


def test_all_but_last():
    """Mutation: include the last step."""
    assert AllButLast().draw(4, 7, 0, 0) == AllButLast().candidates(4) == (0, 1, 2)


def test_random_window_covers_every_start():
    """Mutation: randrange in place of randint, which never draws the last start."""
    seen = Counter(draws(window(size=3, low=1, high=7, advance_every=None), 2000))
    assert set(seen) == {(start, start + 1, start + 2) for start in (1, 2, 3, 4)}
    assert all(abs(count - 500) < 5 * 20 for count in seen.values())  # 5 standard deviations


def test_progressive_window_by_hand():
    """Two iterations a place, moving by the window's size, wrapping. Mutation: move by 1."""
    assert draws(window(size=2, low=1, high=6, advance_every=2), 6) == [
        (1, 2),
        (1, 2),
        (3, 4),
        (3, 4),
        (1, 2),
        (1, 2),
    ]


def test_the_window_of_mix_grpo_by_hand():
    """Its script at 10 steps: of the first 8, a window of 4 from step 0 on that moves by 1, shrinks
    where fewer are left, and begins anew; its place without a step is left out.

    Mutation: move by the window's size, stop where it fits no longer, take the last two steps, or
    never roll back.
    """
    mix_grpo = window(size=4, low=0, high=8, advance_every=25, stride=1, shrinks=True)
    places = [
        (0, 1, 2, 3),
        (1, 2, 3, 4),
        (2, 3, 4, 5),
        (3, 4, 5, 6),
        (4, 5, 6, 7),
        (5, 6, 7),
        (6, 7),
        (7,),
    ]
    every_25 = [place for place in [*places, *places] for _ in range(25)]
    assert draws(mix_grpo, 400) == every_25
    assert mix_grpo.candidates(10) == tuple(range(8))


def test_the_released_script_of_mix_grpo():
    """25 steps, of which a window holds the first 23 at most: by iteration, as its script prints
    the places; the run of 300 iterations ends at the twelfth.

    Mutation: another stride or interval.
    """
    mix_grpo = window(size=4, low=0, high=23, advance_every=25, stride=1, shrinks=True)
    seen = {iteration: mix_grpo.draw(25, iteration, 0, 0) for iteration in (0, 24, 25, 299, 574)}
    assert seen == {
        0: (0, 1, 2, 3),
        24: (0, 1, 2, 3),
        25: (1, 2, 3, 4),
        299: (11, 12, 13, 14),
        574: (22,),
    }
    assert mix_grpo.draw(25, 575, 0, 0) == (0, 1, 2, 3)


def test_a_window_may_stay_where_it_fits_last():
    """MixGRPO's paper. Mutation: roll back whatever is asked."""
    staying = window(size=2, low=0, high=4, advance_every=1, stride=1, rolls_back=False)
    assert draws(staying, 5) == [(0, 1), (1, 2), (2, 3), (2, 3), (2, 3)]


@pytest.mark.parametrize("change", [{"stride": 1}, {"shrinks": True}, {"rolls_back": False}])
def test_a_drawn_window_does_not_slide(change):
    """Mutation: take what then means nothing."""
    with pytest.raises(ValueError, match="advance_every=null draws its place"):
        window(size=2, low=0, high=4, advance_every=None, **change)


def test_a_random_share_is_each_samples_own():
    """DanceGRPO: of 5 stochastic steps each sample trains on 3, every choice of them as often.

    Mutation: draw for an iteration, or for a group; draw with replacement; leave out an end.
    """
    choice = RandomShare(share=0.6)
    stochastic = AllButLast().draw(6, 0, 0, 0)
    indices = itertools.product(range(3), range(20), range(20))
    drawn = [choice.draw(stochastic, i, 0, prompt, sample) for i, prompt, sample in indices]
    counts = Counter(drawn)
    assert set(counts) == set(itertools.combinations(range(5), 3))
    assert all(abs(count - 120) < 5 * 10.4 for count in counts.values())  # 5 standard deviations
    for one, other in ((0, 1), (20, 400)):
        places = [drawn[start : start + 20] for start in (one * 20, other * 20)]
        assert places[0] != places[1]
    assert drawn[:20] == [choice.draw(stochastic, 0, 0, 0, sample) for sample in range(20)]
    assert drawn[:20] != [choice.draw(stochastic, 0, 1, 0, sample) for sample in range(20)]
    assert choice.candidates(stochastic) == stochastic


@pytest.mark.parametrize(
    ("num_steps", "share", "count"),
    [(16, 0.6, 9), (7, 0.6, 3), (25, 0.6, 14), (6, 0.6, 3), (6, 0.1, 1)],
)
def test_the_share_of_dance_grpo_is_rounded_down(num_steps, share, count):
    """int((K - 1) 0.6) as in its script, and never none. Mutation: round, or count all K steps."""
    stochastic = AllButLast().candidates(num_steps)
    assert len(RandomShare(share=share).draw(stochastic, 0, 0, 0, 0)) == count


def test_all_stochastic_steps_are_trained():
    """Mutation: leave one out."""
    assert AllStochastic().candidates((1, 3)) == AllStochastic().draw((1, 3), 0, 0, 0, 0) == (1, 3)


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
    "steps", [Subset(count=3, low=0, high=8), window(size=2, low=0, high=9, advance_every=None)]
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
    "steps", [Subset(count=2, low=1, high=4), window(size=2, low=1, high=4, advance_every=None)]
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
        (lambda: window(size=0, low=0, high=4, advance_every=None), "steps.size=0"),
        (lambda: window(size=3, low=2, high=4, advance_every=None), "steps.size=3"),
        (lambda: window(size=1, low=0, high=4, advance_every=0), "steps.advance_every=0"),
        (lambda: window(size=1, low=0, high=4, advance_every=-2), "steps.advance_every=-2"),
        (lambda: Subset(count=5, low=0, high=4), "steps.count=5"),
        (lambda: window(size=1, low=0, high=4, advance_every=1, stride=0), "steps.stride=0"),
        (lambda: RandomShare(share=1.5), "trained.share=1.5"),
        (lambda: Subset(count=1, low=-1, high=4), "steps.low=-1"),
    ],
)
def test_impossible_ranges_are_named(build, name):
    """Mutation: drop one bound of the check."""
    with pytest.raises(ValueError, match=name):
        build()


def test_branches_are_dealt_evenly():
    """Three prompts in a row part at one step, the next three at another, and each of the steps 1
    to 4 comes once before one comes again. Mutation: draw each prompt's step by itself, or the same
    order in every deal or iteration.
    """
    branch = Branch(low=1, high=5, in_a_row=3)
    assert branch.candidates(10) == (1, 2, 3, 4)
    orders = []
    for iteration in range(3):
        steps = [branch.draw(10, iteration, 0, prompt) for prompt in range(24)]
        rows = [steps[first : first + 3] for first in range(0, 24, 3)]
        assert all(len(set(row)) == 1 for row in rows)
        places = [row[0][0] for row in rows]
        assert sorted(places[:4]) == sorted(places[4:]) == [1, 2, 3, 4]
        orders += [tuple(places[:4]), tuple(places[4:])]
    assert len(set(orders)) > 3
    assert steps == [branch.draw(10, 2, 0, prompt) for prompt in range(24)]
    assert steps != [branch.draw(10, 2, 1, prompt) for prompt in range(24)]


def test_branches_need_a_step():
    """Mutation: deal from nothing."""
    with pytest.raises(UserError, match=r"steps\.low=5 must be below steps\.high=5"):
        Branch(low=5, high=5, in_a_row=1)

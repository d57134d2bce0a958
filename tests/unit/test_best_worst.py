"""Which candidates are kept, by lists that were worked out by hand."""

import pytest

from flowrl.errors import UserError
from flowrl.training.best_worst import BestWorst, Kept


def choose(scores, count):
    return BestWorst(candidates=len(scores), num_steps=1).choose(scores, count)


def test_the_best_and_the_worst_half_are_kept():
    """Scores .5 .9 .1 .7 .3 .8: from the best, numbers 1 5 3 0 4 2; in an update they are in the
    order of their numbers.

    Mutation: keep the best alone, or leave them in the order of their scores.
    """
    kept = choose([0.5, 0.9, 0.1, 0.7, 0.3, 0.8], 4)
    assert kept == Kept(best=(1, 5), worst=(4, 2))
    assert kept.numbers == [1, 2, 4, 5]


def test_of_an_odd_number_one_more_is_among_the_worst():
    """As in Sol-RL's code: 3 // 2 = 1 of the best. Mutation: one more among the best."""
    assert choose([0.5, 0.9, 0.1, 0.7, 0.3], 3) == Kept(best=(1,), worst=(4, 2))


def test_equal_scores_are_told_apart_by_their_numbers():
    """Ranked 1 4 (both 2), 0 2 3 5 (all 1): the first of the twos, the last two of the ones. A
    constant group keeps its first and its last, none twice.

    Mutation: rank equal scores by the larger number.
    """
    assert choose([1.0, 2.0, 1.0, 1.0, 2.0, 1.0], 3) == Kept(best=(1,), worst=(3, 5))
    assert choose([1.0] * 6, 4) == Kept(best=(0, 1), worst=(4, 5))


def test_a_candidate_without_a_score_is_the_last_resort():
    """Four of six have a score: of four kept all of these; of five the first of the others as well,
    which is neither best nor worst. Where none has one, the first are kept.

    Mutation: take a missing score for a low one.
    """
    scores = [None, 0.5, None, 0.9, 0.1, 0.7]
    assert choose(scores, 4) == Kept(best=(3, 5), worst=(1, 4))
    assert choose(scores, 5) == Kept(best=(3, 5), worst=(1, 4), unscored=(0,))
    assert choose(scores, 5).numbers == [0, 1, 3, 4, 5]
    assert choose([None] * 4, 2) == Kept(best=(), worst=(), unscored=(0, 1))


def test_values_are_bounded_where_a_choice_is_made():
    """Mutation: check nothing."""
    with pytest.raises(UserError, match=r"scouting\.candidates=0 must be"):
        BestWorst(candidates=0, num_steps=4)
    with pytest.raises(UserError, match=r"scouting\.num_steps=0 must be"):
        BestWorst(candidates=8, num_steps=0)

import math
from functools import partial

import pytest
import torch

from flowrl.advantages import from_mean, gdpo, global_std, group, weighted_sum, zscore

OPTIONS = {
    "group": group,
    "global_std": global_std,
    "from_mean": partial(from_mean, scale=0.5),
    "zscore": zscore,
    "gdpo": gdpo,
}
ALL = pytest.mark.parametrize("function", OPTIONS.values(), ids=OPTIONS)


def run(function, rewards, groups, is_valid=None, weights=(1.0,)):
    valid = (
        torch.ones(len(rewards), dtype=torch.bool) if is_valid is None else torch.tensor(is_valid)
    )
    terms = torch.tensor(rewards, dtype=torch.float64).view(len(rewards), -1)
    return function(terms, torch.tensor(weights, dtype=torch.float64), torch.tensor(groups), valid)


def test_group_of_three_by_hand():
    """(1, 2, 3): std sqrt(2/3). Mutation: sample instead of population std, or another floor than
    1e-4.
    """
    one = 1 / (math.sqrt(2 / 3) + 1e-4)
    assert run(group, [1.0, 2.0, 3.0], [5, 5, 5]).values.tolist() == pytest.approx(
        [-one, 0, one], rel=1e-12
    )


def test_global_std_by_hand():
    """Groups (0, 2) and (1, 3): means 1 and 2, std over the batch sqrt(1.25). Mutation: std of the
    centred rewards.
    """
    one = 1 / (math.sqrt(1.25) + 1e-4)
    assert run(global_std, [0.0, 1.0, 2.0, 3.0], [0, 1, 0, 1]).values.tolist() == pytest.approx(
        [-one, -one, one, one], rel=1e-12
    )


def test_from_mean_by_hand():
    """Groups (0, 2) and (1, 4), scale 1/2. Mutation: divide by a spread, or leave out the scale."""
    got = run(OPTIONS["from_mean"], [0.0, 1.0, 2.0, 4.0], [0, 1, 0, 1])
    assert got.values.tolist() == [-0.5, -0.75, 0.5, 0.75]


@ALL
def test_missing_samples_are_left_out(function):
    """A missing reward, whatever its value, changes nobody's advantage and gets 0. Mutation: count
    it as 0.
    """
    full = run(function, [1.0, 3.0, 4.0, 8.0], [0, 0, 1, 1]).values
    for junk in (1e6, math.nan, math.inf):
        got = run(
            function, [1.0, junk, 3.0, 4.0, 8.0], [0, 0, 0, 1, 1], [True, False, True, True, True]
        )
        assert got.values[1] == 0
        torch.testing.assert_close(got.values[[0, 2, 3, 4]], full, rtol=1e-12, atol=0)
        assert (got.constant_share, got.dropped_share) == (0, 0)


@ALL
def test_constant_groups_get_exactly_0_and_are_counted(function):
    """Three times 0.1 has a mean that is not 0.1. Mutation: decide by std > 0."""
    got = run(function, [0.1, 0.1, 0.1, 1.0, 2.0, 4.0], [0, 0, 0, 1, 1, 1])
    assert got.values[:3].tolist() == [0, 0, 0]
    assert got.values[3:].abs().min() > 0.1
    assert (got.constant_share, got.dropped_share) == (0.5, 0)


@ALL
def test_groups_with_one_valid_sample_are_dropped_and_counted(function):
    """Mutation: require one valid sample, or count a dropped group as constant."""
    got = run(
        function,
        [7.0, 9.0, 1.0, 2.0, 0.0, 5.0],
        [0, 0, 1, 1, 2, 2],
        [True, False, True, True, False, False],
    )
    assert got.values[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]
    assert got.values[3] == -got.values[2] != 0
    assert got.constant_share == 0
    assert got.dropped_share == pytest.approx(2 / 3, rel=1e-6)


@ALL
def test_nothing_valid_teaches_nothing(function):
    """Mutation: take statistics of an empty set."""
    got = run(function, [1.0, 2.0], [0, 0], [False, False])
    assert got.values.tolist() == [0, 0]
    assert got.dropped_share == 1


@ALL
def test_order_and_names_of_groups_do_not_matter(function, normal):
    """Mutation: assume contiguous groups, or ids that count from 0."""
    rewards, groups = normal(24), torch.arange(24) // 6
    valid = torch.arange(24) % 5 != 0
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    names = torch.tensor([40, 7, 1000, 3])
    one = torch.ones(1, dtype=torch.float64)
    direct = function(rewards[:, None], one, groups, valid)
    shuffled = function(rewards[order, None], one, names[groups][order], valid[order])
    torch.testing.assert_close(shuffled.values, direct.values[order], rtol=1e-12, atol=1e-15)
    assert direct.values[valid].abs().min() > 0
    assert shuffled.dropped_share == direct.dropped_share == 0


def test_gdpo_by_hand():
    """One group: z-scores (-1, 1) of a large reward with weight 1 and (1, -1) of a small one with
    weight 3 give (2, -2), over the batch (1, -1). Mutation: add the raw rewards up, or leave the
    weights out.
    """
    got = run(gdpo, [[0.0, 0.02], [100.0, 0.01]], [0, 0], weights=(1.0, 3.0))
    assert got.values.tolist() == pytest.approx([1, -1], rel=1e-9)


def test_weighted_sum_of_raw_rewards():
    """(0 + 3 x 0.02, 100 + 3 x 0.01): the large reward decides. Mutation: ignore the weights."""
    got = run(group, [[0.0, 0.02], [100.0, 0.01]], [0, 0], weights=(1.0, 3.0))
    assert got.values.tolist() == pytest.approx([-1, 1], rel=1e-4)
    flipped = run(group, [[0.0, 0.02], [100.0, 0.01]], [0, 0], weights=(1.0, 30000.0))
    assert flipped.values.tolist() == pytest.approx([1, -1], rel=1e-4)


def test_gdpo_takes_what_a_half_constant_group_still_says():
    """Mutation: drop a group as soon as one of its rewards is constant."""
    got = run(
        gdpo, [[1.0, 0.0], [1.0, 1.0], [2.0, 5.0], [2.0, 5.0]], [0, 0, 1, 1], weights=(1.0, 1.0)
    )
    assert got.values[1] == -got.values[0] != 0
    assert got.values[2:].tolist() == [0, 0]
    assert got.constant_share == 0.5


def test_a_constant_reward_says_nothing_in_gdpo():
    """Twelve times 26.37 in float32 has a mean that is not 26.37. Mutation: divide that rounding by
    the floor.
    """
    other = torch.arange(24.0) % 2
    first = torch.cat([torch.full((12,), 26.37), other[12:]])
    groups = torch.arange(24) // 12
    got = gdpo(
        torch.stack([first, other], 1), torch.ones(2), groups, torch.ones(24, dtype=torch.bool)
    )
    size = (2.5) ** -0.5  # one reward speaks in the first group, two in the second
    expected = size * (2 * other - 1) * (1 + groups)
    torch.testing.assert_close(got.values, expected, rtol=1e-4, atol=1e-4)


@ALL
def test_used_samples(function):
    """Valid ones with another valid one in their group, constant or not. Mutation: count constant
    groups as missing.
    """
    got = run(
        function, [1.0, 1.0, 3.0, 4.0, 5.0], [0, 0, 1, 1, 1], [True, True, True, False, False]
    )
    assert got.is_used.tolist() == [True, True, False, False, False]


def test_zscore_by_hand():
    """Groups (0, 2), (10, 10) of a reward with std sqrt(20.75) over the batch, and (1, 1), (0, 4)
    of one with std 1.5: with weights 1 and 3. Mutation: std within the group, or weights before the
    standardisation.
    """
    got = run(
        zscore, [[0.0, 1.0], [2.0, 1.0], [10.0, 0.0], [10.0, 4.0]], [0, 0, 1, 1], weights=(1.0, 3.0)
    )
    first, second = 1 / (math.sqrt(20.75) + 1e-4), 3 * 2 / (1.5 + 1e-4)
    assert got.values.tolist() == pytest.approx([-first, first, -second, second], rel=1e-12)


def test_zscore_of_one_reward_is_global_std(normal):
    """Mutation: divide by the std of the centred rewards."""
    rewards, groups = normal(24)[:, None], torch.arange(24) // 6
    one, valid = torch.ones(1, dtype=torch.float64), torch.arange(24) % 5 != 0
    ours, theirs = (
        function(rewards, one, groups, valid).values for function in (zscore, global_std)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


NAN = math.nan


def test_a_sum_of_the_rewards_that_apply():
    """Mutation: a NaN for the whole sum, a 0 where nothing applies, or the weights spread over the
    rest.
    """
    terms = torch.tensor([[1.0, 10.0], [NAN, 10.0], [1.0, NAN], [NAN, NAN]])
    assert weighted_sum(terms, torch.tensor([2.0, 0.5])).tolist()[:3] == [7, 5, 2]
    assert weighted_sum(terms, torch.tensor([2.0, 0.5]))[3].isnan()


@ALL
def test_a_reward_that_does_not_apply_is_as_if_it_were_not_there(function):
    """On prompts that only the first reward judges, the order is the first reward's; they are not
    missing.

    Mutation: put 0 or NaN in its place and into its statistics, or drop the group.
    """
    both = [[1.0, 5.0], [2.0, 9.0], [4.0, 7.0]]
    got = run(
        function,
        [*both, [3.0, NAN], [5.0, NAN], [4.0, NAN]],
        [0, 0, 0, 1, 1, 1],
        weights=(1.0, 1.0),
    )
    assert got.is_used.all() and (got.constant_share, got.dropped_share) == (0, 0)
    assert got.values.isfinite().all()
    low, high, middle = got.values[3:].tolist()
    assert low < middle < high and low + high == pytest.approx(2 * middle, abs=1e-9)


@ALL
def test_samples_that_no_reward_judges_change_nothing(function):
    """Mutation: count them as zeros, or as valid in the group or batch statistics."""
    some = [[1.0, 5.0], [2.0, 9.0], [4.0, NAN], [3.0, NAN]]
    alone = run(function, some, [0, 0, 1, 1], weights=(1.0, 2.0))
    got = run(function, [*some, [NAN, NAN], [NAN, NAN]], [0, 0, 1, 1, 2, 2], weights=(1.0, 2.0))
    torch.testing.assert_close(got.values[:4], alone.values, rtol=1e-12, atol=0)
    assert got.values[4:].tolist() == [0, 0] and got.is_used.tolist() == [True] * 4 + [False] * 2
    assert got.dropped_share == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("function", [zscore, gdpo])
def test_statistics_of_a_reward_are_its_own(function):
    """Scaling a reward by 100 changes nothing, though it applies to one group only.

    Mutation: take its spread over samples that it does not judge.
    """
    terms = [[1.0, NAN], [2.0, NAN], [1.0, 5.0], [3.0, 9.0], [2.0, 6.0]]
    groups = [0, 0, 1, 1, 1]
    plain = run(function, terms, groups, weights=(1.0, 1.0)).values
    scaled = run(function, [[a, 1000 * b] for a, b in terms], groups, weights=(1.0, 1.0)).values
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-3)
    assert plain[3] > plain[4] > plain[2]


@ALL
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0)], ids=["one reward", "two"])
def test_a_dropped_sample_sets_no_spread(function, weights):
    """The lone valid sample of a group, far from all others, changes nobody's advantage.

    Mutation: take the spread of the batch over it too.
    """
    some = [[1.0, 5.0], [2.0, 9.0], [4.0, 8.0], [3.0, 6.0]]
    rewards = [row[: len(weights)] for row in [*some, [1000.0, -1000.0], [0.0, 0.0]]]
    alone = run(function, rewards[:4], [0, 0, 1, 1], weights=weights).values
    got = run(function, rewards, [0, 0, 1, 1, 2, 2], [True] * 5 + [False], weights)
    torch.testing.assert_close(got.values[:4], alone, rtol=1e-12, atol=0)
    assert got.values[4:].tolist() == [0, 0] and not got.is_used[4:].any()
    assert got.dropped_share == pytest.approx(1 / 3, rel=1e-6)


@ALL
def test_the_order_of_samples_does_not_matter_to_rewards_of_little_spread(function):
    """Rewards of 5 with a spread of .01: to 1e-12 inside, and float32 gives the rounded value of
    that. In float32 they would differ at 5e-5.

    Mutation: compute in the rewards' own dtype.
    """
    generator = torch.Generator().manual_seed(0)
    rewards = (5 + 0.01 * torch.randn(96, 1, generator=generator)).float()
    groups, valid = torch.arange(96) // 24, torch.ones(96, dtype=torch.bool)
    exact = function(rewards.double(), torch.ones(1, dtype=torch.float64), groups, valid).values
    for seed in range(5):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
        arguments = (groups[order], valid[order])
        double = function(rewards[order].double(), torch.ones(1).double(), *arguments).values
        torch.testing.assert_close(double, exact[order], rtol=1e-12, atol=1e-12)
        single = function(rewards[order], torch.ones(1), *arguments).values
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact[order], rtol=6e-8, atol=1e-12)


@pytest.mark.parametrize("value", [5.0, -300.0, 1e-3])
def test_gdpo_takes_a_last_bit_for_rounding(value):
    """Groups of equal rewards but for one that is a float32 away, beside groups that vary: they get
    exactly 0 and are counted, and so they do where all groups are such. Differences of 1e-5 of the
    reward count.

    Mutation: ask for unequal rewards alone.
    """
    rewards = torch.full((8,), value)
    rewards[1] = torch.nextafter(rewards[1], torch.tensor(torch.inf))
    rewards[4:] += torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert rewards[0] != rewards[1]
    groups, valid = torch.arange(8) // 4, torch.ones(8, dtype=torch.bool)
    got = gdpo(rewards[:, None], torch.ones(1), groups, valid)
    assert got.values[:4].tolist() == [0, 0, 0, 0] and got.values[4:].abs().min() > 0.1
    assert got.constant_share == 0.5
    alone = gdpo(rewards[:4, None], torch.ones(1), groups[:4], valid[:4])
    assert alone.values.tolist() == [0, 0, 0, 0] and alone.constant_share == 1
    rewards[1] = value * (1 + 1e-5)
    assert gdpo(rewards[:4, None], torch.ones(1), groups[:4], valid[:4]).values.abs().max() > 1

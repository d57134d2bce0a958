import math

import numpy as np
import pytest

from flowrl.statistics import by_prompt, difference, fallen, interval_kinds, mean, ratio

PROMPTS = np.arange(400) // 4


def test_means_of_prompts_leave_out_what_is_not_there():
    """Mutation: count a missing image, or a prompt of none as 0."""
    values = np.array([1.0, 3.0, 5.0, math.nan, math.inf, math.nan])
    means = by_prompt(values, np.array([0, 0, 1, 1, 2, 2]))
    assert means[:2].tolist() == [2, 5] and math.isnan(means[2])
    found = mean(means)
    assert found.mean == 3.5 and found.count == 2


def test_interval_of_a_known_spread(normal):
    """1.96 / sqrt(n) either side for unit normal means of 400 prompts. Mutation: 90 %, or single
    values.
    """
    found = mean(normal(400).numpy())
    assert abs((found.high - found.low) / (2 * 1.96 / 20) - 1) < 0.08
    assert found.low < found.mean < found.high


@pytest.mark.parametrize(
    ("count", "least", "most"), [(3, 0.93, 0.97), (5, 0.89, 0.95), (12, 0.91, 0.97)]
)
def test_intervals_of_few_values_cover_what_they_say(count, least, most):
    """How often 0 lies in the interval of normal values. Mutation: plain percentiles, which of
    5 cover 84 %; resampling 3."""
    values = np.random.default_rng(0).standard_normal((400, count))
    found = [mean(own) for own in values]
    assert least <= np.mean([own.low <= 0 <= own.high for own in found]) <= most


def test_student_by_hand():
    """1, 2, 3: 2 +- 4.303 / sqrt(3). Mutation: a spread over n."""
    found = mean([1.0, 2.0, 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_a_ratio_of_few_seeds_has_no_interval():
    """Mutation: the range of four."""
    ours, theirs = ({str(i): value + i for i in range(4)} for value in (2.0, 1.0))
    assert ratio(ours, theirs).mean == 3.5 / 2.5 and math.isnan(ratio(ours, theirs).low)
    unpaired = difference(ours, {f"other {key}": value for key, value in theirs.items()})
    assert unpaired.mean == 1.0 and math.isnan(unpaired.low)


def test_a_ratio_resamples_pairs():
    """Ours is twice theirs in every seed, so in every resample. Mutation: resample the two
    apart.
    """
    theirs = {str(i): 1.0 + i for i in range(6)}
    found = ratio({seed: 2 * value for seed, value in theirs.items()}, theirs)
    assert (found.low, found.mean, found.high) == pytest.approx((2, 2, 2))


def test_more_images_of_a_prompt_are_no_more_prompts(normal):
    """Repeating each image changes nothing. Mutation: resample images."""
    values, prompts = normal(50).numpy(), np.arange(50)
    once = mean(by_prompt(values, prompts))
    repeated = mean(by_prompt(values.repeat(9), prompts.repeat(9)))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), rel=1e-9)


def test_paired_differences_see_what_single_means_do_not(normal):
    """A gain of 0.1 on prompts that differ by 1. Mutation: the difference of two unpaired
    intervals.
    """
    before = normal(100).numpy()
    after = before + 0.1 + 0.01 * normal(100).numpy()
    gain = mean(after - before)
    assert 0.09 < gain.low < gain.mean < gain.high < 0.11
    assert mean(before).high > mean(after).low


def test_nothing_has_no_mean_and_one_prompt_no_interval():
    """Mutation: a mean of 0, or an interval of no width."""
    assert math.isnan(mean(np.full(3, math.nan)).mean)
    one = mean(np.array([math.nan, 2.0]))
    assert (one.mean, one.count) == (2.0, 1) and math.isnan(one.low) and math.isnan(one.high)


@pytest.mark.parametrize(
    ("reward", "gold", "alarm"),
    [(0.1, -0.1, ["gold"]), (0.1, 0.1, []), (-0.1, -0.1, []), (0.1, 0.0, []), (1e-4, -0.1, [])],
)
def test_the_alarm(reward, gold, alarm, normal):
    """The reward up and a gold metric down, both beyond chance. Mutation: either alone, or any
    change at all.
    """
    noise = 0.05 * normal(400).numpy()
    noise = noise - noise.mean()
    before = {"reward": np.zeros(400), "gold": np.ones(400), "other": np.zeros(400)}
    now = {"reward": reward + noise, "gold": 1 + gold + noise, "other": noise}
    assert fallen(before, now, PROMPTS, np.arange(100)) == alarm


def test_repeated_prompts_are_one():
    """30 captions on four lines each, which differ by less than captions do, and the same with the
    lines shuffled.

    The standard error is that of 30 means: 1.96 x the spread of the captions' means / sqrt(30)
    either side. Mutation: take 120 lines for 120 prompts, which makes the interval about half as
    wide; or ids in the order of the lines.
    """
    rng = np.random.default_rng(0)
    lines = rng.standard_normal(30).repeat(4) + 0.1 * rng.standard_normal(120)
    captions = np.arange(30).repeat(4)
    by_caption = mean(by_prompt(lines, captions))
    clustered = mean(lines, captions)
    assert (clustered.low, clustered.high) == pytest.approx(
        (by_caption.low, by_caption.high), rel=1e-9
    )
    assert clustered.count == 30 and mean(lines).count == 120
    assert 1.8 < (clustered.high - clustered.low) / (mean(lines).high - mean(lines).low) < 2.2
    order = rng.permutation(120)
    again = mean(lines[order], captions[order])
    assert (again.low, again.high) == pytest.approx((clustered.low, clustered.high), rel=1e-9)


def test_a_prompt_that_is_repeated_more_often_weighs_more():
    """Lines 1, 1, 1, 5 of three captions: their mean is 2. Sums less mean x size: 2 - 4, 1 - 2, 5 -
    2, squares 14; 4.303 sqrt(14 x 3 / 2) / 4. Mutation: the mean of the captions' means, or a
    spread over n.
    """
    found = mean([1.0, 1.0, 1.0, 5.0], np.array([0, 0, 1, 2]))
    half = 4.302653 * math.sqrt(14 * 3 / 2) / 4
    assert (found.mean, found.count) == (2, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert math.isnan(mean([1.0, math.nan, 1.0, 5.0], np.array([0, 1, 0, 2])).low)
    half_of_all = mean([1.0] * 50 + [0.0] * 50, np.array([0] * 50 + list(range(1, 51))))
    assert half_of_all.mean == 0.5 and half_of_all.low < 0.1 < 0.5 < half_of_all.high


def test_one_prompt_repeated_raises_no_alarm():
    """A hundred lines with one text say no more than one. Mutation: count lines."""
    before = {"reward": np.zeros(400), "gold": np.ones(400)}
    now = {"reward": 0.1 + 1e-3 * np.arange(400) / 400, "gold": 0.9 + 1e-3 * np.arange(400) / 400}
    assert fallen(before, now, PROMPTS, np.arange(100)) == ["gold"]
    assert fallen(before, now, PROMPTS, np.zeros(100, int)) == []


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 9], "95 % bootstrap intervals"),
        ([], "95 % bootstrap intervals"),
        ([0, 3], "95 % Student's intervals, since there are fewer than 5 seeds"),
        ([1, 4], "95 % Student's intervals, since there are fewer than 5 seeds"),
        ([5, 4], "95 % intervals: bootstrap, of 3 or 4 seeds Student's"),
        ([2, 1], "no intervals, since there are fewer than 3 seeds"),
    ],
)
def test_intervals_are_called_what_they_are(counts, expected):
    """As `mean` makes them. Mutation: call all of them bootstrap intervals."""
    assert interval_kinds(counts, "seeds") == expected

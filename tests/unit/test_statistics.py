import math

import numpy as np
import pytest

from flowrl.statistics import by_prompt, difference, fallen, mean, ratio

PROMPTS = np.arange(400) // 4


def test_means_of_prompts_leave_out_what_is_not_there():
    """Mutation: count a missing image, or a prompt of none as 0."""
    values = np.array([1.0, 3.0, 5.0, math.nan, math.inf, math.nan])
    means = by_prompt(values, np.array([0, 0, 1, 1, 2, 2]))
    assert means[:2].tolist() == [2, 5] and math.isnan(means[2])
    found = mean(means)
    assert found.mean == 3.5 and found.count == 2


def test_interval_of_a_known_spread(normal):
    """1.96 / sqrt(n) either side for unit normal means of 400 prompts. Mutation: 90 %, or single values."""
    found = mean(normal(400).numpy())
    assert abs((found.high - found.low) / (2 * 1.96 / 20) - 1) < 0.08
    assert found.low < found.mean < found.high


@pytest.mark.parametrize(("count", "least", "most"), [(3, 0.93, 0.97), (5, 0.89, 0.95), (12, 0.91, 0.97)])
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
    """Ours is twice theirs in every seed, so in every resample. Mutation: resample the two apart."""
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
    """A gain of 0.1 on prompts that differ by 1. Mutation: the difference of two unpaired intervals."""
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
    """The reward up and a gold metric down, both beyond chance. Mutation: either alone, or any change at all."""
    noise = 0.05 * normal(400).numpy()
    noise = noise - noise.mean()
    before = {"reward": np.zeros(400), "gold": np.ones(400), "other": np.zeros(400)}
    now = {"reward": reward + noise, "gold": 1 + gold + noise, "other": noise}
    assert fallen(before, now, PROMPTS) == alarm

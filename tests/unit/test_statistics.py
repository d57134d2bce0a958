import math

import pytest
import torch

from flowrl.statistics import by_prompt, difference, estimate, fallen

PROMPTS = torch.arange(400) // 4


def test_means_of_prompts_leave_out_what_is_not_there():
    """Mutation: count a missing image, or a prompt of none as 0."""
    values = torch.tensor([1.0, 3.0, 5.0, math.nan, math.nan, math.nan])
    means = by_prompt(values, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert means[:2].tolist() == [2, 5] and means[2].isnan()
    found = estimate(means)
    assert found.mean == 3.5 and found.num_prompts == 2


def test_interval_of_a_known_spread(normal):
    """1.96 / sqrt(n) either side for unit normal means of 400 prompts. Mutation: 90 %, or single values."""
    found = estimate(normal(400))
    assert abs((found.high - found.low) / (2 * 1.96 / 20) - 1) < 0.08
    assert found.low < found.mean < found.high


def test_more_images_of_a_prompt_are_no_more_prompts(normal):
    """Repeating each image changes nothing. Mutation: resample images."""
    values, prompts = normal(50), torch.arange(50)
    once = estimate(by_prompt(values, prompts))
    repeated = estimate(by_prompt(values.repeat_interleave(9), prompts.repeat_interleave(9)))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), rel=1e-9)


def test_paired_differences_see_what_single_means_do_not(normal):
    """A gain of 0.1 on prompts that differ by 1. Mutation: the difference of two unpaired intervals."""
    before = normal(100)
    after = before + 0.1 + 0.01 * normal(100)
    gain = difference(after, before)
    assert 0.09 < gain.low < gain.mean < gain.high < 0.11
    assert estimate(before).high > estimate(after).low


def test_nothing_is_no_estimate():
    """Mutation: a mean of nothing."""
    assert estimate(torch.full((3,), math.nan)) is None


@pytest.mark.parametrize(
    ("reward", "gold", "alarm"),
    [(0.1, -0.1, ["gold"]), (0.1, 0.1, []), (-0.1, -0.1, []), (0.1, 0.0, []), (1e-4, -0.1, [])],
)
def test_the_alarm(reward, gold, alarm, normal):
    """The reward up and a gold metric down, both beyond chance. Mutation: either alone, or any change at all."""
    noise = 0.05 * normal(400)
    noise = noise - noise.mean()
    before = {"reward": torch.zeros(400), "gold": torch.ones(400), "other": torch.zeros(400)}
    now = {"reward": reward + noise, "gold": 1 + gold + noise, "other": noise}
    assert fallen(before, {name: value.float() for name, value in now.items()}, PROMPTS) == alarm

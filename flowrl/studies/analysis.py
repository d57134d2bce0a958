"""The analysis of a study's runs: scores by seed, and comparisons of two conditions at equal budget
and at equal reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from flowrl.report.charts import Point
from flowrl.statistics import Estimate, difference, mean, ratio
from flowrl.studies.record import Metric, Record, evaluated, mean_of

Runs = Sequence[Record]


def conditions(runs: Runs, stages: Sequence[str]) -> dict[str, list[Record]]:
    """Group the runs of some stages by their condition, in the order of the plan."""
    grouped: dict[str, list[Record]] = {}
    for run in runs:
        if run["stage"] in stages:
            grouped.setdefault(f"{run['method']} {run['variant']}".strip(), []).append(run)
    return grouped


def by_seed(runs: Runs, metric: Metric) -> dict[str, float]:
    """Return the last score of each run that has one: that after training, or of a failed run its
    last before it failed.
    """
    values = {str(run["seed"]): evaluated(run, metric, -1) for run in runs}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def gains(runs: Runs, metric: Metric) -> dict[str, float]:
    """Return the last score minus that before training, by seed."""
    before = {str(run["seed"]): evaluated(run, metric, 0) for run in runs}
    return {seed: value - before[seed] for seed, value in by_seed(runs, metric).items()}


def course(run: Record, x: Metric, y: Metric) -> list[Point]:
    """Return (x, y) of a run's evaluations, from the base model on."""
    points = [(mean_of(row, x), mean_of(row, y)) for row in run["evaluations"]]
    return [point for point in points if not math.isnan(sum(point))]


def value_at(points: Sequence[Point], target: float, power: float = 1.0) -> float:
    """Return the value at which a course of (value, reward) first reaches the target; else NaN.

    Between evaluations value ** power is linear in the reward: a small move by d gains d and costs
    d^2 in KL, whose power is therefore 1/2.
    """
    for (value, reward), (next_value, next_reward) in pairwise(points):
        if reward < target <= next_reward:
            low = _raised(value, power)
            high = _raised(next_value, power)
            return (low + (high - low) * (target - reward) / (next_reward - reward)) ** (1 / power)
    return math.nan


def _raised(value: float, power: float) -> float:
    return value if power == 1 else max(value, 0.0) ** power


def pairs_at_equal(
    ours: Runs, theirs: Runs, reward: Metric, value: Metric, power: float
) -> list[Point]:
    """Return our value and theirs at equal reward, a pair for each shared seed.

    A pair is compared at the smaller of its two final rewards, which both runs passed. One in which
    a run ended at or below the base model has no such reward and is left out.
    """
    their_courses = {run["seed"]: course(run, value, reward) for run in theirs}
    values = []
    for seed, our_course in {run["seed"]: course(run, value, reward) for run in ours}.items():
        pair = (our_course, their_courses.get(seed, []))
        if all(pair):
            target = min(points[-1][1] for points in pair)
            values.append((value_at(pair[0], target, power), value_at(pair[1], target, power)))
    return [pair for pair in values if not math.isnan(sum(pair))]


def kl_ratio_at_equal(ours: Runs, theirs: Runs, reward: Metric, kl: Metric) -> Estimate:
    """Return our KL to the reference over theirs at equal reward: the geometric mean over shared
    seeds, `count` of them.
    """
    pairs = pairs_at_equal(ours, theirs, reward, kl, power=0.5)
    log_ratio = mean([math.log(ours / theirs) for ours, theirs in pairs if min(ours, theirs) > 0])
    return Estimate(
        mean=math.exp(log_ratio.mean),
        low=math.exp(log_ratio.low),
        high=math.exp(log_ratio.high),
        count=log_ratio.count,
        is_paired=True,
    )


def difference_at_equal(ours: Runs, theirs: Runs, reward: Metric, value: Metric) -> Estimate:
    """Return our value minus theirs at equal reward, over shared seeds."""
    return mean([a - b for a, b in pairs_at_equal(ours, theirs, reward, value, power=1.0)])


def compare(ours: Runs, theirs: Runs, reward: Metric) -> dict[str, Estimate]:
    """Compare at equal budget: difference and ratio of rewards, ratio of gains over the base
    model.
    """
    scores = by_seed(ours, reward), by_seed(theirs, reward)
    return {
        "difference": difference(*scores),
        "ratio": ratio(*scores),
        "ratio of gains": ratio(gains(ours, reward), gains(theirs, reward)),
    }


def interaction(ours: Sequence[Runs], theirs: Sequence[Runs], metric: Metric) -> Estimate:
    """Return what a change does to us minus what it does to them, by shared seeds; each is (with,
    without) the change.
    """
    return difference(_effect(ours, metric), _effect(theirs, metric))


def _effect(pair: Sequence[Runs], metric: Metric) -> dict[str, float]:
    changed, plain = pair
    before = by_seed(plain, metric)
    after = by_seed(changed, metric)
    return {seed: value - before[seed] for seed, value in after.items() if seed in before}

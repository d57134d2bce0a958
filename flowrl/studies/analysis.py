"""The analysis of a study's runs: scores by seed, and comparisons of two conditions at equal budget
and at equal reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from flowrl.report.charts import Point
from flowrl.statistics import Estimate, difference, geometric_mean, mean, ratio
from flowrl.studies.record import Metric, Record, evaluated, mean_of

Runs = Sequence[Record]
Groups = Mapping[str, Runs]
"""Runs by their condition, in the order of the plan."""


def conditions(runs: Runs, stages: Sequence[str]) -> dict[str, list[Record]]:
    """Group the runs of some stages by their condition, in the order of the plan."""
    grouped: dict[str, list[Record]] = {}
    for run in runs:
        if run["stage"] in stages:
            label = f"{run['method']} {run['variant']}".strip()
            grouped.setdefault(label, []).append(run)
    return grouped


def by_seed(runs: Runs, metric: Metric) -> dict[str, float]:
    """Return the last score of each run that has one: that after training, or of a failed run its
    last before it failed.

    Runs without a score are left out, so the result may be empty.
    """
    scores = {}
    for run in runs:
        score = evaluated(run, metric, -1)
        if not math.isnan(score):
            scores[str(run["seed"])] = score
    return scores


def gains(runs: Runs, metric: Metric) -> dict[str, float]:
    """Return the last score minus that before training, by seed."""
    before = {str(run["seed"]): evaluated(run, metric, 0) for run in runs}
    after = by_seed(runs, metric)
    return {seed: score - before[seed] for seed, score in after.items()}


def course(run: Record, x: Metric, y: Metric) -> list[Point]:
    """Return (x, y) of a run's evaluations, from the base model on; those that lack either are left
    out.
    """
    points = []
    for row in run["evaluations"]:
        point = (mean_of(row, x), mean_of(row, y))
        if not _has_gap(point):
            points.append(point)
    return points


def _has_gap(pair: Point) -> bool:
    """Tell whether one of two numbers is NaN, which their sum then is as well."""
    return math.isnan(sum(pair))


def value_at(points: Sequence[Point], target: float, power: float = 1.0) -> float:
    """Return the value at which a course of (value, reward) first reaches the target; else NaN.

    Between evaluations value ** power is linear in the reward: a small move by d gains d and costs
    d^2 in KL, whose power is therefore 1/2.
    """
    for (value, reward), (next_value, next_reward) in pairwise(points):
        # A reward may fall and rise again: the first stretch that crosses the target counts.
        if reward < target <= next_reward:
            low = _raised(value, power)
            high = _raised(next_value, power)
            return (low + (high - low) * (target - reward) / (next_reward - reward)) ** (1 / power)
    return math.nan


def _raised(value: float, power: float) -> float:
    if power == 1:
        return value
    # A KL that was measured may be a rounding error below 0, where a root would be complex.
    return max(value, 0.0) ** power


def pairs_at_equal(
    ours: Runs, theirs: Runs, reward: Metric, value: Metric, power: float
) -> list[Point]:
    """Return our value and theirs at equal reward, a pair for each shared seed.

    A pair is compared at the smaller of its two final rewards, which both runs passed. One in which
    a run ended at or below the base model has no such reward and is left out.
    """
    our_courses = {run["seed"]: course(run, value, reward) for run in ours}
    their_courses = {run["seed"]: course(run, value, reward) for run in theirs}
    values = []
    for seed, our_course in our_courses.items():
        their_course = their_courses.get(seed, [])
        pair = (our_course, their_course)
        # A seed that one side lacks, or whose run has no evaluation, gives no pair.
        if not all(pair):
            continue
        target = min(points[-1][1] for points in pair)
        our_value = value_at(our_course, target, power)
        their_value = value_at(their_course, target, power)
        values.append((our_value, their_value))
    return [pair for pair in values if not _has_gap(pair)]


def kl_ratio_at_equal(ours: Runs, theirs: Runs, reward: Metric, kl: Metric) -> Estimate:
    """Return our KL to the reference over theirs at equal reward: the geometric mean over shared
    seeds, `count` of them.
    """
    pairs = pairs_at_equal(ours, theirs, reward, kl, power=0.5)
    # A KL of 0 has no logarithm; its pair is left out.
    return geometric_mean([our_kl / kl for our_kl, kl in pairs if min(our_kl, kl) > 0])


def difference_at_equal(ours: Runs, theirs: Runs, reward: Metric, value: Metric) -> Estimate:
    """Return our value minus theirs at equal reward, over shared seeds."""
    pairs = pairs_at_equal(ours, theirs, reward, value, power=1.0)
    return mean([our_value - their_value for our_value, their_value in pairs])


def compare(ours: Runs, theirs: Runs, reward: Metric) -> dict[str, Estimate]:
    """Compare at equal budget: difference and ratio of rewards, ratio of gains over the base
    model.
    """
    our_scores = by_seed(ours, reward)
    their_scores = by_seed(theirs, reward)
    our_gains = gains(ours, reward)
    their_gains = gains(theirs, reward)
    return {
        "difference": difference(our_scores, their_scores),
        "ratio": ratio(our_scores, their_scores),
        "ratio of gains": ratio(our_gains, their_gains),
    }


def interaction(ours: Sequence[Runs], theirs: Sequence[Runs], metric: Metric) -> Estimate:
    """Return what a change does to us minus what it does to them, by shared seeds; each is (with,
    without) the change.
    """
    our_effect = _effect(ours, metric)
    their_effect = _effect(theirs, metric)
    return difference(our_effect, their_effect)


def _effect(pair: Sequence[Runs], metric: Metric) -> dict[str, float]:
    """Return by seed the score with a change minus that without it, where both are known."""
    changed, plain = pair
    before = by_seed(plain, metric)
    after = by_seed(changed, metric)
    return {seed: score - before[seed] for seed, score in after.items() if seed in before}

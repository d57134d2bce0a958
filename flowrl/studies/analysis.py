"""What the runs of a study say: scores by seed, and how two conditions compare at equal budget and
at equal reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from flowrl.statistics import Estimate, difference, mean, ratio
from flowrl.studies.record import Metric, Record, evaluated, mean_of

Runs = Sequence[Record]
Point = tuple[float, float]


def conditions(runs: Runs, stages: Sequence[str]) -> dict[str, list[Record]]:
    """The runs of some stages by their condition, in the order of the plan."""
    grouped: dict[str, list[Record]] = {}
    for run in runs:
        if run["stage"] in stages:
            grouped.setdefault(f"{run['method']} {run['variant']}".strip(), []).append(run)
    return grouped


def by_seed(runs: Runs, metric: Metric) -> dict[str, float]:
    """The last score of each run that has one: that after training, or of a failed run its last
    before it failed.
    """
    values = {str(run["seed"]): evaluated(run, metric, -1) for run in runs}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def gains(runs: Runs, metric: Metric) -> dict[str, float]:
    """The last score minus that before training."""
    before = {str(run["seed"]): evaluated(run, metric, 0) for run in runs}
    return {seed: value - before[seed] for seed, value in by_seed(runs, metric).items()}


def course(run: Record, x: Metric, y: Metric) -> list[Point]:
    """(x, y) of a run's evaluations, from the base model on."""
    pairs = [tuple(mean_of(row, metric) for metric in (x, y)) for row in run["evaluations"]]
    return [(a, b) for a, b in pairs if not math.isnan(a + b)]


def value_at(points: Sequence[Point], target: float, power: float = 1.0) -> float:
    """The value at which a course of (value, reward) first reaches the target; else NaN.

    Between evaluations value ** power is linear in the reward: a small move by d gains d and costs
    d^2 in KL, whose power is therefore 1/2.
    """
    for (value, reward), (next_value, next_reward) in pairwise(points):
        if reward < target <= next_reward:
            low, high = (
                own if power == 1 else max(own, 0.0) ** power for own in (value, next_value)
            )
            return (low + (high - low) * (target - reward) / (next_reward - reward)) ** (1 / power)
    return math.nan


def pairs_at_equal(
    ours: Runs, theirs: Runs, reward: Metric, value: Metric, power: float
) -> list[Point]:
    """Our value and theirs at equal reward, a pair for each shared seed.

    A pair is compared at the smaller of its two final rewards, which both runs passed. One in which
    a run ended at or below the base model has no such reward and is left out.
    """
    courses = [{run["seed"]: course(run, value, reward) for run in runs} for runs in (ours, theirs)]
    found = []
    for seed, own in courses[0].items():
        pair = (own, courses[1].get(seed, []))
        if all(pair):
            target = min(points[-1][1] for points in pair)
            a, b = (value_at(points, target, power) for points in pair)
            found.append((a, b))
    return [pair for pair in found if not math.isnan(sum(pair))]


def kl_ratio_at_equal(ours: Runs, theirs: Runs, reward: Metric, kl: Metric) -> Estimate:
    """Our KL to the reference over theirs at equal reward: the geometric mean over shared seeds,
    `count` of them.
    """
    pairs = pairs_at_equal(ours, theirs, reward, kl, power=0.5)
    found = mean([math.log(a / b) for a, b in pairs if min(a, b) > 0])
    return Estimate(
        math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count, is_paired=True
    )


def difference_at_equal(ours: Runs, theirs: Runs, reward: Metric, value: Metric) -> Estimate:
    """Our value minus theirs at equal reward, over shared seeds."""
    return mean([a - b for a, b in pairs_at_equal(ours, theirs, reward, value, power=1.0)])


def compare(ours: Runs, theirs: Runs, reward: Metric) -> dict[str, Estimate]:
    """At equal budget: difference and ratio of rewards, ratio of gains over the base model."""
    scores = by_seed(ours, reward), by_seed(theirs, reward)
    return {
        "difference": difference(*scores),
        "ratio": ratio(*scores),
        "ratio of gains": ratio(gains(ours, reward), gains(theirs, reward)),
    }


def interaction(ours: Sequence[Runs], theirs: Sequence[Runs], metric: Metric) -> Estimate:
    """What a change does to us minus what it does to them, by shared seeds; each is (with, without)
    the change.
    """
    effects = []
    for changed, plain in (ours, theirs):
        before = by_seed(plain, metric)
        effects.append(
            {
                seed: value - before[seed]
                for seed, value in by_seed(changed, metric).items()
                if seed in before
            }
        )
    return difference(*effects)

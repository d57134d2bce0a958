"""What the runs of a study say: scores by seed, and how two conditions compare at equal budget and at equal reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from flowrl.report.statistics import Estimate, difference, mean, ratio
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
    """The score after training of each run that has one."""
    values = {str(run["seed"]): evaluated(run, metric, -1) for run in runs}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def gains(runs: Runs, metric: Metric) -> dict[str, float]:
    """The score after training minus that before."""
    before = {str(run["seed"]): evaluated(run, metric, 0) for run in runs}
    return {seed: value - before[seed] for seed, value in by_seed(runs, metric).items()}


def course(run: Record, x: Metric, y: Metric) -> list[Point]:
    """(x, y) of a run's evaluations, from the base model on."""
    pairs = [tuple(mean_of(row, metric) for metric in (x, y)) for row in run["evaluations"]]
    return [(a, b) for a, b in pairs if not math.isnan(a + b)]


def cost_at(points: Sequence[Point], target: float) -> float:
    """The cost at which a course of (cost, reward) first reaches the target, linear between evaluations; else NaN."""
    for (cost, reward), (next_cost, next_reward) in pairwise(points):
        if reward < target <= next_reward:
            return cost + (next_cost - cost) * (target - reward) / (next_reward - reward)
    return math.nan


def equal_reward_ratio(ours: Runs, theirs: Runs, reward: Metric, kl: Metric) -> Estimate:
    """Our KL to the reference over theirs at equal reward: the geometric mean over shared seeds.

    The reward at which a pair is compared is the highest that both of its runs reached in any evaluation. A pair in
    which one run never rose above the base model has no such reward and is left out; `count` tells how many are in.
    """
    courses = [{run["seed"]: course(run, kl, reward) for run in runs} for runs in (ours, theirs)]
    logs = []
    for seed, ours_points in courses[0].items():
        pair = (ours_points, courses[1].get(seed, []))
        if not all(pair):
            continue
        target = min(max(value for _, value in points) for points in pair)
        costs = [cost_at(points, target) for points in pair]
        if all(cost > 0 for cost in costs):
            logs.append(math.log(costs[0] / costs[1]))
    found = mean(logs)
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count, is_paired=True)


def compare(ours: Runs, theirs: Runs, reward: Metric, kl: Metric) -> dict[str, Estimate]:
    """The four comparisons of a claim: difference and ratio of rewards, ratio of gains, ratio of KL at equal reward."""
    scores = by_seed(ours, reward), by_seed(theirs, reward)
    return {
        "difference": difference(*scores),
        "ratio": ratio(*scores),
        "ratio of gains": ratio(gains(ours, reward), gains(theirs, reward)),
        "KL ratio at equal reward": equal_reward_ratio(ours, theirs, reward, kl),
    }

"""Runs at an equal number of images or of seconds, and what they spent to reach a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

from flowrl.report.charts import Point
from flowrl.statistics import Estimate, geometric_mean
from flowrl.studies.analysis import Groups, Runs, value_at
from flowrl.studies.record import Metric, Record, mean_of

UNITS = ("images", "seconds")
"""What a budget may be counted in: images drawn for training, candidates of scouting among them; or
seconds of training without evaluations, from the median speed of a condition's iterations or of its
method's in a stage of its own, which neither the first one's warm-up nor a busy moment moves.
"""


def seconds_of_an_image(runs: Runs) -> float:
    """Return the training time of an image: by the median run, the median iteration; NaN where no
    run tells its speed.
    """
    speeds = [run["images_per_second"] for run in runs if run["images_per_second"]]
    return 1 / median(speeds) if speeds else math.nan


def paced(runs: Runs, stages: Sequence[str]) -> list[Record]:
    """Return the runs at the speed that their method has in `stages`, where it has a run there:
    short runs that were made side by side while nothing else ran.
    """
    speeds = {run["method"]: run["images_per_second"] for run in runs if run["stage"] in stages}
    own = "images_per_second"
    return [{**run, own: speeds.get(run["method"], run[own])} for run in runs]


def spent(run: Record, image_costs: float) -> list[float]:
    """Return what a run had spent by each of its evaluations.

    `image_costs` is what an image costs: 1 counts images, its seconds count seconds.
    """
    # A run that failed in its first iteration has finished none.
    images = run["images"] / max(run["iterations"], 1)
    return [row["iteration"] * images * image_costs for row in run["evaluations"]]


def at_budget(runs: Runs, unit: str, amount: float) -> list[Record]:
    """Return the runs as if each had ended after `amount` of a unit.

    Between two evaluations every metric is interpolated by a line. Runs that ended earlier are left
    out, but for those that failed, whose last scores are theirs.
    """
    image_seconds = seconds_of_an_image(runs)
    image_costs = image_seconds if unit == "seconds" else 1.0
    ended = []
    for run in runs:
        rows = _rows_at(run, spent(run, image_costs), amount)
        if rows:
            images = amount / image_costs
            budget = {"images": images, "seconds": images * image_seconds}
            ended.append({**run, **budget, "evaluations": rows})
        elif run["status"] == "failed":
            ended.append(run)
    return ended


def _rows_at(run: Record, costs: Sequence[float], amount: float) -> list[Mapping[str, float]]:
    """Return a run's evaluations up to an amount, the last one exactly there; none where it ended
    before.
    """
    rows = run["evaluations"]
    for i, (low, high) in enumerate(pairwise(costs)):
        if low < amount <= high:
            share = (amount - low) / (high - low)
            return [*rows[: i + 1], _between(rows[i], rows[i + 1], share)]
    return []


def _between(
    row: Mapping[str, float], following: Mapping[str, float], share: float
) -> dict[str, float]:
    """Return the metrics that both of two evaluations have, at a share of the way between them."""
    both = row.keys() & following.keys()
    return {name: row[name] + share * (following[name] - row[name]) for name in sorted(both)}


def groups_at(groups: Groups, unit: str, amount: float) -> dict[str, list[Record]]:
    """Return each condition's runs as if they had ended after `amount` of a unit; conditions none
    of whose runs went so far are left out.
    """
    ended = {label: at_budget(runs, unit, amount) for label, runs in groups.items()}
    return {label: runs for label, runs in ended.items() if runs}


def costs_of(runs: Runs, unit: str, metric: Metric, score: float) -> dict[str, float]:
    """Return by seed what each run spent until the metric first reached `score`, on the line
    between evaluations; infinity where it never did.
    """
    image_costs = seconds_of_an_image(runs) if unit == "seconds" else 1.0
    costs = {}
    for run in runs:
        scores = [mean_of(row, metric) for row in run["evaluations"]]
        course: list[Point] = list(zip(spent(run, image_costs), scores, strict=True))
        cost = value_at(course, score)
        costs[str(run["seed"])] = math.inf if math.isnan(cost) else cost
    return costs


def cost_ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Estimate:
    """Return our cost of a score over theirs: the geometric mean over the seeds that both have and
    that reached it on both sides, `count` of them.
    """
    ratios: list[float] = []
    for seed, cost in ours.items():
        other = theirs.get(seed, math.inf)
        if math.isfinite(cost) and math.isfinite(other) and other > 0:
            ratios.append(cost / other)
    return geometric_mean(ratios)

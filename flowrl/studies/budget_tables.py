"""Tables of what a score costs, in images and in seconds, from a study's record alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from flowrl.report.tables import Cell, Table
from flowrl.studies.analysis import Groups
from flowrl.studies.budget import UNITS, cost_ratio, costs_of
from flowrl.studies.plan import Section


def scores_table(groups: Groups, report: Section) -> Table:
    """Make a table with one row a condition: how many runs reached each score, and the images and
    seconds that the median run spent on it, with those of the fastest and the slowest.

    `report["scores"]` maps metrics, by their names in `metrics`, to the scores that are asked for.
    """
    rows: list[list[Cell]] = []
    heads: list[str] = []
    for name, score in _asked_scores(report):
        heads += [f"{name} {score}, {what}" for what in ("runs", *UNITS)]
    for label, runs in groups.items():
        row: list[Cell] = [label]
        for name, score in _asked_scores(report):
            metric = report["metrics"][name]
            costs = [list(costs_of(runs, unit, metric, score).values()) for unit in UNITS]
            reached = sum(map(math.isfinite, costs[0]))
            row += [f"{reached} of {len(runs)}", *map(_spread, costs)]
        rows.append(row)
    note = (
        "Spent until an evaluation first reached the score, on the line from the one before: the "
        "median run [the first, the last]; `-` where it did not within its length. Seconds are of "
        "training alone, by the median iteration."
    )
    return Table("scores", "To a score", note, ("condition", *heads), rows)


def _asked_scores(report: Section) -> list[tuple[str, float]]:
    """Return (name of the metric, score) for every score that a report asks for."""
    return [(name, score) for name, scores in report["scores"].items() for score in scores]


def _spread(costs: Sequence[float]) -> str:
    """Write the median of costs, with the smallest and the largest; infinite ones as `-`."""
    middle, low, high = median(costs), min(costs), max(costs)
    texts = [f"{cost:,.0f}" if math.isfinite(cost) else "-" for cost in (middle, low, high)]
    if math.isinf(low):
        return "-"
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def cost_ratio_table(groups: Groups, pairs: Sequence[Sequence[str]], report: Section) -> Table:
    """Make a table with one row a claim: what a condition spent on each score, over another's."""
    rows: list[list[Cell]] = []
    heads: list[str] = []
    for name, score in _asked_scores(report):
        heads += [f"{name} {score}, {unit}" for unit in UNITS]
    for ours, theirs in pairs:
        row: list[Cell] = [f"{ours} against {theirs}"]
        for name, score in _asked_scores(report):
            metric = report["metrics"][name]
            for unit in UNITS:
                our_costs = costs_of(groups[ours], unit, metric, score)
                their_costs = costs_of(groups[theirs], unit, metric, score)
                estimate = cost_ratio(our_costs, their_costs)
                row.append(f"{estimate.text()} ({estimate.count})")
        rows.append(row)
    note = (
        "Images or seconds that the first spent on the score, over those of the second: geometric "
        "means of pairs that share a seed, with 95 % intervals, and in brackets how many there are "
        "in which both reached it."
    )
    return Table("cost_ratios", "What a score costs", note, ("comparison", *heads), rows)

"""Tuning: the variant of each method that a study's first stage chooses, by a rule fixed before any
run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.errors import UserError
from flowrl.statistics import average
from flowrl.studies.plan import Planned, Stage
from flowrl.studies.record import Record, evaluated


def choose(
    stage: Stage, runs: Sequence[Planned], records: Mapping[Planned, Record]
) -> dict[str, dict[str, Any]]:
    """Choose for each method the variant of the highest mean final score over the stage's seeds,
    its overrides and score.

    A variant with a failed run is out; of equals the first listed is taken. Raises UserError while
    runs are missing, or where every variant of a method failed.
    """
    # A choice among the variants that happen to be over would favour those that run first.
    if any(run not in records for run in runs):
        raise UserError(f"stage {stage.name} is not over: nothing is chosen yet")
    chosen = {}
    for method, variants in stage.variants.items():
        usable = {}
        for variant in variants:
            mean_score = score(stage, runs, records, method, variant)
            if not math.isnan(mean_score):
                usable[variant] = mean_score
        if not usable:
            raise UserError(f"stage {stage.name}: every variant of {method} failed; widen its grid")
        # `max` returns the first of equals, and the variants stand in the order of the grid.
        best = max(usable, key=usable.__getitem__)
        chosen[method] = {
            "variant": best,
            "overrides": list(variants[best]),
            "score": usable[best],
        }
    return chosen


def score(
    stage: Stage,
    runs: Sequence[Planned],
    records: Mapping[Planned, Record],
    method: str,
    variant: str,
) -> float:
    """Return the mean over seeds of a variant's final score, NaN where one of its runs failed or
    has none.

    The score is the metric by which the stage chooses; `runs` must all have a record.
    """
    tried = []
    for run in runs:
        if run.method == method and run.variant == variant:
            tried.append(records[run])
    if any(record["status"] == "failed" for record in tried):
        return math.nan
    return average([evaluated(record, stage.chooses, -1) for record in tried])

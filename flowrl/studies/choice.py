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
    if any(run not in records for run in runs):
        raise UserError(f"stage {stage.name} is not over: nothing is chosen yet")
    chosen = {}
    for method, variants in stage.variants.items():
        scores = {variant: score(stage, runs, records, method, variant) for variant in variants}
        usable = {variant: value for variant, value in scores.items() if not math.isnan(value)}
        if not usable:
            raise UserError(f"stage {stage.name}: every variant of {method} failed; widen its grid")
        best = max(usable, key=usable.__getitem__)
        chosen[method] = {"variant": best, "overrides": list(variants[best]), "score": usable[best]}
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
    """
    tried = [records[run] for run in runs if (run.method, run.variant) == (method, variant)]
    if any(record["status"] == "failed" for record in tried):
        return math.nan
    return average([evaluated(record, stage.chooses, -1) for record in tried])

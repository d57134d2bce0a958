"""What a study keeps of a finished run, and `results.json`, the file of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowrl.report.runs import Run, read
from flowrl.runs.files import CONFIG, read_object, write_whole
from flowrl.studies.plan import Planned

Record = dict[str, Any]
Metric = str | Sequence[str]
"""A metric by its name in metrics.csv, or several whose mean is meant."""

DIVERGED = "NotFinite"
"""The error of a run whose gradients became infinite or NaN: a result too. Other failures are
accidents, run again.
"""

TRAINING = (
    "reward/mean",
    "trust/kl_old",
    "trust/masked_fraction",
    "trust/clip_false_alarms",
    "trust/clip_misses",
    "trust/log_ratio_noise",
    "trust/log_ratio_signal",
)
STEP_KL = "trust/kl_old/"
"""Kept of training, besides evaluations; and the KL of each step, whose metrics begin with the
latter.
"""
POINTS = 20
"""So many values of each at most: means over equal stretches of the run."""
DIGITS = 6


def from_folder(planned: Planned, folder: Path) -> Record | None:
    """The record of a run in `folder`, None while it is not over."""
    if not all((folder / name).is_file() for name in (CONFIG, "summary.json")):
        return None
    run = read(folder, folder.name)
    is_result = run.status == "finished" or (
        run.status == "failed" and run.summary.get("error") == DIVERGED
    )
    return record(planned, run) if is_result else None


def record(planned: Planned, run: Run) -> Record:
    """What is kept of a run: all its evaluations, the course of `TRAINING`, and where and how it
    ran.
    """
    curves = {name: dict(run.curve(name)) for name in run.metrics if name.startswith("eval/")}
    iterations = sorted({iteration for curve in curves.values() for iteration in curve})
    evaluations = [
        {"iteration": int(iteration)}
        | {name: _rounded(curve[iteration]) for name, curve in curves.items() if iteration in curve}
        for iteration in iterations
    ]
    kept = ("status", "iterations", "images", "seconds", "images_per_second", "peak_memory_gib")
    summary = {name: run.summary.get(name) for name in kept}
    return {
        "stage": planned.stage,
        "method": planned.method,
        "variant": planned.variant,
        "seed": planned.seed,
        "overrides": list(planned.overrides),
        **summary,
        "commit": run.summary.get("git_revision"),
        "device": run.summary.get("device"),
        "versions": run.summary.get("versions"),
        "evaluations": evaluations,
        "training": {
            name: thinned([row[name] for row in run.rows if name in row])
            for name in run.metrics
            if name in TRAINING or name.startswith(STEP_KL)
        },
    }


def thinned(values: Sequence[float]) -> list[float]:
    """Means over at most `POINTS` equal stretches."""
    count = min(POINTS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [_rounded(sum(values[a:b]) / (b - a)) for a, b in pairwise(edges)]


def _rounded(value: float) -> float:
    return float(format(value, f".{DIGITS}g"))


def evaluated(record: Mapping[str, Any], metric: Metric, index: int) -> float:
    """A metric of a run's evaluation, by its number; NaN without one.

    -1 is the last: that after training, or of a run that failed the last before it did, be it the
    base model's.
    """
    if index == -1 and record["status"] == "finished" and len(record["evaluations"]) < 2:
        return math.nan
    return mean_of(record["evaluations"][index] if record["evaluations"] else {}, metric)


def mean_of(row: Mapping[str, float], metric: Metric) -> float:
    """A metric of one evaluation; NaN where it, or one of several, is missing."""
    values = [row.get(name, math.nan) for name in ([metric] if isinstance(metric, str) else metric)]
    return sum(values) / len(values)


def write(path: Path, results: Mapping[str, Any]) -> None:
    """results.json, one line a run, whole or not at all."""
    head = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results.items() if key != "runs"
    ]
    runs = ",\n  ".join(json.dumps(run) for run in results["runs"])
    body = ",\n ".join([*head, f'"runs": [\n  {runs}\n ]' if runs else '"runs": []'])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{{\n {body}\n}}\n")


def load(path: Path) -> dict[str, Any]:
    """results.json; without the file a study that has no run."""
    return read_object(path, "restore it from the repository") if path.is_file() else {"runs": []}

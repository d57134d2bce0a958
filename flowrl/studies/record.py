"""The record that a study keeps of a finished run, and `results.json`, the file of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowrl.report.runs import Run, read
from flowrl.runs.files import CONFIG, read_object, write_whole
from flowrl.statistics import average
from flowrl.studies.plan import Planned

Record = dict[str, Any]
Metric = str | Sequence[str]
"""A metric by its name in metrics.csv, or several whose mean is meant. `NAME | OTHER` is the first
of them that an evaluation has: with another reward a score may have another name.
"""
OR = " | "
HIGHEST = "highest of "
"""Before a metric's name: its highest value among a run's evaluations, wherever in the course."""
Metrics = Mapping[str, Metric]
"""Metrics by the names that tables and figures show."""
Results = Mapping[str, Any]
"""The content of results.json: `runs`, and what the study has `tuned` or computed without them."""
Simulation = Mapping[str, Any]
"""The entry `simulation` of results.json, as the study of the ratio's noise computes it."""

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
)
STEP_KL = "trust/kl_old/"
"""The course of these metrics is kept of training, and of the KL of each step, whose metrics begin
with the latter.
"""
POINTS = 20
"""A course has so many values at most: means over equal stretches of the run."""
DIGITS = 6


def from_folder(planned: Planned, folder: Path) -> Record | None:
    """Read the record of a run in `folder`, None while it is not over.

    A run that failed by accident is not over either: it is run again.
    """
    has_config = (folder / CONFIG).is_file()
    has_summary = (folder / "summary.json").is_file()
    if not (has_config and has_summary):
        return None
    run = read(folder, folder.name)
    has_diverged = run.status == "failed" and run.summary.get("error") == DIVERGED
    if run.status == "finished" or has_diverged:
        return record(planned, run)
    return None


def record(planned: Planned, run: Run) -> Record:
    """Keep of a run all its evaluations, the course of `TRAINING`, and where and how it ran."""
    names = ("status", "iterations", "images", "seconds", "images_per_second", "peak_memory_gib")
    outcome = {name: run.summary.get(name) for name in names}
    return {
        "stage": planned.stage,
        "method": planned.method,
        "variant": planned.variant,
        "seed": planned.seed,
        "overrides": list(planned.overrides),
        **outcome,
        "commit": run.summary.get("git_revision"),
        "device": run.summary.get("device"),
        "versions": run.summary.get("versions"),
        "evaluations": _evaluations(run),
        "training": _training(run),
    }


def _evaluations(run: Run) -> list[dict[str, float]]:
    """Return the metrics of each evaluation, the iteration first."""
    rows: dict[float, dict[str, float]] = {}
    for name in run.metrics:
        if not name.startswith("eval/"):
            continue
        for iteration, value in run.curve(name):
            row = rows.setdefault(iteration, {"iteration": int(iteration)})
            row[name] = _rounded(value)
    return [rows[iteration] for iteration in sorted(rows)]


def _training(run: Run) -> dict[str, list[float]]:
    """Return the course of each metric that is kept of training."""
    courses = {}
    for name in run.metrics:
        if name in TRAINING or name.startswith(STEP_KL):
            values = [row[name] for row in run.rows if name in row]
            courses[name] = thinned(values)
    return courses


def thinned(values: Sequence[float]) -> list[float]:
    """Return the means over at most `POINTS` equal stretches, rounded; of fewer values each."""
    count = min(POINTS, len(values))
    if count == 0:
        return []
    # Stretches differ by one value at most where their number does not divide the values.
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = []
    for start, end in pairwise(edges):
        means.append(_rounded(average(values[start:end])))
    return means


def _rounded(value: float) -> float:
    """Return a number to `DIGITS` significant digits, which keep a record readable in a diff."""
    return float(format(value, f".{DIGITS}g"))


def evaluated(record: Mapping[str, Any], metric: Metric, index: int) -> float:
    """Return a metric of a run's evaluation, by its number; NaN without one.

    Number -1 is the last one: that after training, or of a run that failed the last before it did,
    be it the base model's. Of a metric that begins with `HIGHEST` it is the highest of all after
    the first.
    """
    evaluations = record["evaluations"]
    # The only evaluation of a finished run is the base model's, not one after training.
    if index == -1 and record["status"] == "finished" and len(evaluations) < 2:
        return math.nan
    if index == -1 and isinstance(metric, str) and metric.startswith(HIGHEST):
        return _highest(evaluations, metric)
    row = evaluations[index] if evaluations else {}
    return mean_of(row, metric)


def _highest(evaluations: Sequence[Mapping[str, float]], metric: str) -> float:
    """Return the highest value after that before training; NaN where there is none."""
    scores = [mean_of(row, metric) for row in evaluations[1:]]
    return max((score for score in scores if not math.isnan(score)), default=math.nan)


def mean_of(row: Mapping[str, float], metric: Metric) -> float:
    """Return a metric of one evaluation; NaN where it, or one of several, is missing."""
    return average([_first_of(row, alternatives) for alternatives in names_of(metric)])


def names_of(metric: Metric) -> list[list[str]]:
    """Return the names of each of the metrics whose mean is meant: several where an evaluation may
    have one or another.
    """
    texts = [metric.removeprefix(HIGHEST)] if isinstance(metric, str) else metric
    return [text.split(OR) for text in texts]


def _first_of(row: Mapping[str, float], names: Sequence[str]) -> float:
    """Return the first of some metrics that an evaluation has, NaN where it has none."""
    return next((row[name] for name in names if name in row), math.nan)


def write(path: Path, results: Results) -> None:
    """Write results.json, one line a run, so that a diff shows the runs that came; whole or not at
    all.
    """
    entries = []
    for key, value in results.items():
        if key != "runs":
            entries.append(f"{json.dumps(key)}: {json.dumps(value)}")
    runs = ",\n  ".join(json.dumps(run) for run in results["runs"])
    entries.append(f'"runs": [\n  {runs}\n ]' if runs else '"runs": []')
    body = ",\n ".join(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{{\n {body}\n}}\n")


def load(path: Path) -> dict[str, Any]:
    """Read results.json; without the file a study has no run.

    Raises UserError for a damaged one.
    """
    if not path.is_file():
        return {"runs": []}
    return read_object(path, "restore it from the repository")

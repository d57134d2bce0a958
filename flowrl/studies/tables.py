"""The tables of a study's README, from its record alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.report.tables import Cell, Table
from flowrl.statistics import average, difference, mean
from flowrl.studies.analysis import (
    Runs,
    by_seed,
    compare,
    conditions,
    difference_at_equal,
    interaction,
    kl_ratio_at_equal,
)
from flowrl.studies.plan import Study
from flowrl.studies.record import Record, evaluated

BASE = "base model"


def tables(study: Study, results: Mapping[str, Any]) -> list[Table]:
    """Make all tables that the record gives: conditions, comparisons, and what was tuned."""
    runs = results["runs"]
    report = study.report
    groups = conditions(runs, report["stages"])
    made = [main_table(groups, report["metrics"])] if groups else []
    if pairs := [pair for pair in report.get("compare", ()) if groups.keys() >= set(pair)]:
        made.append(comparison_table(groups, pairs, report))
    if report.get("interactions"):
        made.append(interaction_table(groups, report))
    if groups and report.get("training"):
        made.append(course_table(groups, report["training"]))
    if results.get("tuned"):
        made += [chosen_table(results["tuned"], study), tuning_table(study, results)]
    return made


def main_table(groups: Mapping[str, Runs], metrics: Mapping[str, Any]) -> Table:
    """Make a table with one row a condition: means of the evaluation after training; above those it
    holds for, the one before.
    """
    rows: list[list[Cell]] = []
    base: list[float] = []
    for label, runs in groups.items():
        before = [evaluated(runs[0], metric, 0) for metric in metrics.values()]
        if not base or not all(map(same_score, before, base)):
            rows.append([f"{BASE}, {runs[0]['variant']}" if base else BASE, "", *before, "", ""])
            base = before
        rows.append(_main_row(label, runs, metrics))
    note = (
        "Means over seeds with 95 % intervals, after training; the base model's values are from "
        "before. How to read "
        "them stands in `experiments/README.md`."
    )
    columns = ("condition", "seeds", *metrics, "images", "seconds")
    return Table("main", "After training", note, columns, rows)


def _main_row(label: str, runs: Runs, metrics: Mapping[str, Any]) -> list[Cell]:
    failed = sum(run["status"] == "failed" for run in runs)
    seeds = f"{len(runs)}, {failed} failed" if failed else f"{len(runs)}"
    values = [mean(list(by_seed(runs, metric).values())) for metric in metrics.values()]
    images = average([run["images"] for run in runs])
    seconds = average([run["seconds"] for run in runs])
    return [label, seeds, *values, f"{images:,.0f}", f"{seconds:.0f}"]


def same_score(one: float, other: float) -> bool:
    """Tell whether two scores of one model are equal but for rounding, or both not measured."""
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3) or (
        math.isnan(one) and math.isnan(other)
    )


def comparison_table(
    groups: Mapping[str, Runs], pairs: Sequence[Sequence[str]], report: Mapping[str, Any]
) -> Table:
    """Make a table with one row a claim: a condition against another."""
    rows: list[list[Cell]] = []
    for ours, theirs in pairs:
        pair = groups[ours], groups[theirs]
        cells = at_equal_budget(*pair, report) | at_equal_reward(*pair, report)
        rows.append([f"{ours} against {theirs}", *cells.values()])
    note = (
        "Over shared seeds as pairs, with 95 % intervals. Ratios of gains are those over the base "
        "model, `-` where a "
        "gain is not positive. At equal reward: in brackets how many pairs have one; a KL ratio "
        "below 1 says that the "
        "first of the two drifts less. How both are found stands in `experiments/README.md`."
    )
    return Table("comparisons", "Comparisons", note, ("comparison", *cells), rows)


def at_equal_budget(ours: Runs, theirs: Runs, report: Mapping[str, Any]) -> dict[str, str]:
    """Return how two conditions compare after training: in rewards, and in what else is asked."""
    metrics = report["metrics"]
    cells = {}
    for name in report["rewards"]:
        for kind, estimate in compare(ours, theirs, metrics[name]).items():
            if kind == "difference" or name in report.get("ratios", ()):
                cells[f"{name}, {kind}"] = estimate.text(sign=kind == "difference")
    for name in report.get("differences", ()):
        gap = difference(by_seed(ours, metrics[name]), by_seed(theirs, metrics[name]))
        cells[f"{name}, difference"] = gap.text(sign=True)
    return cells


def at_equal_reward(ours: Runs, theirs: Runs, report: Mapping[str, Any]) -> dict[str, str]:
    """Return what two conditions cost at equal reward: KL as a ratio, all else as a difference."""
    metrics = report["metrics"]
    cells = {}
    for asked in report["equal"]:
        reward = asked["at"]
        name = asked["of"]
        is_kl = name == report["kl"]
        cost = kl_ratio_at_equal if is_kl else difference_at_equal
        estimate = cost(ours, theirs, metrics[reward], metrics[name])
        kind = "ratio" if is_kl else "difference"
        label = f"{name}, {kind} at equal {reward}"
        cells[label] = f"{estimate.text(sign=not is_kl)} ({estimate.count})"
    return cells


def interaction_table(groups: Mapping[str, Runs], report: Mapping[str, Any]) -> Table:
    """Make a table with one row a method: what a change does to ours minus what it does to that
    one.
    """
    rows: list[list[Cell]] = []
    names = [report["rewards"][0], *report.get("differences", ())]
    for asked in report["interactions"]:
        for ours, theirs in sides(asked):
            if not groups.keys() >= {*ours, *theirs}:
                continue
            row: list[Cell] = [f"{' for '.join(ours)} against {' for '.join(theirs)}"]
            our_runs = [groups[label] for label in ours]
            their_runs = [groups[label] for label in theirs]
            for name in names:
                effect = interaction(our_runs, their_runs, report["metrics"][name])
                row.append(effect.text(sign=True))
            rows.append(row)
    note = (
        "The change's effect on the first method minus its effect on the second, over shared seeds."
    )
    return Table(
        "interactions", "Does the change suit one better?", note, ("comparison", *names), rows
    )


def sides(asked: Mapping[str, Any]) -> list[tuple[list[str], list[str]]]:
    """Return the conditions of each comparison of changes: (with, without) of ours, and of theirs.

    What ours is held `against` is a method with the same change, or one with another of its own.
    """
    pairs = []
    for other in asked["against"]:
        if not isinstance(other, dict):
            other = {"of": other, "change": asked["change"]}
        pairs.append((_changed(asked), _changed(other)))
    return pairs


def _changed(side: Mapping[str, Any]) -> list[str]:
    """Return a method's conditions with a change and without it."""
    return [f"{side['of']} {variant}" for variant in side["change"]]


def course_table(groups: Mapping[str, Runs], names: Mapping[str, str]) -> Table:
    """Make a table with one row a condition: what training logged, in its first quarter, its middle
    half and its last quarter.
    """
    rows: list[list[Cell]] = []
    for label, runs in groups.items():
        cells: list[Cell] = []
        for metric in names.values():
            means = [quarters(run["training"].get(metric, ())) for run in runs]
            cells += [mean(over_runs) for over_runs in zip(*means, strict=True)]
        rows.append([label, *cells])
    stretches = ("first quarter", "middle", "last quarter")
    columns = [f"{name}, {stretch}" for name in names for stretch in stretches]
    note = "Means over the iterations of each part, all steps and updates, and over seeds."
    return Table("course", "In training", note, ("condition", *columns), rows)


def quarters(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the means of the first quarter, the middle half and the last quarter of a course; NaN
    where it is too short for quarters.
    """
    quarter = len(values) // 4
    if quarter == 0:
        return math.nan, math.nan, math.nan
    last = len(values) - quarter
    return average(values[:quarter]), average(values[quarter:last]), average(values[last:])


def chosen_table(tuned: Mapping[str, Mapping[str, Any]], study: Study) -> Table:
    """Make a table of what the tuning stage chose for each method."""
    stage = next(stage for stage in study.stages if stage.chooses)
    rows: list[list[Cell]] = []
    for method, choice in tuned.items():
        variant = choice["variant"]
        at_edge = edges(variant, list(stage.variants[method]))
        rows.append([method, variant, choice["score"], at_edge])
    note = (
        f"By mean {stage.chooses} after training, over seeds {', '.join(map(str, stage.seeds))}, "
        "unused elsewhere."
    )
    columns = ("method", "chosen", "score", "at the edge of its grid")
    return Table("chosen", "Tuned", note, columns, rows)


def edges(variant: str, variants: Sequence[str]) -> str:
    """Return the keys of a variant whose value is the first or last of several in the grid: a wider
    one might do better.
    """
    words = list(dict.fromkeys(" ".join(variants).split()))
    keys = []
    for word in variant.split():
        key = word.split("=", 1)[0]
        values = [other for other in words if other.startswith(f"{key}=")]
        if len(values) > 1 and word in (values[0], values[-1]):
            keys.append(key)
    return ", ".join(keys) or "no"


def tuning_table(study: Study, results: Mapping[str, Any]) -> Table:
    """Make a table of every variant that was tried."""
    stage = next(stage for stage in study.stages if stage.chooses)
    groups = conditions(results["runs"], [stage.name])
    rows: list[list[Cell]] = []
    for method, variants in stage.variants.items():
        for variant in variants:
            runs = groups.get(f"{method} {variant}".strip(), [])
            score = math.nan
            if runs and all(run["status"] == "finished" for run in runs):
                score = average([evaluated(run, stage.chooses, -1) for run in runs])
            choice = results["tuned"].get(method, {})  # a method may be new
            is_chosen = choice.get("variant") == variant
            rows.append([method, variant, len(runs), score, "yes" if is_chosen else ""])
    columns = ("method", "variant", "seeds", stage.chooses, "chosen")
    note = "Mean over the tuning seeds; `-` where a run failed."
    return Table("tuning", "Tuning", note, columns, rows)


def status(study: Study, results: Mapping[str, Any]) -> str:
    """Tell how much of the study has been run, with what and where."""
    runs = results["runs"]
    if not runs and not results.get("simulation"):
        stages = ", ".join(f"{stage.name} {stage.num_runs}" for stage in study.stages)
        return (
            f"**Not run yet.** Planned: {study.num_runs} runs ({stages}), about {study.hours:.1f} "
            "hours on two cores."
        )
    failed = sum(run["status"] == "failed" for run in runs)
    lines = [
        f"{len(runs)} of {study.num_runs} runs, {failed} of them failed; {_hours(runs)} hours of "
        "single runs."
    ]
    if len(runs) < study.num_runs:
        lines.insert(0, "**Incomplete:** what follows is of the runs that are there.")
    for name, key in (("Commit", "commit"), ("Device", "device")):
        values = _counted([str(run[key])[:60] for run in runs])
        lines.append(f"{name}: {', '.join(values)}.")
    lines += [f"Packages: {value}." for value in _counted([_versions(run) for run in runs])]
    return "  \n".join(lines)


def _counted(values: Sequence[str]) -> list[str]:
    """Return the different values, the most common one first, each with how often it occurs."""
    return [f"{value} ({count})" for value, count in Counter(values).most_common()]


def _versions(run: Record) -> str:
    versions = run["versions"] or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _hours(runs: Runs) -> str:
    return f"{sum(run['seconds'] or 0 for run in runs) / 3600:.2f}"


def cells(study: str, table: Table) -> dict[str, str]:
    """Return each cell by `<study>/<table>/<row>/<column>`, so that a sentence can quote it."""
    return {
        f"{study}/{table.stem}/{row[0]}/{column}": table.text(cell)
        for row in table.rows
        for column, cell in zip(table.columns[1:], row[1:], strict=True)
    }

"""The tables of a study's README, from its record alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flowrl.report.tables import Cell, Table
from flowrl.statistics import average, difference, mean
from flowrl.studies.analysis import (
    Groups,
    Runs,
    by_seed,
    compare,
    conditions,
    difference_at_equal,
    interaction,
    kl_ratio_at_equal,
)
from flowrl.studies.budget import groups_at, paced
from flowrl.studies.budget_tables import cost_ratio_table, scores_table
from flowrl.studies.plan import Section, Study
from flowrl.studies.record import Metrics, Record, Results, evaluated

BASE = "base model"


def tables(study: Study, results: Results) -> list[Table]:
    """Make all tables that the record gives: conditions, comparisons, and what was tuned."""
    runs = results["runs"]
    report = study.report
    groups = conditions(paced(runs, report.get("pace", ())), report["stages"])
    made: list[Table] = []
    if groups:
        made += _result_tables(groups, report)
    if results.get("tuned"):
        made.append(chosen_table(results["tuned"], study))
        made.append(tuning_table(study, results))
    return made


def _result_tables(groups: Groups, report: Section) -> list[Table]:
    """Make the tables of the conditions that have runs, of which a study under way has some."""
    made = [main_table(groups, report["metrics"])]
    budgets = report.get("budgets", {})
    for unit, amount in budgets.items():
        made += _budget_tables(groups_at(groups, unit, amount), report, unit, amount)
    pairs = _with_runs(report.get("compare", ()), groups)
    # Where runs differ in length their ends are no equal budget.
    if pairs and not budgets:
        made.append(comparison_table(groups, pairs, report))
    if report.get("scores"):
        made.append(scores_table(groups, report))
    if ratios := _with_runs(report.get("cost_ratios", ()), groups):
        made.append(cost_ratio_table(groups, ratios, report))
    if report.get("interactions"):
        made.append(interaction_table(groups, report))
    if report.get("training"):
        made.append(course_table(groups, report["training"]))
    return made


def _with_runs(pairs: Sequence[Sequence[str]], groups: Groups) -> list[Sequence[str]]:
    """Return the comparisons both of whose sides have runs."""
    return [pair for pair in pairs if groups.keys() >= set(pair)]


def _budget_tables(groups: Groups, report: Section, unit: str, amount: float) -> list[Table]:
    """Make the tables of conditions and of comparisons at equal images or seconds; none where no
    run went so far.
    """
    if not groups:
        return []
    place = f"at {amount:,} {unit}"
    main = main_table(groups, report["metrics"])
    note = (
        f"Means over seeds with 95 % intervals {place} of training, interpolated between "
        "evaluations; of the runs that went so far."
    )
    title = place.capitalize()
    made = [replace(main, stem=f"at_{unit}", title=title, note=note)]
    if pairs := _with_runs(report.get("compare", ()), groups):
        table = comparison_table(groups, pairs, report)
        title = f"Comparisons {place}"
        made.append(replace(table, stem=f"comparisons_at_{unit}", title=title))
    return made


def main_table(groups: Groups, metrics: Metrics) -> Table:
    """Make a table with one row a condition: means of the evaluation after training; above those it
    holds for, the one before.

    `metrics` maps the names of the columns to the metrics that they show.
    """
    rows: list[list[Cell]] = []
    base: list[float] = []
    for label, runs in groups.items():
        # All runs evaluate the same base model, so one of them tells its scores. They differ where
        # a variant evaluates otherwise, and then the base model has a row more.
        first = runs[0]
        before = [evaluated(first, metric, 0) for metric in metrics.values()]
        if not base:
            rows.append([BASE, "", *before, "", ""])
            base = before
        elif not all(map(same_score, before, base)):
            rows.append([f"{BASE}, {first['variant']}", "", *before, "", ""])
            base = before
        rows.append(_main_row(label, runs, metrics))
    note = (
        "Means over seeds with 95 % intervals, after training; the base model's values are from "
        "before. How to read them stands in `experiments/README.md`."
    )
    columns = ("condition", "seeds", *metrics, "images", "seconds")
    return Table("main", "After training", note, columns, rows)


def _main_row(label: str, runs: Runs, metrics: Metrics) -> list[Cell]:
    """Return a condition's row: its runs, its metrics, and what a run of it took."""
    failed = sum(run["status"] == "failed" for run in runs)
    seeds = f"{len(runs)}"
    if failed:
        seeds += f", {failed} failed"
    values = []
    for metric in metrics.values():
        scores = by_seed(runs, metric)
        values.append(mean(list(scores.values())))
    images = average([run["images"] for run in runs])
    seconds = average([run["seconds"] for run in runs])
    return [label, seeds, *values, f"{images:,.0f}", f"{seconds:.0f}"]


def same_score(one: float, other: float) -> bool:
    """Tell whether two scores of one model are equal but for rounding, or both not measured."""
    if math.isnan(one) and math.isnan(other):
        return True
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)


def comparison_table(groups: Groups, pairs: Sequence[Sequence[str]], report: Section) -> Table:
    """Make a table with one row a claim: a condition against another.

    `pairs` are one or more, each two of the conditions that `groups` holds.
    """
    rows: list[list[Cell]] = []
    for ours, theirs in pairs:
        our_runs = groups[ours]
        their_runs = groups[theirs]
        budget_cells = at_equal_budget(our_runs, their_runs, report)
        reward_cells = at_equal_reward(our_runs, their_runs, report)
        cells = budget_cells | reward_cells
        rows.append([f"{ours} against {theirs}", *cells.values()])
    note = (
        "Over shared seeds as pairs, with 95 % intervals. Ratios of gains are those over the base "
        "model, `-` where a gain is not positive. At equal reward: in brackets how many pairs have "
        "one; a KL ratio below 1 says that the first of the two drifts less. How both are found "
        "stands in `experiments/README.md`."
    )
    # The columns depend on the report alone, so those of the last pair are those of all.
    columns = ("comparison", *cells)
    return Table("comparisons", "Comparisons", note, columns, rows)


def at_equal_budget(ours: Runs, theirs: Runs, report: Section) -> dict[str, str]:
    """Return how two conditions compare after training: in rewards, and in what else is asked.

    The keys are the heads of the columns, the values their texts.
    """
    metrics = report["metrics"]
    with_ratios = report.get("ratios", ())
    cells = {}
    for name in report["rewards"]:
        estimates = compare(ours, theirs, metrics[name])
        for kind, estimate in estimates.items():
            is_difference = kind == "difference"
            # Only a reward with a natural zero, such as a share of images, has meaningful ratios.
            if is_difference or name in with_ratios:
                cells[f"{name}, {kind}"] = estimate.text(sign=is_difference)
    for name in report.get("differences", ()):
        metric = metrics[name]
        gap = difference(by_seed(ours, metric), by_seed(theirs, metric))
        cells[f"{name}, difference"] = gap.text(sign=True)
    return cells


def at_equal_reward(ours: Runs, theirs: Runs, report: Section) -> dict[str, str]:
    """Return what two conditions cost at equal reward: KL as a ratio, all else as a difference.

    The keys are the heads of the columns; a value ends in the number of pairs that it is over.
    """
    metrics = report["metrics"]
    cells = {}
    for asked in report["equal"]:
        reward = asked["at"]
        name = asked["of"]
        if name == report["kl"]:
            kind = "ratio"
            estimate = kl_ratio_at_equal(ours, theirs, metrics[reward], metrics[name])
            text = estimate.text(sign=False)
        else:
            kind = "difference"
            estimate = difference_at_equal(ours, theirs, metrics[reward], metrics[name])
            text = estimate.text(sign=True)
        label = f"{name}, {kind} at equal {reward}"
        cells[label] = f"{text} ({estimate.count})"
    return cells


def interaction_table(groups: Groups, report: Section) -> Table:
    """Make a table with one row a method: what a change does to ours minus what it does to that
    one.
    """
    rows: list[list[Cell]] = []
    names = [report["rewards"][0], *report.get("differences", ())]
    for asked in report["interactions"]:
        for ours, theirs in sides(asked):
            # Some of the four conditions may have no run yet.
            if not groups.keys() >= {*ours, *theirs}:
                continue
            our_change = " for ".join(ours)
            their_change = " for ".join(theirs)
            row: list[Cell] = [f"{our_change} against {their_change}"]
            our_runs = [groups[label] for label in ours]
            their_runs = [groups[label] for label in theirs]
            for name in names:
                effect = interaction(our_runs, their_runs, report["metrics"][name])
                row.append(effect.text(sign=True))
            rows.append(row)
    note = (
        "The change's effect on the first method minus its effect on the second, over shared seeds."
    )
    title = "Does the change suit one better?"
    return Table("interactions", title, note, ("comparison", *names), rows)


def sides(asked: Section) -> list[tuple[list[str], list[str]]]:
    """Return the conditions of each comparison of changes: (with, without) of ours, and of theirs.

    What ours is held `against` is a method with the same change, or one with another of its own.
    """
    pairs = []
    for other in asked["against"]:
        if not isinstance(other, dict):
            other = {"of": other, "change": asked["change"]}
        pairs.append((_changed(asked), _changed(other)))
    return pairs


def _changed(side: Section) -> list[str]:
    """Return a method's conditions with a change and without it."""
    return [f"{side['of']} {variant}" for variant in side["change"]]


def course_table(groups: Groups, names: Mapping[str, str]) -> Table:
    """Make a table with one row a condition: what training logged, in its first quarter, its middle
    half and its last quarter.

    `names` maps the names of the columns to the metrics that they show.
    """
    rows: list[list[Cell]] = []
    for label, runs in groups.items():
        cells: list[Cell] = []
        for metric in names.values():
            courses = [run["training"].get(metric, ()) for run in runs]
            means = [quarters(values) for values in courses]
            # From three numbers a run to the numbers of all runs in each of the three stretches.
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
    seeds = ", ".join(map(str, stage.seeds))
    note = f"By mean {stage.chooses} after training, over seeds {seeds}, unused elsewhere."
    columns = ("method", "chosen", "score", "at the edge of its grid")
    return Table("chosen", "Tuned", note, columns, rows)


def edges(variant: str, variants: Sequence[str]) -> str:
    """Return the keys of a variant whose value is the first or last of several in the grid: a wider
    one might do better.
    """
    # A variant is named by its overrides, with spaces between them. Each word is kept once, in the
    # order of the grid, so that a key's values stand in the order in which they were listed.
    every_word = " ".join(variants).split()
    words = list(dict.fromkeys(every_word))
    keys = []
    for word in variant.split():
        key = word.split("=", 1)[0]
        values = [other for other in words if other.startswith(f"{key}=")]
        if len(values) > 1 and word in (values[0], values[-1]):
            keys.append(key)
    return ", ".join(keys) or "no"


def tuning_table(study: Study, results: Results) -> Table:
    """Make a table of every variant that was tried, those that have no run yet among them."""
    stage = next(stage for stage in study.stages if stage.chooses)
    groups = conditions(results["runs"], [stage.name])
    rows: list[list[Cell]] = []
    for method, variants in stage.variants.items():
        # A method that is new to the plan has no choice yet.
        choice = results["tuned"].get(method, {})
        for variant in variants:
            runs = groups.get(f"{method} {variant}".strip(), [])
            score = math.nan
            # A variant with a failed run is out of the choice, so it has no score here either.
            if runs and all(run["status"] == "finished" for run in runs):
                score = average([evaluated(run, stage.chooses, -1) for run in runs])
            mark = "yes" if choice.get("variant") == variant else ""
            rows.append([method, variant, len(runs), score, mark])
    columns = ("method", "variant", "seeds", stage.chooses, "chosen")
    note = "Mean over the tuning seeds; `-` where a run failed."
    return Table("tuning", "Tuning", note, columns, rows)


def status(study: Study, results: Results) -> str:
    """Tell how much of the study has been run, with what and where, as Markdown."""
    runs = results["runs"]
    if not runs and not results.get("simulation"):
        stages = ", ".join(f"{stage.name} {stage.num_runs}" for stage in study.stages)
        return (
            f"**Not run yet.** Planned: {study.num_runs} runs ({stages}), about {study.hours:.1f} "
            "hours on two cores."
        )
    lines = []
    if len(runs) < study.num_runs:
        lines.append("**Incomplete:** what follows is of the runs that are there.")
    failed = sum(run["status"] == "failed" for run in runs)
    lines.append(
        f"{len(runs)} of {study.num_runs} runs, {failed} of them failed; {_hours(runs)} hours of "
        "single runs."
    )
    for name, key in (("Commit", "commit"), ("Device", "device")):
        values = _counted([str(run[key])[:60] for run in runs])
        lines.append(f"{name}: {', '.join(values)}.")
    packages = [_versions(run) for run in runs]
    lines += [f"Packages: {value}." for value in _counted(packages)]
    # Two spaces before the line's end are Markdown's break of a line within a paragraph.
    return "  \n".join(lines)


def _counted(values: Sequence[str]) -> list[str]:
    """Return the different values, the most common one first, each with how often it occurs."""
    return [f"{value} ({count})" for value, count in Counter(values).most_common()]


def _versions(run: Record) -> str:
    versions = run["versions"] or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _hours(runs: Runs) -> str:
    """Return the hours of all runs together, as text; a failed run may not know its seconds."""
    seconds = sum(run["seconds"] or 0 for run in runs)
    return f"{seconds / 3600:.2f}"


def cells(study: str, table: Table) -> dict[str, str]:
    """Return each cell by `<study>/<table>/<row>/<column>`, so that a sentence can quote it."""
    texts = {}
    columns = table.columns[1:]
    for label, *values in table.rows:
        for column, value in zip(columns, values, strict=True):
            texts[f"{study}/{table.stem}/{label}/{column}"] = table.text(value)
    return texts

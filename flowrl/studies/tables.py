"""The tables of a study's README, from its record alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.report.tables import Cell, Table
from flowrl.statistics import difference, mean
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
from flowrl.studies.record import evaluated

BASE = "base model"


def tables(study: Study, results: Mapping[str, Any]) -> list[Table]:
    """What the record has to say: conditions, comparisons, and what was tuned."""
    runs = results["runs"]
    report = study.report
    groups = conditions(runs, report["stages"])
    found = [main_table(groups, report["metrics"])] if groups else []
    if pairs := [
        pair for pair in report.get("compare", ()) if all(name in groups for name in pair)
    ]:
        found.append(comparison_table(groups, pairs, report))
    if report.get("interactions"):
        found.append(interaction_table(groups, report))
    if groups and report.get("training"):
        found.append(course_table(groups, report["training"]))
    if results.get("tuned"):
        found += [chosen_table(results["tuned"], study), tuning_table(study, results)]
    return found


def main_table(groups: Mapping[str, Runs], metrics: Mapping[str, Any]) -> Table:
    """One row a condition: means of the evaluation after training; above those it holds for, the
    one before.
    """
    rows: list[list[Cell]] = []
    base: list[float] = []
    for label, runs in groups.items():
        before = [evaluated(runs[0], metric, 0) for metric in metrics.values()]
        if not base or not all(map(same_score, before, base)):
            rows.append([f"{BASE}, {runs[0]['variant']}" if base else BASE, "", *before, "", ""])
            base = before
        failed = sum(run["status"] == "failed" for run in runs)
        seeds = f"{len(runs)}" + (f", {failed} failed" if failed else "")
        images, seconds = (_average([run[key] for run in runs]) for key in ("images", "seconds"))
        values = (mean(list(by_seed(runs, metric).values())) for metric in metrics.values())
        rows.append([label, seeds, *values, f"{images:,.0f}", f"{seconds:.0f}"])
    note = (
        "Means over seeds with 95 % intervals, after training; the base model's values are from "
        "before. How to read "
        "them stands in `experiments/README.md`."
    )
    columns = ("condition", "seeds", *metrics, "images", "seconds")
    return Table("main", "After training", note, columns, rows)


def same_score(one: float, other: float) -> bool:
    """Whether two scores of one model are equal but for rounding, or both not measured."""
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3) or (
        math.isnan(one) and math.isnan(other)
    )


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def comparison_table(
    groups: Mapping[str, Runs], pairs: Sequence[Sequence[str]], report: Mapping[str, Any]
) -> Table:
    """One row a claim: a condition against another."""
    metrics = report["metrics"]
    rows: list[list[Cell]] = []
    for ours, theirs in pairs:
        own = groups[ours], groups[theirs]
        cells = {}
        for name in report["rewards"]:
            for kind, found in compare(*own, metrics[name]).items():
                if kind == "difference" or name in report.get("ratios", ()):
                    cells[f"{name}, {kind}"] = found.text(sign=kind == "difference")
        for name in report.get("differences", ()):
            scores = [by_seed(runs, metrics[name]) for runs in own]
            cells[f"{name}, difference"] = difference(*scores).text(sign=True)
        cells |= at_equal(own, report)
        rows.append([f"{ours} against {theirs}", *cells.values()])
    note = (
        "Over shared seeds as pairs, with 95 % intervals. Ratios of gains are those over the base "
        "model, `-` where a "
        "gain is not positive. At equal reward: in brackets how many pairs have one; a KL ratio "
        "below 1 says that the "
        "first of the two drifts less. How both are found stands in `experiments/README.md`."
    )
    return Table("comparisons", "Comparisons", note, ("comparison", *cells), rows)


def at_equal(own: tuple[Runs, Runs], report: Mapping[str, Any]) -> dict[str, str]:
    """What two conditions cost at equal reward: KL as a ratio, all else as a difference."""
    metrics = report["metrics"]
    cells = {}
    for given in report["equal"]:
        reward = metrics[given["at"]]
        name = given["of"]
        if name == report["kl"]:
            found = kl_ratio_at_equal(*own, reward, metrics[name])
            label = f"{name}, ratio at equal {given['at']}"
        else:
            found = difference_at_equal(*own, reward, metrics[name])
            label = f"{name}, difference at equal {given['at']}"
        cells[label] = f"{found.text(sign=name != report['kl'])} ({found.count})"
    return cells


def interaction_table(groups: Mapping[str, Runs], report: Mapping[str, Any]) -> Table:
    """One row a method: what a change does to ours minus what it does to that one."""
    rows: list[list[Cell]] = []
    names = [report["rewards"][0], *report.get("differences", ())]
    for given in report["interactions"]:
        for labels in sides(given):
            if all(label in groups for pair in labels for label in pair):
                ours, others = ([groups[label] for label in pair] for pair in labels)
                cells = (
                    interaction(ours, others, report["metrics"][name]).text(sign=True)
                    for name in names
                )
                rows.append([" against ".join(" for ".join(pair) for pair in labels), *cells])
    note = (
        "The change's effect on the first method minus its effect on the second, over shared seeds."
    )
    return Table(
        "interactions", "Does the change suit one better?", note, ("comparison", *names), rows
    )


def sides(given: Mapping[str, Any]) -> list[list[list[str]]]:
    """The conditions of each comparison of changes: (with, without) of ours, and of theirs.

    What ours is held `against` is a method with the same change, or one with another of its own.
    """
    others = [
        own if isinstance(own, dict) else {"of": own, "change": given["change"]}
        for own in given["against"]
    ]
    return [
        [[f"{side['of']} {variant}" for variant in side["change"]] for side in (given, other)]
        for other in others
    ]


def course_table(groups: Mapping[str, Runs], names: Mapping[str, str]) -> Table:
    """One row a condition: what training logged, in its first quarter, its middle half and its last
    quarter.
    """
    rows: list[list[Cell]] = []
    for label, runs in groups.items():
        cells: list[Cell] = []
        for metric in names.values():
            parts = [quarters(run["training"].get(metric, ())) for run in runs]
            cells += [mean([own[i] for own in parts]) for i in range(3)]
        rows.append([label, *cells])
    columns = [
        f"{name}, {part}" for name in names for part in ("first quarter", "middle", "last quarter")
    ]
    note = "Means over the iterations of each part, all steps and updates, and over seeds."
    return Table("course", "In training", note, ("condition", *columns), rows)


def quarters(values: Sequence[float]) -> tuple[float, float, float]:
    """Means of the first quarter, the middle half and the last quarter of a course; NaN of
    nothing.
    """
    quarter = len(values) // 4
    parts = (
        values[:quarter],
        values[quarter : len(values) - quarter],
        values[len(values) - quarter :],
    )
    return tuple(_average(own) if quarter else math.nan for own in parts)  # type: ignore[return-value]


def chosen_table(tuned: Mapping[str, Mapping[str, Any]], study: Study) -> Table:
    """What the tuning stage chose for each method."""
    stage = next(stage for stage in study.stages if stage.chooses)
    rows: list[list[Cell]] = [
        [method, own["variant"], own["score"], edges(own["variant"], list(stage.variants[method]))]
        for method, own in tuned.items()
    ]
    note = (
        f"By mean {stage.chooses} after training, over seeds {', '.join(map(str, stage.seeds))}, "
        "unused elsewhere."
    )
    columns = ("method", "chosen", "score", "at the edge of its grid")
    return Table("chosen", "Tuned", note, columns, rows)


def edges(variant: str, variants: Sequence[str]) -> str:
    """The keys of a variant whose value is the first or last of several in the grid: a wider one
    might do better.
    """
    found = []
    for word in variant.split():
        key = word.split("=", 1)[0]
        values = list(
            dict.fromkeys(
                own for other in variants for own in other.split() if own.startswith(f"{key}=")
            )
        )
        if len(values) > 1 and word in (values[0], values[-1]):
            found.append(key)
    return ", ".join(found) or "no"


def tuning_table(study: Study, results: Mapping[str, Any]) -> Table:
    """Every variant that was tried."""
    stage = next(stage for stage in study.stages if stage.chooses)
    groups = conditions(results["runs"], [stage.name])
    rows: list[list[Cell]] = []
    for method, variants in stage.variants.items():
        for variant in variants:
            runs = groups.get(f"{method} {variant}".strip(), [])
            scores = [evaluated(run, stage.chooses, -1) for run in runs]
            score = (
                _average(scores)
                if scores and all(run["status"] == "finished" for run in runs)
                else math.nan
            )
            is_chosen = (
                results["tuned"].get(method, {}).get("variant") == variant
            )  # a method may be new
            rows.append([method, variant, len(runs), score, "yes" if is_chosen else ""])
    columns = ("method", "variant", "seeds", stage.chooses, "chosen")
    return Table(
        "tuning", "Tuning", "Mean over the tuning seeds; `-` where a run failed.", columns, rows
    )


def status(study: Study, results: Mapping[str, Any]) -> str:
    """How much of the study has been run, with what and where."""
    runs = results["runs"]
    if not runs and not results.get("simulation"):
        parts = ", ".join(f"{stage.name} {stage.num_runs}" for stage in study.stages)
        return (
            f"**Not run yet.** Planned: {study.num_runs} runs ({parts}), about {study.hours:.1f} "
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
        counts = Counter(str(run[key])[:60] for run in runs)
        lines.append(
            f"{name}: {', '.join(f'{value} ({count})' for value, count in counts.most_common())}."
        )
    packages = Counter(
        ", ".join(f"{name} {own}" for name, own in (run["versions"] or {}).items()) for run in runs
    )
    lines += [f"Packages: {value} ({count})." for value, count in packages.most_common()]
    return "  \n".join(lines)


def _hours(runs: Runs) -> str:
    return f"{sum(run['seconds'] or 0 for run in runs) / 3600:.2f}"


def cells(study: str, table: Table) -> dict[str, str]:
    """Each cell by `<study>/<table>/<row>/<column>`, so that a sentence can quote it."""
    return {
        f"{study}/{table.stem}/{row[0]}/{column}": table.text(cell)
        for row in table.rows
        for column, cell in zip(table.columns[1:], row[1:], strict=True)
    }

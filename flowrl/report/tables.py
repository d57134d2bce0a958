"""The tables of a report, each as CSV and Markdown; its page shows them as well."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowrl.report.compare import Condition, differences, short
from flowrl.report.runs import Run
from flowrl.statistics import ROUNDING, Estimate, average, difference, interval_kinds, mean

Cell = str | int | float | Estimate


@dataclass(frozen=True)
class Table:
    """Rows under `columns`, one cell a column; `stem` names its file, without a suffix.

    An Estimate becomes three columns in CSV: mean, low, high. `has_signs` is for differences, whose
    means are then written with a plus or a minus.
    """

    stem: str
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    has_signs: bool = False

    def text(self, cell: Cell) -> str:
        """Return a cell for reading."""
        if isinstance(cell, Estimate):
            return cell.text(self.has_signs)
        if isinstance(cell, float) and math.isnan(cell):
            return "-"
        if isinstance(cell, float):
            return format(cell, ".4g")
        return str(cell)

    def csv(self) -> str:
        """Return the table with a header; numbers in full, nothing where there is none."""
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        heads: list[str] = []
        for i, name in enumerate(self.columns):
            heads.append(name)
            if any(isinstance(row[i], Estimate) for row in self.rows):
                heads += [f"{name} low", f"{name} high"]
        writer.writerow(heads)
        for row in self.rows:
            writer.writerow(_full(row))
        return file.getvalue()

    def markdown(self) -> str:
        """Return a heading, the note and a pipe table."""
        lines = [_pipe_row(self.columns), _pipe_row(["---"] * len(self.columns))]
        for row in self.rows:
            texts = [self.text(cell) for cell in row]
            lines.append(_pipe_row(texts))
        body = "\n".join(lines)
        return f"## {self.title}\n\n{self.note}\n\n{body}\n"


def _full(row: Sequence[Cell]) -> list[str | int | float]:
    """Return a row for CSV: numbers unrounded, an estimate with its bounds, nothing for NaN."""
    line: list[str | int | float] = []
    for cell in row:
        if isinstance(cell, Estimate):
            line += [_or_empty(cell.mean), _or_empty(cell.low), _or_empty(cell.high)]
        elif isinstance(cell, float):
            line.append(_or_empty(cell))
        else:
            line.append(cell)
    return line


def _or_empty(number: float) -> float | str:
    return "" if math.isnan(number) else number


def _pipe_row(words: Sequence[str]) -> str:
    """Write a row of a Markdown table, in which a pipe would end the cell."""
    escaped = [word.replace("|", "\\|") for word in words]
    return f"| {' | '.join(escaped)} |"


def run_table(runs: Sequence[Run], groups: Sequence[Condition], metrics: Sequence[str]) -> Table:
    """Make a table with one row a run: its last value of each metric, and what it cost.

    Every run belongs to one of `groups`.
    """
    # By identity, since runs hold lists and so have no hash.
    label_of = {id(run): group.label for group in groups for run in group.runs}
    rows: list[list[Cell]] = []
    for run in runs:
        num_iterations = int(run.rows[-1]["iteration"]) if run.rows else 0
        revision = str(run.summary.get("git_revision") or "-")
        rows.append(
            [
                run.label,
                label_of[id(run)],
                run.seed,
                run.status,
                num_iterations,
                *(run.final(metric) for metric in metrics),
                _summary_number(run, "seconds"),
                _summary_number(run, "images_per_second"),
                _summary_number(run, "peak_memory_gib"),
                revision[:10],
            ]
        )
    columns = (
        "run",
        "condition",
        "seed",
        "status",
        "iterations",
        *metrics,
        "seconds",
        "images per second",
        "peak GiB",
        "commit",
    )
    note = f"Values of the last evaluation.{_changed(runs)}"
    return Table(
        stem="runs",
        title="Runs",
        note=note,
        columns=columns,
        rows=rows,
    )


def _changed(runs: Sequence[Run]) -> str:
    """Say in a sentence which runs changed a key on the way; nothing where none did."""
    texts = []
    for run in runs:
        for change in run.changes:
            texts.append(f"{run.label}: {change} after iteration {change.iteration}")
    if not texts:
        return ""
    return (
        " Changed on the way, so that the numbers are not those of a run with either value "
        f"throughout: {'; '.join(texts)}."
    )


def _summary_number(run: Run, key: str) -> float:
    """Return a number of a run's summary; NaN for an unfinished run, or a summary without it."""
    value = run.summary.get(key)
    return float(value) if value is not None else math.nan


def mean_over_seeds(group: Condition, metric: str) -> Estimate:
    """Return the mean of a metric over a condition's finished runs, one value a seed."""
    values = group.by_seed(metric).values()
    return mean(list(values))


def ablation_table(groups: Sequence[Condition], metrics: Sequence[str]) -> Table:
    """Make a table with one row a condition: means over its finished runs, and their seeds."""
    rows: list[list[Cell]] = []
    counts: list[int] = []
    for group in groups:
        seeds = {run.seed for run in group.runs if run.status == "finished"}
        means = [mean_over_seeds(group, metric) for metric in metrics]
        counts += [estimate.count for estimate in means]
        rows.append([group.label, len(seeds), *means])
    intervals = interval_kinds(counts, "seeds")
    note = f"Means over seeds with {intervals}, from the last evaluation of finished runs."
    return Table(
        stem="ablation",
        title="Ablation",
        note=note,
        columns=("condition", "seeds", *metrics),
        rows=rows,
    )


def difference_table(
    groups: Sequence[Condition], baseline: Condition, metrics: Sequence[str]
) -> Table:
    """Make a table of each condition minus the baseline, which is one of `groups`, over one metric
    or more.
    """
    rows: list[list[Cell]] = []
    for group in groups:
        if group is baseline:
            continue
        gaps = []
        for metric in metrics:
            gaps.append(_gap(group.by_seed(metric), baseline.by_seed(metric)))
        # The first metric is the one that is compared first, and speaks for the row.
        comparison = "paired" if gaps[0].is_paired else "unpaired"
        rows.append([group.label, gaps[0].count, comparison, *gaps])
    note = (
        f"Difference to {baseline.label}, over shared seeds as pairs where there are two or more."
    )
    return Table(
        stem="differences",
        title="Against the baseline",
        note=note,
        columns=("condition", "seeds", "comparison", *metrics),
        rows=rows,
        has_signs=True,
    )


def _gap(values: Mapping[str, float], baseline: Mapping[str, float]) -> Estimate:
    """Return the difference between two conditions' values by seed."""
    compared = [*values.values(), *baseline.values()]
    return _without_rounding(difference(values, baseline), compared)


def _without_rounding(gap: Estimate, values: Sequence[float]) -> Estimate:
    """Return a difference as 0 where it and its interval are no more than what float32 rounds of
    the values that it compares.
    """
    ends = (gap.mean, gap.low, gap.high)
    sizes = [abs(end) for end in ends if not math.isnan(end)]
    if not sizes or max(sizes) > ROUNDING * max(map(abs, values)):
        return gap
    # What has no interval does not get one here.
    end = math.nan if math.isnan(gap.low) else 0.0
    return dataclasses.replace(gap, mean=0.0, low=end, high=end)


def effect_table(groups: Sequence[Condition], metrics: Sequence[str]) -> Table:
    """Make a table of what changing one key does with all others held fixed: differences averaged
    within a seed, then over seeds.

    Of each key the other values are compared with the first one that occurs. A key that never
    changes alone has no row.
    """
    rows: list[list[Cell]] = []
    for key in groups[0].values:
        # The different values of the key, in the order of the conditions.
        first, *others = dict.fromkeys(group.values[key] for group in groups)
        for level in others:
            pairs = _pairs(groups, key, level, first)
            if not pairs:
                continue
            effects = [_effect(pairs, metric) for metric in metrics]
            change = f"{first} to {level}"
            rows.append([key, change, len(pairs), *effects])
    note = (
        "The change of one key, all others held fixed: paired differences, averaged within each "
        "seed."
    )
    return Table(
        stem="effects",
        title="Effects",
        note=note,
        columns=("key", "change", "pairs of conditions", *metrics),
        rows=rows,
        has_signs=True,
    )


def _pairs(
    groups: Sequence[Condition], key: str, level: str, first: str
) -> list[tuple[Condition, Condition]]:
    """Return the conditions with `level` under `key`, each with the one that differs from it by
    having `first` there.
    """
    pairs = []
    for group in groups:
        if group.values[key] != level:
            continue
        wanted = {**group.values, key: first}
        pairs += [(group, other) for other in groups if other.values == wanted]
    return pairs


def _effect(pairs: Sequence[tuple[Condition, Condition]], metric: str) -> Estimate:
    """Estimate the change of a metric from the second conditions of the pairs to the first ones.

    One value a seed enters the interval, however many pairs there are: the pairs of a seed are not
    independent.
    """
    gaps: dict[str, list[float]] = {}
    compared: list[float] = []
    for changed, plain in pairs:
        values = changed.by_seed(metric)
        baseline = plain.by_seed(metric)
        for seed in values.keys() & baseline.keys():
            gap = values[seed] - baseline[seed]
            gaps.setdefault(seed, []).append(gap)
            compared += [values[seed], baseline[seed]]
    # Only seeds that every pair has: the others would mix the effect with which pairs they miss.
    # Sorted, since the resampling of a mean depends on the order of its values, and a set has none.
    complete = []
    for _, gaps_of_seed in sorted(gaps.items()):
        if len(gaps_of_seed) == len(pairs):
            complete.append(average(gaps_of_seed))
    return _without_rounding(mean(complete), compared)


def frontier_table(groups: Sequence[Condition], kl: str, reward: str) -> Table:
    """Make a table of reward against distance to the reference; on the frontier, no other condition
    has as much for less.
    """
    costs = [mean_over_seeds(group, kl) for group in groups]
    gains = [mean_over_seeds(group, reward) for group in groups]
    points = [(cost.mean, gain.mean) for cost, gain in zip(costs, gains, strict=True)]
    optimal = frontier(points)
    rows: list[list[Cell]] = []
    for i, group in enumerate(groups):
        verdict = "yes" if i in optimal else "no"
        rows.append([group.label, costs[i], gains[i], verdict])
    note = (
        f"{reward} against {kl}: on the frontier, no other condition has as much reward at less KL."
    )
    return Table(
        stem="frontier",
        title="Reward against KL",
        note=note,
        columns=("condition", kl, reward, "on the frontier"),
        rows=rows,
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points (cost, gain) that no other beats in both, by rising cost;
    NaN is never among them.
    """
    best = -math.inf
    chosen = []
    usable = [i for i, point in enumerate(points) if not math.isnan(sum(point))]
    # By rising cost, and of equal cost the greatest gain first: the others cannot beat it.
    for i in sorted(usable, key=lambda i: (points[i][0], -points[i][1])):
        _, gain = points[i]
        if gain > best:
            best = gain
            chosen.append(i)
    return chosen


def config_table(runs: Sequence[Run]) -> Table:
    """Make a table of the keys that differ between runs; it counts the copies of each elsewhere in
    the configuration.
    """
    rows = []
    for names, values in differences(runs).items():
        num_copies = len(names) - 1
        copies = f" (+{num_copies} alike)" if num_copies else ""
        rows.append([names[0] + copies, *map(short, values)])
    labels = [run.label for run in runs]
    return Table(
        stem="config",
        title="Configuration differences",
        note="Keys that differ alike share a row.",
        columns=("key", *labels),
        rows=rows,
    )

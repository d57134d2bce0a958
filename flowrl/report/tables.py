"""The tables of a report, each as CSV and Markdown; its page shows them as well."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowrl.report.compare import Condition, differences, short
from flowrl.report.runs import Run
from flowrl.statistics import Estimate, difference, mean

Cell = str | int | float | Estimate


@dataclass(frozen=True)
class Table:
    """Rows under `columns`; `stem` names its file. An Estimate becomes three columns in CSV."""

    stem: str
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    has_signs: bool = False

    def text(self, cell: Cell) -> str:
        """A cell for reading."""
        if isinstance(cell, Estimate):
            return cell.text(self.has_signs)
        if isinstance(cell, float):
            return "-" if math.isnan(cell) else format(cell, ".4g")
        return str(cell)

    def csv(self) -> str:
        """With a header; numbers in full, nothing where there is none."""
        is_estimate = [
            any(isinstance(row[i], Estimate) for row in self.rows) for i in range(len(self.columns))
        ]
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        heads = zip(self.columns, is_estimate, strict=True)
        writer.writerow(
            itertools.chain(*([n, f"{n} low", f"{n} high"] if wide else [n] for n, wide in heads))
        )
        for row in self.rows:
            line: list[Cell] = []
            for cell in row:
                line += [cell.mean, cell.low, cell.high] if isinstance(cell, Estimate) else [cell]
            writer.writerow(
                "" if isinstance(cell, float) and math.isnan(cell) else cell for cell in line
            )
        return file.getvalue()

    def markdown(self) -> str:
        """A heading, the note and a pipe table."""
        lines = [
            self.columns,
            ["---"] * len(self.columns),
            *([self.text(cell) for cell in row] for row in self.rows),
        ]
        body = "\n".join(
            "| " + " | ".join(word.replace("|", "\\|") for word in line) + " |" for line in lines
        )
        return f"## {self.title}\n\n{self.note}\n\n{body}\n"


def run_table(runs: Sequence[Run], groups: Sequence[Condition], metrics: Sequence[str]) -> Table:
    """One row a run."""
    label = {id(run): group.label for group in groups for run in group.runs}
    rows: list[list[Cell]] = [
        [
            *(run.label, label[id(run)], run.seed, run.status),
            int(run.rows[-1]["iteration"]) if run.rows else 0,
            *(run.final(metric) for metric in metrics),
            *(
                _number(run, "seconds"),
                _number(run, "images_per_second"),
                _number(run, "peak_memory_gib"),
            ),
            str(run.summary.get("git_revision") or "-")[:10],
        ]
        for run in runs
    ]
    speed = ("seconds", "images per second", "peak GiB", "commit")
    columns = ("run", "condition", "seed", "status", "iterations", *metrics, *speed)
    return Table("runs", "Runs", "Values of the last evaluation.", columns, rows)


def _number(run: Run, name: str) -> float:
    value = run.summary.get(name)
    return float(value) if value is not None else math.nan


def ablation_table(groups: Sequence[Condition], metrics: Sequence[str]) -> Table:
    """One row a condition: means over its finished runs."""
    rows: list[list[Cell]] = [
        [
            *(group.label, len({run.seed for run in group.runs if run.status == "finished"})),
            *(mean(list(group.by_seed(metric).values())) for metric in metrics),
        ]
        for group in groups
    ]
    note = (
        "Mean over seeds and its 95 % bootstrap interval, from the last evaluation of finished "
        "runs."
    )
    return Table("ablation", "Ablation", note, ("condition", "seeds", *metrics), rows)


def difference_table(
    groups: Sequence[Condition], baseline: Condition, metrics: Sequence[str]
) -> Table:
    """Each condition minus the baseline."""
    rows: list[list[Cell]] = []
    for group in groups:
        if group is not baseline:
            gaps = [
                difference(group.by_seed(metric), baseline.by_seed(metric)) for metric in metrics
            ]
            rows.append(
                [group.label, gaps[0].count, "paired" if gaps[0].is_paired else "unpaired", *gaps]
            )
    note = (
        f"Difference to {baseline.label}, over shared seeds as pairs where there are two or more."
    )
    columns = ("condition", "seeds", "comparison", *metrics)
    return Table("differences", "Against the baseline", note, columns, rows, has_signs=True)


def effect_table(groups: Sequence[Condition], metrics: Sequence[str]) -> Table:
    """What changing one key does with all others held fixed: differences averaged within a seed,
    then over seeds.
    """
    rows: list[list[Cell]] = []
    for key in groups[0].values:
        levels = list(dict.fromkeys(group.values[key] for group in groups))
        for level in levels[1:]:
            pairs = [
                (one, other)
                for one, other in itertools.product(groups, groups)
                if (one.values[key], other.values[key]) == (level, levels[0])
                and all(
                    one.values[name] == other.values[name] for name in one.values if name != key
                )
            ]
            if pairs:
                change = f"{levels[0]} to {level}"
                rows.append(
                    [key, change, len(pairs), *(_effect(pairs, metric) for metric in metrics)]
                )
    note = (
        "The change of one key, all others held fixed: paired differences, averaged within each "
        "seed."
    )
    return Table(
        "effects",
        "Effects",
        note,
        ("key", "change", "pairs of conditions", *metrics),
        rows,
        has_signs=True,
    )


def _effect(pairs: Sequence[tuple[Condition, Condition]], metric: str) -> Estimate:
    gaps: dict[str, list[float]] = {}
    for one, other in pairs:
        ours = one.by_seed(metric)
        theirs = other.by_seed(metric)
        for seed in ours.keys() & theirs.keys():
            gaps.setdefault(seed, []).append(ours[seed] - theirs[seed])
    # Only seeds that every pair has: the others would mix the effect with which pairs they miss.
    return mean([sum(own) / len(own) for _, own in sorted(gaps.items()) if len(own) == len(pairs)])


def frontier_table(groups: Sequence[Condition], kl: str, reward: str) -> Table:
    """Reward against distance to the reference; on the frontier, no other condition has as much for
    less.
    """
    points = [
        (group, mean(list(group.by_seed(kl).values())), mean(list(group.by_seed(reward).values())))
        for group in groups
    ]
    optimal = frontier([(x.mean, y.mean) for _, x, y in points])
    rows = [
        [group.label, x, y, "yes" if i in optimal else "no"]
        for i, (group, x, y) in enumerate(points)
    ]
    note = (
        f"{reward} against {kl}: on the frontier, no other condition has as much reward at less KL."
    )
    return Table(
        "frontier", "Reward against KL", note, ("condition", kl, reward, "on the frontier"), rows
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (cost, gain) that no other beats in both, by rising cost; NaN is never
    among them.
    """
    best = -math.inf
    chosen = []
    usable = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    for i in sorted(usable, key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            chosen.append(i)
    return chosen


def config_table(runs: Sequence[Run]) -> Table:
    """The keys that differ between runs; under each its copies elsewhere in the configuration."""
    rows = []
    for names, values in differences(runs).items():
        more = f" (+{len(names) - 1} alike)" if len(names) > 1 else ""
        rows.append([names[0] + more, *(short(value) for value in values)])
    note = "Keys that differ alike share a row."
    return Table(
        "config", "Configuration differences", note, ("key", *(run.label for run in runs)), rows
    )

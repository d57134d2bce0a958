"""The tables of what the study of the ratio's noise computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowrl.report.tables import Cell, Table
from flowrl.statistics import average, mean
from flowrl.studies.analysis import Runs, conditions
from flowrl.studies.record import STEP_KL


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Make the tables: at the threshold, by estimator, as published, by step, and measured in real
    runs.
    """
    simulation = results["simulation"]
    makers = (threshold_table, estimator_table, published_table, varied_table, step_table)
    made = [make(simulation) for make in makers]
    if groups := conditions(results["runs"], ["run"]):
        made.append(measured_table(groups, simulation["setting"]["run_dimensions"]))
    return made


def threshold_table(simulation: Mapping[str, Any]) -> Table:
    """Make a table of noise against signal where the KL is the threshold."""
    rows: list[list[Cell]] = [
        [f"{row['dimensions']:,}", row["noise"], row["signal"], row["noise"] / row["signal"]]
        for row in simulation["at_threshold"]
    ]
    rows[-1][0] = f"{rows[-1][0]}, the embedded model's own delta"
    note = (
        f"A step whose exact KL is delta = {simulation['setting']['delta']:g}, mean-reduced: "
        "sqrt(2 delta / D) against "
        "delta. Neither sampler nor sigma enters."
    )
    columns = ("dimensions", "noise", "signal", "noise over signal")
    return Table("threshold", "Noise and signal", note, columns, rows)


def estimator_table(simulation: Mapping[str, Any]) -> Table:
    """Make a table of how often each clip, at its best range, decides otherwise than the mask."""
    rows: list[list[Cell]] = []
    keys = ("contradicted", "false_alarms", "misses", "gross")
    for label, by_dimensions in simulation["estimators"].items():
        for row in by_dimensions:
            shares = [_percent(row[key]) for key in keys]
            drawn = _percent(row["sampled"]) if "sampled" in row else "-"
            name = f"{label}, D={row['dimensions']:,}"
            rows.append([name, row["clip"], *shares, drawn, _percent(row["carried"])])
    heads = (
        "contradicted",
        "false alarms",
        "misses",
        "gross",
        "contradicted, drawn",
        "with the first D's range",
    )
    note = (
        "Shares of the terms that move away from the old policy, in closed form, each clip at the "
        "range that "
        "contradicts the exact divergence least. Gross: the KL is a factor of four or more from "
        "delta."
    )
    return Table("estimators", "Contradicted decisions", note, ("clip", "best range", *heads), rows)


def published_table(simulation: Mapping[str, Any]) -> Table:
    """Make a table of how large a trust region the published clip ranges make."""
    setting = simulation["setting"]
    rows: list[list[Cell]] = [
        [
            row["label"],
            f"{row['clip']:.1e}",
            f"{row['delta']:.1e}",
            f"{row['delta'] / setting['delta']:.2g}",
            f"{row['noise'] / row['delta']:.2g}",
            _percent(row["contradicted"]),
            _percent(row["gross"]),
            f"{row['carried']:.1e}",
            _percent(row["here"]),
        ]
        for row in simulation["published"]
    ]
    there = setting["published_on"]["dimensions"]
    here = setting["carried_to"]["dimensions"]
    note = (
        "The threshold whose mask each published range contradicts least, on SD3.5's grid with "
        f"{there:,} dimensions, "
        "and the range that does so for the same threshold, per dimension, in the embedded model "
        f"with {here}."
    )
    columns = (
        "clip",
        "published range",
        "threshold",
        "over the authors' delta",
        "noise over signal",
        "contradicted",
        "gross",
        "range in the embedded model",
        "contradicted there",
    )
    return Table("published", "Published ranges", note, columns, rows)


def varied_table(simulation: Mapping[str, Any]) -> Table:
    """Make a table of the same under other assumptions about steps and velocities."""
    rows: list[list[Cell]] = [
        [f"{row['label']}, {row['name']}", _percent(row["contradicted"]), _percent(row["gross"])]
        for row in simulation["varied"]
    ]
    setting = simulation["setting"]
    note = (
        f"{setting['varied_dimensions']:,} dimensions where none are named, each clip at its best "
        "range. Velocities "
        "that grow: their mean square is so many times as large at the last trained step as at the "
        "first."
    )
    return Table("varied", "Other assumptions", note, ("clip", "contradicted", "gross"), rows)


def step_table(simulation: Mapping[str, Any]) -> Table:
    """Make a table of what one difference of velocities means at each step."""
    rows: list[list[Cell]] = []
    for label, steps in simulation["steps"].items():
        for number, row in enumerate(steps):
            relative = row["kl"] / simulation["setting"]["delta"]
            rows.append(
                [f"{label}, step {number}", row["sigma"], row["std"], relative, row["scale"]]
            )
    note = (
        "The median difference of velocities, the same at every step; scale is what the clip "
        "multiplies log r by."
    )
    return Table("steps", "By step", note, ("clip", "sigma", "std", "KL over delta", "scale"), rows)


def measured_table(groups: Mapping[str, Runs], dimensions: int) -> Table:
    """Make a table of real runs: the logged noise, and the noise that the logged KL of each step
    predicts.

    Of an iteration's two updates the first starts at the rollout's weights, where both are 0. With
    noise sqrt(2 kl / D) in the second, the mean of the two is sqrt(kl / D) of the mean kl. Noise is
    averaged over steps; so must that be.
    """
    rows: list[list[Cell]] = []
    for label, runs in groups.items():
        first, last, seen, predicted, alarms, misses = zip(
            *(measured(run, dimensions) for run in runs), strict=True
        )
        quotients = [noise / expected for noise, expected in zip(seen, predicted, strict=True)]
        values = (first, last, seen, predicted, quotients, alarms, misses)
        rows.append([label, len(runs), *map(mean, values)])
    steps = ("KL, first step", "KL, last step")
    columns = (
        *steps,
        "noise",
        "noise predicted",
        "measured over predicted",
        "false alarms",
        "misses",
    )
    note = (
        f"Means over iterations of short real runs, {dimensions} latent dimensions, and over "
        "seeds. False alarms and "
        "misses: shares of all terms, at trust.clip and trust.delta as they ship."
    )
    return Table("measured", "In training", note, ("condition", "seeds", *columns), rows)


def measured(run: Mapping[str, Any], dimensions: int) -> tuple[float, ...]:
    """Return the KL at the first and last trained step, noise logged and predicted, false alarms
    and misses: means over a run.
    """
    logged = run["training"]
    steps = [logged[name] for name in sorted(logged) if name.startswith(STEP_KL)]
    noise_of_steps = []
    for kls in steps:
        noise_of_steps.append(average([math.sqrt(kl / dimensions) for kl in kls]))
    names = ("log_ratio_noise", "clip_false_alarms", "clip_misses")
    seen, alarms, misses = (average(logged[f"trust/{name}"]) for name in names)
    predicted = average(noise_of_steps)
    return average(steps[0]), average(steps[-1]), seen, predicted, alarms, misses


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

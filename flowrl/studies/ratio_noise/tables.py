"""The tables of what the study of the ratio's noise computes."""

from __future__ import annotations

import math

from flowrl.report.tables import Cell, Table
from flowrl.statistics import average, mean
from flowrl.studies.analysis import Groups, conditions
from flowrl.studies.record import STEP_KL, Record, Results, Simulation


def tables(results: Results) -> list[Table]:
    """Make the tables: at the threshold, by estimator, as published, under other assumptions, by
    step, and, where the record holds runs, measured in these.
    """
    simulation = results["simulation"]
    makers = (threshold_table, estimator_table, published_table, varied_table, step_table)
    made = [make(simulation) for make in makers]
    groups = conditions(results["runs"], ["run"])
    if groups:
        dimensions = simulation["setting"]["run_dimensions"]
        made.append(measured_table(groups, dimensions))
    return made


def threshold_table(simulation: Simulation) -> Table:
    """Make a table of noise against signal where the KL is the threshold."""
    rows: list[list[Cell]] = []
    for row in simulation["at_threshold"]:
        noise = row["noise"]
        signal = row["signal"]
        rows.append([f"{row['dimensions']:,}", noise, signal, noise / signal])
    # The last row is the model that runs here, at another threshold than those above.
    rows[-1][0] = f"{rows[-1][0]}, the embedded model's own delta"
    delta = simulation["setting"]["delta"]
    note = (
        f"A step whose exact KL is delta = {delta:g}, mean-reduced: sqrt(2 delta / D) against "
        "delta. Neither sampler nor sigma enters."
    )
    columns = ("dimensions", "noise", "signal", "noise over signal")
    return Table("threshold", "Noise and signal", note, columns, rows)


def estimator_table(simulation: Simulation) -> Table:
    """Make a table of how often each clip, at its best range, decides otherwise than the mask."""
    rows: list[list[Cell]] = []
    keys = ("contradicted", "false_alarms", "misses", "gross")
    for label, by_dimensions in simulation["estimators"].items():
        for row in by_dimensions:
            shares = [_percent(row[key]) for key in keys]
            # Few sizes are drawn besides, and of a centred ratio none.
            drawn = _percent(row["sampled"]) if "sampled" in row else "-"
            carried = _percent(row["carried"])
            name = f"{label}, D={row['dimensions']:,}"
            rows.append([name, row["clip"], *shares, drawn, carried])
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
        "range that contradicts the exact divergence least. Gross: the KL is a factor of four or "
        "more from delta."
    )
    columns = ("clip", "best range", *heads)
    return Table("estimators", "Contradicted decisions", note, columns, rows)


def published_table(simulation: Simulation) -> Table:
    """Make a table of how large a trust region the published clip ranges make."""
    setting = simulation["setting"]
    rows: list[list[Cell]] = []
    for row in simulation["published"]:
        delta = row["delta"]
        over_authors = delta / setting["delta"]
        noise_over_signal = row["noise"] / delta
        cells: list[Cell] = [
            row["label"],
            f"{row['clip']:.1e}",
            f"{delta:.1e}",
            f"{over_authors:.2g}",
            f"{noise_over_signal:.2g}",
            _percent(row["contradicted"]),
            _percent(row["gross"]),
            f"{row['carried']:.1e}",
            _percent(row["here"]),
        ]
        rows.append(cells)
    there = setting["published_on"]["dimensions"]
    here = setting["carried_to"]["dimensions"]
    note = (
        "The threshold whose mask each published range contradicts least, on SD3.5's grid with "
        f"{there:,} dimensions, and the range that does so for the same threshold, per dimension, "
        f"in the embedded model with {here}."
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


def varied_table(simulation: Simulation) -> Table:
    """Make a table of the same under other assumptions about steps and velocities."""
    rows: list[list[Cell]] = []
    for row in simulation["varied"]:
        name = f"{row['label']}, {row['name']}"
        contradicted = _percent(row["contradicted"])
        gross = _percent(row["gross"])
        rows.append([name, contradicted, gross])
    dimensions = simulation["setting"]["varied_dimensions"]
    note = (
        f"{dimensions:,} dimensions where none are named, each clip at its best range. Velocities "
        "that grow: their mean square is so many times as large at the last trained step as at the "
        "first."
    )
    return Table("varied", "Other assumptions", note, ("clip", "contradicted", "gross"), rows)


def step_table(simulation: Simulation) -> Table:
    """Make a table of what one difference of velocities means at each step."""
    delta = simulation["setting"]["delta"]
    rows: list[list[Cell]] = []
    for label, steps in simulation["steps"].items():
        for number, row in enumerate(steps):
            name = f"{label}, step {number}"
            kl_over_delta = row["kl"] / delta
            rows.append([name, row["sigma"], row["std"], kl_over_delta, row["scale"]])
    note = (
        "The median difference of velocities, the same at every step; scale is what the clip "
        "multiplies log r by."
    )
    columns = ("clip", "sigma", "std", "KL over delta", "scale")
    return Table("steps", "By step", note, columns, rows)


def measured_table(groups: Groups, dimensions: int) -> Table:
    """Make a table of real runs: the logged noise, and the noise that the logged KL of each step
    predicts.

    Of an iteration's two updates the first starts at the rollout's weights, where both are 0. With
    noise sqrt(2 kl / D) in the second, the mean of the two is sqrt(kl / D) of the mean kl. Noise is
    averaged over steps; so must that be.
    """
    rows: list[list[Cell]] = []
    for label, runs in groups.items():
        # From six numbers a run to six lists over the runs.
        numbers = [measured(run, dimensions) for run in runs]
        first, last, seen, predicted, alarms, misses = zip(*numbers, strict=True)
        quotients = [noise / expected for noise, expected in zip(seen, predicted, strict=True)]
        values = (first, last, seen, predicted, quotients, alarms, misses)
        rows.append([label, len(runs), *map(mean, values)])
    columns = (
        "condition",
        "seeds",
        "KL, first step",
        "KL, last step",
        "noise",
        "noise predicted",
        "measured over predicted",
        "false alarms",
        "misses",
    )
    note = (
        f"Means over iterations of short real runs, {dimensions} latent dimensions, and over "
        "seeds. False alarms and misses: shares of all terms, at trust.clip and trust.delta as "
        "they ship."
    )
    return Table("measured", "In training", note, columns, rows)


def measured(run: Record, dimensions: int) -> tuple[float, ...]:
    """Return the KL at the first and last trained step, noise logged and predicted, false alarms
    and misses: means over a run.
    """
    logged = run["training"]
    # The names of the steps' metrics end in a number, and there are fewer than ten steps.
    steps = [logged[name] for name in sorted(logged) if name.startswith(STEP_KL)]
    noise_of_steps = []
    for kls in steps:
        noise_of_steps.append(average([math.sqrt(kl / dimensions) for kl in kls]))
    return (
        average(steps[0]),
        average(steps[-1]),
        average(logged["trust/log_ratio_noise"]),
        average(noise_of_steps),
        average(logged["trust/clip_false_alarms"]),
        average(logged["trust/clip_misses"]),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
